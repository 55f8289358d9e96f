//! One tight loop per instruction over a tile of rows.
//!
//! Every loop is generic over the register type and monomorphic in its function, so the compiler vectorises it, once for each
//! instruction set; nothing here depends on which.

use super::program::{BinaryFn, FloatKind, ReduceFn, UnaryFn};
use super::span::{self, Left, Map1, Map2, Right};
use crate::element::Element;
use crate::fault;
use crate::math::Real;
use crate::simd::versions;
use candle_core::DType;
use half::{bf16, f16};

/// Elements per segment of a sum. Part of the numbers a program gives: see [`sum_into`].
pub(crate) const SEGMENT: usize = 1024;
/// Up to this many elements an accumulator meets one element, and most are not needed.
pub(super) const SHORT: usize = 16;
/// Accumulators per segment of a sum.
pub(super) const LANES: usize = 128;

/// An argument of a loop: one value for the tile, one per row, or one per element.
#[derive(Clone, Copy)]
pub(crate) enum Arg<'a, T> {
    Const(T),
    Row(&'a [T]),
    /// Rows of elements, `pitch` apart; pitch 0 repeats one row.
    Vec {
        data: &'a [T],
        pitch: usize,
    },
}

/// An argument for one row.
enum RowArg<'a, T> {
    Scalar(T),
    Slice(&'a [T]),
}

impl<'a, T: Copy + Default> Arg<'a, T> {
    #[inline(always)]
    fn row(&self, r: usize, cols: usize) -> RowArg<'a, T> {
        match *self {
            Arg::Const(v) => RowArg::Scalar(v),
            Arg::Row(v) => RowArg::Scalar(v.get(r).copied().unwrap_or_default()),
            Arg::Vec { data, pitch } => {
                let at = r * pitch;
                RowArg::Slice(data.get(at..at + cols).unwrap_or_default())
            }
        }
    }

    /// Whether all rows of the tile are one run of memory (or one scalar).
    fn is_flat(&self, rows: usize, cols: usize) -> bool {
        match *self {
            Arg::Const(_) => true,
            Arg::Row(_) => rows <= 1,
            Arg::Vec { pitch, .. } => rows <= 1 || pitch == cols,
        }
    }
}

/// Splits a tile into the loops to run: one run over everything where all arguments allow, else one per row.
fn shape<T: Copy + Default>(args: &[Arg<'_, T>], rows: usize, cols: usize) -> (usize, usize) {
    if args.iter().all(|a| a.is_flat(rows, cols)) {
        (1, rows * cols)
    } else {
        (rows, cols)
    }
}

/// Makes `F<FMA>` the function that is written like a closure of `T`s.
macro_rules! function {
    (|$x:ident| $e:expr) => {
        #[derive(Clone, Copy)]
        struct F<const FMA: bool>;
        impl<T: Real, const FMA: bool> Map1<T> for F<FMA> {
            #[inline(always)]
            fn call(self, $x: T) -> T {
                $e
            }
        }
    };
    (|$x:ident, $y:ident| $e:expr) => {
        #[derive(Clone, Copy)]
        struct F<const FMA: bool>;
        impl<T: Real, const FMA: bool> Map2<T> for F<FMA> {
            #[inline(always)]
            fn call(self, $x: T, $y: T) -> T {
                $e
            }
        }
    };
}

#[inline(always)]
fn map1<T: Real>(a: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize, f: impl Map1<T>) {
    let (rows, cols) = shape(&[a], rows, cols);
    if cols == 0 {
        return;
    }
    for (r, d) in dst.chunks_exact_mut(cols).take(rows).enumerate() {
        match a.row(r, cols) {
            RowArg::Scalar(x) => d.fill(f.call(x)),
            RowArg::Slice(x) => span::one(d, x, f),
        }
    }
}

#[inline(always)]
fn map2<T: Real>(a: Arg<'_, T>, b: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize, f: impl Map2<T>) {
    let (rows, cols) = shape(&[a, b], rows, cols);
    if cols == 0 {
        return;
    }
    for (r, d) in dst.chunks_exact_mut(cols).take(rows).enumerate() {
        match (a.row(r, cols), b.row(r, cols)) {
            (RowArg::Slice(x), RowArg::Slice(y)) => span::two(d, x, y, f),
            (RowArg::Slice(x), RowArg::Scalar(y)) => span::one(d, x, Right(f, y)),
            (RowArg::Scalar(x), RowArg::Slice(y)) => span::one(d, y, Left(f, x)),
            (RowArg::Scalar(x), RowArg::Scalar(y)) => d.fill(f.call(x, y)),
        }
    }
}

versions! {
/// `c != 0 ? a : b` over a tile.
pub(crate) fn select<T: Real>(c: Arg<'_, T>, a: Arg<'_, T>, b: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize) = select_body;
}

#[inline(always)]
fn select_body<T: Real, const FMA: bool>(
    c: Arg<'_, T>,
    a: Arg<'_, T>,
    b: Arg<'_, T>,
    dst: &mut [T],
    rows: usize,
    cols: usize,
) {
    let (rows, cols) = shape(&[c, a, b], rows, cols);
    if cols == 0 {
        return;
    }
    let (a, b) = if fault::active("row.select.arms") { (b, a) } else { (a, b) };
    for (r, d) in dst.chunks_exact_mut(cols).take(rows).enumerate() {
        let (c, a, b) = (c.row(r, cols), a.row(r, cols), b.row(r, cols));
        match (c, a, b) {
            (RowArg::Slice(c), RowArg::Slice(a), RowArg::Slice(b)) => {
                for (((d, &c), &a), &b) in d.iter_mut().zip(c).zip(a).zip(b) {
                    *d = pick(c, a, b);
                }
            }
            (RowArg::Slice(c), RowArg::Slice(a), RowArg::Scalar(b)) => {
                for ((d, &c), &a) in d.iter_mut().zip(c).zip(a) {
                    *d = pick(c, a, b);
                }
            }
            (c, a, b) => {
                for (j, d) in d.iter_mut().enumerate() {
                    *d = pick(at(&c, j), at(&a, j), at(&b, j));
                }
            }
        }
    }
}

#[inline(always)]
fn pick<T: Real>(c: T, a: T, b: T) -> T {
    if c != T::ZERO {
        a
    } else {
        b
    }
}

#[inline(always)]
fn at<T: Copy + Default>(a: &RowArg<'_, T>, j: usize) -> T {
    match a {
        RowArg::Scalar(v) => *v,
        RowArg::Slice(s) => s.get(j).copied().unwrap_or_default(),
    }
}

#[inline(always)]
fn truth<T: Real>(b: bool) -> T {
    if b {
        T::ONE
    } else {
        T::ZERO
    }
}

versions! {
/// A function of one argument over a tile.
pub(crate) fn unary<T: Real>(f: UnaryFn, a: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize) = unary_body;
}

#[inline(always)]
fn unary_body<T: Real, const FMA: bool>(f: UnaryFn, a: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize) {
    macro_rules! go {
        (|$x:ident| $e:expr) => {{
            function!(|$x| $e);
            map1(a, dst, rows, cols, F::<FMA>)
        }};
    }
    match f {
        UnaryFn::Neg => go!(|x| -x),
        UnaryFn::Abs => go!(|x| x.abs()),
        UnaryFn::Recip => go!(|x| T::ONE / x),
        UnaryFn::Sqr => go!(|x| x * x),
        UnaryFn::Sqrt => go!(|x| x.sqrt()),
        UnaryFn::Rsqrt => go!(|x| T::ONE / x.sqrt()),
        UnaryFn::Exp => go!(|x| x.exp::<FMA>()),
        UnaryFn::Log => go!(|x| x.log::<FMA>()),
        UnaryFn::Sin => go!(|x| x.sin::<FMA>()),
        UnaryFn::Cos => go!(|x| x.cos::<FMA>()),
        UnaryFn::Tanh => go!(|x| x.tanh::<FMA>()),
        UnaryFn::Erf => go!(|x| x.erf::<FMA>()),
        UnaryFn::Gelu => go!(|x| x.gelu::<FMA>()),
        UnaryFn::GeluErf => go!(|x| x.gelu_erf::<FMA>()),
        UnaryFn::Relu => go!(|x| if x > T::ZERO { x } else { T::ZERO }),
        UnaryFn::Silu => go!(|x| x.silu::<FMA>()),
        UnaryFn::Sigmoid => go!(|x| x.sigmoid::<FMA>()),
        UnaryFn::Floor => go!(|x| x.floor()),
        UnaryFn::Ceil => go!(|x| x.ceil()),
        UnaryFn::Round => go!(|x| x.round()),
        UnaryFn::Sign => go!(|x| truth::<T>(x > T::ZERO) - truth::<T>(x < T::ZERO)),
    }
    if fault::any() && fault::active(&format!("row.{f:?}.tail")) {
        spoil_last(dst, false);
    }
}

versions! {
/// A function of two arguments over a tile.
pub(crate) fn binary<T: Real>(f: BinaryFn, a: Arg<'_, T>, b: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize) = binary_body;
}

#[inline(always)]
fn binary_body<T: Real, const FMA: bool>(
    f: BinaryFn,
    a: Arg<'_, T>,
    b: Arg<'_, T>,
    dst: &mut [T],
    rows: usize,
    cols: usize,
) {
    macro_rules! go {
        (|$x:ident, $y:ident| $e:expr) => {{
            function!(|$x, $y| $e);
            map2(a, b, dst, rows, cols, F::<FMA>)
        }};
    }
    match f {
        BinaryFn::Add => go!(|x, y| x + y),
        BinaryFn::Sub => go!(|x, y| x - y),
        BinaryFn::Mul => go!(|x, y| x * y),
        BinaryFn::Div | BinaryFn::Quotient => go!(|x, y| x / y),
        BinaryFn::Max => go!(|x, y| if x < y { y } else { x }),
        BinaryFn::Min => go!(|x, y| if x > y { y } else { x }),
        BinaryFn::Pow => go!(|x, y| x.pow(y)),
        BinaryFn::Eq => go!(|x, y| truth(x == y)),
        BinaryFn::Ne => go!(|x, y| truth(x != y)),
        BinaryFn::Lt => go!(|x, y| truth(x < y)),
        BinaryFn::Le => go!(|x, y| truth(x <= y)),
        BinaryFn::Gt => go!(|x, y| truth(x > y)),
        BinaryFn::Ge => go!(|x, y| truth(x >= y)),
    }
    if fault::any() && fault::active(&format!("row.{f:?}.tail")) {
        spoil_last(dst, is_comparison(f));
    }
}

versions! {
/// x·mul + add over a run of elements, rounded twice as a program's two instructions round.
pub(crate) fn affine<T: Real>(x: Arg<'_, T>, mul: T, add: T, dst: &mut [T]) = affine_body;
}

#[derive(Clone, Copy)]
struct Affine<T> {
    mul: T,
    add: T,
}

impl<T: Real> Map1<T> for Affine<T> {
    #[inline(always)]
    fn call(self, x: T) -> T {
        x * self.mul + self.add
    }
}

#[inline(always)]
fn affine_body<T: Real, const FMA: bool>(x: Arg<'_, T>, mul: T, add: T, dst: &mut [T]) {
    let n = dst.len();
    map1(x, dst, 1, n, Affine { mul, add });
}

fn is_comparison(f: BinaryFn) -> bool {
    matches!(f, BinaryFn::Eq | BinaryFn::Ne | BinaryFn::Lt | BinaryFn::Le | BinaryFn::Gt | BinaryFn::Ge)
}

/// The fault of a tail: the last element a thousandth off, or the wrong truth value.
fn spoil_last<T: Real>(dst: &mut [T], truth: bool) {
    if let Some(x) = dst.last_mut() {
        *x = if truth { T::ONE - *x } else { fault::nudged(*x) };
    }
}

versions! {
/// Rounds a tile to a storage type's precision.
pub(crate) fn round<T: Real>(to: FloatKind, a: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize) = round_body;
}

#[inline(always)]
fn round_body<T: Real, const FMA: bool>(to: FloatKind, a: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize) {
    macro_rules! go {
        (|$x:ident| $e:expr) => {{
            function!(|$x| $e);
            map1(a, dst, rows, cols, F::<FMA>)
        }};
    }
    if fault::any() && fault::active(&format!("row.round.{to:?}")) {
        return go!(|x| x);
    }
    match to {
        FloatKind::F16 => go!(|x| T::get(x.put::<f16>())),
        FloatKind::BF16 => go!(|x| T::get(x.put::<bf16>())),
        FloatKind::F32 => go!(|x| T::get(Element::to_f32(x))),
    }
}

versions! {
/// √(sum/n + eps) over a tile, in f64 and rounded once.
pub(crate) fn root_mean<T: Real>(sum: Arg<'_, T>, n: f64, eps: f64, dst: &mut [T], rows: usize, cols: usize) = root_mean_body;
}

#[derive(Clone, Copy)]
struct RootMean {
    n: f64,
    eps: f64,
}

impl<T: Real> Map1<T> for RootMean {
    #[inline(always)]
    fn call(self, x: T) -> T {
        T::from_f64((x.to_f64() / self.n + self.eps).sqrt())
    }
}

#[inline(always)]
fn root_mean_body<T: Real, const FMA: bool>(
    sum: Arg<'_, T>,
    n: f64,
    eps: f64,
    dst: &mut [T],
    rows: usize,
    cols: usize,
) {
    let n = if fault::active("row.root_mean.count") { 1.0 } else { n };
    let eps = if fault::active("row.root_mean.eps") { 0.0 } else { eps };
    map1(sum, dst, rows, cols, RootMean { n, eps });
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

versions! {
/// Folds a tile's elements into one accumulator per row. `first` says whether column 0 is the row's first element.
pub(crate) fn reduce<T: Real>(f: ReduceFn, a: Arg<'_, T>, acc: &mut [T], rows: usize, cols: usize, first: bool) = reduce_body;
}

#[inline(always)]
fn reduce_body<T: Real, const FMA: bool>(
    f: ReduceFn,
    a: Arg<'_, T>,
    acc: &mut [T],
    rows: usize,
    cols: usize,
    first: bool,
) {
    for (r, acc) in acc.iter_mut().take(rows).enumerate() {
        if let RowArg::Slice(x) = a.row(r, cols) {
            let x = if fault::any() && fault::active(&format!("row.{f:?}.last")) {
                &x[..x.len().saturating_sub(1)]
            } else {
                x
            };
            match f {
                ReduceFn::Sum => sum_into(x, acc),
                ReduceFn::Max => extreme_into(x, acc, first, T::NEG_INF, |m, x| m < x),
                ReduceFn::Min => extreme_into(x, acc, first, T::INF, |m, x| m > x),
            }
        }
    }
}

/// Adds `x` to `acc` in the fixed order of this crate: per segment of 1,024 elements 128 accumulators (element `i` goes to
/// accumulator `i mod 128`), folded in halves (64, 32, …, 1), then segment by segment. `x` starts at a multiple of a segment, so
/// the order depends on the row's length alone.
#[inline(always)]
fn sum_into<T: Real>(x: &[T], acc: &mut T) {
    if fault::active("row.sum.f16") {
        let sum = x.iter().fold(f16::ZERO, |s, v| s + v.put::<f16>());
        *acc = *acc + T::get(sum);
        return;
    }
    let segments = if fault::active("row.sum.segment") { 1 } else { usize::MAX };
    let whole_chunks_only = fault::active("row.sum.remainder");
    for segment in x.chunks(SEGMENT).take(segments) {
        if segment.len() <= SHORT && !whole_chunks_only {
            *acc = *acc + T::from_f64(fold_wide::<T, SHORT>(segment));
            continue;
        }
        // An accumulator meets eight additions at most, so that a large element's rounding errors do not pile up.
        let mut lanes = [T::ZERO; LANES];
        let rest = fold_chunks(segment, &mut lanes, |l, v| l + v);
        if !whole_chunks_only {
            for (l, &v) in lanes.iter_mut().zip(rest) {
                *l = *l + v;
            }
        }
        let sum = match segment.len() < LANES || T::DTYPE == DType::F64 {
            true => fold_wide::<T, LANES>(&lanes[..segment.len().min(LANES)]),
            false => fold_all(&lanes),
        };
        *acc = *acc + T::from_f64(sum);
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
fn fold_chunks<'a, T: Real>(x: &'a [T], lanes: &mut [T; LANES], f: impl Fn(T, T) -> T) -> &'a [T] {
    const HALF: usize = LANES / 2;
    for (half, lanes) in lanes.chunks_exact_mut(HALF).enumerate() {
        let mut held = [T::ZERO; HALF];
        held.copy_from_slice(lanes);
        for chunk in x.chunks_exact(LANES) {
            // a length that the compiler knows
            if let Some(Ok(chunk)) = chunk.chunks_exact(HALF).nth(half).map(<&[T; HALF]>::try_from) {
                for (h, &v) in held.iter_mut().zip(chunk) {
                    *h = f(*h, v);
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

#[inline(always)]
fn extreme_into<T: Real>(x: &[T], acc: &mut T, first: bool, start: T, better: impl Fn(T, T) -> bool) {
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
    let mut lanes = [start; LANES];
    let rest = fold_chunks(x, &mut lanes, |l, v| if better(l, v) { v } else { l });
    for (l, &v) in lanes.iter_mut().zip(rest) {
        *l = if better(*l, v) { v } else { *l };
    }
    let m = fold(&mut lanes, |a, b| if better(a, b) { b } else { a });
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

#[cfg(test)]
mod tests;
