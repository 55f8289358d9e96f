//! f64 functions: the platform's, and libm's error function.

use super::{consts, Formula, Real};
use crate::element::Element;

impl Real for f64 {
    consts!(f64);

    #[inline(always)]
    fn exp<const FMA: bool>(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn log<const FMA: bool>(self) -> Self {
        self.ln()
    }
    #[inline(always)]
    fn tanh<const FMA: bool>(self) -> Self {
        self.tanh()
    }
    #[inline(always)]
    fn erf<const FMA: bool>(self) -> Self {
        libm::erf(self)
    }
    #[inline(always)]
    fn gelu<const FMA: bool>(self) -> Self {
        Double(self).gelu().0
    }
    #[inline(always)]
    fn gelu_erf<const FMA: bool>(self) -> Self {
        Double(self).gelu_erf().0
    }
    #[inline(always)]
    fn sigmoid<const FMA: bool>(self) -> Self {
        Double(self).sigmoid().0
    }
    #[inline(always)]
    fn silu<const FMA: bool>(self) -> Self {
        Double(self).silu().0
    }

    #[inline(always)]
    fn softcap(self, slope: f64, cap: f64) -> Self {
        cap * (self * slope).tanh()
    }

    fn scratch<R>(len: usize, f: impl FnOnce(&mut [Self]) -> R) -> R {
        // eight numbers are a line
        f(crate::kernels::scratch::on_line(&mut crate::kernels::fresh(len + 8), len))
    }
    #[inline(always)]
    fn read<E: Element>(src: &[E], dst: &mut [Self]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = s.to_f64();
        }
    }
    #[inline(always)]
    fn write<E: Element>(src: &[Self], dst: &mut [E]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = E::from_f64(*s);
        }
    }
    #[inline(always)]
    fn get<E: Element>(v: E) -> Self {
        v.to_f64()
    }
    #[inline(always)]
    fn put<E: Element>(self) -> E {
        E::from_f64(self)
    }
}

/// A number that formulas are evaluated at.
#[derive(Clone, Copy)]
struct Double(f64);

macro_rules! by_value {
    ($($trait:ident, $name:ident;)*) => {
        $(impl std::ops::$trait for Double {
            type Output = Self;
            #[inline(always)]
            fn $name(self, b: Self) -> Self {
                Self(std::ops::$trait::$name(self.0, b.0))
            }
        })*
    };
}

by_value! {
    Add, add;
    Mul, mul;
    Div, div;
}

impl std::ops::Neg for Double {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self(-self.0)
    }
}

impl Formula for Double {
    #[inline(always)]
    fn number(self, x: f64) -> Self {
        Self(x)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        Self(self.0.exp())
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        Self(self.0.tanh())
    }
    #[inline(always)]
    fn erf(self) -> Self {
        Self(libm::erf(self.0))
    }
}
