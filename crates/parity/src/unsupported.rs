//! The reviewed table: cells that Candle computes instead of a kernel of ours, and cells that nobody computes. Every entry
//! has its reason.

use crate::case::{Case, Layout};
use candle_core::DType;
use candle_lazy_graph::{Op, OpClass, ReduceOp, UnaryOp};

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
        op if op.class() == OpClass::Composite => None,
        _ => Some("`ops` offers composites only; a primitive on plain tensors is Candle's"),
    }
}

/// Why eager Candle's result is no measure for this case.
#[must_use]
pub fn eager_is_wrong(case: &Case) -> Option<&'static str> {
    let empty = case.inputs.iter().any(|i| i.dims.contains(&0));
    match &case.op {
        Op::Reduce { op: ReduceOp::Mean | ReduceOp::Var, .. } if empty => {
            Some("Candle's mean of nothing is not defined")
        }
        Op::Gather { dim } => {
            let (x, ids) = (&case.inputs.first()?.dims, &case.inputs.get(1)?.dims);
            let smaller = (0..x.len().min(ids.len())).any(|d| d != usize::from(*dim) && ids[d] < x[d]);
            smaller.then_some("Candle's gather reads wrong elements where an index dim is smaller than the source's")
        }
        _ => None,
    }
}

/// Why eager Candle has no result for this case.
#[must_use]
pub fn eager_refuses(case: &Case) -> Option<&'static str> {
    match &case.op {
        Op::Arange { .. } => Some("Candle's arange adds up its steps one by one: it is no twin"),
        Op::Random { .. } => Some("Candle's random numbers have no key: they are no twin"),
        _ => None,
    }
}

/// Why the gradient of this case cannot be measured: eager Candle has none.
#[must_use]
pub fn no_gradient(case: &Case) -> Option<&'static str> {
    match &case.op {
        _ => eager_refuses(case),
    }
}

/// Why lazy evaluation of tracked leaves may round the gradient otherwise than eager does, or `None` where it has eager's bits.
#[must_use]
pub fn gradient_rounds(case: &Case) -> Option<&'static str> {
    match &case.op {
        _ => None,
    }
}
