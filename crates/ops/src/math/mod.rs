//! Elementary functions: polynomial code for f32 that the compiler vectorises, the platform's for f64.
//!
//! The f32 functions have no branch and no table (only selects), so a loop over them becomes SIMD code
//! on any target, and an element's bits never depend on where in a loop it stands. The polynomials are
//! minimax fits (Remez exchange in 40-digit arithmetic) made for this crate.

mod f32;
mod f64;
pub(crate) mod lane;

/// What register arithmetic needs of its type. `f32` and `f64` are the only ones. `FMA` says whether the code may use a fused
/// multiply-add: where the instruction set lacks one it would be a call.
pub(crate) trait Real:
    crate::element::Element
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
{
    /// Whether f64 holds a number of this type and its rounding error too.
    const SPLITS: bool;
    const ZERO: Self;
    const ONE: Self;
    const NEG_INF: Self;
    const INF: Self;
    const NAN: Self;

    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    fn exp<const FMA: bool>(self) -> Self;
    fn log<const FMA: bool>(self) -> Self;
    fn sin<const FMA: bool>(self) -> Self;
    fn cos<const FMA: bool>(self) -> Self;
    fn tanh<const FMA: bool>(self) -> Self;
    fn erf<const FMA: bool>(self) -> Self;
    fn floor(self) -> Self;
    fn ceil(self) -> Self;
    fn round(self) -> Self;
    fn pow(self, e: Self) -> Self;
    fn is_nan(self) -> bool;
    /// self·b + c, rounded once where `FMA`, else twice.
    fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self;

    /// Calls `f` with `len` numbers of any value for it to write, which begin on a cache line.
    fn scratch<R>(len: usize, f: impl FnOnce(&mut [Self]) -> R) -> R;

    /// Reads a run of any element type as this type.
    fn read<E: crate::element::Element>(src: &[E], dst: &mut [Self]);
    /// Rounds a run of this type to any element type.
    fn write<E: crate::element::Element>(src: &[Self], dst: &mut [E]);
    /// Reads one element.
    fn get<E: crate::element::Element>(v: E) -> Self;
    /// Rounds one element.
    fn put<E: crate::element::Element>(self) -> E;

    fn gelu<const FMA: bool>(self) -> Self;
    fn gelu_erf<const FMA: bool>(self) -> Self;
    fn sigmoid<const FMA: bool>(self) -> Self;
    fn silu<const FMA: bool>(self) -> Self;

    /// cap·tanh(x·slope) for a score x, with slope = scale/cap, rounded once where there is a wider type: an exponential of the
    /// result follows, which turns its absolute error into a relative one.
    fn softcap(self, slope: f64, cap: f64) -> Self;
}

/// Activations over what they are made of, whatever number that is of.
pub(crate) trait Formula:
    Copy
    + std::ops::Add<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
{
    /// A number of the same type.
    fn number(self, x: f64) -> Self;
    fn exp(self) -> Self;
    fn tanh(self) -> Self;
    fn erf(self) -> Self;

    /// 0.5·x·(1 + tanh(√(2/π)·x·(1 + 0.044715·x²))), evaluated in the order Candle uses.
    #[inline(always)]
    fn gelu(self) -> Self {
        let (one, half) = (self.number(1.0), self.number(0.5));
        let root = self.number(0.797_884_560_802_865_4);
        let inner = root * self * (one + self.number(0.044_715) * self * self);
        half * self * (one + inner.tanh())
    }

    /// 0.5·x·(1 + erf(x/√2)).
    #[inline(always)]
    fn gelu_erf(self) -> Self {
        let (one, half) = (self.number(1.0), self.number(0.5));
        ((self * self.number(std::f64::consts::FRAC_1_SQRT_2)).erf() + one) * half * self
    }

    /// 1/(1 + e⁻ˣ).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let one = self.number(1.0);
        one / (one + (-self).exp())
    }

    /// x/(1 + e⁻ˣ); -∞ gives NaN, as Candle's does.
    #[inline(always)]
    fn silu(self) -> Self {
        self / (self.number(1.0) + (-self).exp())
    }
}

macro_rules! consts {
    ($t:ident) => {
        const SPLITS: bool = size_of::<Self>() < 8;
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const NEG_INF: Self = std::primitive::$t::NEG_INFINITY;
        const INF: Self = std::primitive::$t::INFINITY;
        const NAN: Self = std::primitive::$t::NAN;

        #[inline(always)]
        fn abs(self) -> Self {
            self.abs()
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            self.sqrt()
        }
        #[inline(always)]
        fn sin<const FMA: bool>(self) -> Self {
            self.sin()
        }
        #[inline(always)]
        fn cos<const FMA: bool>(self) -> Self {
            self.cos()
        }
        #[inline(always)]
        fn floor(self) -> Self {
            self.floor()
        }
        #[inline(always)]
        fn ceil(self) -> Self {
            self.ceil()
        }
        #[inline(always)]
        fn round(self) -> Self {
            self.round()
        }
        #[inline(always)]
        fn pow(self, e: Self) -> Self {
            self.powf(e)
        }
        #[inline(always)]
        fn is_nan(self) -> bool {
            self.is_nan()
        }
        #[inline(always)]
        fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self {
            if FMA {
                self.mul_add(b, c)
            } else {
                self * b + c
            }
        }
    };
}
use consts;

#[cfg(test)]
mod tests;
