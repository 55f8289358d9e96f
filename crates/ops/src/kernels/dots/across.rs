//! Few rows of x with the columns of a matrix, by AVX-512: neighbouring columns lie in a vector as they do in memory, so nothing is packed or
//! turned.
//!
//! A product has sixteen interleaved sums, folded in halves. Here one of the sixteen is made at a time, of every sixteenth row of the
//! matrix, for all rows of x and a strip of columns in registers. They come in the order of a binary counter whose bits are read the
//! other way round (0, 8, 4, 12, 2, …): each meets what it is folded with as soon as both are there, and four wait at most.

use super::segment::segments;
use super::{Columns, Grid, Narrow, Right, Rows, LANES};
use crate::fault;
use std::arch::x86_64::*;

/// How many steps ahead rows of the matrix are asked for.
const AHEAD: usize = 4;

/// How often a fold of sixteen halves them.
const LEVELS: usize = LANES.ilog2() as usize;

/// As `super::dots`.
pub(super) fn dots<E: Narrow>(x: Rows<'_, f32>, w: Columns<'_, E>, out: &mut Grid<'_>) {
    let mut i = 0;
    while i < x.count {
        // SAFETY: the caller takes this path only where the machine has AVX-512.
        i += unsafe {
            match x.count - i {
                1 => pass::<E, 1, 4>(x, i, w, out),
                2 | 3 => pass::<E, 2, 4>(x, i, w, out),
                4..8 => pass::<E, 4, 4>(x, i, w, out),
                _ => pass::<E, 8, 3>(x, i, w, out),
            }
        };
    }
}

/// `M` rows of x from `i` on with all columns, `V` vectors of them at a time; says how many rows of x that were.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn pass<E: Narrow, const M: usize, const V: usize>(
    x: Rows<'_, f32>,
    i: usize,
    w: Columns<'_, E>,
    out: &mut Grid<'_>,
) -> usize {
    let xs: [&[f32]; M] = std::array::from_fn(|r| x.row(i + r));
    for from in (0..w.count()).step_by(V * LANES) {
        let strip = match w.count() - from {
            left if left >= V * LANES => folded::<E, M, V, true>(xs, w, from),
            _ => folded::<E, M, V, false>(xs, w, from),
        };
        for (r, vectors) in strip.iter().enumerate() {
            for (v, vector) in vectors.iter().enumerate() {
                let mut numbers = [0f32; LANES];
                // SAFETY: sixteen numbers.
                unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), *vector) };
                out.put(i + r, from + v * LANES, &numbers);
            }
        }
    }
    M
}

/// The products of a strip of columns, which are all there if it is `WHOLE`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn folded<E: Narrow, const M: usize, const V: usize, const WHOLE: bool>(
    xs: [&[f32]; M],
    w: Columns<'_, E>,
    from: usize,
) -> [[__m512; V]; M] {
    let lanes = if fault::active("dots.across.lane") { LANES / 2 } else { LANES };
    let mut waiting = [[[_mm512_setzero_ps(); V]; M]; LEVELS];
    for n in 0..lanes {
        let mut sums = lane::<E, M, V, WHOLE>(xs, w, from, reversed(n));
        let mut level = 0;
        while n >> level & 1 == 1 {
            for (sums, earlier) in sums.iter_mut().zip(&waiting[level]) {
                for (sum, earlier) in sums.iter_mut().zip(earlier) {
                    *sum = _mm512_add_ps(*earlier, *sum);
                }
            }
            level += 1;
        }
        match waiting.get_mut(level) {
            Some(place) => *place = sums,
            None => return sums,
        }
    }
    waiting[LEVELS - 1]
}

/// The four bits of a number in the other order.
fn reversed(n: usize) -> usize {
    (0..LEVELS).fold(0, |bits, b| bits << 1 | n >> b & 1)
}

/// The sums of rows `lane`, `lane` + 16, … of the matrix, segment by segment.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn lane<E: Narrow, const M: usize, const V: usize, const WHOLE: bool>(
    xs: [&[f32]; M],
    w: Columns<'_, E>,
    from: usize,
    lane: usize,
) -> [[__m512; V]; M] {
    let mut totals = [[_mm512_setzero_ps(); V]; M];
    for (p, part) in segments(w.len()).enumerate() {
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        // a segment begins on a multiple of sixteen
        for l in (part.start + lane..part.end).step_by(LANES) {
            let row = w.row(l, from, V * LANES);
            let mut right = [_mm512_setzero_ps(); V];
            for (v, right) in right.iter_mut().enumerate() {
                // SAFETY: of a whole strip all numbers are there; otherwise the mask has a bit for each that is, and what it hides is not
                // read.
                *right = unsafe {
                    match WHOLE {
                        true => E::load(row.as_ptr().add(v * LANES), None),
                        false => {
                            let mask = match row.len().saturating_sub(v * LANES) {
                                left @ 0..LANES => (1u16 << left) - 1,
                                _ => u16::MAX,
                            };
                            E::load(row.as_ptr().wrapping_add(v * LANES), Some(mask))
                        }
                    }
                };
            }
            // a row of the matrix is a page away from the next, of which the machine makes nothing
            let ahead = w.row((l + AHEAD * LANES).min(w.len() - 1), from, V * LANES).as_ptr();
            for v in 0..V {
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(v * LANES).cast());
            }
            for (sums, x) in sums.iter_mut().zip(xs) {
                let left = _mm512_set1_ps(x[l]);
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = _mm512_fmadd_ps(left, right, *sum);
                }
            }
        }
        for (totals, sums) in totals.iter_mut().zip(sums) {
            for (total, sum) in totals.iter_mut().zip(sums) {
                // a zero and a -0 would make a 0
                *total = if p > 0 { _mm512_add_ps(*total, sum) } else { sum };
            }
        }
    }
    totals
}
