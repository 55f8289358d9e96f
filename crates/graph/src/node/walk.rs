//! Through what is pending, each node once, without recursion.

use super::state::{State, Waiting};
use super::{Node, NodeId, NodeRef};
use crate::hash::FastMap;

/// The nodes that were met, and those of them whose inputs were not looked at yet.
struct Walk {
    seen: FastMap<NodeId, ()>,
    stack: Vec<NodeRef>,
}

impl Walk {
    fn new() -> Self {
        Self { seen: FastMap::default(), stack: Vec::new() }
    }

    /// Whether the node waits; its inputs are met later.
    fn enter(&mut self, node: &Node) -> bool {
        let State::Pending(Waiting { inputs, .. }) = &*node.state.lock() else { return false };
        // a node is marked when it is first met, so that shared inputs are neither cloned nor pushed twice
        let Self { seen, stack } = self;
        stack.extend(inputs.iter().filter(|n| seen.insert(n.id, ()).is_none()).cloned());
        true
    }
}

impl Node {
    /// Counts pending nodes and bytes exactly and stores the result as the new estimate.
    pub fn count_pending(&self) -> (u64, u64) {
        let (mut nodes, mut bytes) = (0, 0);
        let mut walk = Walk::new();
        let mut count = |walk: &mut Walk, node: &Self| {
            if walk.enter(node) {
                nodes += 1;
                bytes += (node.elem_count() * node.dtype.size_in_bytes()) as u64;
            }
        };
        count(&mut walk, self);
        while let Some(node) = walk.stack.pop() {
            count(&mut walk, &node);
        }
        self.pending.set(nodes, bytes);
        (nodes, bytes)
    }
}

/// Those of `roots`, and of what they wait for, whose numbers are wanted.
#[must_use]
pub fn find<'a>(
    roots: impl IntoIterator<Item = &'a NodeRef>,
    wanted: impl IntoIterator<Item = NodeId>,
) -> Vec<NodeRef> {
    let wanted: FastMap<NodeId, ()> = wanted.into_iter().map(|id| (id, ())).collect();
    let mut found = Vec::new();
    if wanted.is_empty() {
        return found;
    }
    let mut walk = Walk::new();
    for root in roots {
        if walk.seen.insert(root.id, ()).is_none() {
            walk.stack.push(root.clone());
        }
        while let Some(node) = walk.stack.pop() {
            walk.enter(&node);
            if wanted.contains_key(&node.id) {
                found.push(node);
            }
        }
    }
    found
}
