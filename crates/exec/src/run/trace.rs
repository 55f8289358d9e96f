//! A recorded function as a plan with open leaves, run again and again.

use super::{capture_waiting, execute, plan, tensor_of, Executed, Terms};
use crate::config::{self, EvalOptions};
use crate::error::{Error, Result};
use crate::lower;
use crate::plan::Plan;
use crate::report::EvalReport;
use crate::tensor::LazyTensor;
use candle_core::{Tensor, TensorId};
use candle_lazy_graph::capture::LeafBinding;
use candle_lazy_graph::{Bindings, BuildSite, Captured, ErrorKind, FastMap, NodeId, NodeRef, Value};
use std::sync::Arc;

/// Where a result comes from.
enum From {
    /// From the plan, by the number of the output.
    Output(usize),
    /// An argument.
    Argument(usize),
    /// A tensor that was there before.
    Constant(Tensor),
}

/// A plan, and what to bind to it beside the arguments.
pub(crate) struct Trace {
    plan: Arc<Plan>,
    bindings: Bindings,
    /// For each leaf the argument that it stands for.
    arguments: Vec<Option<usize>>,
    results: Vec<From>,
    roots: Vec<NodeRef>,
}

impl Trace {
    /// Of `outputs`, recorded on `leaves`. Nothing is run.
    pub(crate) fn new(leaves: &[LazyTensor], outputs: Vec<LazyTensor>) -> Result<Self> {
        let options = EvalOptions::default();
        let tensors: Vec<Option<TensorId>> = leaves.iter().map(|x| x.node().tensor().map(|t| t.id())).collect();
        // by its tensor: a variable made of an argument is a node of its own on the same one
        let argument = |tensor: &Tensor| tensors.iter().position(|id| *id == Some(tensor.id()));
        let roots: Vec<NodeRef> = outputs.iter().map(|y| y.node().clone()).collect();
        drop(outputs);
        let Captured { graph, key, mut bindings } = capture_waiting(&roots, &options)?;
        let plan = match plan::find(key.hash(), key.words(), &options) {
            Some(plan) => {
                plan::hit();
                plan
            }
            None => {
                let plan = Arc::new(lower::make_plan(graph, &bindings, &options)?);
                plan::keep(key, &options, plan)
            }
        };
        let mut arguments = Vec::with_capacity(bindings.leaves.len());
        for leaf in &mut bindings.leaves {
            // it is read again at the next call
            leaf.exclusive = false;
            arguments.push(match &leaf.value {
                Value::Tensor(tensor) => argument(tensor),
                Value::Engine(_) | Value::Quantized(_) => None,
            });
        }
        let mut published: FastMap<NodeId, usize> = FastMap::default();
        for (output, nodes) in bindings.published().enumerate() {
            published.extend(nodes.map(|node| (node.id(), output)));
        }
        let mut results = Vec::with_capacity(roots.len());
        for root in &roots {
            results.push(match published.get(&root.id()) {
                Some(&output) => From::Output(output),
                None => {
                    let tensor = tensor_of(root)?;
                    argument(&tensor).map_or(From::Constant(tensor), From::Argument)
                }
            });
        }
        Ok(Self { plan, bindings, arguments, results, roots })
    }

    /// The results at `values`.
    pub(crate) fn run(&self, values: &[Tensor]) -> Result<Vec<LazyTensor>> {
        let missing = || Error::Internal("a compiled function with another number of arguments".into());
        let template = &self.bindings;
        let mut leaves = Vec::with_capacity(template.leaves.len());
        for (leaf, argument) in template.leaves.iter().zip(&self.arguments) {
            let value = match argument {
                Some(i) => Value::Tensor(values.get(*i).ok_or_else(missing)?.clone()),
                None => leaf.value.clone(),
            };
            leaves.push(LeafBinding { value, ..leaf.clone() });
        }
        let mut bindings = template.with_leaves(leaves);
        let terms = Terms { budget: config::memory_budget(), ..Terms::INSPECTION };
        let executed = execute(&self.plan, &mut bindings, &self.roots, terms, &mut EvalReport::default())?;
        let Executed::Values(found, lent) = executed else {
            return Err(Error::Internal("a compiled function took a leaf".into()));
        };
        lent.finish();
        let mut results = Vec::with_capacity(self.results.len());
        for from in &self.results {
            let tensor = match from {
                From::Argument(i) => values.get(*i).ok_or_else(missing)?.clone(),
                From::Constant(tensor) => tensor.clone(),
                From::Output(i) => match found.get(*i) {
                    Some(Value::Tensor(tensor)) => tensor.clone(),
                    _ => return Err(Error::Internal("a result of a compiled function is no tensor".into())),
                },
            };
            results.push(LazyTensor::from(tensor));
        }
        Ok(results)
    }
}

/// Refuses to evaluate `tensor` where a compiled function is being recorded.
pub(crate) fn refuse_while_recording(tensors: &[&LazyTensor]) -> Result<()> {
    if !config::is_recording() {
        return Ok(());
    }
    let Some(tensor) = tensors.iter().find(|t| !t.is_ready()) else {
        return Ok(());
    };
    let (op, _) = tensor.node().recorded().map_or(("leaf", 0), |(op, _)| (op.name(), 0));
    let detail =
        "it is evaluated inside of a compiled function, which only records: give what needs its value as an argument"
            .into();
    let site: &BuildSite = tensor.site();
    Err(candle_lazy_graph::Error::new(op, ErrorKind::Unsupported(detail)).on(&[tensor.node().meta()]).at(site).into())
}
