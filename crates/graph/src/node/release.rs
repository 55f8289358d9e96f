//! How nodes go: without recursion, however long the chain above is.

use super::state::{State, Waiting};
use super::{id, Node, NodeId, NodeRef};
use triomphe::UniqueArc;

impl Node {
    /// Gives up a handle. The last one's node is taken apart, and the next one is recorded in its memory.
    #[inline]
    pub fn release(handle: NodeRef) {
        if let Some(node) = last(handle) {
            drop_iteratively(take_apart(node));
        }
    }

    /// What the node waits for or has kept of it; the node is being dropped.
    fn take_waiting(&mut self) -> Option<Waiting> {
        match self.state.get_mut() {
            State::Given => None,
            State::Ready(_) | State::Lent => self.history.take().map(|waiting| *waiting),
            state @ State::Pending(_) => match std::mem::replace(state, State::Lent) {
                State::Pending(waiting) => Some(waiting),
                _ => None,
            },
        }
    }
}

/// The node itself, if the handle is the last one: of threads that give up the last ones at the same time one gets it.
#[inline]
fn last(handle: NodeRef) -> Option<UniqueArc<Node>> {
    // a handle that is alone is found so by a plain load
    match NodeRef::try_unique(handle) {
        Ok(node) => Some(node),
        Err(handle) => NodeRef::into_unique(handle),
    }
}

#[inline]
fn take_apart(mut node: UniqueArc<Node>) -> Option<Waiting> {
    let waiting = node.take_waiting();
    Node::reuse(node);
    waiting
}

/// Drops a pending state without recursion: whoever holds the last reference to an input takes that input apart too.
pub(super) fn drop_iteratively(waiting: Option<Waiting>) {
    let Some(waiting) = waiting else { return };
    let mut stack = waiting.inputs;
    while let Some(node) = stack.pop() {
        match last(node).and_then(take_apart) {
            // one behind another: nothing is moved piece by piece
            Some(waiting) if stack.is_empty() => stack = waiting.inputs,
            Some(waiting) => stack.extend(waiting.inputs),
            None => {}
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.id != NodeId::NONE {
            id::dropped();
            drop_iteratively(self.take_waiting());
        }
    }
}
