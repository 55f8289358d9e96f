//! How much pending work stands at and above a node, estimated when it is recorded.

use std::sync::atomic::{AtomicU64, Ordering};

/// What the process has recorded so far.
static NODES: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// Two upper estimates, of which the smaller one counts, since each is far off where the other is near: the sum over the inputs, which
/// counts shared parts again and again, and all that the process has recorded since the oldest pending node above, which counts
/// what is not above. An exact count replaces the first.
#[derive(Debug)]
pub(super) struct Pending {
    nodes: AtomicU64,
    bytes: AtomicU64,
    /// What was recorded before the oldest pending node above, and up to this one.
    since: (u64, u64),
    until: (u64, u64),
}

impl Pending {
    /// Of a node that is ready.
    pub(super) fn none() -> Self {
        Self { nodes: AtomicU64::new(0), bytes: AtomicU64::new(0), since: (0, 0), until: (0, 0) }
    }

    /// Of a node that is being recorded, of so many bytes, above which stand `inputs`.
    pub(super) fn above<'a>(inputs: impl Iterator<Item = &'a Self>, own: u64) -> Self {
        let before = (NODES.fetch_add(1, Ordering::Relaxed), BYTES.fetch_add(own, Ordering::Relaxed));
        let (mut nodes, mut bytes, mut since) = (1u64, own, before);
        for input in inputs {
            let (n, b) = input.sums();
            if n > 0 {
                nodes = nodes.saturating_add(n);
                bytes = bytes.saturating_add(b);
                since = (since.0.min(input.since.0), since.1.min(input.since.1));
            }
        }
        let until = (before.0.wrapping_add(1), before.1.wrapping_add(own));
        Self { nodes: AtomicU64::new(nodes), bytes: AtomicU64::new(bytes), since, until }
    }

    fn sums(&self) -> (u64, u64) {
        (self.nodes.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    /// Nodes and bytes.
    pub(super) fn estimate(&self) -> (u64, u64) {
        let (nodes, bytes) = self.sums();
        (nodes.min(self.until.0.wrapping_sub(self.since.0)), bytes.min(self.until.1.wrapping_sub(self.since.1)))
    }

    /// Replaces the sums: by an exact count, or by nothing where the node has become ready.
    pub(super) fn set(&self, nodes: u64, bytes: u64) {
        self.nodes.store(nodes, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }
}
