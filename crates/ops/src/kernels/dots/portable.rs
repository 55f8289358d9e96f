//! The products for every machine.

use super::{Grid, Narrow, Rows, LANES};
use crate::fault;
use crate::row::reduce::fold;
use crate::simd::{mul_add, versions};

/// Rows of the weight that are summed together once they are in the cache.
const TILE: usize = 4;

versions! {
/// As `dots`, columns from `at` on.
pub(super) fn dots<E: Narrow>(x: Rows<'_, f32>, w: Rows<'_, E>, out: &mut Grid<'_>, at: usize) = dots_body;
}

#[inline(always)]
fn dots_body<E: Narrow, const FMA: bool>(x: Rows<'_, f32>, w: Rows<'_, E>, out: &mut Grid<'_>, at: usize) {
    for i in 0..x.count {
        match i {
            0 => row::<E, FMA, 1>(x, i, w, out, at),
            _ => row::<E, FMA, TILE>(x, i, w, out, at),
        }
    }
}

/// Row `i` of x with all rows of the weight, `R` at a time.
#[inline(always)]
fn row<E: Narrow, const FMA: bool, const R: usize>(
    x: Rows<'_, f32>,
    i: usize,
    w: Rows<'_, E>,
    out: &mut Grid<'_>,
    at: usize,
) {
    for j in (0..w.count).step_by(R) {
        let count = R.min(w.count - j);
        // rows that are not there repeat the last one
        let rows: [&[E]; R] = std::array::from_fn(|t| w.row(j + t.min(count - 1)));
        out.put(i, at + j, &tile::<E, FMA, R>(x.row(i), rows)[..count]);
    }
}

/// The products of a row with `R` others.
#[inline(always)]
fn tile<E: Narrow, const FMA: bool, const R: usize>(x: &[f32], w: [&[E]; R]) -> [f32; R] {
    let mut sums = [[0f32; LANES]; R];
    let whole = x.len() / LANES * LANES;
    for l in (0..whole).step_by(LANES) {
        for (sums, w) in sums.iter_mut().zip(&w) {
            // lengths that the compiler knows
            if let (Some(Ok(x)), Some(Ok(w))) =
                (x.get(l..l + LANES).map(<&[f32; LANES]>::try_from), w.get(l..l + LANES).map(<&[E; LANES]>::try_from))
            {
                for ((sum, &x), &w) in sums.iter_mut().zip(x).zip(w) {
                    *sum = mul_add::<FMA>(x, w.to_f32(), *sum);
                }
            }
        }
    }
    if !fault::active("dot.tail") {
        for (sums, w) in sums.iter_mut().zip(&w) {
            for ((sum, &x), &w) in sums.iter_mut().zip(&x[whole..]).zip(&w[whole..]) {
                *sum = mul_add::<FMA>(x, w.to_f32(), *sum);
            }
        }
    }
    sums.map(|mut sums| fold(&mut sums, |a, b| a + b))
}
