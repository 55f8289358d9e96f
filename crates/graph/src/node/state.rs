//! How a node stands: a leaf with its value, pending, ready, or lent to a running plan; and how it becomes the next.

use super::release::drop_iteratively;
use super::{EngineValue, Inputs, Node, NodeRef, Value};
use crate::custom::CustomOp;
use candle_core::Tensor;
use parking_lot::MutexGuard;
use std::sync::Arc;

#[derive(Debug)]
pub(super) enum State {
    /// The value is the node's [`Origin`](super::Origin).
    Given,
    Pending(Waiting),
    Ready(Value),
    /// The value was given to a running plan, which writes it in place; the plan gives it back if it fails.
    Lent,
}

/// What a pending node holds and a ready one has dropped.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) inputs: Inputs,
    pub(super) custom: Option<CustomOp>,
}

impl Node {
    /// Makes a pending node ready: the first to publish wins. Returns whether `value` was taken.
    ///
    /// The inputs are dropped here, outside the lock, but for those of a traced node.
    pub fn publish(&self, value: Value) -> bool {
        let state = self.state.lock();
        let pending = matches!(*state, State::Pending(_));
        if pending {
            self.fulfil(state, value);
        }
        pending
    }

    /// Makes a pending node ready with the tensor that `f` computes from its inputs, and returns the tensor. Meanwhile the node is
    /// locked, and whoever asks for its value or its inputs waits: for what is quick. `f` must not ask this node for what the lock guards,
    /// and of others only those above: locks are taken from a node to its inputs, then their storages. `None` if it is not pending, or
    /// `f` says so.
    ///
    /// # Errors
    /// What `f` returns; the node is pending still.
    pub fn compute<E>(
        &self,
        f: impl FnOnce(&[NodeRef]) -> Option<std::result::Result<Tensor, E>>,
    ) -> Option<std::result::Result<Tensor, E>> {
        let state = self.state.lock();
        let State::Pending(Waiting { inputs, .. }) = &*state else { return None };
        let computed = f(inputs)?;
        if let Ok(tensor) = &computed {
            self.fulfil(state, Value::Tensor(tensor.clone()));
        }
        Some(computed)
    }

    /// A pending node becomes ready, then the lock is given up.
    fn fulfil(&self, mut state: MutexGuard<'_, State>, value: Value) {
        let old = match std::mem::replace(&mut *state, State::Ready(value)) {
            // under the lock: whoever sees the value sees the history
            State::Pending(waiting) if self.traced && !self.is_variable() => {
                // it is empty, since nothing becomes ready twice
                self.history.set(Box::new(waiting)).err().map(|waiting| *waiting)
            }
            State::Pending(waiting) => Some(waiting),
            State::Given | State::Ready(_) | State::Lent => None,
        };
        drop(state);
        self.pending.set(0, 0);
        drop_iteratively(old);
    }

    /// Takes an engine value out of a ready node for an in-place update. [`Node::give_back`] returns it.
    #[must_use]
    pub fn lend(&self) -> Option<Arc<dyn EngineValue>> {
        let mut state = self.state.lock();
        if !matches!(*state, State::Ready(Value::Engine(_))) {
            return None;
        }
        match std::mem::replace(&mut *state, State::Lent) {
            State::Ready(Value::Engine(value)) => Some(value),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Returns a value taken by [`Node::lend`].
    pub fn give_back(&self, value: Arc<dyn EngineValue>) {
        let mut state = self.state.lock();
        if matches!(*state, State::Lent) {
            *state = State::Ready(Value::Engine(value));
        }
    }

    /// Makes a node whose value was taken by [`Node::lend`] ready again with `value`.
    pub fn settle(&self, value: Value) {
        let mut state = self.state.lock();
        if matches!(*state, State::Lent) {
            *state = State::Ready(value);
        }
    }

    /// Gives a ready node the same value in another form. Returns whether it was ready and no leaf that keeps its value.
    pub fn replace(&self, value: Value) -> bool {
        let mut state = self.state.lock();
        let ready = matches!(*state, State::Ready(_));
        if ready {
            // the old value is dropped behind the lock: its tape may hold other nodes
            let old = std::mem::replace(&mut *state, State::Ready(value));
            drop(state);
            drop(old);
        }
        ready
    }

    /// Whether the value is lent to a running plan.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        matches!(*self.state.lock(), State::Lent)
    }
}
