//! How nodes go: without recursion, however long the chain above is.

use super::state::{State, Waiting};
use super::{id, Node};
use std::sync::Arc;

impl Node {
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

/// Drops a pending state without recursion: whoever holds the last reference to an input takes that input apart too.
pub(super) fn drop_iteratively(waiting: Option<Waiting>) {
    let Some(waiting) = waiting else { return };
    let mut stack = waiting.inputs;
    while let Some(mut node) = stack.pop() {
        // what is ours alone is taken apart where it lies; the count is looked at first, since `get_mut` is no plain load
        let alone = (Arc::strong_count(&node) == 1).then(|| Arc::get_mut(&mut node)).flatten();
        let waiting = match alone {
            Some(node) => node.take_waiting(),
            // `into_inner` gives the node to exactly one of the threads that drop it at the same time
            None => Arc::into_inner(node).and_then(|mut node| node.take_waiting()),
        };
        match waiting {
            // one behind another: nothing is moved piece by piece
            Some(waiting) if stack.is_empty() => stack = waiting.inputs,
            Some(waiting) => stack.extend(waiting.inputs),
            None => {}
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        id::dropped();
        drop_iteratively(self.take_waiting());
    }
}
