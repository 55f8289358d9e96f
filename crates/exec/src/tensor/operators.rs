//! Operators with tensors, results and numbers on the right, as Candle's.

use super::LazyTensor;
use crate::error::Result;
use candle_lazy_graph::BinaryOp;
use std::borrow::Borrow;

macro_rules! operator {
    ($trait:ident, $name:ident, $mul:expr, $add:expr) => {
        impl<B: Borrow<LazyTensor>> std::ops::$trait<B> for LazyTensor {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: B) -> Self::Output {
                self.into_binary(BinaryOp::$trait, rhs.borrow())
            }
        }

        impl<B: Borrow<LazyTensor>> std::ops::$trait<B> for &LazyTensor {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: B) -> Self::Output {
                LazyTensor::$name(self, rhs.borrow())
            }
        }

        impl<B: Borrow<LazyTensor>> std::ops::$trait<Result<B>> for LazyTensor {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: Result<B>) -> Self::Output {
                self.into_binary(BinaryOp::$trait, rhs?.borrow())
            }
        }

        impl<B: Borrow<LazyTensor>> std::ops::$trait<Result<B>> for &LazyTensor {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: Result<B>) -> Self::Output {
                LazyTensor::$name(self, rhs?.borrow())
            }
        }

        impl<B: Borrow<LazyTensor>> std::ops::$trait<LazyTensor> for Result<B> {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: LazyTensor) -> Self::Output {
                LazyTensor::$name(self?.borrow(), &rhs)
            }
        }

        impl<B: Borrow<LazyTensor>> std::ops::$trait<&LazyTensor> for Result<B> {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: &LazyTensor) -> Self::Output {
                LazyTensor::$name(self?.borrow(), rhs)
            }
        }

        impl std::ops::$trait<f64> for LazyTensor {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: f64) -> Self::Output {
                self.into_affine($mul(rhs), $add(rhs))
            }
        }

        impl std::ops::$trait<f64> for &LazyTensor {
            type Output = Result<LazyTensor>;
            #[track_caller]
            fn $name(self, rhs: f64) -> Self::Output {
                self.affine($mul(rhs), $add(rhs))
            }
        }
    };
}

operator!(Add, add, |_| 1.0, |v| v);
operator!(Sub, sub, |_| 1.0, |v: f64| -v);
operator!(Mul, mul, |v| v, |_| 0.0);
operator!(Div, div, |v| 1.0 / v, |_| 0.0);

macro_rules! number_on_the_left {
    ($($trait:ident, $name:ident, |$lhs:ident, $rhs:ident| $body:expr;)*) => {
        $(
            impl std::ops::$trait<LazyTensor> for f64 {
                type Output = Result<LazyTensor>;
                #[track_caller]
                fn $name(self, rhs: LazyTensor) -> Self::Output {
                    let ($lhs, $rhs) = (self, &rhs);
                    $body
                }
            }

            impl std::ops::$trait<&LazyTensor> for f64 {
                type Output = Result<LazyTensor>;
                #[track_caller]
                fn $name(self, rhs: &LazyTensor) -> Self::Output {
                    let ($lhs, $rhs) = (self, rhs);
                    $body
                }
            }
        )*
    };
}

number_on_the_left! {
    Add, add, |l, r| r.affine(1.0, l);
    Sub, sub, |l, r| r.affine(-1.0, l);
    Mul, mul, |l, r| r.affine(l, 0.0);
    Div, div, |l, r| r.recip()?.affine(l, 0.0);
}
