//! The numbers of nodes, and how many nodes are alive.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// A number that no other node of this process has. A node's is larger than those of its inputs, and than those of all nodes that had been
/// recorded before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(super) u64);

static ISSUED: AtomicU64 = AtomicU64::new(0);
/// How many nodes each thread has dropped: a thread's own count takes no atomic addition.
static THREADS: Mutex<Vec<Arc<AtomicU64>>> = Mutex::new(Vec::new());
/// The same of the threads that have ended.
static ENDED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static MINE: Mine = Mine::new();
}

/// A thread's count.
struct Mine(Arc<AtomicU64>);

impl Mine {
    fn new() -> Self {
        let count = Arc::new(AtomicU64::new(0));
        THREADS.lock().push(count.clone());
        Self(count)
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        let mut threads = THREADS.lock();
        threads.retain(|count| !Arc::ptr_eq(count, &self.0));
        ENDED.fetch_add(self.0.load(Ordering::Relaxed), Ordering::Release);
    }
}

impl NodeId {
    /// Of what is no node any more.
    pub(super) const NONE: Self = Self(0);

    /// From 1 on.
    #[inline]
    pub(super) fn next() -> Self {
        Self(ISSUED.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// A number of no node: larger than those of the nodes that were recorded before on this thread, smaller than those of the nodes
    /// that it records after.
    #[must_use]
    pub fn mark() -> Self {
        let id = Self::next();
        dropped();
        id
    }

    /// The number itself.
    #[inline]
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

/// Counts a node that is no more.
#[inline]
pub(super) fn dropped() {
    // only this thread writes it
    let counted = MINE.try_with(|Mine(count)| count.store(count.load(Ordering::Relaxed) + 1, Ordering::Release));
    if counted.is_err() {
        // the thread is ending, and has handed its count in
        ENDED.fetch_add(1, Ordering::Release);
    }
}

/// How many nodes of this process are alive, leaves included: what a leak shows up in.
#[must_use]
pub fn live_nodes() -> u64 {
    // held until the end: a thread that ends meanwhile would be counted in neither place, or in both
    let threads = THREADS.lock();
    let dropped =
        threads.iter().map(|count| count.load(Ordering::Acquire)).sum::<u64>() + ENDED.load(Ordering::Acquire);
    // whatever was dropped had been issued before
    ISSUED.load(Ordering::Relaxed).saturating_sub(dropped)
}
