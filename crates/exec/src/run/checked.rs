//! Checked mode: the plan beside eager execution, node by node.
//!
//! Every recorded node is run as an output of one plan. Then each is judged alone, in the order of recording: Candle's own
//! op is applied to the *planned* values of its inputs, so that an error shows at the node that makes it and not at those
//! below. At last the plan that `eval` would run is run too, and its results must have the bits that were judged.

use super::inspect::{every_value, ready_tensor, recorded};
use super::{execute, failure, judge, planned, publish, tensor_of, Executed, Planned, Terms};
use crate::config::EvalOptions;
use crate::error::{Difference, Error, Result};
use crate::report::EvalReport;
use crate::tensor::LazyTensor;
use candle_core::Tensor;
use candle_lazy_graph::{FastMap, NodeId, NodeRef, Op};

/// Evaluates all tensors and checks every recorded node on the way against eager execution.
///
/// A node whose op is exact ([`Exactness`](candle_lazy_graph::Exactness)) must have the bits of Candle's own op on the same
/// inputs. Elsewhere the error against the same op in f64 may be 1.5 times that of Candle's op, or 2 units in the last
/// place of the dtype (2⁻²³ of the power of two below for f32, 2⁻⁵² for f64, 2⁻¹⁰ for f16, 2⁻⁷ for bf16) at the scale of
/// the row: the largest |value| in it, and for sums and products the largest Σ|aᵢ·bᵢ|, carried through the parts of a
/// composite by their derivatives. Two units, because a kernel of ours and Candle's may each be half a unit off after
/// every rounding; at the row's scale, because a sum that cancels keeps the error of its largest part.
///
/// It takes several times as long as `eval`, keeps every intermediate value until the end, and writes nothing in place.
///
/// # Errors
/// [`Error::Differs`] naming the first node that differs: then every node is still pending. Else as
/// [`crate::run::eval_all`].
pub fn eval_all_checked(tensors: &[&LazyTensor]) -> Result<Vec<Tensor>> {
    let roots: Vec<NodeRef> = tensors.iter().map(|t| t.node().clone()).collect();
    let judged = judge_all(&roots)?;
    run_checked(&roots, &judged)?;
    roots.iter().map(tensor_of).collect()
}

/// The planned values of the roots, after every node above them was judged.
fn judge_all(roots: &[NodeRef]) -> Result<FastMap<NodeId, Tensor>> {
    let recorded = recorded(roots);
    let mut values = every_value(&recorded, &EvalOptions { cache: false, ..EvalOptions::default() })?;
    for (node, expr) in &recorded.pending {
        // Candle's own kernels on both sides: there is nothing to compare with
        if matches!(expr.op, Op::Custom { .. } | Op::QMatmul) {
            continue;
        }
        let mut inputs = Vec::with_capacity(expr.inputs.len());
        for input in &expr.inputs {
            inputs.push(match values.get(&input.id()) {
                Some(tensor) => tensor.clone(),
                None => ready_tensor(input)?,
            });
        }
        // a node that is missing was made ready by another thread, and is that thread's
        if let Some(planned) = values.get(&node.id()) {
            if let Some(difference) = judge::judge(node, expr, &inputs, planned)? {
                return Err(Error::Differs(Box::new(difference)));
            }
        }
    }
    let kept = roots.iter().filter_map(|n| values.remove(&n.id()).map(|t| (n.id(), t))).collect();
    Ok(kept)
}

/// Runs the plan of the roots, compares its results with what was judged, and publishes them.
fn run_checked(roots: &[NodeRef], judged: &FastMap<NodeId, Tensor>) -> Result<()> {
    let options = EvalOptions::default();
    loop {
        let Planned { plan, mut bindings, .. } = planned(roots, &options)?;
        if bindings.publish.is_empty() {
            return Ok(());
        }
        for leaf in &mut bindings.leaves {
            // what differs is not published, so nothing may have been overwritten for it
            leaf.exclusive = false;
        }
        let mut report = EvalReport::default();
        let Executed::Values(values, lent) = execute(&plan, &mut bindings, roots, Terms::INSPECTION, &mut report)?
        else {
            continue;
        };
        lent.finish();
        for (nodes, value) in bindings.published().zip(&values) {
            let candle_lazy_graph::Value::Tensor(got) = value else {
                continue;
            };
            for node in nodes {
                let Some(want) = judged.get(&node.id()) else {
                    continue;
                };
                if let Some((index, planned, wanted)) = judge::different_bits(got, want)? {
                    let (op, operands) = failure::described(node).unwrap_or(("root", String::new()));
                    return Err(Error::Differs(Box::new(Difference {
                        op: op.to_string(),
                        operands,
                        dims: want.dims().to_vec(),
                        dtype: want.dtype(),
                        site: node.site().clone(),
                        index,
                        planned,
                        eager: wanted,
                        exact: None,
                        ulp: None,
                    })));
                }
            }
        }
        publish(&bindings, values);
        return Ok(());
    }
}
