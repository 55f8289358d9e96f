//! The module of `nn` for an op, against candle-nn's module.

use super::gradient::{gradients, judge_gradients, Fold};
use super::{Cell, Outcome, Subject};
use crate::compare::rounding;
use crate::{unsupported, Result};
use candle_core::Tensor;
use candle_lazy_exec::LazyTensor;
use candle_lazy_graph::{Op, UnaryOp};
use candle_lazy_nn::{self as ours, Module as _};
use candle_nn::{self as theirs, Module as _};

/// The result of our module, recorded.
fn record(op: &Op, s: &[f64], x: &[LazyTensor]) -> Option<ours::Result<LazyTensor>> {
    let bias = |has: bool, at: usize| has.then(|| x[at].clone());
    Some(match op {
        Op::Unary(f) => activation(*f)?.0.forward(&x[0]),
        Op::Linear { bias: b } => ours::Linear::new(x[1].clone(), bias(*b, 2)).and_then(|m| m.forward(&x[0])),
        Op::RmsNorm { weight: true } => ours::RmsNorm::new(x[1].clone(), s[0]).and_then(|m| m.forward(&x[0])),
        Op::LayerNorm { weight: true, bias: b } => {
            ours::LayerNorm::new(x[1].clone(), bias(*b, 2), s[0]).and_then(|m| m.forward(&x[0]))
        }
        Op::Embedding => ours::Embedding::new(x[0].clone()).and_then(|m| m.forward(&x[1])),
        Op::Lora { base: false } => lora(x, s[0]),
        _ => return None,
    })
}

/// An adapter on a base of zeros: only the adapter is left.
fn lora(x: &[LazyTensor], scale: f64) -> ours::Result<LazyTensor> {
    let (features, out) = (x[1].dims()[0], x[2].dims()[1]);
    let zeros = LazyTensor::zeros((out, features), x[0].dtype(), x[0].device())?;
    let mut module = ours::LoraLinear::new(ours::Linear::new(zeros, None)?);
    module.set_adapter(Some(ours::LoraWeights::new(x[1].clone(), x[2].clone(), scale)?))?;
    module.forward(&x[0])
}

fn activation(f: UnaryOp) -> Option<(ours::Activation, theirs::Activation)> {
    Some(match f {
        UnaryOp::Gelu => (ours::Activation::GeluTanh, theirs::Activation::GeluPytorchTanh),
        UnaryOp::GeluErf => (ours::Activation::Gelu, theirs::Activation::Gelu),
        UnaryOp::Relu => (ours::Activation::Relu, theirs::Activation::Relu),
        UnaryOp::Silu => (ours::Activation::Silu, theirs::Activation::Silu),
        UnaryOp::Sigmoid => (ours::Activation::Sigmoid, theirs::Activation::Sigmoid),
        _ => return None,
    })
}

/// The result of candle-nn's module, where it has one that takes these inputs.
fn eager(op: &Op, s: &[f64], x: &[Tensor]) -> Option<candle_core::Result<Tensor>> {
    Some(match op {
        Op::Unary(f) => activation(*f)?.1.forward(&x[0]),
        // its kernels refuse what does not lie in order, and a vector
        Op::Linear { bias } if x[0].rank() > 1 => {
            theirs::Linear::new(x[1].contiguous().ok()?, bias.then(|| x[2].clone())).forward(&x[0].contiguous().ok()?)
        }
        Op::RmsNorm { weight: true } => {
            theirs::RmsNorm::new(x[1].contiguous().ok()?, s[0]).forward(&x[0].contiguous().ok()?)
        }
        Op::LayerNorm { weight: true, bias } => {
            let w = x[1].contiguous().ok()?;
            let module = match bias {
                true => theirs::LayerNorm::new(w, x[2].contiguous().ok()?, s[0]),
                false => theirs::LayerNorm::new_no_bias(w, s[0]),
            };
            module.forward(&x[0].contiguous().ok()?)
        }
        Op::Embedding => {
            theirs::Embedding::new(x[0].contiguous().ok()?, x[0].dim(1).ok()?).forward(&x[1].contiguous().ok()?)
        }
        _ => return None,
    })
}

/// Our module's result against candle-nn's and the reference; on tracked inputs, its gradients.
pub(super) fn check(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    let leaves: Vec<LazyTensor> = subject.inputs.iter().map(LazyTensor::from).collect();
    let Some(y) = record(&case.op, &case.scalars, &leaves) else {
        return Ok(None);
    };
    let (got, report) = y?.eval_with_report()?;
    let mut cell = subject.verdict("nn-module", &got)?;
    cell.kernels = report.kernels;
    let module = match unsupported::no_module(case) {
        Some(_) => None,
        None => super::contained(|| Ok(eager(&case.op, &case.scalars, &subject.inputs).transpose()?))?,
    };
    if let (Outcome::Passed, Some(module), false) = (&cell.outcome, module, case.is_special()) {
        cell.judged_by(rounding("nn-module against candle-nn's", &got, Some(&module), &subject.judged, 1.0)?);
    }
    let judged = cell.outcome == Outcome::Passed && got.dtype().is_float() && !case.is_special();
    if judged && case.inputs.iter().any(|i| i.dtype.is_float()) {
        let (vars, inputs) = case.tracked_inputs(subject.seed)?;
        let leaves: Vec<LazyTensor> = inputs.iter().map(LazyTensor::from).collect();
        if let Some(y) = record(&case.op, &case.scalars, &leaves) {
            cell.and(judge_gradients(subject, gradients(&y?.eval()?, &vars), Fold::Candle)?);
        }
    }
    Ok(Some(cell))
}
