//! Inner products in a fixed order.

use crate::fault;
use crate::math::Real;
use crate::row::reduce::fold;

/// Σ aᵢ·bᵢ with 16 interleaved accumulators folded in halves: the order depends on the length alone.
#[inline(always)]
pub(crate) fn dot<T: Real, const FMA: bool>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::ZERO; 16];
    let (mut ca, mut cb) = (a.chunks_exact(16), b.chunks_exact(16));
    for (x, y) in (&mut ca).zip(&mut cb) {
        for ((l, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
            *l = x.mul_add::<FMA>(y, *l);
        }
    }
    let rest = if fault::active("dot.tail") { &[] } else { ca.remainder() };
    for ((l, &x), &y) in lanes.iter_mut().zip(rest).zip(cb.remainder()) {
        *l = x.mul_add::<FMA>(y, *l);
    }
    fold(&mut lanes, |a, b| a + b)
}
