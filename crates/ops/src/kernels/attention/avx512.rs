//! The weighted sum of values by AVX-512.

use super::{BLOCK, GROUP};
use std::arch::x86_64::*;

const LANES: usize = 16;

/// As `super::loops::accumulate_group` for the columns that fill whole vectors; says how many those are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn accumulate_group(
    weights: &[[f32; BLOCK]; GROUP],
    rows: usize,
    values: &[f32],
    pitch: usize,
    accs: &mut [f32],
) -> usize {
    let n = accs.len() / GROUP;
    let whole = n / LANES * LANES;
    let reach = rows.checked_sub(1).and_then(|last| last.checked_mul(pitch)?.checked_add(whole));
    if rows > BLOCK || reach.is_none_or(|reach| reach > values.len()) {
        return 0;
    }
    let mut c = 0;
    while c < whole {
        // SAFETY: rows `0..rows` of the values and `whole` columns of them are there, as are the columns of each accumulator.
        c += unsafe {
            if whole - c >= 2 * LANES {
                columns::<2>(weights, rows, values.as_ptr().add(c), pitch, accs.as_mut_ptr().add(c), n)
            } else {
                columns::<1>(weights, rows, values.as_ptr().add(c), pitch, accs.as_mut_ptr().add(c), n)
            }
        };
    }
    whole
}

/// `V` vectors of columns; says how many columns that are.
///
/// # Safety
/// `values` has `rows` rows of that many numbers, `pitch` apart, and `accs` has [`GROUP`], `n` apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn columns<const V: usize>(
    weights: &[[f32; BLOCK]; GROUP],
    rows: usize,
    values: *const f32,
    pitch: usize,
    accs: *mut f32,
    n: usize,
) -> usize {
    let mut held = [[_mm512_setzero_ps(); V]; GROUP];
    for (q, held) in held.iter_mut().enumerate() {
        for (v, held) in held.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *held = unsafe { _mm512_loadu_ps(accs.add(q * n + v * LANES)) };
        }
    }
    for j in 0..rows.min(BLOCK) {
        let mut row = [_mm512_setzero_ps(); V];
        for (v, row) in row.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *row = unsafe { _mm512_loadu_ps(values.add(j * pitch + v * LANES)) };
        }
        for (held, weights) in held.iter_mut().zip(weights) {
            let p = _mm512_set1_ps(weights[j]);
            for (held, row) in held.iter_mut().zip(row) {
                *held = _mm512_fmadd_ps(p, row, *held);
            }
        }
    }
    for (q, held) in held.iter().enumerate() {
        for (v, held) in held.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(accs.add(q * n + v * LANES), *held) };
        }
    }
    V * LANES
}
