//! Quotients by a number that a row has one of: a product with its reciprocal, which a vector takes a fifth of a division's time for.
//!
//! The reciprocal is kept in two parts, 1/d ≈ high + low, so that `fma(x, high, x·low)` is off by hardly more than its one rounding
//! (0.5 + 2⁻²¹ units in the last place; where the quotient is below 10⁻³¹, up to 1). `high` is rounded down and `low` is positive: two infinities never meet with unlike signs.

use super::loops::Arg;
use super::span::{self, Map1, Map2, Map3};
use crate::fault;
use crate::math::Real;
use crate::simd::versions;

/// Rows of a tile of columns that are divided together.
const WIDTH: usize = 256;

/// Divisors with a reciprocal in two parts: far from where either part would overflow or lose digits.
const RANGE: std::ops::Range<f64> = 1e-30..1e30;

/// The reciprocal of a divisor, or `None` where the quotient has to be a division.
#[inline(always)]
pub(super) fn reciprocal<T: Real, const FMA: bool>(d: T) -> Option<(T, T)> {
    (FMA && T::SPLITS && RANGE.contains(&d.to_f64())).then(|| parts(d))
}

/// The two parts of the reciprocal of a divisor in [`RANGE`].
#[inline(always)]
fn parts<T: Real>(d: T) -> (T, T) {
    let inverse = 1.0 / d.to_f64();
    // the nearest number may lie above: one unit less is below, and `low` takes what is missing
    let high = T::from_f64(inverse * (1.0 - f64::from(f32::EPSILON)));
    let low = T::from_f64(inverse - high.to_f64());
    (high, low)
}

/// A product with a reciprocal in two parts.
#[derive(Clone, Copy)]
pub(super) struct Scale<T, const FMA: bool> {
    pub(super) high: T,
    pub(super) low: T,
}

impl<T: Real, const FMA: bool> Map1<T> for Scale<T, FMA> {
    #[inline(always)]
    fn call(self, x: T) -> T {
        x.mul_add::<FMA>(self.high, x * self.low)
    }
}

#[derive(Clone, Copy)]
struct Divide<T>(T);

impl<T: Real> Map1<T> for Divide<T> {
    #[inline(always)]
    fn call(self, x: T) -> T {
        x / self.0
    }
}

versions! {
/// `x[r][c] / d[r]`: `x` has `outer` runs of `inner` elements. With `columns` a run is a column of the tile, and `d` has one value for
/// each element of it, else a run is a row, and `d` has one value for each run.
pub(super) fn quotient<T: Real>(x: Arg<'_, T>, d: &[T], dst: &mut [T], outer: usize, inner: usize, columns: bool) = quotient_body;
}

#[inline(always)]
fn quotient_body<T: Real, const FMA: bool>(
    x: Arg<'_, T>,
    d: &[T],
    dst: &mut [T],
    outer: usize,
    inner: usize,
    columns: bool,
) {
    // a tile's elements, whatever they are computed from: see `Run::arg`
    let Arg::Vec { data, pitch } = x else {
        dst.fill(T::NAN);
        return;
    };
    if inner == 0 {
        return;
    }
    if !columns {
        for (r, dst) in dst.chunks_exact_mut(inner).take(outer).enumerate() {
            let (x, d) = (&data[r * pitch..r * pitch + inner], d.get(r).copied().unwrap_or(T::NAN));
            let last = dst.len() - 1;
            match reciprocal::<T, FMA>(d) {
                Some((high, low)) => span::one(dst, x, Scale::<T, FMA> { high, low }),
                None => span::one(dst, x, Divide(d)),
            }
            if fault::any() && fault::active("row.quotient.tail") {
                dst[last] = fault::nudged(dst[last]);
            }
        }
        return;
    }
    // so many rows at a time that their reciprocals, which serve every column, stay near
    for from in (0..inner).step_by(WIDTH) {
        let width = WIDTH.min(inner - from);
        let d = &d[from..from + width];
        let (mut high, mut low, mut split) = ([T::ONE; WIDTH], [T::ZERO; WIDTH], FMA && T::SPLITS);
        for ((&d, high), low) in d.iter().zip(&mut high).zip(&mut low) {
            let parts = parts(d);
            split &= RANGE.contains(&d.to_f64());
            (*high, *low) = parts;
        }
        for c in 0..outer {
            let x = &data[c * pitch + from..c * pitch + from + width];
            let dst = &mut dst[c * inner + from..c * inner + from + width];
            if split {
                for (((q, &x), &high), &low) in dst.iter_mut().zip(x).zip(&high).zip(&low) {
                    *q = Scale::<T, FMA> { high, low }.call(x);
                }
            } else {
                for ((q, &x), &d) in dst.iter_mut().zip(x).zip(d) {
                    *q = match reciprocal::<T, FMA>(d) {
                        Some((high, low)) => Scale::<T, FMA> { high, low }.call(x),
                        None => x / d,
                    };
                }
            }
        }
    }
}

/// (x − shift) times a reciprocal in two parts, or divided.
#[derive(Clone, Copy)]
struct Shifted<F, T> {
    shift: T,
    f: F,
}

impl<T: Real, F: Map1<T>> Map1<T> for Shifted<F, T> {
    #[inline(always)]
    fn call(self, x: T) -> T {
        // without a shift it is 0, which changes no x
        self.f.call(x - self.shift)
    }
}

/// `f` of x, times a weight, plus a bias.
#[derive(Clone, Copy)]
struct Weighted<F>(F);

impl<T: Real, F: Map1<T>> Map2<T> for Weighted<F> {
    #[inline(always)]
    fn call(self, x: T, w: T) -> T {
        self.0.call(x) * w
    }
}

impl<T: Real, F: Map1<T>> Map3<T> for Weighted<F> {
    #[inline(always)]
    fn call(self, x: T, w: T, b: T) -> T {
        self.0.call(x) * w + b
    }
}

/// The operands of [`normal`] for one row of a tile.
pub(super) struct Operands<'a, T> {
    pub(super) x: &'a [T],
    pub(super) weight: Option<&'a [T]>,
    pub(super) bias: Option<&'a [T]>,
}

/// A row of an argument with a value for each element, which all arguments here are: see `Run::arg`.
#[inline(always)]
fn elements<'a, T>(a: Arg<'a, T>, r: usize, cols: usize) -> &'a [T] {
    match a {
        Arg::Vec { data, pitch } => &data[r * pitch..r * pitch + cols],
        Arg::Const(_) | Arg::Row(_) => &[],
    }
}

#[inline(always)]
fn normal_row<T: Real>(dst: &mut [T], of: &Operands<'_, T>, f: impl Map1<T>) {
    match (of.weight, of.bias) {
        (None, _) => span::one(dst, of.x, f),
        (Some(w), None) => span::two(dst, of.x, w, Weighted(f)),
        (Some(w), Some(b)) => span::three(dst, of.x, w, b, Weighted(f)),
    }
}

/// One row of [`normal`]; `next` is what is read next, if that is known.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // prefetching is for AVX-512 alone
pub(super) fn normal_of<T: Real, const FMA: bool>(dst: &mut [T], of: &Operands<'_, T>, shift: T, root: T, next: &[T]) {
    let Some((high, low)) = reciprocal::<T, FMA>(root) else {
        return normal_row(dst, of, Shifted { shift, f: Divide(root) });
    };
    #[cfg(target_arch = "x86_64")]
    {
        let of = super::wide::Normal { x: of.x, weight: of.weight, bias: of.bias, shift, high, low };
        if super::wide::normal(dst, &of, next) {
            return;
        }
    }
    normal_row(dst, of, Shifted { shift, f: Scale::<T, FMA> { high, low } });
}

/// The numbers of [`normal`] that a row has one of.
#[derive(Clone, Copy)]
pub(super) struct PerRow<'a, T> {
    pub(super) shift: Option<&'a [T]>,
    pub(super) root: &'a [T],
}

versions! {
/// `(x[r][c] − shift[r]) / root[r] · weight[r][c] + bias[r][c]` over a tile of rows, as the instructions one by one; a bias comes with a
/// weight.
pub(super) fn normal<T: Real>(x: Arg<'_, T>, row: PerRow<'_, T>, weight: Option<Arg<'_, T>>, bias: Option<Arg<'_, T>>, dst: &mut [T], cols: usize) = normal_body;
}

#[inline(always)]
fn normal_body<T: Real, const FMA: bool>(
    x: Arg<'_, T>,
    row: PerRow<'_, T>,
    weight: Option<Arg<'_, T>>,
    bias: Option<Arg<'_, T>>,
    dst: &mut [T],
    cols: usize,
) {
    if cols == 0 {
        return;
    }
    for (r, dst) in dst.chunks_exact_mut(cols).enumerate() {
        let number = |a: &[T]| a.get(r).copied().unwrap_or(T::NAN);
        let of = Operands {
            x: elements(x, r, cols),
            weight: weight.map(|w| elements(w, r, cols)),
            bias: bias.map(|b| elements(b, r, cols)),
        };
        normal_of::<T, FMA>(dst, &of, row.shift.map_or(T::ZERO, number), number(row.root), &[]);
        if fault::any() && fault::active("row.normal.tail") {
            dst[cols - 1] = fault::nudged(dst[cols - 1]);
        }
    }
}

versions! {
/// `e^(x[r][c] − shift[r])` over a tile of rows, as the instructions one by one.
pub(super) fn shifted_exp<T: Real>(x: Arg<'_, T>, shift: &[T], dst: &mut [T], cols: usize) = shifted_exp_body;
}

#[derive(Clone, Copy)]
struct Exp<const FMA: bool>;

impl<T: Real, const FMA: bool> Map1<T> for Exp<FMA> {
    #[inline(always)]
    fn call(self, x: T) -> T {
        x.exp::<FMA>()
    }
}

/// `dst[i] = e^(x[i] − shift)`, one row.
#[inline(always)]
pub(super) fn exp_row<T: Real, const FMA: bool>(dst: &mut [T], x: &[T], shift: T) {
    #[cfg(target_arch = "x86_64")]
    if super::wide::map(super::wide::ShiftedExp(shift.to_f32()), dst, x) {
        return;
    }
    span::one(dst, x, Shifted { shift, f: Exp::<FMA> });
}

#[inline(always)]
fn shifted_exp_body<T: Real, const FMA: bool>(x: Arg<'_, T>, shift: &[T], dst: &mut [T], cols: usize) {
    let Arg::Vec { data, pitch } = x else {
        dst.fill(T::NAN);
        return;
    };
    if cols == 0 {
        return;
    }
    for (r, dst) in dst.chunks_exact_mut(cols).enumerate() {
        let shift = shift.get(r).copied().unwrap_or(T::NAN);
        exp_row::<T, FMA>(dst, &data[r * pitch..r * pitch + cols], shift);
        if fault::any() && fault::active("row.shifted_exp.tail") {
            dst[cols - 1] = fault::nudged(dst[cols - 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::with_each;

    /// Divisors over the whole range, and numbers, with every special one.
    fn numbers() -> Vec<f32> {
        let mut out = vec![
            0.0,
            -0.0,
            1.0,
            -1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-45,
            3.0,
            2.0,
            0.5,
            1e-31,
            1e31,
        ];
        let mut bits = 12345u32;
        for _ in 0..400 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            out.push(f32::from_bits(bits));
        }
        out
    }

    #[test]
    fn quotients_are_within_a_half_and_a_little() {
        let x = numbers();
        with_each(|isa| {
            for &d in &numbers() {
                let mut got = vec![0f32; x.len()];
                quotient(Arg::Vec { data: &x, pitch: 0 }, &[d], &mut got, 1, x.len(), false);
                for (&x, &q) in x.iter().zip(&got) {
                    let want = f64::from(x) / f64::from(d);
                    let nearest = want as f32;
                    if nearest.is_nan() {
                        assert!(q.is_nan(), "{isa:?}: {x:e}/{d:e} = {q:e}");
                    } else if nearest.is_infinite() || nearest == 0.0 {
                        assert_eq!(q.to_bits(), nearest.to_bits(), "{isa:?}: {x:e}/{d:e}");
                    } else {
                        let ulp = f64::from(f32::from_bits(nearest.abs().to_bits() + 1)) - f64::from(nearest.abs());
                        let allowed = if nearest.abs() < 1e-31 { 1.0 } else { 0.5 + 2f64.powi(-21) };
                        let off = (f64::from(q) - want).abs() / ulp;
                        assert!(off <= allowed, "{isa:?}: {x:e}/{d:e} = {q:e}, off by {off}");
                    }
                }
            }
        });
    }

    #[test]
    fn columns_have_the_bits_of_rows() {
        let (rows, cols) = (37, 5);
        let d: Vec<f32> = numbers()[..rows].to_vec();
        let x: Vec<f32> = numbers().into_iter().cycle().take(rows * cols).collect();
        with_each(|_| {
            for d in [d.clone(), vec![3.7; rows]] {
                let mut by_row = vec![0f32; rows * cols];
                quotient(Arg::Vec { data: &x, pitch: cols }, &d, &mut by_row, rows, cols, false);
                let across = |v: &[f32], n: usize, m: usize| -> Vec<f32> {
                    (0..m).flat_map(|c| (0..n).map(move |r| (r, c))).map(|(r, c)| v[r * m + c]).collect()
                };
                let mut by_column = vec![0f32; rows * cols];
                let turned = across(&x, rows, cols);
                quotient(Arg::Vec { data: &turned, pitch: rows }, &d, &mut by_column, cols, rows, true);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&across(&by_row, rows, cols)), bits(&by_column));
            }
        });
    }
}
