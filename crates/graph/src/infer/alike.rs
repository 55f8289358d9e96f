//! What is inferred at a glance.

use super::{Meta, MAX_RANK};
use crate::op::Op;
use candle_core::DType;

/// The first input of an elementwise op on inputs that are alike, as most are: [`infer`](super::infer()) says that the result is like it. `None` says
/// nothing.
#[inline]
pub(crate) fn like_first<'a>(op: &Op, inputs: &[Meta<'a>]) -> Option<Meta<'a>> {
    let first = match (op, inputs) {
        (Op::Unary(_) | Op::Affine, [x]) => x,
        (Op::Binary(_), [x, y]) if x.dtype == y.dtype && x.dims == y.dims => x,
        _ => return None,
    };
    // so few elements that no later size computation overflows
    let few = first.dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)).filter(|&n| n < 1 << 27)).is_some();
    let plain = matches!(first.dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16);
    (few && plain && first.dims.len() <= MAX_RANK).then_some(*first)
}
