//! Tensors on huge pages that are each too small for one.
//!
//! A model is some hundred tensors of a megabyte or three. An allocator puts them side by side, so that most pages of 2 MiB around them hold nothing
//! else; but it asks for its memory piece by piece, and what is touched piece by piece lies on small pages. Once all of them are there, the
//! system can copy what lies on small pages to a huge one (`MADV_COLLAPSE`, since Linux 6.1): each step of a decoder reads all
//! weights once, and finds its way through a five-hundredth of the page tables.
#![allow(unsafe_code)] // a system call on memory that is in use, whose content it leaves

use super::huge::HUGE_PAGE as PAGE;
use candle_core::{Storage, Tensor};
use candle_lazy_ops::storage::cpu_slice;
use parking_lot::Mutex;
use std::ops::Range;

/// Tensors of fewer bytes together stay in the processor's caches, where pages matter little.
const LEAST: usize = 16 << 20;
/// How long the system takes for a page, about, in nanoseconds.
const PAGE_NS: usize = 1_000_000;
/// So many pages are asked for at once.
const AT_ONCE: usize = 8;

/// Notes where tensors lie, and moves them to huge pages together when it is dropped, where the system can.
///
/// Tensors on other devices and of fewer than 16 MiB together stay where they are, and so does what shares its page with other memory for the most
/// part. Their values do not change. It takes up to a millisecond for two MiB, shared among the team's threads.
#[derive(Debug, Default)]
pub struct HugePages(Mutex<Vec<Range<usize>>>);

impl HugePages {
    /// Notes where `tensor` lies.
    pub fn note(&self, tensor: &Tensor) {
        let (storage, _) = tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { return };
        if let Some(slice) = cpu_slice(storage) {
            self.0.lock().push(slice.addresses());
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        collapse(&pages(std::mem::take(self.0.get_mut())));
    }
}

/// The runs of huge pages that `ranges` fill at least half of each; none if the ranges are small.
fn pages(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    // memory that was given up and taken again was noted twice
    let mut end = 0;
    for range in &mut ranges {
        range.start = range.start.max(end);
        end = end.max(range.end);
    }
    ranges.retain(|range| range.start < range.end);
    if ranges.iter().map(ExactSizeIterator::len).sum::<usize>() < LEAST {
        return Vec::new();
    }
    // a page, and how much of it is filled
    let mut filled: Vec<(usize, usize)> = Vec::new();
    for range in ranges {
        for page in range.start / PAGE..range.end.div_ceil(PAGE) {
            let inside = range.end.min((page + 1) * PAGE) - range.start.max(page * PAGE);
            match filled.last_mut() {
                Some((last, bytes)) if *last == page => *bytes += inside,
                _ => filled.push((page, inside)),
            }
        }
    }
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (page, _) in filled.into_iter().filter(|(_, bytes)| 2 * bytes >= PAGE) {
        match runs.last_mut() {
            Some(run) if run.end == page * PAGE => run.end += PAGE,
            _ => runs.push(page * PAGE..(page + 1) * PAGE),
        }
    }
    runs
}

#[cfg(all(target_os = "linux", not(miri)))]
fn collapse(runs: &[Range<usize>]) {
    /// `linux/mman.h`
    const MADV_COLLAPSE: libc::c_int = 25;
    let bytes: usize = runs.iter().map(ExactSizeIterator::len).sum();
    if bytes == 0 {
        return;
    }
    let parts = runs.iter().flat_map(|run| {
        let end = run.end;
        run.clone().step_by(AT_ONCE * PAGE).map(move |from| from..end.min(from + AT_ONCE * PAGE))
    });
    let refused = std::sync::atomic::AtomicUsize::new(0);
    candle_lazy_ops::kernels::each(bytes / PAGE * PAGE_NS, parts.collect(), |part: Range<usize>| {
        // SAFETY: the call changes no content of any memory, whosever it is, and unmaps none: where nothing is mapped, or what is there cannot
        // be moved, it is refused. The addresses are not dereferenced here.
        let asked = |part: &Range<usize>| unsafe {
            libc::madvise(part.start as *mut libc::c_void, part.len(), MADV_COLLAPSE) == 0
        };
        if !asked(&part) {
            // page by page: what is moved already is moved at once
            let pages = part.step_by(PAGE).map(|from| from..from + PAGE);
            let left = pages.filter(|page| !asked(page)).count() * PAGE;
            refused.fetch_add(left, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let refused = refused.into_inner();
    tracing::debug!(bytes, refused, "tensors on huge pages");
}

/// Elsewhere pages are as the system makes them.
#[cfg(not(all(target_os = "linux", not(miri))))]
fn collapse(_: &[Range<usize>]) {}

/// How many bytes of this process lie on huge pages; `None` where the system does not say.
#[must_use]
pub fn on_huge_pages() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find(|line| line.starts_with("AnonHugePages:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pages_that_are_half_full_are_chosen_and_no_others(
            pieces in prop::collection::vec((0usize..3 << 20, 1usize..5 << 20), 8..20),
            first in 0usize..8 << 20,
            again in 0usize..8,
        ) {
            let mut at = first;
            let mut ranges = Vec::new();
            for (gap, len) in pieces {
                ranges.push(at + gap..at + gap + len);
                at += gap + len;
            }
            let total: usize = ranges.iter().map(ExactSizeIterator::len).sum();
            let full = |page: usize| -> usize {
                let inside = |r: &Range<usize>| r.end.min((page + 1) * PAGE).saturating_sub(r.start.max(page * PAGE));
                ranges.iter().map(inside).sum()
            };
            let want: Vec<usize> = (0..at.div_ceil(PAGE)).filter(|&p| total >= LEAST && 2 * full(p) >= PAGE).collect();
            // some were noted twice, or in part
            let mut mixed = ranges.clone();
            mixed.extend(ranges.iter().take(again).map(|r| r.start + r.len() / 3..r.end));
            mixed.reverse();
            let runs = pages(mixed);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "runs are joined");
            let got: Vec<usize> = runs.iter().flat_map(|run| run.start / PAGE..run.end / PAGE).collect();
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn tensors_hold_what_they_held() {
        let count = if cfg!(miri) { 1 } else { 24 };
        let pages = HugePages::default();
        let tensors: Vec<Tensor> = (0..count)
            .map(|i| {
                let numbers: Vec<f32> = (0..333_333).map(|j| (i * 1000 + j) as f32).collect();
                let tensor = Tensor::from_vec(numbers, 333_333, &Device::Cpu).unwrap();
                pages.note(&tensor);
                tensor
            })
            .collect();
        // one that is gone by then
        pages.note(&Tensor::zeros(10 << 20, DType::F32, &Device::Cpu).unwrap());
        drop(pages);
        for (i, tensor) in tensors.iter().enumerate() {
            let numbers = tensor.to_vec1::<f32>().unwrap();
            assert!(numbers.iter().enumerate().all(|(j, &x)| x == (i * 1000 + j) as f32), "{i}");
        }
    }
}
