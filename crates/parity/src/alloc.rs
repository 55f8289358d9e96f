//! A counting allocator: bytes alive now, and the most since the last reset.
//!
//! A program that measures installs it with `#[global_allocator]`; without it every count is zero.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with every byte counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct CountingAlloc;

fn grown(by: usize) {
    let now = LIVE.fetch_add(by, Ordering::Relaxed) + by;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

fn shrunk(by: usize) {
    LIVE.fetch_sub(by, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator with the arguments it came with; counting touches two atomics only and
// allocates nothing.
unsafe impl GlobalAlloc for CountingAlloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the system allocator's.
        let at = unsafe { System.alloc(layout) };
        if !at.is_null() {
            LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
            grown(layout.size());
        }
        at
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let at = unsafe { System.alloc_zeroed(layout) };
        if !at.is_null() {
            LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
            grown(layout.size());
        }
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from this allocator, hence from the system's, with this layout.
        unsafe { System.dealloc(at, layout) };
        shrunk(layout.size());
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; `size` is the caller's promise.
        let new = unsafe { System.realloc(at, layout, size) };
        if !new.is_null() {
            LARGEST.fetch_max(size, Ordering::Relaxed);
            // both blocks may have been alive for a moment, as far as anyone outside can tell only the larger one was
            if size >= layout.size() {
                grown(size - layout.size());
            } else {
                shrunk(layout.size() - size);
            }
        }
        new
    }
}

/// Bytes alive.
#[must_use]
pub fn live_bytes() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// The most bytes alive at once since the last [`reset_peak`].
#[must_use]
pub fn peak_bytes() -> usize {
    PEAK.load(Ordering::Relaxed)
}

/// The largest single allocation since the last [`reset_peak`].
#[must_use]
pub fn largest_bytes() -> usize {
    LARGEST.load(Ordering::Relaxed)
}

/// Forgets the peak and the largest allocation: from now on the peak is what is alive.
pub fn reset_peak() {
    LARGEST.store(0, Ordering::Relaxed);
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// Whether the allocator is installed: a program always has something alive.
#[must_use]
pub fn is_counting() -> bool {
    live_bytes() > 0
}
