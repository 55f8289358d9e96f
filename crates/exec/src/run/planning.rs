//! From tensors to a plan and what to bind to it: known by a guard, found by the key of their graph, or made.

use super::{wait_for_lent, LENT};
use crate::config::{EvalOptions, TARGET};
use crate::error::{Error, Result};
use crate::lower;
use crate::plan::{self, Guarded, Known, Plan};
use candle_core::{DType, Device};
use candle_lazy_graph::capture::{CaptureFailure, Unguarded};
use candle_lazy_graph::{
    capture, validate, Bindings, CaptureOptions, Captured, Guard, NodeId, NodeRef, Op, Value, Workspace,
};
use std::cell::Cell;
use std::sync::Arc;
use tracing::{debug_span, trace_span};

/// A plan and what to bind to it.
pub(super) struct Planned {
    pub(super) plan: Arc<Plan>,
    pub(super) bindings: Bindings,
    /// Whether the plan was cached.
    pub(super) hit: bool,
}

impl Planned {
    /// A plan that was found by its key.
    fn found(plan: Arc<Plan>, bindings: Bindings) -> Self {
        plan::hit();
        Self { plan, bindings, hit: true }
    }

    /// A plan whose graph a guard knew.
    fn known(guard: &Arc<Guarded>, bindings: Bindings) -> Self {
        plan::guarded_hit(guard);
        Self { plan: guard.plan().clone(), bindings, hit: true }
    }
}

/// A plan that was found by its key, and the hash of the key.
type Found = (u64, Arc<Plan>);

thread_local! {
    /// The memory of this thread's captures.
    static WORKSPACE: Cell<Option<Box<Workspace>>> = const { Cell::new(None) };
}

/// The plan of what `roots` need: one whose graph a guard knows, the cached one of their key, or a new one, for which they are captured again
/// as a graph.
pub(super) fn planned(roots: &[NodeRef], options: &EvalOptions) -> Result<Planned> {
    loop {
        if let Some(planned) = attempt(roots, options)? {
            return Ok(planned);
        }
    }
}

/// `None` where it is to be looked again: somebody else has changed the graph meanwhile, or it turned out to have no guard.
fn attempt(roots: &[NodeRef], options: &EvalOptions) -> Result<Option<Planned>> {
    if options.cache {
        match (plan::known(roots, options), options.validate) {
            (Some(known), false) => {
                return Ok(Some(Planned::known(&known.guard, known.bindings)));
            }
            (Some(known), true) => return confirmed(known, roots, options),
            // what is validated is captured as a graph
            (None, true) => {}
            (None, false) => {
                let (bindings, found) = keyed(roots, options)?;
                if let Some(found) = found {
                    return Ok(guarded(roots, options, found, bindings));
                }
            }
        }
    }
    let Captured { graph, key, bindings } = capture_waiting(roots, options)?;
    if options.cache && options.validate {
        if let Some(plan) = plan::find(key.hash(), key.words(), options) {
            return Ok(guarded(roots, options, (key.hash(), plan), bindings));
        }
    }
    let _span = debug_span!(target: TARGET, "compile", nodes = bindings.pending).entered();
    // two threads may make the same plan, and the first one stays
    let plan = Arc::new(lower::make_plan(graph, &bindings, options)?);
    let plan = if options.cache { plan::keep(key, options, plan) } else { plan };
    Ok(Some(Planned { plan, bindings, hit: false }))
}

/// What to bind to a plan of the key of `roots`, and the cached one.
fn keyed(roots: &[NodeRef], options: &EvalOptions) -> Result<(Bindings, Option<Found>)> {
    let mut workspace = WORKSPACE.take().unwrap_or_default();
    let bindings = waiting(options, |how| workspace.key(roots, how));
    let hash = workspace.hash();
    let plan = bindings.is_ok().then(|| plan::find(hash, workspace.words(), options)).flatten();
    WORKSPACE.set(Some(workspace));
    Ok((bindings?, plan.map(|plan| (hash, plan))))
}

/// A plan that was found: the next graph like this one is known by a guard. `None` where there is none of its kind, which is not asked
/// again, or somebody else has changed the graph meanwhile.
fn guarded(roots: &[NodeRef], options: &EvalOptions, (hash, plan): Found, bindings: Bindings) -> Option<Planned> {
    if !plan::wants_guard(hash, &plan) {
        return Some(Planned::found(plan, bindings));
    }
    // they hold nodes, and a guard notes which nodes others hold
    drop(bindings);
    let (guard, key) = match Guard::of(roots, &CaptureOptions { expand: &expanding(options) }) {
        Ok(made) => made,
        Err(why) => {
            if why == Unguarded::Kind {
                plan::no_guard(hash, &plan);
            }
            return None;
        }
    };
    let bindings = plan::keep_guard(roots, options, &plan, guard, &key)?;
    Some(Planned::found(plan, bindings))
}

/// What a guard knew, if a capture finds the same; `None` where others have changed the graph meanwhile.
fn confirmed(known: Known, roots: &[NodeRef], options: &EvalOptions) -> Result<Option<Planned>> {
    let Known { bindings, guard } = known;
    let (bound, size) = (structure(&bindings), (bindings.pending, bindings.graph_nodes()));
    drop(bindings);
    // what others have changed by now has another key: what waited has a value
    let Captured { key, bindings, .. } = capture_waiting(roots, options)?;
    // where scalars happen to be equal, a capture merges what the guard has as two; what somebody else has evaluated waits no longer
    let confirmed = match plan::is_of(&guard, &key) {
        true => structure(&bindings) == bound,
        false => (bindings.pending, bindings.graph_nodes()) <= size,
    };
    if !confirmed {
        return Err(Error::Internal("a guard binds other values than a capture".into()));
    }
    drop(bindings);
    Ok(guard.bind(roots).map(|bindings| Planned::known(&guard, bindings)))
}

/// What bindings say of a graph, whoever else holds its nodes.
fn structure(bindings: &Bindings) -> impl PartialEq {
    let count = u32::try_from(bindings.graph_nodes()).unwrap_or(u32::MAX);
    let recorded: Vec<Option<NodeId>> = (0..count).map(|i| Some(bindings.recorded(i)?.id())).collect();
    let scalars: Vec<u64> = bindings.params.iter().map(|x| x.to_bits()).collect();
    let data = |value: &Value| match value {
        Value::Tensor(tensor) => Some(tensor.id()),
        Value::Engine(_) | Value::Quantized(_) => None,
    };
    let leaves: Vec<_> = bindings.leaves.iter().map(|leaf| (leaf.index, data(&leaf.value))).collect();
    (bindings.sizes.clone(), scalars, leaves, recorded, bindings.pending)
}

/// Captures a graph, and validates it where the options ask for that.
pub(super) fn capture_waiting(roots: &[NodeRef], options: &EvalOptions) -> Result<Captured> {
    let captured = waiting(options, |how| capture(roots, how))?;
    if options.validate {
        validate::validate(&captured.graph, &captured.bindings)?;
    }
    Ok(captured)
}

/// Which composites a capture replaces by their decompositions.
fn expanding(options: &EvalOptions) -> impl Fn(&Op, DType, &Device) -> bool + '_ {
    |op, _, device| lower::expands(op, device, options)
}

/// Captures; where another run is writing a leaf in place, waits for it first.
fn waiting<T>(
    options: &EvalOptions,
    mut capture: impl FnMut(&CaptureOptions<'_>) -> std::result::Result<T, CaptureFailure>,
) -> Result<T> {
    let _span = trace_span!(target: TARGET, "capture").entered();
    let expand = expanding(options);
    loop {
        let seen = *LENT.lock();
        match capture(&CaptureOptions { expand: &expand }) {
            Ok(captured) => return Ok(captured),
            Err(CaptureFailure::Error(error)) => return Err(error.into()),
            Err(CaptureFailure::Lent) => wait_for_lent(seen),
        }
    }
}
