//! What the machine can do at best: bytes moved per second by footprint, floating-point operations per second.

use super::measure::median;
use candle_core::{DType, Device, Tensor};
use candle_lazy::exec::buffer::vec_with_huge_pages;
use candle_lazy_parity::{arithmetic, ask_for};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::Instant;

/// Below this many bytes one thread does the work: starting a second would take longer.
const PARALLEL: usize = 1 << 20;

/// The limits of this machine; bandwidths are measured when first asked for.
#[derive(Debug)]
pub(super) struct Machine {
    threads: usize,
    /// Operations per second in f32, all threads.
    pub(super) flops: f64,
    bandwidth: Mutex<BTreeMap<usize, f64>>,
}

impl Machine {
    pub(super) fn measure() -> candle_core::Result<Self> {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            threads,
            flops: arithmetic_peak(threads).max(matrix_peak()?),
            bandwidth: Mutex::new(BTreeMap::new()),
        })
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Bytes per second, read and written both counted, over a footprint of `bytes`: the fastest of copying one half to the other, as the
    /// platform does and with what comes a page later asked for ahead, and of reading all of it, on ordinary and on huge pages.
    pub(super) fn bandwidth(&self, bytes: usize) -> f64 {
        let bytes = bytes.max(1 << 12).next_power_of_two();
        // a panic elsewhere leaves the table whole
        let mut known = self.bandwidth.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *known.entry(bytes).or_insert_with(|| {
            let threads = if bytes < PARALLEL { 1 } else { self.threads };
            let ways: [fn(&mut [u64]) -> usize; 3] = [copy, copy_ahead, read];
            let rates = ways.into_iter().flat_map(|way| [false, true].map(|huge| moved(bytes, threads, huge, way)));
            rates.fold(0.0, f64::max)
        })
    }

    /// The least time in microseconds for `bytes` out of a footprint, and for `flops`.
    pub(super) fn limit_us(&self, bytes: usize, footprint: usize, flops: f64) -> f64 {
        (bytes as f64 / self.bandwidth(footprint)).max(flops / self.flops) * 1e6
    }
}

/// Moves a buffer once, and says how many bytes that were.
fn copy(buffer: &mut [u64]) -> usize {
    let (to, from) = buffer.split_at_mut(buffer.len() / 2);
    let n = to.len().min(from.len());
    to[..n].copy_from_slice(black_box(&from[..n]));
    black_box(to);
    2 * n * size_of::<u64>()
}

/// As [`copy`], line by line. A processor guesses what is read next, but not across a page.
fn copy_ahead(buffer: &mut [u64]) -> usize {
    const LINE: usize = 8;
    let (to, from) = buffer.split_at_mut(buffer.len() / 2);
    let (to, from) = (to.as_chunks_mut::<LINE>().0, black_box(&*from).as_chunks::<LINE>().0);
    let lines = to.len().min(from.len());
    for (to, from) in to.iter_mut().zip(from) {
        ask_for(from.as_ptr().wrapping_byte_add(4096).cast());
        *to = *from;
    }
    black_box(to);
    2 * lines * LINE * size_of::<u64>()
}

fn read(buffer: &mut [u64]) -> usize {
    // eight sums, so that no addition waits for the one before
    let mut sums = [0u64; 32];
    for chunk in black_box(&*buffer).chunks_exact(32) {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*x);
        }
    }
    black_box(sums);
    std::mem::size_of_val(buffer)
}

/// Bytes per second of `threads` threads that share a footprint, on huge pages where that is wanted and granted.
fn moved(bytes: usize, threads: usize, huge: bool, work: fn(&mut [u64]) -> usize) -> f64 {
    let mine = bytes / threads / size_of::<u64>();
    let one = || {
        let mut buffer = if huge { vec_with_huge_pages(mine) } else { Vec::with_capacity(mine) };
        buffer.resize(mine, 1u64);
        work(&mut buffer);
        let rounds = (1usize << 28).checked_div(bytes).unwrap_or(1).clamp(1, 1 << 14);
        let rates: Vec<f64> = (0..7)
            .map(|_| {
                let start = Instant::now();
                let total: usize = (0..rounds).map(|_| work(&mut buffer)).sum();
                total as f64 / start.elapsed().as_secs_f64()
            })
            .collect();
        median(&rates)
    };
    if threads == 1 {
        return one();
    }
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        all.into_iter().filter_map(|thread| thread.join().ok()).sum()
    })
}

/// Operations per second of all threads at once on numbers in registers, the best of several: cores that share their units count once.
fn arithmetic_peak(threads: usize) -> f64 {
    const ROUNDS: usize = 1 << 18;
    let start = Barrier::new(threads);
    let one = || {
        (0..12).map(|_| {
            start.wait();
            let begin = Instant::now();
            let done = arithmetic(ROUNDS);
            done as f64 / begin.elapsed().as_secs_f64()
        })
    };
    let rates: Vec<Vec<f64>> = thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(|| one().collect())).collect();
        all.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    (0..12).map(|i| rates.iter().filter_map(|rates| rates.get(i)).sum()).fold(0.0, f64::max)
}

/// Operations per second of Candle's product of two 1024² matrices, the best of several: for machines whose registers nobody has
/// written a loop for.
fn matrix_peak() -> candle_core::Result<f64> {
    let n = 1024;
    let a = Tensor::ones((n, n), DType::F32, &Device::Cpu)?;
    let mut best = f64::INFINITY;
    for _ in 0..12 {
        let start = Instant::now();
        black_box(a.matmul(&a)?);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n * n * n) as f64 / best)
}
