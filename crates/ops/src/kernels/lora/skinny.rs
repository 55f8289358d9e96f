//! Both products of a LoRA row after row: the hidden row stays in registers between them.
//!
//! Each number is summed in an order of its own: x·A over four or eight interleaved sums of the inner dim folded in halves,
//! (x·A)·B along the rank. So a row's bits depend on the row, A and B only. A and B are small: every
//! row finds them in the caches.

use crate::fault;
#[cfg(target_arch = "x86_64")]
use crate::simd::{isa, Isa};
use crate::simd::{mul_add, versions};

/// The largest rank that is done here.
pub(super) const LARGEST: usize = 64;
/// Interleaved sums of a hidden number where the rank is padded to at most eight, and where it is larger: a chain of additions waits for
/// each, and short hidden rows have few chains.
pub(super) const SUMS: usize = 8;
/// See [`SUMS`].
pub(super) const WIDE_SUMS: usize = 4;
/// Columns of the output at a time.
const WIDTH: usize = 64;

/// Dense operands: x `(rows, k)` with rows `pitch` apart, a `(k, padded)` with zeros behind its rank, b `(r, n)`.
#[derive(Clone, Copy)]
pub(super) struct Skinny<'a> {
    pub(super) x: &'a [f32],
    pub(super) pitch: usize,
    pub(super) k: usize,
    pub(super) a: &'a [f32],
    pub(super) padded: usize,
    pub(super) b: &'a [f32],
    pub(super) r: usize,
    pub(super) n: usize,
    pub(super) scale: f32,
    /// Whether the output holds a base to add to.
    pub(super) has_base: bool,
}

/// What the rank is padded to.
pub(super) fn padded(rank: usize) -> usize {
    match rank {
        0..=4 => 4,
        5..=8 => 8,
        9..=16 => 16,
        17..=32 => 32,
        _ => LARGEST,
    }
}

/// Rows of the output from row `first` on, as many as `out` holds.
pub(super) fn rows(of: Skinny<'_>, first: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: the machine has AVX-512.
        return unsafe { super::avx512::rows(of, first, out, fault::active("lora.skinny_rank")) };
    }
    portable(of, first, out);
}

versions! {
/// As [`rows`], on every machine.
fn portable<>(of: Skinny<'_>, first: usize, out: &mut [f32]) = rows_body;
}

#[inline(always)]
fn rows_body<const FMA: bool>(of: Skinny<'_>, first: usize, out: &mut [f32]) {
    match of.padded {
        4 => ranked::<FMA, 4, SUMS>(of, first, out),
        8 => ranked::<FMA, 8, SUMS>(of, first, out),
        16 => ranked::<FMA, 16, WIDE_SUMS>(of, first, out),
        32 => ranked::<FMA, 32, WIDE_SUMS>(of, first, out),
        _ => ranked::<FMA, LARGEST, WIDE_SUMS>(of, first, out),
    }
}

/// With `R` numbers in a hidden row, and `S` sums of each.
#[inline(always)]
fn ranked<const FMA: bool, const R: usize, const S: usize>(of: Skinny<'_>, first: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_mut(of.n).enumerate() {
        let at = (first + i) * of.pitch;
        let h = hidden::<FMA, R, S>(&of.x[at..at + of.k], of.a);
        output::<FMA, R>(of, h, out);
    }
}

/// x·A for one row.
#[inline(always)]
fn hidden<const FMA: bool, const R: usize, const S: usize>(x: &[f32], a: &[f32]) -> [f32; R] {
    let mut sums = [[0f32; R]; S];
    for (x, a) in x.chunks(S).zip(a.chunks(S * R)) {
        for ((sums, &x), a) in sums.iter_mut().zip(x).zip(a.chunks_exact(R)) {
            for (sum, &a) in sums.iter_mut().zip(a) {
                *sum = mul_add::<FMA>(x, a, *sum);
            }
        }
    }
    let mut half = S / 2;
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            for (low, high) in low.iter_mut().zip(high) {
                *low += *high;
            }
        }
        half /= 2;
    }
    sums[0]
}

/// (x·A)·B for one row, from the hidden row.
#[inline(always)]
fn output<const FMA: bool, const R: usize>(of: Skinny<'_>, mut h: [f32; R], out: &mut [f32]) {
    if fault::active("lora.skinny_rank") {
        h[of.r.saturating_sub(1)] = 0.0;
    }
    let n = of.n;
    let mut at = 0;
    while at + WIDTH <= n {
        let mut sums = [0f32; WIDTH];
        for (j, &h) in h.iter().enumerate().take(of.r) {
            if let Some(Ok(b)) = of.b.get(j * n + at..j * n + at + WIDTH).map(<&[f32; WIDTH]>::try_from) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = mul_add::<FMA>(h, b, *sum);
                }
            }
        }
        finish::<FMA>(of, &sums, &mut out[at..at + WIDTH]);
        at += WIDTH;
    }
    let mut sums = [0f32; WIDTH];
    let sums = &mut sums[..n - at];
    for (j, &h) in h.iter().enumerate().take(of.r) {
        for (sum, &b) in sums.iter_mut().zip(&of.b[j * n + at..(j + 1) * n]) {
            *sum = mul_add::<FMA>(h, b, *sum);
        }
    }
    finish::<FMA>(of, sums, &mut out[at..]);
}

#[inline(always)]
fn finish<const FMA: bool>(of: Skinny<'_>, sums: &[f32], out: &mut [f32]) {
    if of.has_base {
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = mul_add::<FMA>(of.scale, sum, *out);
        }
    } else {
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = of.scale * sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::{fused, with_each};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 127) as f32 / 31.0 - 2.0).collect()
    }

    #[test]
    fn rows_are_the_products_in_f64_and_do_not_depend_on_their_neighbours() {
        for (m, k, r, n) in [
            (1, 1, 1, 1),
            (4, 7, 3, 31),
            (5, 16, 4, 32),
            (9, 33, 8, 70),
            (6, 20, 13, 65),
            (7, 50, 30, 40),
            (5, 12, 64, 33),
            (6, 39, 4, 20),
            // A and B do not stay in the first-level cache
            (5, 701, 8, 600),
            (2, 1300, 3, 1400),
        ] {
            let (x, wa, b) = (numbers(m * k, 1), numbers(k * r, 2), numbers(r * n, 3));
            let base = numbers(m * n, 4);
            let wide = padded(r);
            let mut a = vec![0f32; k * wide];
            for (to, from) in a.chunks_exact_mut(wide).zip(wa.chunks_exact(r)) {
                to[..r].copy_from_slice(from);
            }
            for has_base in [false, true] {
                let of = Skinny { x: &x, pitch: k, k, a: &a, padded: wide, b: &b, r, n, scale: 0.5, has_base };
                with_each(|isa| {
                    let mut got = base.clone();
                    rows(of, 0, &mut got);
                    let mut plain = base.clone();
                    match fused(isa) {
                        true => rows_body::<true>(of, 0, &mut plain),
                        false => rows_body::<false>(of, 0, &mut plain),
                    }
                    assert!(got == plain, "{isa:?} {m}x{k}x{r}x{n}");
                    for i in 0..m {
                        let mut alone = base[i * n..(i + 1) * n].to_vec();
                        rows(of, i, &mut alone);
                        assert!(alone == got[i * n..(i + 1) * n], "{isa:?} row {i} of {m}x{k}x{r}x{n}");
                        for c in 0..n {
                            let (mut want, mut scale) = (0f64, 0f64);
                            for j in 0..r {
                                let terms = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(wa[l * r + j]));
                                let (h, size) = terms.fold((0.0, 0.0), |(h, s), t| (h + t, s + t.abs()));
                                want += h * f64::from(b[j * n + c]) * 0.5;
                                scale += size * f64::from(b[j * n + c]).abs() * 0.5;
                            }
                            if has_base {
                                want += f64::from(base[i * n + c]);
                                scale += f64::from(base[i * n + c]).abs();
                            }
                            let off = (f64::from(got[i * n + c]) - want).abs();
                            assert!(
                                off <= 1e-6 * scale,
                                "{isa:?} {m}x{k}x{r}x{n} at {i}, {c}: off by {off:e} of {scale:e}"
                            );
                        }
                    }
                });
            }
        }
    }
}
