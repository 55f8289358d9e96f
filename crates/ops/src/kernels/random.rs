//! Random numbers that depend on a key and on each element's place, and on nothing else: not on threads, not on what else is
//! computed, not on the order of evaluation.
//!
//! The generator is Philox4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
//! bijection of 128-bit counters under a 64-bit key.

use super::{check_float, team, PARALLEL};
use crate::element::Element;
use crate::error::Result;
use crate::fault;
use crate::view::{each_dtype, SliceMut};
use candle_core::DType;

/// Which distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Evenly spread over `a ≤ x < b`. The fraction has as many random bits as the dtype has digits (at most 32; 53 for f64); the
    /// result is rounded once, which may give `b` where `a` and `b` are much larger than their distance.
    Uniform,
    /// Normal with mean `a` and standard deviation `b` (Box and Muller 1958).
    Normal,
}

/// Philox4x32-10 of one counter.
#[must_use]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let (p0, p1) = (0xD251_1F53u64 * u64::from(c0), 0xCD9E_8D57u64 * u64::from(c2));
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// Fills `out` (float) with random numbers for `key`.
///
/// # Errors
/// `Unsupported` for a dtype that is not a float.
pub fn random(key: u64, dist: Distribution, a: f64, b: f64, out: &mut SliceMut<'_>) -> Result<()> {
    check_float("random", out.dtype())?;
    let key = if fault::active("random.key") { 0 } else { key };
    let b = if fault::active("random.scale") { a + 1.0 } else { b };
    each_dtype!(SliceMut, out, dst => fill(key, dist, a, b, dst));
    Ok(())
}

/// Elements that share a counter.
const BLOCK: usize = 4;

/// About how many nanoseconds a number takes.
const NS: usize = 3;

fn fill<E: Element>(key: u64, dist: Distribution, a: f64, b: f64, dst: &mut [E]) {
    let run = |first: usize, dst: &mut [E]| {
        for (i, out) in dst.chunks_mut(BLOCK).enumerate() {
            let block = if fault::active("random.block") { 0 } else { (first + i) as u64 };
            let numbers = match dist {
                Distribution::Uniform => uniform(key, block, E::DTYPE).map(|u| a + (b - a) * u),
                Distribution::Normal => normal(key, block, E::DTYPE).map(|n| a + b * n),
            };
            for (o, v) in out.iter_mut().zip(numbers) {
                *o = E::from_f64(v);
            }
        }
    };
    if dst.len() >= PARALLEL {
        team::each_chunk(NS.saturating_mul(dst.len()), dst, BLOCK, run);
    } else {
        run(0, dst);
    }
}

/// Four counters' worth of bits for four elements: `wide` takes two words per element, else one.
fn words(key: u64, block: u64, stream: u32, wide: bool) -> [u64; BLOCK] {
    let key = [key as u32, (key >> 32) as u32];
    let at = |half: u32| philox([block as u32, (block >> 32) as u32, stream, half], key);
    let [w0, w1, w2, w3] = at(0);
    if !wide {
        return [w0, w1, w2, w3].map(u64::from);
    }
    let [w4, w5, w6, w7] = at(1);
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    [join(w0, w1), join(w2, w3), join(w4, w5), join(w6, w7)]
}

/// Fractions in [0, 1) with as many bits as the dtype has digits.
fn uniform(key: u64, block: u64, dtype: DType) -> [f64; BLOCK] {
    let wide = dtype == DType::F64;
    let (have, bits) = match dtype {
        DType::F64 => (64, 53),
        DType::F16 => (32, 11),
        DType::BF16 => (32, 8),
        _ => (32, 24),
    };
    let scale = 1.0 / (1u64 << bits) as f64;
    words(key, block, 0, wide).map(|w| (w >> (have - bits)) as f64 * scale)
}

fn normal(key: u64, block: u64, dtype: DType) -> [f64; BLOCK] {
    let wide = dtype == DType::F64;
    // in (0, 1), so that the logarithm is finite
    let open =
        |w: u64| if wide { ((w >> 11) as f64 + 0.5) / (1u64 << 53) as f64 } else { (w as f64 + 0.5) / 4_294_967_296.0 };
    let [u0, v0, u1, v1] = words(key, block, 1, wide).map(open);
    let pair = |u: f64, v: f64| {
        let (radius, angle) = (libm::sqrt(-2.0 * libm::log(u)), std::f64::consts::TAU * v);
        [radius * libm::cos(angle), radius * libm::sin(angle)]
    };
    let ([a, b], [c, d]) = (pair(u0, v0), pair(u1, v1));
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        // known answers of the authors' Random123 distribution
        let digits = ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        let all = [
            (([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            (([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (digits, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ];
        for ((counter, key), want) in all {
            assert_eq!(philox(counter, key), want);
        }
    }

    fn moments(v: &[f32]) -> (f64, f64) {
        let n = v.len() as f64;
        let mean = v.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        (mean, v.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n)
    }

    #[test]
    fn numbers_follow_their_distribution_and_no_thread() {
        let mut v = vec![0f32; 200_000];
        random(7, Distribution::Uniform, -1.0, 3.0, &mut SliceMut::F32(&mut v)).unwrap();
        let (mean, var) = moments(&v);
        // six standard errors of the mean and of the variance of 200,000 samples
        assert!((mean - 1.0).abs() < 6.0 * (16.0f64 / 12.0 / 2e5).sqrt(), "{mean}");
        assert!((var - 16.0 / 12.0).abs() < 6.0 * 0.894 * 16.0 / 12.0 / 2e5f64.sqrt(), "{var}");
        assert!(v.iter().all(|x| (-1.0..3.0).contains(x)));
        let mut w = vec![0f32; 1000];
        random(7, Distribution::Uniform, -1.0, 3.0, &mut SliceMut::F32(&mut w)).unwrap();
        assert_eq!(v[..1000], w[..]);
        random(8, Distribution::Uniform, -1.0, 3.0, &mut SliceMut::F32(&mut w)).unwrap();
        assert_ne!(v[..1000], w[..]);
        random(7, Distribution::Normal, 2.0, 0.5, &mut SliceMut::F32(&mut v)).unwrap();
        let (mean, var) = moments(&v);
        assert!((mean - 2.0).abs() < 6.0 * 0.5 / 2e5f64.sqrt(), "{mean}");
        assert!((var - 0.25).abs() < 6.0 * 2f64.sqrt() * 0.25 / 2e5f64.sqrt(), "{var}");
    }
}
