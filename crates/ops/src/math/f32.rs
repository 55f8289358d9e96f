//! f32 functions as straight-line polynomial code.

use super::lane::{Lane, One, BIASED};
use super::{consts, Formula, Real};
use crate::element::Element;
use crate::simd::mul_add;

impl Real for f32 {
    consts!(f32);

    #[inline(always)]
    fn exp<const FMA: bool>(self) -> Self {
        One::<FMA>(self).exp().0
    }
    #[inline(always)]
    fn log<const FMA: bool>(self) -> Self {
        log::<FMA>(self)
    }
    #[inline(always)]
    fn tanh<const FMA: bool>(self) -> Self {
        One::<FMA>(self).tanh().0
    }
    #[inline(always)]
    fn erf<const FMA: bool>(self) -> Self {
        One::<FMA>(self).erf().0
    }
    #[inline(always)]
    fn gelu<const FMA: bool>(self) -> Self {
        One::<FMA>(self).gelu().0
    }
    #[inline(always)]
    fn gelu_erf<const FMA: bool>(self) -> Self {
        One::<FMA>(self).gelu_erf().0
    }
    #[inline(always)]
    fn sigmoid<const FMA: bool>(self) -> Self {
        One::<FMA>(self).sigmoid().0
    }
    #[inline(always)]
    fn silu<const FMA: bool>(self) -> Self {
        One::<FMA>(self).silu().0
    }

    #[inline(always)]
    fn softcap(self, slope: f64, cap: f64) -> Self {
        (cap * wide_tanh(f64::from(self) * slope)) as f32
    }

    fn scratch<R>(len: usize, f: impl FnOnce(&mut [Self]) -> R) -> R {
        crate::kernels::scratch::with(len, f)
    }
    #[inline(always)]
    fn read<E: Element>(src: &[E], dst: &mut [Self]) {
        E::widen(src, dst);
    }
    #[inline(always)]
    fn write<E: Element>(src: &[Self], dst: &mut [E]) {
        E::round_from(src, dst);
    }
    #[inline(always)]
    fn get<E: Element>(v: E) -> Self {
        v.to_f32()
    }
    #[inline(always)]
    fn put<E: Element>(self) -> E {
        E::from_f32(self)
    }
}

/// ln 2 in two parts; the first has 9 significant bits, so its product with an exponent is exact.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;

impl<L: Lane> Formula for L {
    #[inline(always)]
    fn number(self, x: f64) -> Self {
        self.all(x as f32)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        exp(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        erf(self)
    }
}

/// eˣ, within 1.1 ulp of the true value; gradual underflow to 0, overflow to +∞, NaN stays NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ = 1 + (r + r²·P(r)), P a minimax polynomial.
#[inline(always)]
fn exp<L: Lane>(x: L) -> L {
    // Outside of these bounds the result is 0 or ∞; a NaN gets through.
    let gone = x.is_less(-104.0);
    let x = x.but(gone).at_most(89.0);
    let t = x.mul_add(x.all(std::f32::consts::LOG2_E), x.all(BIASED));
    let n = t - x.all(BIASED);
    let r = (-n).mul_add(x.all(LN2_LO), (-n).mul_add(x.all(LN2_HI), x));
    let mut p = x.all(0.001_395_170_3);
    p = p.step(r, 0.008_369_598);
    p = p.step(r, 0.041_666_187);
    p = p.step(r, 0.166_665_12);
    p = p.step(r, 0.5);
    let p = x.all(1.0) + (r * r).mul_add(p, r);
    p.times_two_to(t, gone)
}

/// Natural logarithm, within 2 ulp; ±0 gives -∞, negative numbers and NaN give NaN, +∞ gives +∞.
///
/// x = 2ᵉ·m with m in [2/3, 4/3); log m is f - f²/2 + f³·P(f) for f = m - 1.
#[inline(always)]
pub(crate) fn log<const FMA: bool>(x: f32) -> f32 {
    // Subnormals are scaled into the normal range first.
    let tiny = x < f32::MIN_POSITIVE;
    let scaled = if tiny { x * 8_388_608.0 } else { x };
    let bias = if tiny { -23.0 } else { 0.0 };
    let bits = scaled.to_bits() as i32;
    // 0x3f2aaaab is 2/3: the shifted difference is the exponent that puts m into [2/3, 4/3).
    let e = bits.wrapping_sub(0x3f2a_aaab) >> 23;
    let m = f32::from_bits(bits.wrapping_sub(e << 23) as u32);
    let e = e as f32 + bias;
    let f = m - 1.0;
    let mut p = 0.123_584_54f32;
    p = mul_add::<FMA>(p, f, -0.128_470_55);
    p = mul_add::<FMA>(p, f, 0.106_612_556);
    p = mul_add::<FMA>(p, f, -0.121_952_98);
    p = mul_add::<FMA>(p, f, 0.143_128_47);
    p = mul_add::<FMA>(p, f, -0.166_796_15);
    p = mul_add::<FMA>(p, f, 0.199_993_06);
    p = mul_add::<FMA>(p, f, -0.249_998_2);
    p = mul_add::<FMA>(p, f, 0.333_333_37);
    let f2 = f * f;
    let tail = mul_add::<FMA>(f2 * f, p, e * LN2_LO);
    let r = mul_add::<FMA>(e, LN2_HI, f + mul_add::<FMA>(-0.5, f2, tail));
    let r = if x == 0.0 { f32::NEG_INFINITY } else { r };
    let r = if x < 0.0 { f32::NAN } else { r };
    let r = if x == f32::INFINITY { x } else { r };
    if x.is_nan() {
        x
    } else {
        r
    }
}

/// Hyperbolic tangent, within 2 ulp; ±∞ gives ±1, NaN stays NaN.
///
/// A polynomial in x² below 0.65, 1 - 2/(e²ˣ + 1) above.
#[inline(always)]
fn tanh<L: Lane>(x: L) -> L {
    let a = x.abs();
    let t = x * x;
    let mut p = x.all(0.002_031_754_7);
    p = p.step(t, -0.008_053_952);
    p = p.step(t, 0.021_650_156);
    p = p.step(t, -0.053_937_47);
    p = p.step(t, 0.133_331_33);
    p = p.step(t, -0.333_333_28);
    let small = (a * t).mul_add(p, a);
    let one = x.all(1.0);
    let large = one - x.all(2.0) / (exp(a + a) + one);
    a.below(0.65, small, large).signed_as(x)
}

/// Error function, within 2 ulp; ±∞ gives ±1, NaN stays NaN.
///
/// x·(1 + P(x²)) below 0.92, 1 - e^Q(|x|) above, where Q fits log erfc.
#[inline(always)]
fn erf<L: Lane>(x: L) -> L {
    let a = x.abs();
    let t = x * x;
    let mut p = x.all(8.345_191e-5);
    p = p.step(t, -0.000_813_742_8);
    p = p.step(t, 0.005_200_633_3);
    p = p.step(t, -0.026_859_27);
    p = p.step(t, 0.112_836_94);
    p = p.step(t, -0.376_126_35);
    p = p.step(t, 0.128_379_17);
    let small = x.mul_add(p, x);
    // erf rounds to 1 from 3.92 on; a NaN gets through.
    let c = a.at_most(4.0);
    let mut q = x.all(-2.082_868e-5);
    q = q.step(c, 0.000_431_394_2);
    q = q.step(c, -0.004_156_257_5);
    q = q.step(c, 0.025_080_623);
    q = q.step(c, -0.108_220_39);
    q = q.step(c, -0.633_400_86);
    q = q.step(c, -1.129_488_5);
    q = q.step(c, 0.000_169_205_54);
    let large = x.all(1.0) - exp(q);
    a.below(0.92, small, large.signed_as(x))
}

/// Hyperbolic tangent in f64 as straight-line code, with a relative error below 10⁻⁹: far below what f32 rounds. ±∞ gives ±1,
/// NaN stays NaN.
///
/// E/(E + 2) with E = e²ᵃ - 1 for a = |x|; e²ᵃ = 2ⁿ·eʳ with |r| ≤ ln 2 / 2, and eʳ - 1 is its Taylor series up to r⁹, whose rest
/// is below 10⁻¹¹·r. Kept as a difference from 1, so that small arguments keep their digits.
#[inline(always)]
fn wide_tanh(x: f64) -> f64 {
    /// Adding and subtracting 1.5·2⁵² rounds to an integer.
    const ROUNDER: f64 = 6_755_399_441_055_744.0;
    let a = x.abs();
    // From 20 on the result rounds to 1; the comparison lets a NaN through.
    let a = if a > 20.0 { 20.0 } else { a };
    let y = a + a;
    let t = y * std::f64::consts::LOG2_E + ROUNDER;
    let r = y - (t - ROUNDER) * std::f64::consts::LN_2;
    let mut p = 1.0 / 362_880.0;
    for c in [1.0 / 40_320.0, 1.0 / 5_040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
        p = p * r + c;
    }
    let n = t.to_bits().wrapping_sub(ROUNDER.to_bits());
    let two = f64::from_bits(n.wrapping_add(1023) << 52);
    let e = two * (p * r) + (two - 1.0);
    let tanh = e / (e + 2.0);
    f64::from_bits(tanh.to_bits() | (x.to_bits() & (1 << 63)))
}
