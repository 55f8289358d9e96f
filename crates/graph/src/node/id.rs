//! The numbers of nodes, and how many nodes are alive.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that no other node of this process has. A node's is larger than those of its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(super) u64);

static ISSUED: AtomicU64 = AtomicU64::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);

impl NodeId {
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
    DROPPED.fetch_add(1, Ordering::Release);
}

/// How many nodes of this process are alive, leaves included: what a leak shows up in.
#[must_use]
pub fn live_nodes() -> u64 {
    let dropped = DROPPED.load(Ordering::Acquire);
    // whatever was dropped had been issued before
    ISSUED.load(Ordering::Relaxed).saturating_sub(dropped)
}
