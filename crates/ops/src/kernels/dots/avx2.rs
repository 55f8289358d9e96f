//! The products of a tile by AVX2 and FMA, number for number those of the loops: two vectors hold the sixteen sums of a product.

use super::panel::{Tile, SIDE, SUMS};
use super::LANES;
use crate::fault;
use std::arch::x86_64::*;

/// Numbers of a vector.
const VECTOR: usize = 8;
/// Rows of each side that are summed at once: four products take eight of the sixteen registers, and each load serves one of them.
const AT_ONCE: usize = 2;

/// As `panel::tile`.
#[target_feature(enable = "avx2,fma")]
pub(super) fn tile<const M: usize>(tile: Tile<'_>) -> [f32; LANES] {
    let Tile { x, w, last, goes_on, ends, sums: kept, .. } = tile;
    let steps = (x.len() / (M * LANES)).min(w.len() / (SIDE * LANES));
    let last = if fault::active("dot.tail") && last < LANES { 0 } else { last };
    for r in (0..M).step_by(AT_ONCE) {
        for l in (0..SIDE).step_by(AT_ONCE) {
            // SAFETY: the panels have `steps` times so many rows of sixteen numbers, and rows `r` and `l` are among them, with the
            // next ones where there are two; see `SUMS` for `kept`.
            unsafe {
                match M - r {
                    1 => products::<M, 1>(x, w, (r, l), steps, last, goes_on, kept),
                    _ => products::<M, 2>(x, w, (r, l), steps, last, goes_on, kept),
                }
            }
        }
    }
    let mut folded = [0f32; LANES];
    if ends {
        for (i, sums) in kept.chunks_exact(LANES).enumerate() {
            let (l, r) = (i / SIDE, i % SIDE);
            // SAFETY: a chunk has sixteen numbers.
            folded[r * SIDE + l] = unsafe { fold(sums.as_ptr()) };
        }
    }
    folded
}

/// The sums of rows `r..r + R` of x and `l..l + 2` of the weight, added to those that are kept if `goes_on`. Of the last step `last`
/// elements count.
///
/// # Safety
/// `x` has `steps` times `M` rows of sixteen numbers, `w` four; `r + R <= M`, `l + 2 <= 4`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn products<const M: usize, const R: usize>(
    x: &[f32],
    w: &[f32],
    (r, l): (usize, usize),
    steps: usize,
    last: usize,
    goes_on: bool,
    kept: &mut [f32; SUMS],
) {
    // SAFETY: the caller's promise, and `kept` has sixteen numbers for each of four rows of x of each of four of the weight.
    unsafe {
        let place = |j: usize, i: usize, half: usize| ((l + j) * SIDE + r + i) * LANES + half * VECTOR;
        let mut sums = [[[_mm256_setzero_ps(); 2]; R]; AT_ONCE];
        let add = |step: usize, sums: &mut [[[__m256; 2]; R]; AT_ONCE], there: Option<[__m256; 2]>| {
            let (x, w) = (x.as_ptr().add((step * M + r) * LANES), w.as_ptr().add((step * SIDE + l) * LANES));
            for half in 0..2 {
                let mut left = [_mm256_setzero_ps(); R];
                for (i, left) in left.iter_mut().enumerate() {
                    *left = _mm256_loadu_ps(x.add(i * LANES + half * VECTOR));
                }
                for (j, sums) in sums.iter_mut().enumerate() {
                    let right = _mm256_loadu_ps(w.add(j * LANES + half * VECTOR));
                    for (sums, left) in sums.iter_mut().zip(left) {
                        let next = _mm256_fmadd_ps(left, right, sums[half]);
                        // sums of elements that are not there stay as they are: adding a zero would make a -0 a 0
                        sums[half] = match there {
                            None => next,
                            Some(there) => _mm256_blendv_ps(sums[half], next, there[half]),
                        };
                    }
                }
            }
        };
        let whole = steps - usize::from(last < LANES && steps > 0);
        for step in 0..whole {
            add(step, &mut sums, None);
        }
        if whole < steps && last > 0 {
            let lanes: [f32; LANES] = std::array::from_fn(|i| if i < last { -1.0 } else { 0.0 });
            let there = [_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes.as_ptr().add(VECTOR))];
            add(whole, &mut sums, Some(there));
        }
        for (j, sums) in sums.iter().enumerate() {
            for (i, sums) in sums.iter().enumerate() {
                for (half, sum) in sums.iter().enumerate() {
                    let at = kept.as_mut_ptr().add(place(j, i, half));
                    let total = if goes_on { _mm256_add_ps(_mm256_loadu_ps(at), *sum) } else { *sum };
                    _mm256_storeu_ps(at, total);
                }
            }
        }
    }
}

/// Sixteen sums folded in halves.
///
/// # Safety
/// `sums` points to sixteen numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn fold(sums: *const f32) -> f32 {
    // SAFETY: the caller's promise.
    let eight = unsafe { _mm256_add_ps(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums.add(VECTOR))) };
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}
