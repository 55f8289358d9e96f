//! Sums and extremes of a run of f32, number for number those of the loops: the same accumulators, which stay in registers from the
//! first element to the result.

use super::{Addend, LANES, SEGMENT};
use crate::fault;
use std::arch::x86_64::*;

/// Numbers of a vector, and vectors of accumulators.
const VECTOR: usize = 16;
const HELD: usize = LANES / VECTOR;

/// The vector at `x[at..]`, and which of it is there; the rest is `fill`.
#[inline(always)]
fn load(x: &[f32], at: usize, fill: __m512) -> (__m512, __mmask16) {
    let mask = match x.len().saturating_sub(at) {
        left @ 0..VECTOR => (1u16 << left) - 1,
        _ => u16::MAX,
    };
    // SAFETY: the mask has a bit for each element from `at` on, and what it hides is not read; the callers have AVX-512.
    unsafe { (_mm512_mask_loadu_ps(fill, mask, x.as_ptr().wrapping_add(at)), mask) }
}

/// Takes each vector of `x` into the accumulator of its lanes.
#[inline(always)]
fn each(x: &[f32], fill: __m512, held: &mut [__m512; HELD], f: impl Fn(__m512, __m512, __mmask16) -> __m512) {
    let whole = x.len() / LANES * LANES;
    for chunk in x[..whole].chunks_exact(LANES) {
        for (k, h) in held.iter_mut().enumerate() {
            // SAFETY: a chunk has 128 elements; the callers have AVX-512.
            let v = unsafe { _mm512_loadu_ps(chunk.as_ptr().add(k * VECTOR)) };
            *h = f(*h, v, u16::MAX);
        }
    }
    if fault::active("row.sum.remainder") {
        return;
    }
    for (k, h) in held.iter_mut().enumerate() {
        if whole + k * VECTOR < x.len() {
            let (v, mask) = load(x, whole + k * VECTOR, fill);
            *h = f(*h, v, mask);
        }
    }
}

/// As `sum_into` for one segment, of at least 128 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn sum(x: &[f32], addend: Addend) -> f64 {
    debug_assert!((LANES..=SEGMENT).contains(&x.len()));
    let zero = _mm512_setzero_ps();
    let mut held = [zero; HELD];
    // lanes behind the end keep their sums: adding a zero would make a -0 a 0
    match addend {
        Addend::Same => each(x, zero, &mut held, |h, v, there| _mm512_mask_add_ps(h, there, h, v)),
        Addend::Square => each(x, zero, &mut held, |h, v, there| _mm512_mask_add_ps(h, there, h, _mm512_mul_ps(v, v))),
        Addend::Centred(shift) => {
            let shift = _mm512_set1_ps(shift);
            each(x, zero, &mut held, |h, v, there| {
                let v = _mm512_sub_ps(v, shift);
                _mm512_mask_add_ps(h, there, h, _mm512_mul_ps(v, v))
            });
        }
    }
    // the accumulators meet in f64, in halves: 64 numbers in eight vectors, then 32, 16, 8
    let low = |v: __m512| _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    let high = |v: __m512| _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(v));
    let [a, b, c, d, e, f, g, h] = held;
    let meet = |x, y| [_mm512_add_pd(low(x), low(y)), _mm512_add_pd(high(x), high(y))];
    let ([a, b], [c, d], [e, f], [g, h]) = (meet(a, e), meet(b, f), meet(c, g), meet(d, h));
    let [a, b, c, d] = [_mm512_add_pd(a, e), _mm512_add_pd(b, f), _mm512_add_pd(c, g), _mm512_add_pd(d, h)];
    let eight = _mm512_add_pd(_mm512_add_pd(a, c), _mm512_add_pd(b, d));
    let four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd::<1>(eight));
    let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
    _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two))
}

/// The largest element, or the smallest; a NaN never is, and of zeros it may be either. `start` where there is none.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn extreme(x: &[f32], max: bool, start: f32) -> f32 {
    let start = _mm512_set1_ps(start);
    let mut held = [start; HELD];
    // of a NaN and a number the second operand
    if max {
        each(x, start, &mut held, |h, v, _| _mm512_max_ps(v, h));
        _mm512_reduce_max_ps(held.into_iter().fold(start, |a, b| _mm512_max_ps(a, b)))
    } else {
        each(x, start, &mut held, |h, v, _| _mm512_min_ps(v, h));
        _mm512_reduce_min_ps(held.into_iter().fold(start, |a, b| _mm512_min_ps(a, b)))
    }
}
