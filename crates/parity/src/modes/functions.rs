//! The functions of `ops` on plain tensors.

use super::gradient::{gradients, judge_gradients, Fold};
use super::{Cell, Outcome, Subject};
use crate::{unsupported, Result};
use candle_core::Tensor;
use candle_lazy_graph::{Op, UnaryOp};
use candle_lazy_ops as ops;

/// The function for an op, or `None` where `ops` has none.
fn run(op: &Op, s: &[f64], x: &[Tensor]) -> Option<candle_core::Result<Tensor>> {
    Some(match op {
        Op::Unary(UnaryOp::Gelu) => ops::gelu(&x[0]),
        Op::Unary(UnaryOp::GeluErf) => ops::gelu_erf(&x[0]),
        Op::Unary(UnaryOp::Silu) => ops::silu(&x[0]),
        Op::Glu { act: UnaryOp::Silu } => ops::silu_mul(&x[0], &x[1]),
        Op::Glu { act: UnaryOp::Gelu } => ops::gelu_mul(&x[0], &x[1]),
        Op::Glu { act: UnaryOp::GeluErf } => ops::gelu_erf_mul(&x[0], &x[1]),
        Op::Embedding => ops::embedding(&x[0], &x[1]),
        Op::Matmul => ops::matmul(&x[0], &x[1]),
        Op::Softmax { dim } => ops::softmax(&x[0], usize::from(*dim)),
        Op::LogSoftmax { dim } => ops::log_softmax(&x[0], usize::from(*dim)),
        Op::RmsNorm { weight } => ops::rms_norm(&x[0], weight.then(|| &x[1]), s[0]),
        Op::LayerNorm { weight, bias } => {
            let b = if *weight { 2 } else { 1 };
            ops::layer_norm(&x[0], weight.then(|| &x[1]), bias.then(|| &x[b]), s[0])
        }
        Op::GroupNorm { groups, weight, bias } => {
            let b = if *weight { 2 } else { 1 };
            ops::group_norm(&x[0], *groups, weight.then(|| &x[1]), bias.then(|| &x[b]), s[0])
        }
        Op::CrossEntropy => ops::cross_entropy(&x[0], &x[1]),
        Op::Linear { bias } => ops::linear(&x[0], &x[1], bias.then(|| &x[2])),
        Op::Lora { base: false } => ops::lora(&x[0], &x[1], &x[2], s[0]),
        Op::Lora { base: true } => ops::lora_add(&x[3], &x[0], &x[1], &x[2], s[0]),
        Op::Rope { interleaved: false } => ops::rope(&x[0], &x[1], &x[2]),
        Op::Rope { interleaved: true } => ops::rope_i(&x[0], &x[1], &x[2]),
        Op::Attention { mask, causal, softcap, window } => {
            let params =
                ops::AttentionParams { scale: s[0], causal: *causal, softcap: softcap.then(|| s[1]), window: *window };
            ops::attention(&x[0], &x[1], &x[2], mask.then(|| &x[3]), &params)
        }
        _ => return None,
    })
}

/// The cell of an op without a function: none where the table says why there is none.
fn without(op: &Op) -> Option<Cell> {
    let wrong = format!("`ops` has no function for {op}, and the table of unsupported cells no reason");
    unsupported::no_function(op).is_none().then(|| Cell::of(Outcome::Failed(wrong)))
}

/// The function's result.
pub(super) fn check(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    let Some(got) = run(&case.op, &case.scalars, &subject.inputs) else {
        return Ok(without(&case.op));
    };
    Ok(Some(subject.verdict("ops", &got?)?))
}

/// The function's result and gradients on tracked tensors.
pub(super) fn check_tracked(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    if case.is_special() || !case.inputs.iter().any(|i| i.dtype.is_float()) {
        return Ok(None);
    }
    let (vars, inputs) = case.tracked_inputs(subject.seed)?;
    let Some(got) = run(&case.op, &case.scalars, &inputs) else {
        return Ok(without(&case.op));
    };
    let got = got?;
    let mut cell = subject.verdict("ops, tracked", &got)?;
    if matches!(cell.outcome, Outcome::Passed) {
        cell.and(judge_gradients(subject, gradients(&got, &vars), Fold::Candle)?);
    }
    Ok(Some(cell))
}
