//! Binding: leaves into slots, and values that are given away for in-place updates.

use super::slots::SlotValue;
use super::Engine;
use crate::error::{Error, Result};
use crate::plan::{Plan, Slot};
use candle_lazy_graph::{Bindings, EngineValue, FastMap, NodeRef, Value};
use std::sync::Arc;

/// The values that a run took out of nodes in order to write them in place.
#[derive(Default)]
pub(super) struct Lent {
    /// Which leaves were taken.
    pub(super) leaves: Vec<bool>,
    loans: Vec<Loan>,
    /// The loan whose value a slot holds.
    of_slot: FastMap<Slot, usize>,
}

struct Loan {
    node: NodeRef,
    place: Place,
}

enum Place {
    /// The value is in this slot.
    Slot(Slot),
    /// The slot was freed; the value is kept until the run has succeeded.
    Kept(Engine),
    Gone,
}

impl Lent {
    fn lend(&mut self, node: NodeRef, slot: Slot) {
        self.of_slot.insert(slot, self.loans.len());
        self.loans.push(Loan { node, place: Place::Slot(slot) });
    }

    /// A slice assignment moved the value from one slot to another.
    pub(super) fn moved(&mut self, from: Slot, to: Slot) {
        if let Some(i) = self.of_slot.remove(&from) {
            self.of_slot.insert(to, i);
            self.loans[i].place = Place::Slot(to);
        }
    }

    /// Empties a slot; a value that may have to be given back is kept.
    pub(super) fn freed(&mut self, slot: Slot, slots: &mut [SlotValue]) {
        let Some(place) = slots.get_mut(slot as usize) else {
            return;
        };
        let value = std::mem::take(place);
        if self.loans.is_empty() {
            return;
        }
        if let Some(i) = self.of_slot.remove(&slot) {
            self.loans[i].place = match value {
                SlotValue::Buffer(value) => Place::Kept(value),
                SlotValue::Foreign(_) | SlotValue::Quantized(_) | SlotValue::Empty => Place::Gone,
            };
        }
    }

    /// The run succeeded: the values live on in the results. Returns whether anything had been lent.
    pub(super) fn finish(self) -> bool {
        !self.loans.is_empty()
    }

    /// The run failed: the values go back to their nodes. Returns whether anything had been lent.
    pub(super) fn give_back(self, slots: &mut [SlotValue]) -> bool {
        let any = !self.loans.is_empty();
        for loan in self.loans {
            let value = match loan.place {
                Place::Kept(value) => Some(value),
                Place::Gone => None,
                Place::Slot(slot) => match slots.get_mut(slot as usize).map(std::mem::take) {
                    Some(SlotValue::Buffer(value)) => Some(value),
                    Some(SlotValue::Foreign(value)) => {
                        loan.node.settle(Value::Tensor(value.tensor));
                        continue;
                    }
                    Some(SlotValue::Quantized(_) | SlotValue::Empty) | None => None,
                },
            };
            if let Some(value) = value {
                loan.node.give_back(Arc::new(value));
            }
        }
        any
    }
}

/// The engine's own value behind the opaque one of the graph; moved where nobody else holds it.
pub(super) fn buffer_value(value: Arc<dyn EngineValue>) -> Result<Engine> {
    match value.into_any().downcast::<Engine>() {
        Ok(value) => Ok(Arc::try_unwrap(value).unwrap_or_else(|shared| (*shared).clone())),
        Err(_) => Err(Error::Internal("a value that this engine did not make".into())),
    }
}

/// Puts every leaf into its slot. A leaf that is only written into and that nobody else holds is taken out of its node.
/// `None` where another run took such a leaf first: everything was given back, and the graph must be captured again.
pub(super) fn leaves(plan: &Plan, bindings: &mut Bindings, lent: &mut Lent) -> Result<Option<Vec<SlotValue>>> {
    let mut slots = vec![SlotValue::Empty; plan.slots as usize];
    let leaves = std::mem::take(&mut bindings.leaves);
    lent.leaves = vec![false; leaves.len()];
    for (i, leaf) in leaves.into_iter().enumerate() {
        let Some(slot) = plan.leaves.get(i).copied().flatten() else {
            continue;
        };
        let donatable = plan.donatable.get(i).copied().unwrap_or(false);
        let value = match leaf.value {
            // the tape of a result is made behind the run
            Value::Tensor(tensor) if tensor.track_op() => SlotValue::foreign(tensor.detach()),
            Value::Tensor(tensor) => SlotValue::foreign(tensor),
            Value::Quantized(weight) => SlotValue::Quantized(weight),
            Value::Engine(shared) if donatable && leaf.exclusive => {
                drop(shared);
                let node = leaf.node.and_then(|node| bindings.nodes.get(node as usize));
                match node.and_then(|node| Some((node, node.lend()?))) {
                    Some((node, value)) => {
                        lent.leaves[i] = true;
                        lent.lend(node.clone(), slot);
                        SlotValue::Buffer(buffer_value(value)?)
                    }
                    None => {
                        std::mem::take(lent).give_back(&mut slots);
                        return Ok(None);
                    }
                }
            }
            Value::Engine(shared) => SlotValue::Buffer(buffer_value(shared)?),
        };
        if let Some(place) = slots.get_mut(slot as usize) {
            *place = value;
        }
    }
    Ok(Some(slots))
}
