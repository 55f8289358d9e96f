//! Looking at every recorded node: all of them run as outputs of one plan, and nothing is published.

use super::{bind, capture_waiting, execute, slots, wait_for_lent, Executed, Terms, LENT};
use crate::config::EvalOptions;
use crate::error::{Error, Result};
use crate::lower;
use crate::report::EvalReport;
use crate::tensor::LazyTensor;
use candle_core::{DType, Device, Tensor};
use candle_lazy_graph::node::Look;
use candle_lazy_graph::{describe, BuildSite, Captured, Expr, FastMap, Meta, Node, NodeId, NodeRef, Value};
use std::fmt;

/// What is above some roots, each list in the order of recording, which is a topological one.
pub(super) struct Recorded {
    pub(super) leaves: Vec<NodeRef>,
    pub(super) pending: Vec<(NodeRef, Expr)>,
}

pub(super) fn recorded(roots: &[NodeRef]) -> Recorded {
    above(roots, |_| None)
}

/// As [`recorded`]; a value that is ready and keeps what it was made of, as traced ones do, is no leaf but counts as pending.
fn recorded_once(roots: &[NodeRef]) -> Recorded {
    above(roots, Node::history)
}

fn above(roots: &[NodeRef], of_ready: impl Fn(&Node) -> Option<Expr>) -> Recorded {
    let mut seen: FastMap<NodeId, ()> = FastMap::default();
    let mut stack = roots.to_vec();
    let mut found = Recorded { leaves: Vec::new(), pending: Vec::new() };
    while let Some(node) = stack.pop() {
        if seen.insert(node.id(), ()).is_some() {
            continue;
        }
        let expr = match node.look() {
            Look::Pending(expr) => Some(expr),
            Look::Ready(_) | Look::Lent => of_ready(&node),
        };
        match expr {
            Some(expr) => {
                stack.extend(expr.inputs.iter().cloned());
                found.pending.push((node, expr));
            }
            None => found.leaves.push(node),
        }
    }
    found.leaves.sort_by_key(|n| n.id());
    found.pending.sort_by_key(|(n, _)| n.id());
    found
}

/// The planned value of every pending node, run as one plan whose outputs they all are. Nothing is written in place.
pub(super) fn every_value(recorded: &Recorded, options: &EvalOptions) -> Result<FastMap<NodeId, Tensor>> {
    let nodes: Vec<NodeRef> = recorded.pending.iter().map(|(n, _)| n.clone()).filter(|n| n.is_pending()).collect();
    let mut values: FastMap<NodeId, Tensor> = FastMap::default();
    loop {
        let Captured { graph, mut bindings, .. } = capture_waiting(&nodes, options)?;
        if graph.outputs.is_empty() {
            return Ok(values);
        }
        for leaf in &mut bindings.leaves {
            leaf.exclusive = false;
        }
        let plan = lower::make_plan(graph, &bindings, options)?;
        let Executed::Values(results, lent) =
            execute(&plan, &mut bindings, &nodes, Terms::INSPECTION, &mut EvalReport::default())?
        else {
            continue;
        };
        lent.finish();
        for (nodes, value) in bindings.published().zip(results) {
            let Value::Tensor(tensor) = value else {
                return Err(Error::Internal("a root of an inspection is no tensor".into()));
            };
            for node in nodes {
                values.insert(node.id(), tensor.clone());
            }
        }
        return Ok(values);
    }
}

/// The value of a node that is ready: a copy where the engine holds it.
pub(super) fn ready_tensor(node: &NodeRef) -> Result<Tensor> {
    loop {
        let seen = *LENT.lock();
        match node.value() {
            Some(Value::Tensor(tensor)) => return Ok(tensor),
            Some(Value::Quantized(weight)) => return Ok(weight.dequantize(node.device())?),
            Some(Value::Engine(shared)) => {
                return Ok(slots::to_tensor(bind::buffer_value(shared)?, node.dims())?.0);
            }
            None if node.is_pending() => return Err(Error::Internal("a leaf has no value".into())),
            None => wait_for_lent(seen),
        }
    }
}

/// The elements in row-major order.
pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = slots::rebased(tensor.detach()).to_device(&Device::Cpu)?.contiguous()?.flatten_all()?;
    Ok(tensor.to_dtype(DType::F64)?.to_vec1()?)
}

/// The index of the element at `flat` in row-major order.
pub(super) fn index_of(dims: &[usize], mut flat: usize) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for (i, &size) in index.iter_mut().zip(dims).rev() {
        *i = flat % size.max(1);
        flat /= size.max(1);
    }
    index
}

/// The first recorded value that holds a NaN or an infinity.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NonFinite {
    /// The op with its attributes; `None` where a leaf already holds the number.
    pub op: Option<String>,
    /// The dtypes and shapes of the op's inputs.
    pub operands: String,
    /// The shape of the value.
    pub dims: Vec<usize>,
    /// The dtype of the value.
    pub dtype: DType,
    /// The line that recorded the op, or that made the leaf, with the module path where a module did.
    pub site: BuildSite,
    /// The index of the first such element.
    pub index: Vec<usize>,
    /// That element: a NaN or an infinity.
    pub value: f64,
    /// How many elements are such.
    pub count: usize,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, operands, dims, dtype, site, index, value, count } = self;
        match op {
            Some(op) => write!(f, "{op} of ({operands}) to {} {dims:?}", dtype.as_str())?,
            None => write!(f, "the leaf {} {dims:?}", dtype.as_str())?,
        }
        let verb = if op.is_some() { "recorded" } else { "made" };
        write!(f, ": element {index:?} is {value} ({count} such elements), {verb} at {site}")
    }
}

/// What is looked for.
type Unwanted = fn(f64) -> bool;

fn find_in(node: &Node, expr: Option<&Expr>, tensor: &Tensor, unwanted: Unwanted) -> Result<Option<NonFinite>> {
    if !tensor.dtype().is_float() {
        return Ok(None);
    }
    let numbers = numbers(tensor)?;
    let Some((at, &value)) = numbers.iter().enumerate().find(|(_, &x)| unwanted(x)) else {
        return Ok(None);
    };
    let operands = expr.map(|e| e.inputs.iter().map(|n| n.meta()).collect::<Vec<Meta<'_>>>());
    Ok(Some(NonFinite {
        op: expr.map(|e| e.op.to_string()),
        operands: operands.map(|o| describe(&o)).unwrap_or_default(),
        dims: tensor.dims().to_vec(),
        dtype: tensor.dtype(),
        site: node.site().clone(),
        index: index_of(tensor.dims(), at),
        value,
        count: numbers.iter().filter(|&&x| unwanted(x)).count(),
    }))
}

/// The first value above `tensors` that holds a NaN or an infinity: leaves first, then the recorded ops in the order of
/// recording; `None` where every number is finite.
///
/// Everything pending is run once, with every intermediate value kept until the end, and nothing becomes ready. A tensor
/// that was evaluated before is a leaf here, its history is gone; but a traced one, such as the loss of a training step,
/// keeps what it was made of, and that is looked through too. An infinity that is meant, such as the −∞ of a causal
/// mask, is found like any other: [`first_nan`] looks for a NaN alone.
///
/// # Errors
/// As [`crate::run::eval_all`].
pub fn first_nonfinite(tensors: &[&LazyTensor]) -> Result<Option<NonFinite>> {
    first(tensors, |x| !x.is_finite())
}

/// The same as [`first_nonfinite`] for the first NaN, in a graph whose infinities are meant.
///
/// # Errors
/// As [`crate::run::eval_all`].
pub fn first_nan(tensors: &[&LazyTensor]) -> Result<Option<NonFinite>> {
    first(tensors, f64::is_nan)
}

fn first(tensors: &[&LazyTensor], unwanted: Unwanted) -> Result<Option<NonFinite>> {
    let roots: Vec<NodeRef> = tensors.iter().map(|t| t.node().clone()).collect();
    let recorded = recorded_once(&roots);
    for leaf in &recorded.leaves {
        if let Some(found) = find_in(leaf, None, &ready_tensor(leaf)?, unwanted)? {
            return Ok(Some(found));
        }
    }
    let values = every_value(&recorded, &EvalOptions { cache: false, ..EvalOptions::default() })?;
    for (node, expr) in &recorded.pending {
        let tensor = match values.get(&node.id()) {
            Some(tensor) => tensor.clone(),
            // it was ready before, or another thread made it so meanwhile
            None => ready_tensor(node)?,
        };
        if let Some(found) = find_in(node, Some(expr), &tensor, unwanted)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
