//! What a formula of f32 is written in: one number, or a vector of them.
//!
//! A loop over single numbers becomes vectors by itself, but not every instruction that a vector has: AVX-512 multiplies by a power of two in one,
//! which takes ten otherwise. So the formulas with an exponential in them are written once over a *lane*, and run on either.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

use std::ops::{Add, Div, Mul, Neg, Sub};

/// Adding and subtracting 1.5·2²³ rounds an f32 of small magnitude to an integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;
/// 1.5·2²³ + 2·127: what it rounds stands above twice the exponent's bias.
pub(super) const BIASED: f32 = ROUNDER + 254.0;

/// One f32, or several side by side, each of which gets the bits that it would get alone.
pub(crate) trait Lane:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// Some of the places.
    type Mask: Copy;
    /// The same number in each place. (Of a lane, because there is none where its instruction set is missing.)
    fn all(self, x: f32) -> Self;
    /// self·b + c, rounded once where the machine can.
    fn mul_add(self, b: Self, c: Self) -> Self;
    fn abs(self) -> Self;
    /// Where it is less than that: a NaN never is.
    fn is_less(self, limit: f32) -> Self::Mask;
    /// `high` where it is more than that; a NaN stays.
    fn at_most(self, high: f32) -> Self;
    /// `then` where it is less than `limit`, else `otherwise`.
    fn below(self, limit: f32, then: Self, otherwise: Self) -> Self;
    /// A number that nothing has to be done for, in places that nobody looks at.
    fn but(self, gone: Self::Mask) -> Self;
    /// Negative where `other` is, for a number that is not.
    fn signed_as(self, other: Self) -> Self;
    /// self·2ⁿ for t = n + `BIASED`, rounded once, and 0 in places that are gone; elsewhere self is between 1/2 and 2, n between -151 and 129.
    fn times_two_to(self, t: Self, gone: Self::Mask) -> Self;

    /// As [`Lane::mul_add`] with a number for all.
    #[inline(always)]
    fn step(self, b: Self, c: f32) -> Self {
        self.mul_add(b, b.all(c))
    }
}

/// One number; `FMA` says whether code may use a fused multiply-add.
#[derive(Clone, Copy)]
pub(crate) struct One<const FMA: bool>(pub(crate) f32);

impl<const FMA: bool> Add for One<FMA> {
    type Output = Self;
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Self(self.0 + b.0)
    }
}

impl<const FMA: bool> Sub for One<FMA> {
    type Output = Self;
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        Self(self.0 - b.0)
    }
}

impl<const FMA: bool> Mul for One<FMA> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Self(self.0 * b.0)
    }
}

impl<const FMA: bool> Div for One<FMA> {
    type Output = Self;
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Self(self.0 / b.0)
    }
}

impl<const FMA: bool> Neg for One<FMA> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self(-self.0)
    }
}

impl<const FMA: bool> Lane for One<FMA> {
    type Mask = bool;
    #[inline(always)]
    fn all(self, x: f32) -> Self {
        Self(x)
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(crate::simd::mul_add::<FMA>(self.0, b.0, c.0))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.abs())
    }
    #[inline(always)]
    fn is_less(self, limit: f32) -> bool {
        self.0 < limit
    }
    #[inline(always)]
    fn at_most(self, high: f32) -> Self {
        if self.0 > high {
            Self(high)
        } else {
            self
        }
    }
    #[inline(always)]
    fn below(self, limit: f32, then: Self, otherwise: Self) -> Self {
        if self.0 < limit {
            then
        } else {
            otherwise
        }
    }
    #[inline(always)]
    fn but(self, gone: bool) -> Self {
        // a result too small for a number of full precision takes a processor a hundred times as long
        if gone {
            Self(0.0)
        } else {
            self
        }
    }
    #[inline(always)]
    fn signed_as(self, other: Self) -> Self {
        Self(f32::from_bits(self.0.to_bits() | (other.0.to_bits() & 0x8000_0000)))
    }
    #[inline(always)]
    fn times_two_to(self, t: Self, gone: bool) -> Self {
        // The power is multiplied in as two halves so that both ends of the range come out right: the last bits of t are n + 254, half of
        // them and the rest are two exponents with their bias, and the shift drops all else.
        let (bits, half) = (t.0.to_bits(), t.0.to_bits() >> 1);
        let product = self.0 * f32::from_bits(half << 23) * f32::from_bits(bits.wrapping_sub(half) << 23);
        Self(if gone { 0.0 } else { product })
    }
}
