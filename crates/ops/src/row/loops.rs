//! One tight loop per instruction over a tile of rows.
//!
//! Every loop is generic over the register type and monomorphic in its function, so the compiler vectorises it, once for each
//! instruction set; nothing here depends on which.

use super::program::{BinaryFn, FloatKind, UnaryFn};
use super::span::{self, Left, Map1, Map2, Right};
#[cfg(target_arch = "x86_64")]
use super::wide;
use crate::element::Element;
use crate::fault;
use crate::math::Real;
use crate::simd::versions;
use half::{bf16, f16};

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
pub(super) enum RowArg<'a, T> {
    Scalar(T),
    Slice(&'a [T]),
}

impl<'a, T: Copy + Default> Arg<'a, T> {
    #[inline(always)]
    pub(super) fn row(&self, r: usize, cols: usize) -> RowArg<'a, T> {
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
    if !in_registers(f, a, dst, rows, cols) {
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
    }
    if fault::any() && fault::active(&format!("row.{f:?}.tail")) {
        spoil_last(dst, false);
    }
}

/// A function that the machine's registers have instructions for, and whether it was done.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn in_registers<T: Real>(f: UnaryFn, a: Arg<'_, T>, dst: &mut [T], rows: usize, cols: usize) -> bool {
    let (rows, cols) = shape(&[a], rows, cols);
    cols > 0
        && dst.chunks_exact_mut(cols).take(rows).enumerate().all(|(r, dst)| match a.row(r, cols) {
            RowArg::Slice(x) => wide::unary(f, dst, x),
            RowArg::Scalar(_) => false,
        })
}

#[cfg(not(target_arch = "x86_64"))]
fn in_registers<T: Real>(_: UnaryFn, _: Arg<'_, T>, _: &mut [T], _: usize, _: usize) -> bool {
    false
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
/// x·mul + add over a tile, rounded twice as a program's two instructions round.
pub(crate) fn affine<T: Real>(x: Arg<'_, T>, mul: T, add: T, dst: &mut [T], rows: usize, cols: usize) = affine_body;
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
fn affine_body<T: Real, const FMA: bool>(x: Arg<'_, T>, mul: T, add: T, dst: &mut [T], rows: usize, cols: usize) {
    map1(x, dst, rows, cols, Affine { mul, add });
    if fault::active("row.affine.tail") {
        spoil_last(dst, false);
    }
}

/// `out[i] = f(x[i])·y[i]` of three runs of one length, rounded as a program's two instructions round.
pub(crate) fn gated(f: UnaryFn, x: &[f32], y: &[f32], out: &mut [f32]) {
    let n = out.len().min(x.len()).min(y.len());
    #[cfg(target_arch = "x86_64")]
    let done = wide::gated(f, &mut out[..n], &x[..n], &y[..n]);
    #[cfg(not(target_arch = "x86_64"))]
    let done = false;
    if !done {
        /// Elements whose function stays near until it is multiplied.
        const NEAR: usize = 256;
        let mut act = [0f32; NEAR];
        for ((out, x), y) in out[..n].chunks_mut(NEAR).zip(x.chunks(NEAR)).zip(y.chunks(NEAR)) {
            let (act, vec) = (&mut act[..out.len()], |data| Arg::Vec { data, pitch: 0 });
            unary(f, vec(&x[..out.len()]), act, 1, out.len());
            let len = out.len();
            binary(BinaryFn::Mul, vec(act), vec(&y[..len]), out, 1, len);
        }
    }
    if let (true, Some(last)) = (fault::active("row.gated.tail"), out.last_mut()) {
        *last = fault::nudged(*last);
    }
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

/// √(x/n + eps)
#[derive(Clone, Copy)]
pub(super) struct RootMean {
    pub(super) n: f64,
    pub(super) eps: f64,
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

#[cfg(test)]
mod tests;
