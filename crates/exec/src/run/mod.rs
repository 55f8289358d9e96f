//! Running: capture, plan, bind, run, publish.
//!
//! A failed run changes nothing: nodes stay pending, values that were given away for an in-place update are given back,
//! and a retry works. The only memory that a run may write in place before it has succeeded is the target of a slice
//! assignment that nobody else can reach; writing it again writes the same bytes.

mod bind;
mod candle;
mod checked;
mod direct;
mod failure;
mod group;
mod inspect;
mod judge;
mod kernel;
mod planning;
mod slots;
mod tape;
mod trace;

pub use checked::eval_all_checked;
pub(crate) use direct::{eval_direct, eval_little, is_direct};
pub(crate) use failure::message_of;
pub(crate) use group::{eval_group, eval_now, eval_small, in_group, is_small, Request, Values};
pub use inspect::{first_nan, first_nonfinite, NonFinite};
pub(crate) use trace::{refuse_while_recording, Trace};

use crate::buffer::{self, BufferValue};
use crate::config::{self, EvalOptions, TARGET};
use crate::error::{Error, Result};
use crate::lower;
use crate::plan::{self, Plan};
use crate::report::EvalReport;
use crate::tensor::LazyTensor;
use bind::Lent;
use candle_core::Tensor;
use candle_lazy_graph::{Bindings, FastMap, NodeId, NodeRef, Value};
use candle_lazy_ops::fault;
use candle_lazy_ops::kernels::rouse;
use parking_lot::{Condvar, Mutex};
use planning::{capture_waiting, planned, Planned};
use slots::SlotValue;
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{debug_span, field};

/// Evaluates all tensors as one plan and returns their values.
///
/// # Errors
/// When a kernel fails: the error names the op and the line that recorded it, nothing has changed, and a retry works.
pub fn eval_all(tensors: &[&LazyTensor]) -> Result<Vec<Tensor>> {
    Ok(eval_all_with_report(tensors)?.0)
}

/// As [`eval_all`], with what it did.
///
/// # Errors
/// As [`eval_all`].
pub fn eval_all_with_report(tensors: &[&LazyTensor]) -> Result<(Vec<Tensor>, EvalReport)> {
    eval_all_with(tensors, &EvalOptions::default())
}

/// As [`eval_all_with_report`], with options.
///
/// # Errors
/// As [`eval_all`].
pub fn eval_all_with(tensors: &[&LazyTensor], options: &EvalOptions) -> Result<(Vec<Tensor>, EvalReport)> {
    let report = evaluate(tensors, options, As::Tensors)?;
    let values = tensors.iter().map(|t| tensor_of(t.node())).collect::<Result<Vec<_>>>()?;
    Ok((values, report))
}

/// Evaluates all tensors as one plan and keeps the values in the engine's own memory: nothing becomes a Candle tensor.
///
/// # Errors
/// As [`eval_all`].
pub fn materialize(tensors: &[&LazyTensor]) -> Result<EvalReport> {
    evaluate(tensors, &EvalOptions::default(), As::Values)
}

/// The plan that evaluating `tensors` would run, as text; nothing is run and nothing is cached.
///
/// # Errors
/// When lowering fails.
pub fn explain(tensors: &[&LazyTensor], options: &EvalOptions) -> Result<String> {
    let roots: Vec<NodeRef> = tensors.iter().map(|t| t.node().clone()).collect();
    let captured = capture_waiting(&roots, options)?;
    let graph = candle_lazy_graph::dump::dump(&captured.graph, Some(&captured.bindings));
    let plan = lower::make_plan(captured.graph, &captured.bindings, options)?;
    let peak = plan::needs(&plan, &captured.bindings).peak;
    Ok(format!("graph\n{graph}\nplan\n{plan}peak {peak} bytes\n"))
}

/// Makes the plan that evaluating `tensors` needs, and runs nothing: an evaluation of a graph of this structure, at any length,
/// then finds it in the cache. Whether it was there already.
///
/// # Errors
/// When lowering fails.
pub fn prepare(tensors: &[&LazyTensor], options: &EvalOptions) -> Result<bool> {
    let roots: Vec<NodeRef> = tensors.iter().map(|t| t.node().clone()).collect();
    Ok(planned(&roots, options)?.hit)
}

/// The most bytes that evaluating `tensors` would hold at once beside its inputs: results, intermediate values and what kernels take for
/// themselves, over all threads. Nothing is run. What plans and nodes are made of does not count (below a KiB per node), and what
/// Candle's own and custom ops take inside is not known.
///
/// # Errors
/// When lowering fails.
pub fn peak_bytes(tensors: &[&LazyTensor], options: &EvalOptions) -> Result<u64> {
    let roots: Vec<NodeRef> = tensors.iter().map(|t| t.node().clone()).collect();
    let Planned { plan, bindings, .. } = planned(&roots, options)?;
    Ok(plan::needs(&plan, &bindings).peak)
}

fn evaluate(tensors: &[&LazyTensor], options: &EvalOptions, as_tensors: As) -> Result<EvalReport> {
    refuse_while_recording(tensors)?;
    let start = Instant::now();
    let mut report = EvalReport::default();
    if tensors.iter().all(|t| t.is_ready()) {
        report.elapsed = start.elapsed();
        return Ok(report);
    }
    let span = debug_span!(target: TARGET, "eval", nodes = field::Empty, cache_hit = field::Empty).entered();
    let roots: Vec<NodeRef> = tensors.iter().map(|t| t.node().clone()).collect();
    loop {
        #[allow(unused_mut)] // faults write it
        let Planned { plan, mut bindings, hit } = planned(&roots, options)?;
        report.nodes = bindings.pending;
        report.cache_hit = hit;
        span.record("nodes", report.nodes).record("cache_hit", hit);
        #[cfg(feature = "testing")]
        stale::bind(&plan, hit, &mut bindings);
        report.passes.clone_from(&plan.passes);
        report.steps = plan.work_steps();
        let terms = Terms { as_tensors, budget: options.memory_budget.or_else(config::memory_budget) };
        match run_and_publish(&plan, bindings, &roots, terms, &mut report)? {
            Ran::Done => break,
            // another run took a leaf between our capture and our run: look again
            Ran::Again => {}
        }
    }
    report.elapsed = start.elapsed();
    Ok(report)
}

/// The fault of a cached plan that keeps what it was first bound to.
#[cfg(feature = "testing")]
mod stale {
    use crate::plan::Plan;
    use candle_lazy_graph::Bindings;
    use candle_lazy_ops::fault;
    use parking_lot::Mutex;
    use std::sync::Arc;

    type First = (usize, Vec<usize>, Vec<f64>);
    static FIRST: Mutex<Vec<First>> = Mutex::new(Vec::new());

    pub(super) fn bind(plan: &Arc<Plan>, hit: bool, bindings: &mut Bindings) {
        let (sizes, params) = (fault::active("cache.stale_sizes"), fault::active("cache.stale_scalars"));
        if !(sizes || params) {
            return;
        }
        let address = Arc::as_ptr(plan) as usize;
        let mut first = FIRST.lock();
        match first.iter().find(|(at, _, _)| *at == address && hit) {
            Some((_, old, _)) if sizes => bindings.sizes.clone_from(old),
            Some((_, _, old)) => bindings.params.clone_from(old),
            None => {
                first.retain(|(at, _, _)| *at != address);
                first.push((address, bindings.sizes.clone(), bindings.params.clone()));
            }
        }
    }
}

/// How a run ended that did not fail.
enum Ran {
    Done,
    Again,
}

/// Counts the runs that ended after borrowing values; a capture that met a borrowed value waits for the next one.
static LENT: Mutex<u64> = Mutex::new(0);
static RETURNED: Condvar = Condvar::new();

fn wait_for_lent(seen: u64) {
    let mut count = LENT.lock();
    while *count == seen {
        // the time-out covers a lender that returned between our capture and our lock
        if RETURNED.wait_for(&mut count, Duration::from_millis(1)).timed_out() {
            return;
        }
    }
}

fn announce_returned() {
    *LENT.lock() += 1;
    RETURNED.notify_all();
}

/// The value of a ready node as a tensor: an engine buffer moves into one where nobody else holds it.
fn tensor_of(node: &NodeRef) -> Result<Tensor> {
    let dims = node.dims();
    loop {
        let seen = *LENT.lock();
        match node.value() {
            Some(Value::Tensor(tensor)) if node.tracked() && !tensor.track_op() => {
                let tensor = tape::attach(node, tape::Finished::Tensor(tensor))?;
                node.replace(Value::Tensor(tensor.clone()));
                return Ok(tensor);
            }
            Some(Value::Tensor(tensor)) => return Ok(tensor),
            Some(Value::Quantized(weight)) => return Ok(weight.dequantize(node.device())?),
            Some(Value::Engine(shared)) => {
                let ours = shared.as_any().downcast_ref::<Engine>();
                if ours.is_none_or(|v| v.layout.elem_count() != dims.iter().product::<usize>()) {
                    return Err(Error::Internal("a root holds a value of another kind or size".into()));
                }
                drop(shared);
                let Some(value) = node.lend() else { continue };
                let result = settle_as_tensor(node, bind::buffer_value(value)?, dims);
                announce_returned();
                return result;
            }
            None if node.is_pending() => return Err(Error::Internal("a root has no value after its run".into())),
            // it was lent a moment ago, and may have its value by now
            None => wait_for_lent(seen),
        }
    }
}

/// Turns a lent value into a tensor and makes the node ready with it; on failure the node gets the value back.
fn settle_as_tensor(node: &NodeRef, value: Engine, dims: &[usize]) -> Result<Tensor> {
    // only a value that will be copied can fail, and then a second reference is no loss
    let will_move = value.is_whole() && Arc::strong_count(&value.buffer) == 1;
    let spare = (!will_move).then(|| value.clone());
    let tensor = if node.tracked() {
        slots::to_buffer(value, dims).and_then(|buffer| tape::attach(node, tape::Finished::Buffer(buffer)))
    } else {
        slots::to_tensor(value, dims).map(|(tensor, _)| tensor)
    };
    match tensor {
        Ok(tensor) => {
            node.settle(Value::Tensor(tensor.clone()));
            Ok(tensor)
        }
        Err(error) => {
            if let Some(value) = spare {
                node.give_back(Arc::new(value));
            }
            Err(error)
        }
    }
}

/// What a plan computed, before anybody sees it.
enum Executed {
    Values(Vec<Value>, Lent),
    Again,
}

/// What becomes of the values of the roots.
#[derive(Clone, Copy, PartialEq, Eq)]
enum As {
    /// Tensors, but for those that Candle tracks.
    Tensors,
    /// Tensors, all of them without a tape.
    Untracked,
    /// They stay in the engine's memory.
    Values,
}

/// How a run goes about its results and its memory.
#[derive(Clone, Copy)]
struct Terms {
    /// What the roots become.
    as_tensors: As,
    /// The most bytes that it may need.
    budget: Option<u64>,
}

impl Terms {
    /// For tools that look at a graph: tensors, whatever they need.
    const INSPECTION: Self = Self { as_tensors: As::Untracked, budget: None };
}

/// Runs a plan. A failure gives back what was lent; success leaves that to the caller, who publishes first.
fn execute(
    plan: &Plan,
    bindings: &mut Bindings,
    roots: &[NodeRef],
    terms: Terms,
    report: &mut EvalReport,
) -> Result<Executed> {
    let memory = plan::needs(plan, bindings);
    report.peak_bytes = memory.peak;
    if let Some(budget) = terms.budget.filter(|&budget| memory.peak > budget) {
        let error = Error::Budget { needed: memory.peak, budget };
        return Err(failure::located(plan, memory.largest, bindings, error));
    }
    let _span = debug_span!(target: TARGET, "run", steps = plan.steps.len(), peak_bytes = memory.peak).entered();
    let _running = buffer::running(memory.peak);
    rouse(memory.took.load(Ordering::Relaxed));
    let began = Instant::now();
    let mut lent = Lent::default();
    let Some(mut slots) = bind::leaves(plan, bindings, &mut lent)? else {
        return Ok(Executed::Again);
    };
    let current = Cell::new(0usize);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        for (i, step) in plan.steps.iter().enumerate() {
            current.set(i);
            if fault::active("run.freed_before") {
                for &slot in &step.free_after {
                    lent.freed(slot, &mut slots);
                }
            }
            kernel::run_step((step, i), bindings, &memory, &mut slots, &mut lent, report)
                .map_err(|e| failure::located(plan, i, bindings, e))?;
            #[cfg(test)]
            hooks::after(step, &mut slots);
            for &slot in &step.free_after {
                lent.freed(slot, &mut slots);
            }
        }
        values(plan, bindings, &mut slots, roots, terms.as_tensors)
    }));
    let outcome = match outcome {
        Ok(result) => result,
        Err(panic) => Err(failure::panicked(plan, current.get(), bindings, panic.as_ref())),
    };
    match outcome {
        Ok(values) => {
            let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            memory.took.store(took, Ordering::Relaxed);
            Ok(Executed::Values(values, lent))
        }
        Err(error) => {
            if lent.give_back(&mut slots) {
                announce_returned();
            }
            Err(error)
        }
    }
}

fn publish(bindings: &Bindings, mut values: Vec<Value>) {
    if fault::active("run.published_swapped") {
        values.reverse();
    }
    for (nodes, value) in bindings.published().zip(values) {
        for node in nodes {
            node.publish(value.clone());
        }
    }
}

fn run_and_publish(
    plan: &Plan,
    mut bindings: Bindings,
    roots: &[NodeRef],
    terms: Terms,
    report: &mut EvalReport,
) -> Result<Ran> {
    match execute(plan, &mut bindings, roots, terms, report)? {
        Executed::Again => Ok(Ran::Again),
        Executed::Values(values, lent) => {
            publish(&bindings, values);
            // after publishing: whoever waits finds the new values
            if lent.finish() {
                announce_returned();
            }
            Ok(Ran::Done)
        }
    }
}

/// The values of the outputs, as tensors where a root asks for them.
fn values(
    plan: &Plan,
    bindings: &Bindings,
    slots: &mut [SlotValue],
    roots: &[NodeRef],
    as_tensors: As,
) -> Result<Vec<Value>> {
    let wanted: FastMap<NodeId, ()> = roots.iter().map(|n| (n.id(), ())).collect();
    let mut uses: FastMap<u32, u32> = FastMap::default();
    for &slot in &plan.outputs {
        *uses.entry(slot).or_default() += 1;
    }
    let mut done: FastMap<u32, Value> = FastMap::default();
    let mut values = Vec::with_capacity(plan.outputs.len());
    for (&slot, mut nodes) in plan.outputs.iter().zip(bindings.published()) {
        if let Some(value) = done.get(&slot) {
            values.push(value.clone());
            continue;
        }
        // what Candle tracks gets its tape when it is asked for as a tensor
        let asked = as_tensors != As::Values
            && nodes.any(|n| wanted.contains_key(&n.id()) && (as_tensors == As::Untracked || !n.tracked()));
        let taken = std::mem::replace(&mut slots[slot as usize], SlotValue::Empty);
        let value = match taken {
            SlotValue::Foreign(foreign) => Value::Tensor(foreign.tensor),
            SlotValue::Buffer(value) if asked => {
                let dims = value.layout.dims.clone();
                Value::Tensor(slots::to_tensor(value, &dims)?.0)
            }
            SlotValue::Buffer(value) => Value::Engine(Arc::new(value)),
            SlotValue::Quantized(_) | SlotValue::Empty => {
                return Err(Error::Internal(format!("output slot ${slot} is empty")));
            }
        };
        if uses.get(&slot).copied().unwrap_or(0) > 1 {
            done.insert(slot, value.clone());
        }
        values.push(value);
    }
    Ok(values)
}

/// A value that the engine made, for its own modules.
pub(crate) type Engine = BufferValue;

#[cfg(test)]
mod checked_tests;
#[cfg(test)]
mod hooks;
#[cfg(test)]
mod tests;
