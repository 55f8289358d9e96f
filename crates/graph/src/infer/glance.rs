//! What is inferred at a glance.

use super::{Meta, MAX_RANK};
use crate::op::Op;
use candle_core::DType;

/// Dims that are those of an input, or such with another last one.
#[derive(Clone, Copy)]
pub(crate) struct Glance<'a> {
    pub(crate) dims: &'a [usize],
    pub(crate) last: Option<usize>,
    pub(crate) dtype: DType,
}

/// What [`infer`](super::infer()) says of the ops and inputs that most are: elementwise ops on inputs that are alike, rows of softmax and
/// norms, and LoRA. `None` says nothing.
#[inline]
pub(crate) fn at_a_glance<'a>(op: &Op, inputs: &[Meta<'a>]) -> Option<Glance<'a>> {
    let first = inputs.first()?;
    // one dtype, of the few that all of these take
    let plain = matches!(first.dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16);
    if !plain || first.dims.len() > MAX_RANK || inputs.iter().any(|input| input.dtype != first.dtype) {
        return None;
    }
    let (dims, last) = match (op, inputs) {
        (Op::Unary(_) | Op::Affine, [_]) => (first.dims, None),
        (Op::Binary(_), [_, y]) if y.dims == first.dims => (first.dims, None),
        (Op::Softmax { dim } | Op::LogSoftmax { dim }, [_]) if usize::from(*dim) < first.dims.len() => {
            (first.dims, None)
        }
        (Op::RmsNorm { weight: true }, [_, w]) => match (first.dims, w.dims) {
            ([.., last], [width]) if last == width => (first.dims, None),
            _ => return None,
        },
        (Op::Lora { base: false }, [_, a, b]) => match (first.dims, a.dims, b.dims) {
            ([rows @ .., k], &[k2, r], &[r2, n]) if *k == k2 && r == r2 => (rows, Some(n)),
            _ => return None,
        },
        _ => return None,
    };
    // so few elements that no later size computation overflows
    let few = |n: usize, &d: &usize| n.checked_mul(d.max(1)).filter(|&n| n < 1 << 27);
    dims.iter().chain(&last).try_fold(1usize, few)?;
    Some(Glance { dims, last, dtype: first.dtype })
}
