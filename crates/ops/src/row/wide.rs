//! Loops over f32 in registers of AVX-512: for functions in which that has an instruction that a compiler does not find, and for rows that are asked
//! for ahead.
//!
//! They give each element the bits that the ordinary loops do.

use super::program::UnaryFn;
use crate::math::lane::avx512::{Wide, WIDTH};
use crate::math::lane::Lane;
use crate::math::{Formula, Real};
use std::arch::x86_64::*;

/// From this many registers on a run has a head, so that its stores do not straddle cache lines.
const LONG: usize = 8;
/// So far ahead, in bytes, elements are asked for: the processor does not do so by itself across a page.
const AHEAD: usize = 4096;

/// A function of one element, of any lane.
pub(super) trait OfLane: Copy {
    fn call<L: Lane>(self, x: L) -> L;
}

/// Makes a function of a lane.
macro_rules! of_lane {
    ($($name:ident, |$x:ident| $e:expr;)*) => {
        $(#[derive(Clone, Copy)]
        struct $name;
        impl OfLane for $name {
            #[inline(always)]
            fn call<L: Lane>(self, $x: L) -> L {
                $e
            }
        })*
    };
}

of_lane! {
    Exp, |x| x.exp();
    Tanh, |x| x.tanh();
    Erf, |x| x.erf();
    Gelu, |x| x.gelu();
    GeluErf, |x| x.gelu_erf();
    Silu, |x| x.silu();
    Sigmoid, |x| x.sigmoid();
}

/// e^(x − shift)
#[derive(Clone, Copy)]
pub(super) struct ShiftedExp(pub(super) f32);

impl OfLane for ShiftedExp {
    #[inline(always)]
    fn call<L: Lane>(self, x: L) -> L {
        (x - x.all(self.0)).exp()
    }
}

/// x·(high + low)
#[derive(Clone, Copy)]
struct Times {
    high: f32,
    low: f32,
}

impl OfLane for Times {
    #[inline(always)]
    fn call<L: Lane>(self, x: L) -> L {
        x.mul_add(x.all(self.high), x * x.all(self.low))
    }
}

/// The lower `n` places of a register.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    if n < WIDTH {
        (1 << n) - 1
    } else {
        u16::MAX
    }
}

/// Calls `f` with where registers begin among `n` elements that are written from `dst` on, and with which of their places count. Where they are many,
/// stores do not straddle cache lines.
#[inline(always)]
fn each_register(dst: *const f32, n: usize, mut f: impl FnMut(usize, __mmask16)) {
    let head = if n < LONG * WIDTH { 0 } else { dst.align_offset(size_of::<__m512>()).min(WIDTH) };
    if head > 0 {
        f(0, first(head));
    }
    let mut at = head;
    while at + WIDTH <= n {
        f(at, u16::MAX);
        at += WIDTH;
    }
    if at < n {
        f(at, first(n - at));
    }
}

/// `dst[i] = f(x[i])` for `n` elements, which may be the same memory.
///
/// # Safety
/// The machine has AVX-512; `dst` may be written and `x` be read for `n` elements, and where they overlap they are the same.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn run(dst: *mut f32, x: *const f32, n: usize, f: impl OfLane) {
    each_register(dst, n, |at, mask| {
        // SAFETY: the mask has a bit for elements before `n`, and what it hides is neither read nor written; a prefetch reads nothing.
        unsafe {
            let x = x.wrapping_add(at);
            _mm_prefetch::<_MM_HINT_T0>(x.wrapping_byte_add(AHEAD).cast());
            let v = f.call(Wide::new(_mm512_maskz_loadu_ps(mask, x))).get();
            _mm512_mask_storeu_ps(dst.wrapping_add(at), mask, v);
        }
    });
}

/// What a normalised row is made of: `(x[i] − shift)·(high + low)·weight[i] + bias[i]`; a bias comes with a weight.
#[derive(Clone, Copy)]
pub(super) struct Normal<'a, T> {
    pub(super) x: &'a [T],
    pub(super) weight: Option<&'a [T]>,
    pub(super) bias: Option<&'a [T]>,
    pub(super) shift: T,
    pub(super) high: T,
    pub(super) low: T,
}

/// Such a row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn normal_row(dst: &mut [f32], of: Normal<'_, f32>, next: &[f32]) {
    let n = [Some(of.x), of.weight, of.bias].into_iter().flatten().fold(dst.len(), |n, s| n.min(s.len()));
    let (shift, scale) = (of.shift, Times { high: of.high, low: of.low });
    macro_rules! row {
        (|$v:ident, $at:ident, $mask:ident| $e:expr) => {
            each_register(dst.as_ptr(), n, |$at, $mask| {
                // SAFETY: the mask has a bit for elements before `n`, which all slices have, and what it hides is neither read nor written; a prefetch reads nothing.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(next.as_ptr().wrapping_add($at).cast());
                    let x = Wide::new(_mm512_maskz_loadu_ps($mask, of.x.as_ptr().wrapping_add($at)));
                    let $v = scale.call(x - x.all(shift));
                    _mm512_mask_storeu_ps(dst.as_mut_ptr().wrapping_add($at), $mask, $e.get());
                }
            })
        };
    }
    let from = |s: &[f32], at: usize, mask| {
        // SAFETY: as above.
        unsafe { Wide::new(_mm512_maskz_loadu_ps(mask, s.as_ptr().wrapping_add(at))) }
    };
    match (of.weight, of.bias) {
        (None, _) => row!(|v, at, mask| v),
        (Some(w), None) => row!(|v, at, mask| v * from(w, at, mask)),
        (Some(w), Some(b)) => row!(|v, at, mask| v * from(w, at, mask) + from(b, at, mask)),
    }
}

/// Writes such a row, and says whether it was done; `next` is what is read next, if there is more.
#[inline(always)]
pub(super) fn normal<T: Real>(dst: &mut [T], of: &Normal<'_, T>, next: &[T]) -> bool {
    if !is_here() {
        return false;
    }
    let (Some(dst), Some(x), Some(next)) = (T::f32s_mut(dst), T::f32s(of.x), T::f32s(next)) else { return false };
    let (weight, bias) = (of.weight.and_then(T::f32s), of.bias.and_then(T::f32s));
    let (shift, high, low) = (of.shift.to_f32(), of.high.to_f32(), of.low.to_f32());
    // SAFETY: the machine has AVX-512.
    unsafe { normal_row(dst, Normal { x, weight, bias, shift, high, low }, next) };
    true
}

/// `dst[i] = x[i] + y[i]` for `n` elements; `next` is what is read next in the place of `y`.
///
/// # Safety
/// The machine has AVX-512; `dst` may be written and `x` and `y` be read for `n` elements; `x` may be the same memory as `dst`, else none overlap.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn sums(dst: *mut f32, x: *const f32, y: *const f32, n: usize, next: *const f32) {
    each_register(dst, n, |at, mask| {
        // SAFETY: the mask has a bit for elements before `n`, and what it hides is neither read nor written; a prefetch reads nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
            let x = Wide::new(_mm512_maskz_loadu_ps(mask, x.wrapping_add(at)));
            let y = Wide::new(_mm512_maskz_loadu_ps(mask, y.wrapping_add(at)));
            _mm512_mask_storeu_ps(dst.wrapping_add(at), mask, (x + y).get());
        }
    });
}

/// Writes such sums, and says whether it was done.
#[inline(always)]
pub(super) fn add<T: Real>(dst: &mut [T], x: &[T], y: &[T], next: &[T]) -> bool {
    if !is_here() {
        return false;
    }
    let (Some(dst), Some(x)) = (T::f32s_mut(dst), T::f32s(x)) else { return false };
    let (Some(y), Some(next)) = (T::f32s(y), T::f32s(next)) else { return false };
    let n = dst.len().min(x.len()).min(y.len());
    // SAFETY: the machine has AVX-512, and all three slices have so many elements.
    unsafe { sums(dst.as_mut_ptr(), x.as_ptr(), y.as_ptr(), n, next.as_ptr()) };
    true
}

/// The same of `dst` in the place of `x`.
#[inline(always)]
pub(super) fn add_to<T: Real>(dst: &mut [T], y: &[T], next: &[T]) -> bool {
    if !is_here() {
        return false;
    }
    let (Some(dst), Some(y), Some(next)) = (T::f32s_mut(dst), T::f32s(y), T::f32s(next)) else { return false };
    let (n, at) = (dst.len().min(y.len()), dst.as_mut_ptr());
    // SAFETY: as above.
    unsafe { sums(at, at, y.as_ptr(), n, next.as_ptr()) };
    true
}

/// `dst[i] = f(x[i])·y[i]` of three runs of one length.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn products(dst: &mut [f32], x: &[f32], y: &[f32], f: impl OfLane) {
    let n = dst.len().min(x.len()).min(y.len());
    each_register(dst.as_ptr(), n, |at, mask| {
        let (x, y) = (x.as_ptr().wrapping_add(at), y.as_ptr().wrapping_add(at));
        // SAFETY: the mask has a bit for elements before `n`, which all slices have, and what it hides is neither read nor written; a prefetch reads nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(x.wrapping_byte_add(AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(y.wrapping_byte_add(AHEAD).cast());
            let y = Wide::new(_mm512_maskz_loadu_ps(mask, y));
            let product = f.call(Wide::new(_mm512_maskz_loadu_ps(mask, x))) * y;
            _mm512_mask_storeu_ps(dst.as_mut_ptr().wrapping_add(at), mask, product.get());
        }
    });
}

/// The same of a function by its name, and whether it was done.
pub(super) fn gated(f: UnaryFn, dst: &mut [f32], x: &[f32], y: &[f32]) -> bool {
    if !is_here() {
        return false;
    }
    // SAFETY: the machine has AVX-512.
    unsafe {
        match f {
            UnaryFn::Gelu => products(dst, x, y, Gelu),
            UnaryFn::GeluErf => products(dst, x, y, GeluErf),
            UnaryFn::Silu => products(dst, x, y, Silu),
            UnaryFn::Sigmoid => products(dst, x, y, Sigmoid),
            _ => return false,
        }
    }
    true
}

/// Whether the machine has AVX-512.
#[inline(always)]
fn is_here() -> bool {
    crate::simd::isa() == crate::simd::Isa::Avx512
}

/// `dst[i] = f(x[i])`, and whether it was done: other types and machines have the ordinary loops.
#[inline(always)]
pub(super) fn map<T: Real>(f: impl OfLane, dst: &mut [T], x: &[T]) -> bool {
    let (true, Some(dst), Some(x)) = (is_here(), T::f32s_mut(dst), T::f32s(x)) else { return false };
    // SAFETY: the machine has AVX-512, and both slices have so many elements.
    unsafe { run(dst.as_mut_ptr(), x.as_ptr(), dst.len().min(x.len()), f) };
    true
}

/// `dst[i] = f(x[i])` of a function by its name, and whether it was done.
#[inline(always)]
pub(super) fn unary<T: Real>(f: UnaryFn, dst: &mut [T], x: &[T]) -> bool {
    match f {
        UnaryFn::Exp => map(Exp, dst, x),
        UnaryFn::Tanh => map(Tanh, dst, x),
        UnaryFn::Erf => map(Erf, dst, x),
        UnaryFn::Gelu => map(Gelu, dst, x),
        UnaryFn::GeluErf => map(GeluErf, dst, x),
        UnaryFn::Silu => map(Silu, dst, x),
        UnaryFn::Sigmoid => map(Sigmoid, dst, x),
        _ => false,
    }
}

/// `x[i] = f(x[i])`, and whether it was done.
#[inline(always)]
fn map_in_place<T: Real>(f: impl OfLane, x: &mut [T]) -> bool {
    let (true, Some(x)) = (is_here(), T::f32s_mut(x)) else { return false };
    let at = x.as_mut_ptr();
    // SAFETY: the machine has AVX-512, and the slice has so many elements.
    unsafe { run(at, at, x.len(), f) };
    true
}

/// `x[i] = e^(x[i] − shift)`, and whether it was done.
#[inline(always)]
pub(crate) fn exp_in_place<T: Real>(x: &mut [T], shift: T) -> bool {
    map_in_place(ShiftedExp(shift.to_f32()), x)
}

/// `x[i] = x[i]·(high + low)`, and whether it was done.
#[inline(always)]
pub(super) fn scale_in_place<T: Real>(x: &mut [T], high: T, low: T) -> bool {
    map_in_place(Times { high: high.to_f32(), low: low.to_f32() }, x)
}

#[cfg(test)]
mod tests {
    use super::super::loops::{self, Arg};
    use super::*;
    use crate::math::lane::One;
    use crate::simd::tests::with_each;
    use crate::simd::Isa;

    const ALL: [UnaryFn; 7] =
        [UnaryFn::Exp, UnaryFn::Tanh, UnaryFn::Erf, UnaryFn::Gelu, UnaryFn::GeluErf, UnaryFn::Silu, UnaryFn::Sigmoid];

    /// Numbers of every magnitude and sign, and those around each bound of a formula.
    fn numbers() -> Vec<f32> {
        let bits = (0..0xff80_0000u32).step_by(4099).filter(|bits| bits & 0x7f80_0000 != 0x7f80_0000);
        let mut out: Vec<f32> = bits.map(f32::from_bits).collect();
        for edge in [-104.0f32, -103.972_08, -87.336_55, 88.722_84, 89.0, 0.65, 0.92, 4.0, 0.0, -0.0] {
            for near in -40..40i32 {
                out.push(f32::from_bits(edge.to_bits().wrapping_add_signed(near)));
                out.push(-edge + near as f32 * 1e-3);
            }
        }
        out.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45]);
        out
    }

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    #[test]
    fn a_register_gives_each_number_the_bits_of_one_alone() {
        let x = numbers();
        let one: [fn(f32) -> f32; 7] = [
            |x| One::<true>(x).exp().0,
            |x| One::<true>(x).tanh().0,
            |x| One::<true>(x).erf().0,
            |x| One::<true>(x).gelu().0,
            |x| One::<true>(x).gelu_erf().0,
            |x| One::<true>(x).silu().0,
            |x| One::<true>(x).sigmoid().0,
        ];
        with_each(|isa| {
            if isa != Isa::Avx512 {
                return;
            }
            for (f, one) in ALL.into_iter().zip(one) {
                let mut got = vec![7f32; x.len()];
                assert!(unary(f, &mut got, &x));
                for (&x, &y) in x.iter().zip(&got) {
                    let want = one(x);
                    assert!(same(y, want), "{f:?}({x:e}) = {y:e}, alone {want:e}");
                }
            }
            let mut got = x.clone();
            assert!(exp_in_place(&mut got, 1.5));
            for (&x, &y) in x.iter().zip(&got) {
                assert!(same(y, One::<true>(x - 1.5).exp().0), "{x:e} - 1.5");
            }
        });
    }

    #[test]
    fn wherever_a_run_begins_and_ends_its_bits_are_those_of_the_loops() {
        let x: Vec<f32> = (0..700).map(|i| (i as f32 - 350.0) * 0.03).collect();
        for f in ALL {
            let mut whole = Vec::new();
            with_each(|isa| {
                if isa != Isa::Portable {
                    let mut out = vec![0f32; x.len()];
                    loops::unary(f, Arg::Vec { data: &x, pitch: 0 }, &mut out, 1, x.len());
                    whole.push(out);
                }
            });
            let [of_avx2, of_avx512] = whole.as_slice() else { return };
            assert!(of_avx2.iter().zip(of_avx512).all(|(&a, &b)| same(a, b)), "{f:?}");
            for (start, len) in (0..20).flat_map(|s| [0, 1, 15, 16, 17, 127, 128, 129, 300].map(|n| (s, n))) {
                let mut out = vec![9f32; len + 40];
                with_each(|isa| {
                    if isa == Isa::Avx512 {
                        assert!(unary(f, &mut out[start..start + len], &x[start..start + len]));
                    }
                });
                for (i, &v) in out.iter().enumerate() {
                    let want = if (start..start + len).contains(&i) { of_avx512[i] } else { 9.0 };
                    assert!(same(v, want), "{f:?} {start}+{len} at {i}: {v} {want}");
                }
            }
        }
    }
}
