//! How much pending work stands at and above a node, estimated when it is recorded.

use super::NodeId;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bytes that the process has recorded so far, but for those of small nodes, for which an atomic operation would be much.
static BYTES: AtomicU64 = AtomicU64::new(0);
/// A node of no more bytes is small: it counts as one of so many where nodes are not looked at one by one.
const SMALL: u64 = 16384;

/// Two upper estimates, of which the smaller one counts, since each is far off where the other is near: the sum over the inputs, which
/// counts shared parts again and again, and all that the process has recorded since the oldest pending node above, which counts
/// what is not above, leaves among it. An exact count replaces the first.
#[derive(Debug)]
pub(super) struct Pending {
    nodes: AtomicU64,
    bytes: AtomicU64,
    /// The number of the oldest pending node above, and the bytes that were recorded before it.
    since: (u64, u64),
    /// This node's number, and the bytes up to it.
    until: (u64, u64),
}

impl Pending {
    /// Of a node that is ready.
    #[inline]
    pub(super) fn none() -> Self {
        Self { nodes: AtomicU64::new(0), bytes: AtomicU64::new(0), since: (0, 0), until: (0, 0) }
    }

    /// Of a node that is being recorded, of so many bytes, above which stand `inputs`.
    pub(super) fn above<'a>(id: NodeId, inputs: impl Iterator<Item = &'a Self>, own: u64) -> Self {
        let (before, after) = if own <= SMALL {
            let bytes = BYTES.load(Ordering::Relaxed);
            (bytes, bytes)
        } else {
            let bytes = BYTES.fetch_add(own, Ordering::Relaxed);
            (bytes, bytes.wrapping_add(own))
        };
        let (mut nodes, mut bytes, mut since) = (1u64, own, (id.0, before));
        for input in inputs {
            let (n, b) = input.sums();
            if n > 0 {
                nodes = nodes.saturating_add(n);
                bytes = bytes.saturating_add(b);
                since = (since.0.min(input.since.0), since.1.min(input.since.1));
            }
        }
        Self { nodes: AtomicU64::new(nodes), bytes: AtomicU64::new(bytes), since, until: (id.0, after) }
    }

    #[inline]
    fn sums(&self) -> (u64, u64) {
        (self.nodes.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    /// Nodes and bytes.
    #[inline]
    pub(super) fn estimate(&self) -> (u64, u64) {
        let (nodes, bytes) = self.sums();
        let (since, until) = (self.since, self.until);
        let all = (until.0 + 1).wrapping_sub(since.0);
        (nodes.min(all), bytes.min(until.1.wrapping_sub(since.1).saturating_add(all.saturating_mul(SMALL))))
    }

    /// Replaces the sums: by an exact count, or by nothing where the node has become ready.
    #[inline]
    pub(super) fn set(&self, nodes: u64, bytes: u64) {
        self.nodes.store(nodes, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }
}
