//! Lowering: from an optimised graph to a plan.
//!
//! 1. `choose`: each op gets a kernel, by predicates on op, dtypes, device and tracking, before anything runs.
//! 2. `units`: ops that row programs serve are grouped; everything else stands alone.
//! 3. `heads`: products take in the group that follows them, and other products of the same left side.
//! 4. `emit`: a group becomes one row program.
//! 5. `order`: the steps are put in an order in which values are freed early.
//! 6. Slots follow from liveness.

#[cfg(feature = "testing")]
mod broken;
mod choose;
mod emit;
mod heads;
mod order;
mod units;

pub use choose::{expands, Choice};
pub(crate) use emit::{binary, unary};

use crate::config::EvalOptions;
use crate::error::{Error, Result};
use crate::plan::{CandleReason, Output, Plan, Slot, Step, StepKind};
use candle_core::DeviceLocation;
use candle_lazy_graph::{passes, Bindings, GNode, Graph, Op, Sym};
use candle_lazy_ops::fault;
use smallvec::{smallvec, SmallVec};
use units::{Unit, Units};

/// Makes the plan of `graph`: passes, then lowering.
///
/// # Errors
/// When a pass broke the graph, or an op has neither a kernel nor a Candle op: defects of this library.
pub(crate) fn make_plan(graph: Graph, bindings: &Bindings, options: &EvalOptions) -> Result<Plan> {
    let check = options.validate.then_some(bindings);
    let wanted = passes::PASSES.iter().filter(|p| !options.skip_passes.contains(&p.name)).copied();
    #[cfg(feature = "testing")]
    let wanted = wanted.map(broken::broken);
    let (graph, hits) = passes::run_these(graph, wanted, check)?;
    let mut plan = lower(&graph, options)?;
    plan.passes = hits;
    Ok(plan)
}

/// Lowers a graph as it is.
fn lower(graph: &Graph, options: &EvalOptions) -> Result<Plan> {
    let choices: Vec<Choice> = graph.nodes.iter().map(|n| choose::choose(graph, n, options)).collect();
    let units = units::form(graph, &choices, options.fuse);
    let mut steps = Vec::new();
    let mut order = units.in_order(graph);
    if fault::active("lower.order") {
        order.reverse();
    }
    for unit in order {
        steps.push(step_of(graph, &choices, &units, unit)?);
    }
    Ok(assign_slots(graph, steps))
}

/// A step whose slots are still node indices.
fn step_of(graph: &Graph, choices: &[Choice], units: &Units, unit: usize) -> Result<Step> {
    let (mut step, members) = match units.get(unit) {
        Unit::Row(group) => (emit::row_step(graph, units, unit, group)?, group.members.as_slice()),
        Unit::Products(products) => (emit::products_step(graph, units, unit, products)?, products.members.as_slice()),
        Unit::Single(node) => (single_step(graph, choices, *node)?, std::slice::from_ref(node)),
    };
    // what views show costs nothing, so there is nothing to explain
    if !matches!(step.kind, StepKind::View(_)) {
        for (i, &input) in step.inputs.iter().enumerate() {
            if step.inputs[..i].contains(&input) {
                continue;
            }
            let reader = members.iter().find(|&&m| graph.nodes[m as usize].inputs.contains(&input));
            if let (Some(&reader), Some(_)) = (reader, units.unit_of(input)) {
                step.boundaries.push((input, units.boundary(graph, choices, input, reader)));
            }
        }
    }
    Ok(step)
}

fn single_step(graph: &Graph, choices: &[Choice], id: u32) -> Result<Step> {
    let node = &graph.nodes[id as usize];
    let Some(op) = node.op() else {
        return Err(Error::Internal(format!("node %{id} is a leaf, not a step")));
    };
    let kind = match choices[id as usize] {
        Choice::Candle(reason) => StepKind::Candle { op: op.clone(), reason },
        Choice::Leaf | Choice::Row | Choice::Kernel => kernel_step(op, node)?,
    };
    Ok(Step {
        kind,
        inputs: node.inputs.iter().copied().collect(),
        outputs: smallvec![output(id, node)],
        params: node.params.iter().copied().collect(),
        boundaries: SmallVec::new(),
        free_after: SmallVec::new(),
        origin: origin(graph, id),
        ops: smallvec![op.name()],
        origins: smallvec![origin(graph, id)],
    })
}

fn kernel_step(op: &Op<Sym>, node: &GNode) -> Result<StepKind> {
    Ok(match op {
        Op::Reshape { .. }
        | Op::Permute { .. }
        | Op::Narrow { .. }
        | Op::Stride { .. }
        | Op::Broadcast { .. }
        | Op::Barrier
        | Op::Checkpoint { .. }
        | Op::Detach => StepKind::View(op.clone()),
        Op::Contiguous => StepKind::Copy,
        Op::Matmul => StepKind::Matmul,
        Op::Linear { .. } => StepKind::Linear,
        Op::Lora { .. } => StepKind::Lora,
        Op::LoraSegments { rows } => StepKind::LoraSegments { rows: rows.clone() },
        Op::Rope { interleaved } => StepKind::Rope { interleaved: *interleaved },
        Op::Attention { mask, causal, softcap, window } => {
            let causal = &(*causal && !fault::active("lower.attention_causal"));
            StepKind::Attention { mask: *mask, causal: *causal, softcap: *softcap, window: *window }
        }
        Op::AttentionBackward { mask, causal, softcap, window } => {
            let causal = *causal && !fault::active("lower.attention_backward_causal");
            StepKind::AttentionBackward { mask: *mask, causal, softcap: *softcap, window: *window }
        }
        Op::IndexSelect { dim } => StepKind::IndexSelect { dim: *dim },
        Op::Embedding => StepKind::IndexSelect { dim: 0 },
        Op::Concat { .. } if fault::active("lower.concat_dim") => StepKind::Concat { dim: 0 },
        Op::ArgReduce { op, dim, .. } => StepKind::ArgReduce { op: *op, dim: *dim },
        Op::Gather { dim } => StepKind::Gather { dim: *dim },
        Op::Scatter { op, dim } => StepKind::Scatter { op: *op, dim: *dim },
        Op::IndexAdd { dim } => StepKind::IndexAdd { dim: *dim },
        Op::Arange { .. } => StepKind::Arange,
        Op::Random { dist, .. } => StepKind::Random { dist: *dist },
        Op::ToDevice => StepKind::ToDevice,
        Op::Custom { .. } => StepKind::Custom(op.clone()),
        Op::Concat { dim } => StepKind::Concat { dim: *dim },
        Op::SliceAssign { dim, start } => StepKind::SliceAssign { dim: *dim, start: *start },
        Op::Full { .. } => StepKind::Full,
        Op::CausalMask { window, .. } => StepKind::CausalMask { window: *window },
        Op::Cast(_) => StepKind::Cast,
        other => {
            return Err(Error::Internal(format!("no kernel for {} {}", other.name(), node.dtype.as_str())));
        }
    })
}

pub(crate) fn output(id: u32, node: &GNode) -> Output {
    Output { slot: id, dims: node.dims.clone(), dtype: node.dtype, in_place_of: None }
}

pub(crate) fn origin(graph: &Graph, id: u32) -> u32 {
    graph.origins.get(id as usize).copied().unwrap_or(id)
}

/// From node indices to slots: a slot is free again after the step that reads its value last.
fn assign_slots(graph: &Graph, mut steps: Vec<Step>) -> Plan {
    let n = graph.nodes.len();
    let mut last_use: Vec<Option<usize>> = vec![None; n];
    let mut is_output = vec![false; n];
    for &o in &graph.outputs {
        is_output[o as usize] = !fault::active("slots.output_freed");
    }
    for (i, step) in steps.iter().enumerate() {
        for &input in &step.inputs {
            last_use[input as usize] = Some(i);
        }
        for output in &step.outputs {
            // a value that nobody reads dies where it is made
            last_use[output.slot as usize].get_or_insert(i);
        }
    }
    if fault::active("slots.freed_early") {
        for at in last_use.iter_mut().flatten() {
            *at = at.saturating_sub(1);
        }
    }
    let mut slot_of: Vec<Option<Slot>> = vec![None; n];
    let mut free: Vec<Slot> = Vec::new();
    let mut slots = 0;
    let mut take = |free: &mut Vec<Slot>| {
        free.pop().unwrap_or_else(|| {
            slots += 1;
            slots - 1
        })
    };
    let mut plan = Plan::default();
    for (id, node) in graph.nodes.iter().enumerate() {
        if node.op().is_some() {
            continue;
        }
        let used = last_use[id].is_some() || is_output[id];
        let slot = used.then(|| take(&mut free));
        slot_of[id] = slot;
        plan.leaves.push(slot);
        plan.donatable.push(false);
    }
    let leaf_number: Vec<Option<usize>> = {
        let mut next = 0;
        graph
            .nodes
            .iter()
            .map(|n| {
                n.op().is_none().then(|| {
                    next += 1;
                    next - 1
                })
            })
            .collect()
    };
    let uses = graph.use_counts();
    for leaf in find_places(graph, &mut steps, &last_use, &is_output) {
        if let Some(leaf) = leaf_number[leaf as usize] {
            plan.donatable[leaf] = true;
        }
    }
    for (i, step) in steps.iter_mut().enumerate() {
        let reads: SmallVec<[u32; 4]> = step.inputs.clone();
        if let (StepKind::SliceAssign { .. }, Some(&target)) = (&step.kind, reads.first()) {
            if let (Some(leaf), 1) = (leaf_number[target as usize], uses[target as usize]) {
                plan.donatable[leaf] = true;
            }
        }
        for slot in step.inputs.iter_mut().chain(step.boundaries.iter_mut().map(|(slot, _)| slot)) {
            *slot = slot_of[*slot as usize].unwrap_or(0);
        }
        let makes: SmallVec<[u32; 2]> = step.outputs.iter().map(|o| o.slot).collect();
        for output in &mut step.outputs {
            let id = output.slot as usize;
            output.slot = if fault::active("slots.one_for_all") { 0 } else { take(&mut free) };
            slot_of[id] = Some(output.slot);
        }
        for &id in reads.iter().chain(&makes) {
            let id = id as usize;
            if last_use[id] == Some(i) && !is_output[id] {
                if let Some(slot) = slot_of[id].take() {
                    step.free_after.push(slot);
                    free.push(slot);
                }
            }
        }
    }
    plan.outputs = graph.outputs.iter().map(|&o| slot_of[o as usize].unwrap_or(0)).collect();
    if fault::active("slots.outputs_swapped") {
        plan.outputs.reverse();
    }
    if fault::active("slots.leaves_swapped") {
        plan.leaves.reverse();
    }
    plan.slots = slots;
    plan.steps = steps;
    plan
}

/// Marks the outputs that may be written over a leaf, which their step reads last, and says which leaves these are.
///
/// Only elementwise steps do so, and only where no step behind them can fail: what has been written over cannot be given back.
fn find_places(
    graph: &Graph,
    steps: &mut [Step],
    last_use: &[Option<usize>],
    is_output: &[bool],
) -> SmallVec<[u32; 4]> {
    let mut taken: SmallVec<[u32; 4]> = SmallVec::new();
    for (i, step) in steps.iter_mut().enumerate().rev() {
        let (program, domain) = match &step.kind {
            StepKind::Row { program, domain, axes: 0 } => (program, domain),
            kind if kind.may_fail() => break,
            _ => continue,
        };
        let inputs = &step.inputs;
        for (_, output) in step.outputs.iter_mut().enumerate().filter(|(k, _)| program.may_run_in_place(*k)) {
            let fits = |leaf: u32, node: &GNode| {
                node.op().is_none()
                    && node.dtype == output.dtype
                    && node.dims == output.dims
                    && node.dims == *domain
                    && last_use[leaf as usize] == Some(i)
                    && !is_output[leaf as usize]
                    && !taken.contains(&leaf)
                    && inputs.iter().filter(|input| **input == leaf).count() == 1
            };
            let place = (0u8..)
                .zip(inputs)
                .find(|(_, &leaf)| graph.nodes.get(leaf as usize).is_some_and(|node| fits(leaf, node)));
            if let Some((number, &leaf)) = place {
                output.in_place_of = Some(number);
                taken.push(leaf);
            }
        }
    }
    taken
}

/// Whether a device has kernels of ours.
pub(crate) fn has_kernels(device: DeviceLocation) -> bool {
    device == DeviceLocation::Cpu
}

/// Why a value that needs no kernel runs as Candle's op.
pub(crate) const REPLAY: Choice = Choice::Candle(CandleReason::Replay);

#[cfg(test)]
mod tests;
