//! The products for every machine, four of the weight's rows at a time.

use super::{Grid, Narrow, Rows, LANES};
use crate::fault;
use crate::row::loops::fold;
use crate::simd::{mul_add, versions};

/// Rows of the weight that are summed together.
const TILE: usize = 4;

versions! {
/// As `dots`, columns from `at` on.
pub(super) fn dots<E: Narrow>(x: Rows<'_, f32>, w: Rows<'_, E>, out: &mut Grid<'_>, at: usize) = dots_body;
}

#[inline(always)]
fn dots_body<E: Narrow, const FMA: bool>(x: Rows<'_, f32>, w: Rows<'_, E>, out: &mut Grid<'_>, at: usize) {
    for i in 0..x.count {
        for j in (0..w.count).step_by(TILE) {
            let count = TILE.min(w.count - j);
            // rows that are not there repeat the last one
            let rows: [&[E]; TILE] = std::array::from_fn(|t| w.row(j + t.min(count - 1)));
            let sums = tile::<E, FMA>(x.row(i), rows);
            out.put(i, at + j, &sums[..count]);
        }
    }
}

/// The products of a row with [`TILE`] others.
#[inline(always)]
fn tile<E: Narrow, const FMA: bool>(x: &[f32], w: [&[E]; TILE]) -> [f32; TILE] {
    let mut sums = [[0f32; LANES]; TILE];
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
