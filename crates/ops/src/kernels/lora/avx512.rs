//! The same by AVX-512, number for number.

use super::skinny::{Skinny, LARGEST, SUMS};
use std::arch::x86_64::*;

/// Numbers in a vector.
const LANES: usize = 16;
/// Vectors of the output at a time.
const VECTORS: usize = 4;

/// As `skinny::rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn rows(of: Skinny<'_>, first: usize, out: &mut [f32], lose_last: bool) {
    for (i, out) in out.chunks_mut(of.n).enumerate() {
        let at = (first + i) * of.pitch;
        let x = &of.x[at..at + of.k];
        let mut h = [0f32; LARGEST];
        match of.padded {
            4 => hidden4(x, of.a, &mut h),
            8 => hidden8(x, of.a, &mut h),
            16 => hidden::<1>(x, of.a, &mut h),
            32 => hidden::<2>(x, of.a, &mut h),
            _ => hidden::<4>(x, of.a, &mut h),
        }
        if lose_last {
            h[of.r.saturating_sub(1)] = 0.0;
        }
        output(of, &h[..of.r.min(LARGEST)], out);
    }
}

/// x·A where a row of A is `V` vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn hidden<const V: usize>(x: &[f32], a: &[f32], h: &mut [f32; LARGEST]) {
    let mut sums = [[_mm512_setzero_ps(); V]; SUMS];
    let width = V * LANES;
    for (x, a) in x.chunks(SUMS).zip(a.chunks(SUMS * width)) {
        for ((sums, &x), a) in sums.iter_mut().zip(x).zip(a.chunks_exact(width)) {
            let x = _mm512_set1_ps(x);
            for (sum, a) in sums.iter_mut().zip(a.chunks_exact(LANES)) {
                // SAFETY: sixteen numbers.
                *sum = _mm512_fmadd_ps(x, unsafe { _mm512_loadu_ps(a.as_ptr()) }, *sum);
            }
        }
    }
    let [s0, s1, s2, s3] = sums;
    for (v, h) in h.chunks_exact_mut(LANES).take(V).enumerate() {
        let sum = _mm512_add_ps(_mm512_add_ps(s0[v], s2[v]), _mm512_add_ps(s1[v], s3[v]));
        // SAFETY: sixteen numbers.
        unsafe { _mm512_storeu_ps(h.as_mut_ptr(), sum) };
    }
}

/// x·A where a row of A is eight numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn hidden8(x: &[f32], a: &[f32], h: &mut [f32; LARGEST]) {
    let mut sums = [_mm256_setzero_ps(); SUMS];
    for (x, a) in x.chunks(SUMS).zip(a.chunks(SUMS * 8)) {
        for ((sum, &x), a) in sums.iter_mut().zip(x).zip(a.chunks_exact(8)) {
            // SAFETY: eight numbers.
            *sum = _mm256_fmadd_ps(_mm256_set1_ps(x), unsafe { _mm256_loadu_ps(a.as_ptr()) }, *sum);
        }
    }
    let [s0, s1, s2, s3] = sums;
    // SAFETY: there is room for more than eight numbers.
    unsafe { _mm256_storeu_ps(h.as_mut_ptr(), _mm256_add_ps(_mm256_add_ps(s0, s2), _mm256_add_ps(s1, s3))) };
}

/// x·A where a row of A is four numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn hidden4(x: &[f32], a: &[f32], h: &mut [f32; LARGEST]) {
    let mut sums = [_mm_setzero_ps(); SUMS];
    for (x, a) in x.chunks(SUMS).zip(a.chunks(SUMS * 4)) {
        for ((sum, &x), a) in sums.iter_mut().zip(x).zip(a.chunks_exact(4)) {
            // SAFETY: four numbers.
            *sum = _mm_fmadd_ps(_mm_set1_ps(x), unsafe { _mm_loadu_ps(a.as_ptr()) }, *sum);
        }
    }
    let [s0, s1, s2, s3] = sums;
    // SAFETY: there is room for more than four numbers.
    unsafe { _mm_storeu_ps(h.as_mut_ptr(), _mm_add_ps(_mm_add_ps(s0, s2), _mm_add_ps(s1, s3))) };
}

/// (x·A)·B for one row, from the hidden row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn output(of: Skinny<'_>, h: &[f32], out: &mut [f32]) {
    let n = of.n;
    let scale = _mm512_set1_ps(of.scale);
    for (c, out) in out.chunks_mut(VECTORS * LANES).enumerate() {
        let at = c * VECTORS * LANES;
        // how much of each vector there is
        let masks: [u16; VECTORS] = std::array::from_fn(|v| match out.len().saturating_sub(v * LANES) {
            left @ 0..LANES => (1u16 << left) - 1,
            _ => u16::MAX,
        });
        let mut sums = [_mm512_setzero_ps(); VECTORS];
        for (&h, b) in h.iter().zip(of.b.chunks_exact(n)) {
            let (h, b) = (_mm512_set1_ps(h), &b[at..at + out.len()]);
            for (v, sum) in sums.iter_mut().enumerate() {
                let from = b.as_ptr().wrapping_add(v * LANES);
                // SAFETY: the mask has a bit for each number from there on that the row has, and what it hides is not read.
                *sum = _mm512_fmadd_ps(h, unsafe { _mm512_maskz_loadu_ps(masks[v], from) }, *sum);
            }
        }
        for (v, sum) in sums.into_iter().enumerate() {
            let to = out.as_mut_ptr().wrapping_add(v * LANES);
            // SAFETY: as above, for the output's row.
            unsafe {
                let y = match of.has_base {
                    true => _mm512_fmadd_ps(scale, sum, _mm512_maskz_loadu_ps(masks[v], to)),
                    false => _mm512_mul_ps(scale, sum),
                };
                _mm512_mask_storeu_ps(to, masks[v], y);
            }
        }
    }
}
