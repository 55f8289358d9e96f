//! The same by AVX-512, number for number.

use super::skinny::{Skinny, LARGEST, WIDE_SUMS};
use std::arch::x86_64::*;

/// Numbers in a vector.
const LANES: usize = 16;
/// Vectors of the output at a time.
const VECTORS: usize = 4;

/// Rows of the output at a time: they share what is loaded of B.
const ROWS: usize = 4;

/// So many numbers of A and B stay in the first-level cache beside the rows; more are asked for ahead of their use.
const NEAR: usize = 10_000;

/// As `skinny::rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn rows(of: Skinny<'_>, first: usize, out: &mut [f32], lose_last: bool) {
    match of.a.len() + of.b.len() > NEAR {
        true => each::<true>(of, first, out, lose_last),
        false => each::<false>(of, first, out, lose_last),
    }
}

/// `FAR` says that A and B come from the second-level cache.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn each<const FAR: bool>(of: Skinny<'_>, first: usize, out: &mut [f32], lose_last: bool) {
    // while one group of rows is summed up, the next comes from memory: a row is too short for the processor to see that one follows
    let ahead = ROWS * of.pitch;
    for (i, out) in out.chunks_mut(ROWS * of.n).enumerate() {
        let mut h = [[0f32; LARGEST]; ROWS];
        let count = out.len() / of.n;
        for (r, h) in h.iter_mut().enumerate().take(count) {
            let at = (first + i * ROWS + r) * of.pitch;
            let x = &of.x[at..at + of.k];
            match of.padded {
                4 => hidden4::<FAR>(x, of.a, h, ahead),
                8 => hidden8::<FAR>(x, of.a, h, ahead),
                16 => hidden::<1>(x, of.a, h, ahead),
                32 => hidden::<2>(x, of.a, h, ahead),
                _ => hidden::<4>(x, of.a, h, ahead),
            }
            if lose_last {
                h[of.r.saturating_sub(1)] = 0.0;
            }
        }
        match count {
            ROWS => output::<ROWS, FAR>(of, &h, out),
            _ => {
                for (h, out) in h.iter().zip(out.chunks_mut(of.n)) {
                    output::<1, FAR>(of, std::array::from_ref(h), out);
                }
            }
        }
    }
}

/// x·A where a row of A is `V` vectors. What lies `ahead` of x is fetched into the cache.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn hidden<const V: usize>(x: &[f32], a: &[f32], h: &mut [f32; LARGEST], ahead: usize) {
    let mut sums = [[_mm512_setzero_ps(); V]; WIDE_SUMS];
    let width = V * LANES;
    for (x, a) in x.chunks(WIDE_SUMS).zip(a.chunks(WIDE_SUMS * width)) {
        _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().wrapping_add(ahead).cast());
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

/// x·A where a row of A is eight numbers: two of its rows are a vector, and two of the sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn hidden8<const FAR: bool>(x: &[f32], a: &[f32], h: &mut [f32; LARGEST], ahead: usize) {
    let [s01, s23, s45, s67] = paired::<8, 4, FAR>(x, a, ahead);
    let sum = _mm512_add_ps(_mm512_add_ps(s01, s45), _mm512_add_ps(s23, s67));
    let sum = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
    // SAFETY: there is room for more than eight numbers.
    unsafe { _mm256_storeu_ps(h.as_mut_ptr(), sum) };
}

/// x·A where a row of A is four numbers: four of its rows are a vector, and four of the sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn hidden4<const FAR: bool>(x: &[f32], a: &[f32], h: &mut [f32; LARGEST], ahead: usize) {
    let [low, high] = paired::<4, 2, FAR>(x, a, ahead);
    let sum = _mm512_add_ps(low, high);
    let sum = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
    let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    // SAFETY: there is room for more than four numbers.
    unsafe { _mm_storeu_ps(h.as_mut_ptr(), sum) };
}

/// The eight sums of each of `R` hidden numbers, `16 / R` of them side by side in each of `S` vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn paired<const R: usize, const S: usize, const FAR: bool>(x: &[f32], a: &[f32], ahead: usize) -> [__m512; S] {
    // numbers of x beside one another in a vector, each as often as A's row is wide
    let side = LANES / R;
    // where lane `i` of vector `v` finds its number among sixteen
    let places: [__m512i; LARGEST_R] = std::array::from_fn(|v| {
        let lanes: [i32; LANES] = std::array::from_fn(|i| (v * side + i / R) as i32);
        // SAFETY: sixteen numbers.
        unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
    });
    let mut sums = [_mm512_setzero_ps(); S];
    let (x16, rest) = x.as_chunks::<LANES>();
    let (a16, a_rest) = a.split_at((x.len() - rest.len()) * R);
    for (x, a) in x16.iter().zip(a16.chunks_exact(LANES * R)) {
        _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().wrapping_add(ahead).cast());
        // SAFETY: sixteen numbers.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        for v in 0..R {
            if FAR {
                _mm_prefetch::<_MM_HINT_T0>(a.as_ptr().wrapping_add((3 * R + v) * LANES).cast());
            }
            let x = _mm512_permutexvar_ps(places[v], x);
            // SAFETY: there are R vectors.
            let a = unsafe { _mm512_loadu_ps(a.as_ptr().add(v * LANES)) };
            sums[v % S] = _mm512_fmadd_ps(x, a, sums[v % S]);
        }
    }
    // SAFETY: the mask has a bit for each number that is left.
    let x = unsafe { _mm512_maskz_loadu_ps((1u16 << rest.len()) - 1, rest.as_ptr()) };
    for (v, a) in a_rest.chunks(LANES).enumerate() {
        let mask = if a.len() < LANES { (1u16 << a.len()) - 1 } else { u16::MAX };
        // SAFETY: the mask has a bit for each number.
        let a = unsafe { _mm512_maskz_loadu_ps(mask, a.as_ptr()) };
        sums[v % S] = _mm512_mask3_fmadd_ps(_mm512_permutexvar_ps(places[v % R], x), a, sums[v % S], mask);
    }
    sums
}

/// The widest row of A of which several are a vector.
const LARGEST_R: usize = 8;

/// (x·A)·B for `M` rows, from their hidden rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn output<const M: usize, const FAR: bool>(of: Skinny<'_>, h: &[[f32; LARGEST]; M], out: &mut [f32]) {
    let n = of.n;
    let scale = _mm512_set1_ps(of.scale);
    for at in (0..n).step_by(VECTORS * LANES) {
        // how much of each vector there is
        let masks: [u16; VECTORS] = std::array::from_fn(|v| match (n - at).saturating_sub(v * LANES) {
            left @ 0..LANES => (1u16 << left) - 1,
            _ => u16::MAX,
        });
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; M];
        for (j, b) in of.b.chunks_exact(n).enumerate().take(of.r.min(LARGEST)) {
            let from = b[at..].as_ptr();
            for v in if FAR { VECTORS..2 * VECTORS } else { 0..0 } {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(v * LANES).cast());
            }
            // SAFETY: the mask has a bit for each number from there on that the row has, and what it hides is not read.
            let b: [__m512; VECTORS] =
                std::array::from_fn(|v| unsafe { _mm512_maskz_loadu_ps(masks[v], from.wrapping_add(v * LANES)) });
            for (sums, h) in sums.iter_mut().zip(h) {
                let h = _mm512_set1_ps(h[j]);
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_fmadd_ps(h, b, *sum);
                }
            }
        }
        for (sums, out) in sums.into_iter().zip(out.chunks_exact_mut(n)) {
            let to = out[at..].as_mut_ptr();
            for (v, sum) in sums.into_iter().enumerate() {
                let to = to.wrapping_add(v * LANES);
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
}
