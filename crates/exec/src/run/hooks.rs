//! What this crate's own tests break on purpose: a wrong element behind a step, or a panic in it.

use super::slots::SlotValue;
use crate::plan::Step;
use candle_lazy_ops::view::SliceMut;
use std::cell::RefCell;
use std::sync::Arc;

/// A fault of every step that computes a given op.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// The last element of its first output is multiplied by this.
    Scale(f32),
    /// It panics.
    Panic,
}

thread_local! {
    static FAULT: RefCell<Option<(&'static str, Fault)>> = const { RefCell::new(None) };
}

/// Runs `f` with steps of this thread that compute `op` broken.
pub(crate) fn with_fault<R>(op: &'static str, fault: Fault, f: impl FnOnce() -> R) -> R {
    FAULT.with(|slot| *slot.borrow_mut() = Some((op, fault)));
    let result = f();
    FAULT.with(|slot| *slot.borrow_mut() = None);
    result
}

pub(super) fn after(step: &Step, slots: &mut [SlotValue]) {
    let Some((op, fault)) = FAULT.with(|slot| *slot.borrow()) else {
        return;
    };
    if !step.ops.contains(&op) {
        return;
    }
    let factor = match fault {
        Fault::Panic => panic!("a fault in {op}"),
        Fault::Scale(factor) => factor,
    };
    let Some(output) = step.outputs.first() else {
        return;
    };
    if let Some(SlotValue::Buffer(value)) = slots.get_mut(output.slot as usize) {
        if let Some(SliceMut::F32(data)) = Arc::get_mut(&mut value.buffer).map(|b| b.slice_mut()) {
            if let Some(last) = data.last_mut() {
                *last *= factor;
            }
        }
    }
}
