//! One pool of buffers for the process, with a cap.
//!
//! A request is served by the smallest cached buffer that is large enough and wastes at most a quarter; a returned
//! buffer that would lift the cache over the cap is freed. A plan asks for pieces of the sizes that it was planned with, and gets
//! exactly those. While plans run the pool holds no more than it held plus what they need: before it asks the system it gives back what
//! nobody uses.

use super::huge::populate;
use super::Data;
use candle_core::DType;
use candle_lazy_ops::kernels::spoil;
use parking_lot::Mutex;
use std::collections::BTreeMap;

/// What the pool holds, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// In use by values and running plans.
    pub active: u64,
    /// The most that was in use at once since the process began or [`MemoryStats::peak`] was last reset by [`trim`].
    pub peak: u64,
    /// Kept for reuse.
    pub cached: u64,
    /// The most that may be kept for reuse.
    pub cap: u64,
}

#[derive(Default)]
struct Pool {
    free: BTreeMap<(u8, usize), Vec<Data>>,
    active: u64,
    peak: u64,
    cached: u64,
    cap: Option<u64>,
    /// How many plans run.
    runs: u64,
    /// How much they may hold.
    level: u64,
}

static POOL: Mutex<Pool> =
    Mutex::new(Pool { free: BTreeMap::new(), active: 0, peak: 0, cached: 0, cap: None, runs: 0, level: 0 });

/// A plan that runs.
#[derive(Debug)]
pub(crate) struct Running(());

/// Lets the pool know that a plan begins to run that needs so many bytes.
pub(crate) fn running(needs: u64) -> Running {
    let mut pool = POOL.lock();
    pool.runs += 1;
    pool.level = pool.level.max((pool.active + pool.cached).saturating_add(needs));
    Running(())
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut pool = POOL.lock();
        pool.runs = pool.runs.saturating_sub(1);
        if pool.runs == 0 {
            pool.level = 0;
        }
    }
}

/// Where the amount of memory cannot be read.
const DEFAULT_CAP: u64 = 2 << 30;

impl Pool {
    fn cap(&mut self) -> u64 {
        *self.cap.get_or_insert_with(|| total_memory().map_or(DEFAULT_CAP, |total| total / 4))
    }

    /// Takes buffers that nobody uses, from the largest of a dtype on, until `bytes` more would be within what the running plans may hold.
    fn make_room(&mut self, bytes: u64) -> Vec<Data> {
        let mut freed = Vec::new();
        while self.runs > 0 && self.cached > 0 && self.active + self.cached + bytes > self.level {
            let Some(mut largest) = self.free.last_entry() else {
                break;
            };
            if let Some(data) = largest.get_mut().pop() {
                self.cached -= data.bytes() as u64;
                freed.push(data);
            }
            if largest.get().is_empty() {
                largest.remove();
            }
        }
        freed
    }
}

/// The memory of the machine in bytes, where `/proc/meminfo` says it.
fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

fn class(dtype: DType) -> Option<u8> {
    candle_lazy_graph::infer::DTYPES.iter().position(|d| *d == dtype).map(|i| i as u8)
}

/// Memory for `len` elements: of exactly `piece`, if that is asked for.
pub(super) fn take(dtype: DType, len: usize, piece: Option<usize>) -> Option<Data> {
    let class = class(dtype)?;
    let size = piece.unwrap_or(len);
    let cached = {
        let mut pool = POOL.lock();
        let (least, most) = piece.map_or((len, len + len / 4), |piece| (piece, piece));
        let found = pool.free.range((class, least)..=(class, most)).next().map(|(key, _)| *key);
        let data = found.and_then(|key| {
            let list = pool.free.get_mut(&key)?;
            let data = list.pop();
            if list.is_empty() {
                pool.free.remove(&key);
            }
            data
        });
        if let Some(data) = &data {
            let bytes = data.bytes() as u64;
            pool.cached -= bytes;
            pool.active += bytes;
            pool.peak = pool.peak.max(pool.active);
        }
        data.ok_or_else(|| pool.make_room(size.saturating_mul(dtype.size_in_bytes()) as u64))
    };
    // outside the lock: the system may take its time
    match cached {
        Ok(mut data) => {
            spoil(&mut data.slice_mut(len));
            return Some(data);
        }
        Err(unused) => drop(unused),
    }
    let mut data = Data::fresh(dtype, size)?;
    populate(&mut data);
    let mut pool = POOL.lock();
    pool.active += data.bytes() as u64;
    pool.peak = pool.peak.max(pool.active);
    Some(data)
}

pub(super) fn put(data: Data) {
    let bytes = data.bytes() as u64;
    let Some(class) = class(data.dtype()) else {
        return;
    };
    let mut pool = POOL.lock();
    pool.active = pool.active.saturating_sub(bytes);
    if bytes > 0 && pool.cached + bytes <= pool.cap() {
        pool.cached += bytes;
        pool.free.entry((class, data.len())).or_default().push(data);
    }
}

/// The memory leaves the pool for good.
pub(super) fn forget(data: &Data) {
    let mut pool = POOL.lock();
    pool.active = pool.active.saturating_sub(data.bytes() as u64);
}

/// What the pool holds now.
#[must_use]
pub fn memory_stats() -> MemoryStats {
    let mut pool = POOL.lock();
    MemoryStats { active: pool.active, peak: pool.peak, cached: pool.cached, cap: pool.cap() }
}

/// Sets the most bytes that may be kept for reuse; what is above is freed now. The default is a quarter of the memory.
pub fn set_pool_cap(bytes: u64) {
    POOL.lock().cap = Some(bytes);
    shrink_to(bytes);
}

/// Frees everything that is kept for reuse and forgets the peak.
pub fn trim() {
    shrink_to(0);
    let mut pool = POOL.lock();
    pool.peak = pool.active;
}

fn shrink_to(bytes: u64) {
    let mut freed = Vec::new();
    let mut pool = POOL.lock();
    while pool.cached > bytes {
        let Some((key, _)) = pool.free.last_key_value() else {
            break;
        };
        let key = *key;
        if let Some(list) = pool.free.remove(&key) {
            pool.cached -= list.iter().map(|d| d.bytes() as u64).sum::<u64>();
            freed.extend(list);
        }
    }
    drop(pool);
    // unmapping takes time: outside the lock
    drop(freed);
}

#[cfg(test)]
mod tests {
    use super::super::Buffer;
    use super::*;

    #[test]
    fn freed_memory_is_found_again_and_never_wastes_more_than_a_quarter() {
        // a size that no other test uses
        let len = if cfg!(miri) { 123_457 } else { 1_234_567 };
        drop(Buffer::take(DType::F64, len).unwrap());
        let same = Buffer::take(DType::F64, len - 1000).unwrap();
        assert_eq!(same.bytes(), len * 8);
        assert_eq!(same.len(), len - 1000);
        drop(same);
        let smaller = Buffer::take(DType::F64, len / 2).unwrap();
        assert_eq!(smaller.bytes(), len / 2 * 8);
    }

    #[test]
    fn the_machine_says_how_much_memory_it_has() {
        if cfg!(target_os = "linux") {
            assert!(total_memory().unwrap() > 1 << 20);
        }
        assert!(memory_stats().cap > 0);
    }
}
