//! What is inferred at a glance.

use super::{out, Meta, OutMeta, MAX_RANK};
use crate::op::{Dims, Op};
use candle_core::DType;

/// What [`infer`](super::infer()) says of the ops and inputs that most are: elementwise ops on inputs that are alike, rows of softmax and
/// norms, and LoRA. `None` says nothing.
#[inline]
pub(crate) fn at_a_glance(op: &Op, inputs: &[Meta<'_>]) -> Option<OutMeta> {
    let first = inputs.first()?;
    // one dtype, of the few that all of these take
    let plain = matches!(first.dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16);
    if !plain || first.dims.len() > MAX_RANK || inputs.iter().any(|input| input.dtype != first.dtype) {
        return None;
    }
    let dims = match (op, inputs) {
        (Op::Unary(_) | Op::Affine, [_]) => Dims::from_slice(first.dims),
        (Op::Binary(_), [_, y]) if y.dims == first.dims => Dims::from_slice(first.dims),
        (Op::Softmax { dim } | Op::LogSoftmax { dim }, [_]) if usize::from(*dim) < first.dims.len() => {
            Dims::from_slice(first.dims)
        }
        (Op::RmsNorm { weight: true }, [_, w]) => match (first.dims, w.dims) {
            ([.., last], [width]) if last == width => Dims::from_slice(first.dims),
            _ => return None,
        },
        (Op::Lora { base: false }, [_, a, b]) => match (first.dims, a.dims, b.dims) {
            ([rows @ .., k], &[k2, r], &[r2, n]) if *k == k2 && r == r2 => {
                let mut dims = Dims::from_slice(rows);
                dims.push(n);
                dims
            }
            _ => return None,
        },
        _ => return None,
    };
    // so few elements that no later size computation overflows
    let few = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)).filter(|&n| n < 1 << 27)).is_some();
    few.then(|| out(dims, first.dtype))
}
