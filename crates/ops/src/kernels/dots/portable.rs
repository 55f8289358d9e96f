//! The products for every machine.

use super::panel::{Tile, SIDE};
use super::segment::segments;
use super::{Columns, Grid, Narrow, Rows, LANES};
use crate::fault;
use crate::row::reduce::fold;
use crate::simd::{mul_add, versions};
use std::ops::Range;

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
        out.put(i, at + j, &products::<E, FMA, R>(x.row(i), rows)[..count]);
    }
}

/// The products of a row with `R` others.
#[inline(always)]
fn products<E: Narrow, const FMA: bool, const R: usize>(x: &[f32], w: [&[E]; R]) -> [f32; R] {
    let mut totals = [[0f32; LANES]; R];
    for (part, within) in segments(x.len()).enumerate() {
        let sums = segment::<E, FMA, R>(&x[within.clone()], w.map(|row| &row[within.clone()]));
        for (totals, sums) in totals.iter_mut().zip(sums) {
            for (total, sum) in totals.iter_mut().zip(sums) {
                // a zero and a -0 would make a 0
                *total = if part > 0 { *total + sum } else { sum };
            }
        }
    }
    totals.map(|mut sums| fold(&mut sums, |a, b| a + b))
}

/// The sums of one segment.
#[inline(always)]
fn segment<E: Narrow, const FMA: bool, const R: usize>(x: &[f32], w: [&[E]; R]) -> [[f32; LANES]; R] {
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
    sums
}

/// As `panel::pack`.
pub(super) fn pack<E: Narrow>(row: &[E], count: usize, r: usize, to: &mut [f32]) {
    for (from, step) in row.chunks(LANES).zip(to.chunks_exact_mut(count * LANES)) {
        let (filled, rest) = step[r * LANES..(r + 1) * LANES].split_at_mut(from.len());
        E::widen(from, filled);
        rest.fill(0.0);
    }
}

/// As `Right::pack`.
pub(super) fn pack_columns<E: Narrow>(w: Columns<'_, E>, j: usize, within: Range<usize>, panels: &mut [f32]) {
    let steps = within.len().div_ceil(LANES);
    for step in 0..steps {
        let first = within.start + step * LANES;
        // a square of sixteen by sixteen numbers, zeros where there are none
        let mut square = [[0f32; LANES]; LANES];
        for (i, row) in square.iter_mut().enumerate().take(within.end - first) {
            let numbers = w.row(first + i, j, LANES);
            E::widen(numbers, &mut row[..numbers.len()]);
        }
        for r in 0..LANES {
            let at = (r / SIDE * steps + step) * SIDE * LANES + r % SIDE * LANES;
            for (to, row) in panels[at..at + LANES].iter_mut().zip(&square) {
                *to = row[r];
            }
        }
    }
}

versions! {
/// Adds x times a run of elements to as many sums.
pub(super) fn scaled<E: Narrow>(x: f32, w: &[E], sums: &mut [f32]) = scaled_body;
}

#[inline(always)]
fn scaled_body<E: Narrow, const FMA: bool>(x: f32, w: &[E], sums: &mut [f32]) {
    for (sum, &w) in sums.iter_mut().zip(w) {
        *sum = mul_add::<FMA>(x, w.to_f32(), *sum);
    }
}

/// As `panel::tile`.
pub(super) fn tile<const M: usize>(tile: Tile<'_>) -> [f32; LANES] {
    let Tile { x, w, last, goes_on, ends, sums: kept, .. } = tile;
    let last = if fault::active("dot.tail") && last < LANES { 0 } else { last };
    for r in 0..M {
        steps(x.get(r * LANES..).unwrap_or_default(), M * LANES, w, last, r, goes_on, &mut kept[..]);
    }
    let mut folded = [0f32; LANES];
    if ends {
        for (i, sums) in kept.chunks_exact_mut(LANES).enumerate() {
            let (l, r) = (i / SIDE, i % SIDE);
            folded[r * SIDE + l] = fold(sums, |a, b| a + b);
        }
    }
    folded
}

versions! {
/// The products of row `r` of x, sixteen of whose numbers stand at every `pitch`, with four rows of the weight, added to those that are
/// kept if it `goes_on`.
fn steps<>(x: &[f32], pitch: usize, w: &[f32], last: usize, r: usize, goes_on: bool, kept: &mut [f32]) = steps_body;
}

#[inline(always)]
fn steps_body<const FMA: bool>(
    x: &[f32],
    pitch: usize,
    w: &[f32],
    last: usize,
    r: usize,
    goes_on: bool,
    kept: &mut [f32],
) {
    let mut sums = [[0f32; LANES]; SIDE];
    let count = w.len() / (SIDE * LANES);
    for (i, (x, w)) in x.chunks(pitch).zip(w.chunks_exact(SIDE * LANES)).enumerate() {
        // a length that the compiler knows
        let Some(Ok(x)) = x.get(..LANES).map(<&[f32; LANES]>::try_from) else {
            continue;
        };
        let many = if i + 1 < count { LANES } else { last };
        for (sums, w) in sums.iter_mut().zip(w.chunks_exact(LANES)) {
            if many == LANES {
                for ((sum, &x), &w) in sums.iter_mut().zip(x).zip(w) {
                    *sum = mul_add::<FMA>(x, w, *sum);
                }
            } else {
                for ((sum, &x), &w) in sums.iter_mut().zip(x).zip(w).take(many) {
                    *sum = mul_add::<FMA>(x, w, *sum);
                }
            }
        }
    }
    for (l, sums) in sums.iter().enumerate() {
        let at = (l * SIDE + r) * LANES;
        for (kept, sum) in kept[at..at + LANES].iter_mut().zip(sums) {
            *kept = if goes_on { *kept + *sum } else { *sum };
        }
    }
}
