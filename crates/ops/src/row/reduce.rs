//! Reductions of a tile's rows, in orders that depend on a row's length alone.

#[cfg(target_arch = "x86_64")]
mod avx512;

use super::loops::{Arg, RowArg};
use super::program::ReduceFn;
use super::span::{Map1, Map2};
use crate::fault;
use crate::math::Real;
use crate::simd::versions;
use candle_core::DType;
use half::f16;

/// Elements per segment of a sum. Part of the numbers a program gives: see [`sum_into`].
pub(crate) const SEGMENT: usize = 1024;
/// Up to this many elements an accumulator meets one element, and most are not needed.
pub(super) const SHORT: usize = 16;
/// Accumulators per segment of a sum.
pub(super) const LANES: usize = 128;

/// The element itself.
#[derive(Clone, Copy)]
struct Same;

impl<T: Real> Map1<T> for Same {
    #[inline(always)]
    fn call(self, x: T) -> T {
        x
    }
}

/// (x − shift)².
#[derive(Clone, Copy)]
struct Square<T> {
    shift: T,
}

impl<T: Real> Map1<T> for Square<T> {
    #[inline(always)]
    fn call(self, x: T) -> T {
        // without a shift it is 0, which changes no x
        let x = x - self.shift;
        x * x
    }
}

/// What a sum adds of an element x.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // read by code for AVX-512 alone
enum Addend {
    /// x
    Same,
    /// x²
    Square,
    /// (x − shift)²
    Centred(f32),
}

/// What a sum adds of an element, as a function and by name.
trait Term<T>: Map1<T> {
    fn addend(self) -> Addend;
}

impl<T: Real> Term<T> for Same {
    #[inline(always)]
    fn addend(self) -> Addend {
        Addend::Same
    }
}

impl<T: Real> Term<T> for Square<T> {
    #[inline(always)]
    fn addend(self) -> Addend {
        match self.shift.to_f32() {
            0.0 => Addend::Square,
            shift => Addend::Centred(shift),
        }
    }
}

/// The run as f32 where the machine has AVX-512, and no fault is to be seen that only the loops have.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn for_avx512<T: Real>(x: &[T]) -> Option<&[f32]> {
    let here = !fault::any() || fault::active("row.sum.remainder");
    T::f32s(x).filter(|_| crate::simd::isa() == crate::simd::Isa::Avx512 && here)
}

/// The sum of a segment of at least [`LANES`] elements, where there is code of its own for it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn sum_of<T: Real>(segment: &[T], addend: Addend) -> Option<f64> {
    // SAFETY: the machine has AVX-512.
    for_avx512(segment).map(|x| unsafe { avx512::sum(x, addend) })
}

/// The extreme of a run, where there is code of its own for it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn extreme_of<T: Real>(x: &[T], max: bool, start: T) -> Option<T> {
    // SAFETY: the machine has AVX-512.
    for_avx512(x).map(|x| T::get(unsafe { avx512::extreme(x, max, start.to_f32()) }))
}

#[cfg(not(target_arch = "x86_64"))]
fn sum_of<T: Real>(_: &[T], _: Addend) -> Option<f64> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
fn extreme_of<T: Real>(_: &[T], _: bool, _: T) -> Option<T> {
    None
}

/// A sum that goes on with a function of the next element.
#[derive(Clone, Copy)]
struct Added<F>(F);

impl<T: Real, F: Map1<T>> Map2<T> for Added<F> {
    #[inline(always)]
    fn call(self, sum: T, x: T) -> T {
        sum + self.0.call(x)
    }
}

/// The better of two elements, the first of equals.
#[derive(Clone, Copy)]
struct Better<F>(F);

impl<T: Real, F: Fn(T, T) -> bool + Copy> Map2<T> for Better<F> {
    #[inline(always)]
    fn call(self, held: T, x: T) -> T {
        if (self.0)(held, x) {
            x
        } else {
            held
        }
    }
}

/// Where a reduction starts.
pub(crate) fn reduce_init<T: Real>(f: ReduceFn) -> T {
    match f {
        ReduceFn::Sum => T::ZERO,
        ReduceFn::Max if fault::active("row.max.start") => T::ZERO,
        ReduceFn::Min if fault::active("row.min.start") => T::ZERO,
        ReduceFn::Max => T::NEG_INF,
        ReduceFn::Min => T::INF,
    }
}

/// What a reduction holds of each row of a tile.
#[derive(Debug)]
pub(crate) struct Held<'a, T> {
    /// The sum or the extreme so far.
    pub(crate) acc: &'a mut [T],
    /// What the additions of segments to a sum rounded away; nothing for extremes.
    pub(crate) lost: &'a mut [T],
}

impl<'a, T: Real> Held<'a, T> {
    /// The numbers of up to `rows` rows, as they lie in one run: the accumulators, and behind them what their additions lost.
    pub(crate) fn new(numbers: &'a mut [T], rows: usize) -> Self {
        let (acc, lost) = numbers.split_at_mut(rows.min(numbers.len()));
        Self { acc, lost }
    }

    /// How many numbers a reduction of `rows` rows has.
    pub(crate) fn numbers(f: ReduceFn, rows: usize) -> usize {
        if f == ReduceFn::Sum {
            2 * rows
        } else {
            rows
        }
    }

    /// The reductions once all segments are in them, in `acc`. An infinite or NaN sum stays what it is: what it "lost" is NaN.
    pub(crate) fn finish(&mut self) {
        for (a, &mut l) in self.acc.iter_mut().zip(&mut *self.lost) {
            if l.to_f64().is_finite() {
                *a = *a + l;
            }
        }
    }
}

/// Adds a segment's sum, and to `lost` what that rounds away (Knuth's two-sum): a row of a hundred segments is as good as one of two.
#[inline(always)]
pub(super) fn add_segment<T: Real>(acc: &mut T, lost: &mut T, part: T) {
    let sum = *acc + part;
    let seen = sum - *acc;
    *lost = *lost + ((*acc - (sum - seen)) + (part - seen));
    *acc = sum;
}

versions! {
/// Folds a tile's elements into one accumulator per row. `first` says whether column 0 is the row's first element.
pub(crate) fn reduce<T: Real>(f: ReduceFn, a: Arg<'_, T>, held: &mut Held<'_, T>, rows: usize, cols: usize, first: bool) = reduce_body;
}

#[inline(always)]
pub(super) fn reduce_body<T: Real, const FMA: bool>(
    f: ReduceFn,
    a: Arg<'_, T>,
    held: &mut Held<'_, T>,
    rows: usize,
    cols: usize,
    first: bool,
) {
    for (r, acc) in held.acc.iter_mut().take(rows).enumerate() {
        let mut none = T::ZERO;
        let lost = held.lost.get_mut(r).unwrap_or(&mut none);
        if let RowArg::Slice(x) = a.row(r, cols) {
            let x = if fault::any() && fault::active(&format!("row.{f:?}.last")) {
                &x[..x.len().saturating_sub(1)]
            } else {
                x
            };
            match f {
                ReduceFn::Sum => sum_into(x, acc, lost, Same),
                ReduceFn::Max => extreme_into(x, acc, first, true, |m, x| m < x),
                ReduceFn::Min => extreme_into(x, acc, first, false, |m, x| m > x),
            }
        }
    }
}

versions! {
/// Adds the squares of a tile's elements, each less its row's shift if there are any, to one accumulator per row: as the instructions
/// `Sub`, `Sqr` and `Reduce` would, without storing what lies between.
pub(super) fn squares<T: Real>(x: Arg<'_, T>, shift: Option<&[T]>, held: &mut Held<'_, T>, rows: usize, cols: usize) = squares_body;
}

#[inline(always)]
fn squares_body<T: Real, const FMA: bool>(
    x: Arg<'_, T>,
    shift: Option<&[T]>,
    held: &mut Held<'_, T>,
    rows: usize,
    cols: usize,
) {
    for (r, (acc, lost)) in held.acc.iter_mut().zip(&mut *held.lost).take(rows).enumerate() {
        if let RowArg::Slice(x) = x.row(r, cols) {
            let x = if fault::active("row.squares.last") { &x[..x.len().saturating_sub(1)] } else { x };
            let shift = shift.map_or(T::ZERO, |s| s.get(r).copied().unwrap_or(T::NAN));
            sum_into(x, acc, lost, Square { shift });
        }
    }
}

/// Adds `f` of each of `x` to `acc` in the fixed order of this crate: per segment of 1,024 elements 128 accumulators (element `i` goes to
/// accumulator `i mod 128`), folded in halves (64, 32, …, 1), then segment by segment, as [`add_segment`] does. `x` starts at a
/// multiple of a segment, so the order depends on the row's length alone.
#[inline(always)]
fn sum_into<T: Real>(x: &[T], acc: &mut T, lost: &mut T, f: impl Term<T>) {
    if fault::active("row.sum.f16") {
        let sum = x.iter().fold(f16::ZERO, |s, &v| s + f.call(v).put::<f16>());
        *acc = *acc + T::get(sum);
        return;
    }
    let segments = if fault::active("row.sum.segment") { 1 } else { usize::MAX };
    let whole_chunks_only = fault::active("row.sum.remainder");
    for segment in x.chunks(SEGMENT).take(segments) {
        if segment.len() <= SHORT && !whole_chunks_only {
            let mut mapped = [T::ZERO; SHORT];
            for (m, &v) in mapped.iter_mut().zip(segment) {
                *m = f.call(v);
            }
            add_segment(acc, lost, T::from_f64(fold_wide::<T, SHORT>(&mapped[..segment.len()])));
            continue;
        }
        if let Some(sum) = (segment.len() >= LANES).then(|| sum_of(segment, f.addend())).flatten() {
            add_segment(acc, lost, T::from_f64(sum));
            continue;
        }
        // An accumulator meets eight additions at most, so that a large element's rounding errors do not pile up.
        let mut lanes = [T::ZERO; LANES];
        let rest = fold_chunks(segment, &mut lanes, Added(f));
        if !whole_chunks_only {
            for (l, &v) in lanes.iter_mut().zip(rest) {
                *l = *l + f.call(v);
            }
        }
        let sum = match segment.len() < LANES || T::DTYPE == DType::F64 {
            true => fold_wide::<T, LANES>(&lanes[..segment.len().min(LANES)]),
            false => fold_all(&lanes),
        };
        add_segment(acc, lost, T::from_f64(sum));
    }
}

/// As [`fold_wide`] for all lanes, in arrays whose sizes the compiler knows, so that they stay in registers.
#[inline(always)]
fn fold_all<T: Real>(lanes: &[T; LANES]) -> f64 {
    if fault::any() && fault::active("row.fold.lane") {
        return fold_wide::<T, LANES>(lanes);
    }
    macro_rules! halve {
        ($from:ident, $width:literal) => {
            std::array::from_fn::<f64, $width, _>(|i| $from[i] + $from[i + $width])
        };
    }
    let w: [f64; 64] = std::array::from_fn(|i| lanes[i].to_f64() + lanes[i + 64].to_f64());
    let w = halve!(w, 32);
    let w = halve!(w, 16);
    let w = halve!(w, 8);
    let w = halve!(w, 4);
    let w = halve!(w, 2);
    w[0] + w[1]
}

/// Sums of up to `N` accumulators. They meet in f64, and round once: a short row's sum is as good as its type allows.
#[inline(always)]
fn fold_wide<T: Real, const N: usize>(lanes: &[T]) -> f64 {
    let used = lanes.len().next_power_of_two().min(N);
    let mut wide = [0f64; N];
    for (w, &v) in wide.iter_mut().zip(lanes) {
        *w = v.to_f64();
    }
    if T::DTYPE == DType::F64 {
        fold_exactly(&mut wide[..used])
    } else {
        fold(&mut wide[..used], |a, b| a + b)
    }
}

/// Takes element `i` of every whole chunk of `LANES` elements into lane `i`, and gives what remains.
///
/// Half of the lanes at a time, in an array that nothing points to: it stays in registers.
#[inline(always)]
fn fold_chunks<'a, T: Real>(x: &'a [T], lanes: &mut [T; LANES], f: impl Map2<T>) -> &'a [T] {
    const HALF: usize = LANES / 2;
    for (half, lanes) in lanes.chunks_exact_mut(HALF).enumerate() {
        let mut held = [T::ZERO; HALF];
        held.copy_from_slice(lanes);
        for chunk in x.chunks_exact(LANES) {
            // a length that the compiler knows
            if let Some(Ok(chunk)) = chunk.chunks_exact(HALF).nth(half).map(<&[T; HALF]>::try_from) {
                for (h, &v) in held.iter_mut().zip(chunk) {
                    *h = f.call(*h, v);
                }
            }
        }
        lanes.copy_from_slice(&held);
    }
    x.chunks_exact(LANES).remainder()
}

/// Folds f64 lanes as [`fold`] does, carrying what each addition rounds away (Knuth's two-sum) and adding it at the end: there
/// is no wider type to meet in.
#[inline(always)]
pub(super) fn fold_exactly(lanes: &mut [f64]) -> f64 {
    let mut lost = 0f64;
    let mut width = lanes.len() / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        let skip = fault::one_if("row.fold.lane");
        for (a, &b) in low.iter_mut().zip(high.iter()).skip(skip) {
            let sum = *a + b;
            let b_seen = sum - *a;
            lost += (*a - (sum - b_seen)) + (b - b_seen);
            *a = sum;
        }
        width /= 2;
    }
    let sum = lanes.first().copied().unwrap_or_default();
    // An infinite or NaN sum stays what it is: what it "lost" is NaN.
    if lost.is_finite() {
        sum + lost
    } else {
        sum
    }
}

/// Folds a power of two of lanes in halves.
#[inline(always)]
pub(crate) fn fold<T: Real>(lanes: &mut [T], f: impl Fn(T, T) -> T) -> T {
    let mut width = lanes.len() / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        let skip = fault::one_if("row.fold.lane");
        for (a, &b) in low.iter_mut().zip(high.iter()).skip(skip) {
            *a = f(*a, b);
        }
        width /= 2;
    }
    lanes.first().copied().unwrap_or_default()
}

/// The sum of a row, or of the squares of its elements less a number.
#[inline(always)]
pub(super) fn sum_of_row<T: Real>(x: &[T], squares_around: Option<T>) -> T {
    let (mut acc, mut lost) = ([T::ZERO], [T::ZERO]);
    match squares_around {
        None => sum_into(x, &mut acc[0], &mut lost[0], Same),
        Some(shift) => sum_into(x, &mut acc[0], &mut lost[0], Square { shift }),
    }
    Held { acc: &mut acc, lost: &mut lost }.finish();
    acc[0]
}

/// The largest element of a row, as a reduction gives it.
#[inline(always)]
pub(super) fn max_of_row<T: Real>(x: &[T]) -> T {
    let mut acc = T::NEG_INF;
    extreme_into(x, &mut acc, true, true, |m, x| m < x);
    acc
}

#[inline(always)]
fn extreme_into<T: Real>(x: &[T], acc: &mut T, first: bool, max: bool, better: impl Fn(T, T) -> bool + Copy) {
    let start = if max { T::NEG_INF } else { T::INF };
    // Candle keeps its first element until a later one compares better: a NaN there stays, a NaN elsewhere never wins.
    if first && x.first().is_some_and(|v| v.is_nan()) && !fault::active("row.extreme.nan") {
        *acc = T::NAN;
        return;
    }
    if x.len() <= SHORT {
        let mut lanes = [start; SHORT];
        for (l, &v) in lanes.iter_mut().zip(x) {
            *l = if better(start, v) { v } else { start };
        }
        let m = fold(&mut lanes, |a, b| if better(a, b) { b } else { a });
        let m = first_zero(m, || x.iter().copied());
        if better(*acc, m) {
            *acc = m;
        }
        return;
    }
    let m = extreme_of(x, max, start).unwrap_or_else(|| {
        let mut lanes = [start; LANES];
        let rest = fold_chunks(x, &mut lanes, Better(better));
        for (l, &v) in lanes.iter_mut().zip(rest) {
            *l = if better(*l, v) { v } else { *l };
        }
        fold(&mut lanes, |a, b| if better(a, b) { b } else { a })
    });
    let m = first_zero(m, || x.iter().copied());
    if better(*acc, m) {
        *acc = m;
    }
}

/// An extreme that is zero has the sign of the row's first zero, as Candle keeps the first of equals: lanes meet in another order.
#[inline(always)]
pub(super) fn first_zero<T: Real, I: Iterator<Item = T>>(m: T, row: impl Fn() -> I) -> T {
    if m == T::ZERO && !fault::active("row.extreme.zero") {
        return row().find(|v| *v == T::ZERO).unwrap_or(m);
    }
    m
}
