//! Sixteen numbers in a register of AVX-512.
//!
//! A [`Wide`] exists only where the machine has AVX-512: to make the first one is unsafe, and all others come from it. Whoever makes one does
//! so in a function compiled for that instruction set, into which all of this is inlined.

use super::{Lane, BIASED};
use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// Numbers of a register.
pub(crate) const WIDTH: usize = 16;

/// Sixteen numbers.
#[derive(Clone, Copy)]
pub(crate) struct Wide(__m512);

impl Wide {
    /// The numbers of a register.
    ///
    /// # Safety
    /// The machine has AVX-512 F and DQ.
    #[inline(always)]
    pub(crate) unsafe fn new(v: __m512) -> Self {
        Self(v)
    }

    /// The register.
    #[inline(always)]
    pub(crate) fn get(self) -> __m512 {
        self.0
    }
}

impl Add for Wide {
    type Output = Self;
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: the machine has AVX-512, for there is a `Wide`.
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }
}

impl Sub for Wide {
    type Output = Self;
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
}

impl Mul for Wide {
    type Output = Self;
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
}

impl Div for Wide {
    type Output = Self;
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_div_ps(self.0, b.0) })
    }
}

impl Neg for Wide {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)) })
    }
}

impl Lane for Wide {
    type Mask = __mmask16;
    #[inline(always)]
    fn all(self, x: f32) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_abs_ps(self.0) })
    }
    #[inline(always)]
    fn is_less(self, limit: f32) -> __mmask16 {
        // SAFETY: as for `add`.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, _mm512_set1_ps(limit)) }
    }
    #[inline(always)]
    fn at_most(self, high: f32) -> Self {
        // of a number and a NaN the second operand
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_min_ps(_mm512_set1_ps(high), self.0) })
    }
    #[inline(always)]
    fn below(self, limit: f32, then: Self, otherwise: Self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_mask_blend_ps(self.is_less(limit), otherwise.0, then.0) })
    }
    #[inline(always)]
    fn but(self, _: __mmask16) -> Self {
        // `times_two_to` leaves those places out
        self
    }
    #[inline(always)]
    fn signed_as(self, other: Self) -> Self {
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_or_ps(self.0, _mm512_and_ps(other.0, _mm512_set1_ps(-0.0))) })
    }
    #[inline(always)]
    fn times_two_to(self, t: Self, gone: __mmask16) -> Self {
        let n = t - t.all(BIASED);
        // SAFETY: as for `add`.
        Self(unsafe { _mm512_maskz_scalef_ps(!gone, self.0, n.0) })
    }
}
