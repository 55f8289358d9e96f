//! How nodes go: without recursion, however long the chain above is.

use super::state::{State, Waiting};
use super::{id, Inputs, Node, NodeId, NodeRef};
use triomphe::UniqueArc;

impl Node {
    /// Gives up a handle. The last one's node is taken apart, and the next one is recorded in its memory.
    #[inline]
    pub fn release(handle: NodeRef) {
        release_above(Some(handle), Inputs::new());
    }

    /// Moves what the node waits for, or has kept of that, to `next` and `stack`; the node is being dropped.
    #[inline]
    fn give_up_inputs(&mut self, next: &mut Option<NodeRef>, stack: &mut Inputs) {
        let history = self.history.get_mut().map(|waiting| &mut **waiting);
        let mut waiting = match self.state.get_mut() {
            State::Pending(waiting) => Some(waiting),
            State::Given | State::Ready(_) | State::Lent => history,
        };
        // one by one: most nodes have one or two, and what is moved as a whole is moved twice
        while let Some(input) = waiting.as_mut().and_then(|waiting| waiting.inputs.pop()) {
            stack.extend(next.replace(input));
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

/// Drops what a node has waited for without recursion: whoever holds the last reference to an input takes that input apart too.
pub(super) fn drop_iteratively(waiting: Option<Waiting>) {
    if let Some(Waiting { inputs, .. }) = waiting {
        release_above(None, inputs);
    }
}

fn release_above(mut next: Option<NodeRef>, mut stack: Inputs) {
    while let Some(handle) = next.take().or_else(|| stack.pop()) {
        if let Some(mut node) = last(handle) {
            node.give_up_inputs(&mut next, &mut stack);
            Node::reuse(node);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.id != NodeId::NONE {
            id::dropped();
            let (mut next, mut stack) = (None, Inputs::new());
            self.give_up_inputs(&mut next, &mut stack);
            release_above(next, stack);
        }
    }
}
