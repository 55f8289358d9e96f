//! The products of a block by AVX-512, number for number those of the loops.

use super::loops::Block;
use super::{BLOCK, GROUP};
use crate::kernels::square::transposed;
use std::arch::x86_64::*;

const LANES: usize = 16;

/// How much of the vector at column `c` there is of `n` columns.
fn mask(c: usize, n: usize) -> u16 {
    match n.saturating_sub(c) {
        left @ 0..LANES => (1u16 << left) - 1,
        _ => u16::MAX,
    }
}

/// As `loops::turn`: squares of sixteen by sixteen numbers, turned in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn turn(keys: &[f32], pitch: usize, rows: usize, at: &mut [f32]) {
    let d = at.len() / BLOCK;
    let reach = rows.checked_sub(1).and_then(|last| last.checked_mul(pitch)?.checked_add(d));
    if rows > BLOCK || reach.is_none_or(|reach| reach > keys.len()) {
        return;
    }
    for j in (0..rows).step_by(LANES) {
        for c in (0..d).step_by(LANES) {
            let (there, columns) = ((rows - j).min(LANES), (d - c).min(LANES));
            // SAFETY: that many rows are there from row `j` on, and that many numbers of each from column `c` on; column `c + i` of the
            // block has `BLOCK` numbers, and `j + 16` is at most that.
            unsafe {
                let (from, to) = (keys.as_ptr().add(j * pitch + c), at.as_mut_ptr().add(c * BLOCK + j));
                // counts that the compiler knows keep the square in registers
                match (there, columns) {
                    (LANES, LANES) => square(from, pitch, LANES, LANES, to),
                    _ => square(from, pitch, there, columns, to),
                }
            }
        }
    }
}

/// Turns up to sixteen rows of up to sixteen numbers.
///
/// # Safety
/// `from` points to `rows` rows of `columns` numbers, `pitch` apart, `to` to `columns` rows of sixteen numbers, [`BLOCK`] apart.
#[inline(always)]
unsafe fn square(from: *const f32, pitch: usize, rows: usize, columns: usize, to: *mut f32) {
    // SAFETY: the caller's promise; the callers have AVX-512.
    unsafe {
        let mut square = [_mm512_setzero_ps(); LANES];
        for (r, row) in square.iter_mut().enumerate().take(rows) {
            // the next block's
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add((r + BLOCK).wrapping_mul(pitch)).cast());
            *row = _mm512_maskz_loadu_ps(mask(0, columns), from.add(r * pitch));
        }
        for (r, column) in transposed(square).iter().enumerate().take(columns) {
            _mm512_mask_storeu_ps(to.add(r * BLOCK), mask(0, rows), *column);
        }
    }
}

/// As `Scores::scores`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn scores(queries: &[f32], d: usize, keys: &[f32], out: &mut Block<f32>) {
    match queries.len() / d.max(1) {
        1 => products::<1>(queries, d, keys, out),
        2 => products::<2>(queries, d, keys, out),
        3 => products::<3>(queries, d, keys, out),
        _ => products::<GROUP>(queries, d, keys, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn products<const M: usize>(queries: &[f32], d: usize, keys: &[f32], out: &mut Block<f32>) {
    const V: usize = BLOCK / LANES;
    let mut sums = [[_mm512_setzero_ps(); V]; M];
    if queries.len() < M * d {
        return;
    }
    for (c, keys) in keys.chunks_exact(BLOCK).enumerate().take(d) {
        let mut column = [_mm512_setzero_ps(); V];
        for (v, column) in column.iter_mut().enumerate() {
            // SAFETY: the chunk has `BLOCK` numbers.
            *column = unsafe { _mm512_loadu_ps(keys.as_ptr().add(v * LANES)) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: there are `M` rows of `d` numbers, and `c < d`.
            let q = _mm512_set1_ps(unsafe { *queries.get_unchecked(r * d + c) });
            for (sum, column) in sums.iter_mut().zip(column) {
                *sum = _mm512_fmadd_ps(q, column, *sum);
            }
        }
    }
    for (sums, out) in sums.iter().zip(out) {
        for (sum, out) in sums.iter().zip(out.chunks_exact_mut(LANES)) {
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *sum) };
        }
    }
}

/// As `Scores::values`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn values(weights: &[&[f32]], values: &[f32], pitch: usize, sums: &mut [f32]) {
    match *weights {
        [] => {}
        [a] => weighted::<1>([a], values, pitch, sums),
        [a, b] => weighted::<2>([a, b], values, pitch, sums),
        [a, b, c] => weighted::<3>([a, b, c], values, pitch, sums),
        [a, b, c, d, ..] => weighted::<GROUP>([a, b, c, d], values, pitch, sums),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn weighted<const M: usize>(weights: [&[f32]; M], values: &[f32], pitch: usize, sums: &mut [f32]) {
    let (n, rows) = (sums.len() / M, weights.iter().map(|w| w.len()).min().unwrap_or(0));
    let reach = rows.checked_sub(1).and_then(|last| last.checked_mul(pitch)?.checked_add(n));
    if reach.is_none_or(|reach| reach > values.len()) {
        return;
    }
    let mut c = 0;
    while c < n {
        // SAFETY: `rows` rows of the values and `n` columns of them are there, as are `n` sums of each query.
        c += unsafe {
            match n - c {
                33.. => columns::<M, 4>(weights, rows, values.as_ptr().add(c), pitch, sums.as_mut_ptr().add(c), (c, n)),
                17.. => columns::<M, 2>(weights, rows, values.as_ptr().add(c), pitch, sums.as_mut_ptr().add(c), (c, n)),
                _ => columns::<M, 1>(weights, rows, values.as_ptr().add(c), pitch, sums.as_mut_ptr().add(c), (c, n)),
            }
        };
    }
}

/// `V` vectors of columns from `c` on, of `n`; says how many columns that are.
///
/// # Safety
/// `values` and `sums` point to column `c`; there are `rows` rows of `n` values, `pitch` apart, and `M` times `n` sums, and no slice of
/// weights is shorter than `rows`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn columns<const M: usize, const V: usize>(
    weights: [&[f32]; M],
    rows: usize,
    values: *const f32,
    pitch: usize,
    sums: *mut f32,
    (c, n): (usize, usize),
) -> usize {
    let masks: [u16; V] = std::array::from_fn(|v| mask(c + v * LANES, n));
    let mut held = [[_mm512_setzero_ps(); V]; M];
    for (q, held) in held.iter_mut().enumerate() {
        for (v, held) in held.iter_mut().enumerate() {
            // SAFETY: the caller's promise; the mask hides what is behind the last column.
            *held = unsafe { _mm512_maskz_loadu_ps(masks[v], sums.wrapping_add(q * n + v * LANES)) };
        }
    }
    for j in 0..rows {
        let mut row = [_mm512_setzero_ps(); V];
        for (v, row) in row.iter_mut().enumerate() {
            // the next block's
            _mm_prefetch::<_MM_HINT_T1>(
                values.wrapping_add((j + BLOCK).wrapping_mul(pitch).wrapping_add(v * LANES)).cast(),
            );
            // SAFETY: as above.
            *row = unsafe { _mm512_maskz_loadu_ps(masks[v], values.wrapping_add(j * pitch + v * LANES)) };
        }
        for (held, weights) in held.iter_mut().zip(weights) {
            // SAFETY: `j < rows`.
            let p = _mm512_set1_ps(unsafe { *weights.get_unchecked(j) });
            for (held, row) in held.iter_mut().zip(row) {
                *held = _mm512_fmadd_ps(p, row, *held);
            }
        }
    }
    for (q, held) in held.iter().enumerate() {
        for (v, held) in held.iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_mask_storeu_ps(sums.wrapping_add(q * n + v * LANES), masks[v], *held) };
        }
    }
    V * LANES
}
