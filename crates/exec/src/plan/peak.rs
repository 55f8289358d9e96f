//! How much memory a plan needs, computed before it runs.

use super::{Plan, StepKind};
use candle_lazy_graph::{Bindings, Op};

/// The largest number of bytes of the plan's own buffers that live at once at the sizes of `bindings`.
///
/// Views share the memory of what they look at; a slice assignment counts as a copy unless its target is memory of this
/// run, or a leaf given away (`donated`), that ends with it. Leaves that the plan only reads are not counted.
pub(crate) fn peak_bytes(plan: &Plan, bindings: &Bindings, donated: &[bool]) -> u64 {
    // the owner of a slot's memory, with how many slots look at it
    let mut owner: Vec<Option<usize>> = vec![None; plan.slots as usize];
    let mut owners: Vec<(u64, u32)> = Vec::new();
    for (leaf, slot) in plan.leaves.iter().enumerate() {
        if let (Some(slot), true) = (slot, donated.get(leaf).copied().unwrap_or(false)) {
            owner[*slot as usize] = Some(owners.len());
            owners.push((0, 1));
        }
    }
    let (mut live, mut peak) = (0u64, 0u64);
    for step in &plan.steps {
        for (i, output) in step.outputs.iter().enumerate() {
            let bytes = bindings.dims(&output.dims).iter().product::<usize>() * output.dtype.size_in_bytes();
            let shared = match (&step.kind, step.inputs.first()) {
                (StepKind::View(_), Some(&input)) => owner[input as usize],
                (StepKind::SliceAssign { .. }, Some(&input)) => {
                    owner[input as usize].filter(|&o| owners[o].1 == 1 && step.free_after.contains(&input))
                }
                _ => None,
            };
            let o = match shared {
                Some(o) => o,
                // a view of a leaf needs no memory of ours, but Candle's tensors have no steps: those are copied
                None if matches!(&step.kind, StepKind::View(op) if !matches!(op, Op::Stride { .. })) && i == 0 => {
                    continue;
                }
                None => {
                    owners.push((bytes as u64, 0));
                    live += bytes as u64;
                    owners.len() - 1
                }
            };
            owners[o].1 += 1;
            owner[output.slot as usize] = Some(o);
        }
        peak = peak.max(live);
        for &slot in &step.free_after {
            if let Some(o) = owner[slot as usize].take() {
                owners[o].1 -= 1;
                if owners[o].1 == 0 {
                    live -= owners[o].0;
                }
            }
        }
    }
    peak
}
