//! The reviewed table: cells that Candle computes instead of a kernel of ours, and cells that nobody computes. Every entry
//! has its reason.

use crate::case::{Case, Domain, InputSpec};
use candle_core::DType;
use candle_lazy_graph::{BinaryOp, Op, OpClass, ReduceOp, ScatterOp, UnaryOp};

/// Why Candle's own op may run for this case, or `None` where a kernel of ours must.
#[must_use]
pub fn candle_runs(case: &Case) -> Option<&'static str> {
    let whole = |i: usize| case.inputs.get(i).is_some_and(|x| !x.dtype.is_float());
    match &case.op {
        Op::Binary(_) | Op::Affine | Op::Compare(_) | Op::CompareScalar(_) if whole(0) => {
            Some("integer arithmetic is Candle's: no kernel of ours computes in integers yet")
        }
        Op::Reduce { op: ReduceOp::Sum | ReduceOp::Max | ReduceOp::Min, .. } if whole(0) => {
            Some("integer reductions are Candle's: no kernel of ours computes in integers yet")
        }
        Op::QMatmul => Some("quantised products are Candle's: no kernel of ours reads its blocks yet"),
        Op::Where if whole(1) => Some("a choice between integers is Candle's: row programs hold floats"),
        Op::Where if matches!(case.inputs.first().map(|i| i.dtype), Some(DType::U32 | DType::I64)) => {
            Some("a wide integer condition is Candle's: row programs read u8 conditions")
        }
        _ => None,
    }
}

/// Why the `ops` functions on plain tensors do not have this op.
#[must_use]
pub fn no_function(op: &Op) -> Option<&'static str> {
    match op {
        Op::Glu { act: UnaryOp::Relu | UnaryOp::Sigmoid } => {
            Some("neither `LazyTensor` nor `ops` names this gated unit: no model of today's has it")
        }
        Op::Unary(UnaryOp::Gelu | UnaryOp::GeluErf | UnaryOp::Silu) | Op::Matmul => None,
        Op::LoraSegments { .. } => {
            Some("an op that Candle tracks takes three inputs; `kernels::lora_segments` takes views")
        }
        Op::AttentionBackward { .. } => Some("on plain tensors it is what `ops::attention` leaves on Candle's tape"),
        op if op.class() == OpClass::Composite => None,
        _ => Some("`ops` offers composites only; a primitive on plain tensors is Candle's"),
    }
}

/// Why eager Candle's result is no measure for this case.
#[must_use]
pub fn eager_is_wrong(case: &Case) -> Option<&'static str> {
    match &case.op {
        Op::Binary(BinaryOp::Pow) if signed_power(case) => {
            Some("Candle's power is exp(b·log a), no number where a is negative")
        }
        Op::Reduce { op: ReduceOp::Var, axes, .. } => {
            let count =
                case.inputs.first()?.dims.iter().enumerate().filter(|(d, _)| axes & (1 << d) != 0).map(|(_, n)| n);
            (count.product::<usize>() == 0)
                .then_some("Candle divides the variance of no elements by 0 − 1 in usize: a panic, or a zero without overflow checks")
        }
        Op::Gather { dim } => {
            let (x, ids, dim) = (&case.inputs.first()?.dims, &case.inputs.get(1)?.dims, usize::from(*dim));
            // what lies before dim and what lies behind it are counted flat, by the sizes of the ids: right where these are the
            // source's, but for the first dim of either part
            let wrong = (1..x.len()).any(|d| d != dim && d != dim + 1 && ids[d] != x[d]);
            wrong.then_some(
                "Candle's gather reads wrong elements where ids are smaller than the source in a dim that it counts by",
            )
        }
        _ => None,
    }
}

/// Whether numbers that may be negative are raised to a power.
fn signed_power(case: &Case) -> bool {
    let positive = |i: usize| case.inputs.get(i).is_some_and(|i| i.domain == Domain::Positive);
    case.dtype().is_float() && !positive(0)
}

/// Why a result of Candle's own op, replayed, is wrong for this case.
#[must_use]
pub fn replay_is_wrong(case: &Case) -> Option<&'static str> {
    match &case.op {
        Op::Binary(BinaryOp::Pow) if signed_power(case) => {
            Some("Candle's power, which a replay asks for, is exp(b·log a), no number where a is negative")
        }
        _ => None,
    }
}

/// Why an op has no twin at all.
#[must_use]
pub fn no_twin(op: &Op) -> Option<&'static str> {
    match op {
        Op::Arange { .. } => Some("no twin: Candle's arange adds up its steps one by one, which rounds more often"),
        Op::Random { .. } => Some("no twin: Candle's random numbers have no key"),
        _ => None,
    }
}

/// Why eager Candle gives nothing to compare this case with.
#[must_use]
pub fn without_eager(case: &Case) -> Option<&'static str> {
    no_twin(&case.op).or_else(|| eager_is_wrong(case)).or_else(|| eager_refuses(case))
}

/// Why eager Candle refuses this case.
#[must_use]
pub fn eager_refuses(case: &Case) -> Option<&'static str> {
    let empty = case.inputs.first().is_some_and(|i| i.dims.contains(&0));
    match &case.op {
        Op::Attention { .. } | Op::AttentionBackward { .. } if empty => {
            Some("Candle's softmax of the scores finds no largest element where there is none")
        }
        Op::Reduce { op: ReduceOp::Max | ReduceOp::Min | ReduceOp::LogSumExp, .. } | Op::ArgReduce { .. } if empty => {
            Some("Candle finds no largest element in a tensor without elements, along dims that have some neither")
        }
        Op::Softmax { .. } | Op::LogSoftmax { .. } if empty => Some(
            "Candle's softmax begins with the largest element, which it does not find in a tensor without elements",
        ),
        _ => None,
    }
}

/// Why the gradient of this case cannot be measured: eager Candle has none.
#[must_use]
pub fn no_gradient(case: &Case) -> Option<&'static str> {
    match &case.op {
        Op::Scatter { op: ScatterOp::Add, .. } if case.inputs[0].dims != case.inputs[1].dims => {
            Some("Candle's backward of scatter_add scatters zeros of x's size, which the ids must have then")
        }
        Op::Gather { dim } => {
            let (x, ids) = (&case.inputs[0].dims, &case.inputs[1].dims);
            (0..x.len())
                .any(|d| d != usize::from(*dim) && ids[d] != x[d])
                .then_some("Candle's backward of gather scatters into x, whose other dims the ids must have then")
        }
        _ => no_twin(&case.op).or_else(|| eager_refuses(case)),
    }
}

/// Why the gradient of an input is no measure where Candle's autograd takes it back through the input's view.
#[must_use]
pub fn fold_stalls(input: &InputSpec) -> Option<&'static str> {
    let digits = match input.dtype {
        DType::BF16 => 8,
        DType::F16 => 11,
        _ => return None,
    };
    let terms = input.dims.iter().product::<usize>() / input.storage_dims().iter().product::<usize>().max(1);
    (terms > 1 << digits).then_some(
        "Candle adds up a broadcast leaf's gradients in their dtype, where a sum of so many equal terms stops growing",
    )
}

/// Why candle-nn has no module for this case.
#[must_use]
pub fn no_module(case: &Case) -> Option<&'static str> {
    match &case.op {
        Op::RmsNorm { .. } | Op::LayerNorm { .. } if case.dtype() == DType::F64 => {
            Some("candle-nn's norms have no kernel for f64")
        }
        Op::RmsNorm { .. } | Op::LayerNorm { .. } if case.inputs.first().is_some_and(|i| i.dims.last() == Some(&0)) => {
            Some("candle-nn's norms divide by the width of a row")
        }
        _ => None,
    }
}
