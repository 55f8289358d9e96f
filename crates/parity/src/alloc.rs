//! A counting allocator: bytes alive beyond those at the beginning of a count, and the most at once.
//!
//! A program that measures installs it with `#[global_allocator]` and holds a [`Count`] while it does. Nothing is counted at other times: the
//! counters are shared by all threads, and touching them with every allocation would weigh on what is timed.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering};

/// How many counts are going on.
static COUNTS: AtomicUsize = AtomicUsize::new(0);
/// Less than zero where what was alive before has been freed.
static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with every byte counted while there is a [`Count`].
#[derive(Debug, Clone, Copy, Default)]
pub struct CountingAlloc;

fn counts() -> bool {
    COUNTS.load(Ordering::Relaxed) > 0
}

/// Lengths of allocations are at most `isize::MAX`.
fn grown(by: usize) {
    let now = LIVE.fetch_add(by as isize, Ordering::Relaxed) + by as isize;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

fn shrunk(by: usize) {
    LIVE.fetch_sub(by as isize, Ordering::Relaxed);
}

fn allocated(size: usize) {
    if counts() {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        grown(size);
    }
}

// SAFETY: every call goes to the system's allocator with the arguments it came with; counting touches atomics only and
// allocates nothing.
unsafe impl GlobalAlloc for CountingAlloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the system allocator's.
        let at = unsafe { System.alloc(layout) };
        if !at.is_null() {
            allocated(layout.size());
        }
        at
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let at = unsafe { System.alloc_zeroed(layout) };
        if !at.is_null() {
            allocated(layout.size());
        }
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from this allocator, hence from the system's, with this layout.
        unsafe { System.dealloc(at, layout) };
        if counts() {
            shrunk(layout.size());
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; `size` is the caller's promise.
        let new = unsafe { System.realloc(at, layout, size) };
        if !new.is_null() && counts() {
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

/// Counts while it lives, of all threads, from when it was made or [reset](Count::reset): counts at the same time disturb each other.
#[derive(Debug)]
pub struct Count(());

impl Count {
    /// Begins.
    #[must_use]
    pub fn begin() -> Self {
        COUNTS.fetch_add(1, Ordering::Relaxed);
        let count = Self(());
        count.reset();
        count
    }

    /// From now on the peak and the largest allocation are of what follows, and what is alive is beyond what is alive now.
    pub fn reset(&self) {
        LIVE.store(0, Ordering::Relaxed);
        PEAK.store(0, Ordering::Relaxed);
        LARGEST.store(0, Ordering::Relaxed);
    }

    /// Bytes alive beyond those at the beginning; less than zero if more was freed than allocated.
    #[must_use]
    pub fn live_bytes(&self) -> isize {
        LIVE.load(Ordering::Relaxed)
    }

    /// The most bytes alive at once beyond those at the beginning.
    #[must_use]
    pub fn peak_bytes(&self) -> usize {
        usize::try_from(PEAK.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// The largest single allocation.
    #[must_use]
    pub fn largest_bytes(&self) -> usize {
        LARGEST.load(Ordering::Relaxed)
    }

    /// Whether the allocator is installed.
    #[must_use]
    pub fn is_counting(&self) -> bool {
        let before = self.live_bytes();
        let some = std::hint::black_box(Box::new(0u64));
        let counted = self.live_bytes() != before;
        drop(some);
        counted
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        COUNTS.fetch_sub(1, Ordering::Relaxed);
    }
}
