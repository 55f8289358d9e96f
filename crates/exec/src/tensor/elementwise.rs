//! Elementwise ops.

use super::LazyTensor;
use crate::error::Result;
use candle_core::{DType, WithDType};
use candle_lazy_graph::{BinaryOp, CmpOp, ErrorKind, Op, UnaryOp};

macro_rules! unary {
    ($($name:ident => $op:ident, $doc:literal;)*) => {
        impl LazyTensor {
            $(
                #[doc = $doc]
                ///
                /// # Errors
                /// When the dtype is not floating-point.
                #[track_caller]
                pub fn $name(&self) -> Result<Self> {
                    Self::record(Op::Unary(UnaryOp::$op), &[], &[self])
                }
            )*
        }
    };
}

unary! {
    neg => Neg, "−x.";
    abs => Abs, "|x|.";
    recip => Recip, "1/x.";
    sqr => Sqr, "x².";
    sqrt => Sqrt, "√x.";
    rsqrt => Rsqrt, "1/√x.";
    exp => Exp, "eˣ.";
    log => Log, "The natural logarithm.";
    sin => Sin, "The sine of x in radians.";
    cos => Cos, "The cosine of x in radians.";
    tanh => Tanh, "The hyperbolic tangent.";
    erf => Erf, "The error function.";
    gelu => Gelu, "GELU, tanh form: x/2·(1 + tanh(√(2/π)(x + 0.044715x³))) (arXiv:1606.08415, §2).";
    gelu_erf => GeluErf, "GELU, exact form: x/2·(1 + erf(x/√2)) (arXiv:1606.08415, §2).";
    relu => Relu, "max(x, 0).";
    silu => Silu, "x/(1 + e⁻ˣ).";
    sigmoid => Sigmoid, "1/(1 + e⁻ˣ).";
    floor => Floor, "The largest integer not above x.";
    ceil => Ceil, "The smallest integer not below x.";
    round => Round, "The nearest integer, halves away from zero.";
    sign => Sign, "−1, 0 or 1.";
}

macro_rules! binary {
    ($($name:ident, $broadcast:ident => $op:expr, $doc:literal;)*) => {
        impl LazyTensor {
            $(
                #[doc = $doc]
                /// Both tensors have the same shape and dtype.
                ///
                /// # Errors
                /// When shapes, dtypes or devices differ.
                #[track_caller]
                pub fn $name(&self, rhs: &Self) -> Result<Self> {
                    self.same_shape(rhs, stringify!($name), stringify!($broadcast))?;
                    Self::record($op, &[], &[self, rhs])
                }

                #[doc = $doc]
                /// The shapes broadcast (numpy's rule: aligned at the end, size one stretches).
                ///
                /// # Errors
                /// When the shapes do not broadcast, or dtypes or devices differ.
                #[track_caller]
                pub fn $broadcast(&self, rhs: &Self) -> Result<Self> {
                    Self::record($op, &[], &[self, rhs])
                }
            )*
        }
    };
}

binary! {
    add, broadcast_add => Op::Binary(BinaryOp::Add), "a + b.";
    sub, broadcast_sub => Op::Binary(BinaryOp::Sub), "a − b.";
    mul, broadcast_mul => Op::Binary(BinaryOp::Mul), "a·b.";
    div, broadcast_div => Op::Binary(BinaryOp::Div), "a/b.";
    pow, broadcast_pow => Op::Binary(BinaryOp::Pow), "aᵇ, float; unlike Candle's also of a negative a and a whole b.";
}

/// The right-hand side of a comparison: a tensor or a number.
#[derive(Debug)]
pub enum TensorOrScalar<'a> {
    /// A tensor of the same shape.
    Tensor(&'a LazyTensor),
    /// A number, converted to the tensor's dtype.
    Scalar(f64),
}

impl<'a> From<&'a LazyTensor> for TensorOrScalar<'a> {
    fn from(tensor: &'a LazyTensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl<T: WithDType> From<T> for TensorOrScalar<'_> {
    fn from(value: T) -> Self {
        Self::Scalar(value.to_f64())
    }
}

macro_rules! compare {
    ($($name:ident, $broadcast:ident => $op:ident, $doc:literal;)*) => {
        impl LazyTensor {
            $(
                #[doc = $doc]
                /// The right-hand side is a tensor of the same shape and dtype, or a number. The result is u8, 1 or 0.
                ///
                /// # Errors
                /// When shapes, dtypes or devices differ.
                #[track_caller]
                pub fn $name<'a>(&self, rhs: impl Into<TensorOrScalar<'a>>) -> Result<Self> {
                    match rhs.into() {
                        TensorOrScalar::Tensor(rhs) => {
                            self.same_shape(rhs, stringify!($name), stringify!($broadcast))?;
                            Self::record(Op::Compare(CmpOp::$op), &[], &[self, rhs])
                        }
                        TensorOrScalar::Scalar(value) => {
                            Self::record(Op::CompareScalar(CmpOp::$op), &[value], &[self])
                        }
                    }
                }

                #[doc = $doc]
                /// The shapes broadcast. The result is u8, 1 or 0.
                ///
                /// # Errors
                /// When the shapes do not broadcast, or dtypes or devices differ.
                #[track_caller]
                pub fn $broadcast(&self, rhs: &Self) -> Result<Self> {
                    Self::record(Op::Compare(CmpOp::$op), &[], &[self, rhs])
                }
            )*
        }
    };
}

compare! {
    eq, broadcast_eq => Eq, "a = b.";
    ne, broadcast_ne => Ne, "a ≠ b.";
    lt, broadcast_lt => Lt, "a < b.";
    le, broadcast_le => Le, "a ≤ b.";
    gt, broadcast_gt => Gt, "a > b.";
    ge, broadcast_ge => Ge, "a ≥ b.";
}

macro_rules! extreme {
    ($($name:ident, $broadcast:ident => $op:ident, $doc:literal, $bounds:expr;)*) => {
        impl LazyTensor {
            $(
                #[doc = $doc]
                /// The right-hand side is a tensor of the same shape and dtype, or a number.
                ///
                /// # Errors
                /// When shapes, dtypes or devices differ.
                #[track_caller]
                pub fn $name<'a>(&self, rhs: impl Into<TensorOrScalar<'a>>) -> Result<Self> {
                    match rhs.into() {
                        TensorOrScalar::Tensor(rhs) => {
                            self.same_shape(rhs, stringify!($name), stringify!($broadcast))?;
                            Self::record(Op::Binary(BinaryOp::$op), &[], &[self, rhs])
                        }
                        TensorOrScalar::Scalar(value) if self.dtype().is_float() => {
                            let bounds: fn(f64) -> [f64; 2] = $bounds;
                            Self::record(Op::Clamp, &bounds(value), &[self])
                        }
                        TensorOrScalar::Scalar(value) => {
                            let rhs = Self::filled(value, (), self.dtype(), self.device())?;
                            Self::record(Op::Binary(BinaryOp::$op), &[], &[self, &rhs])
                        }
                    }
                }

                #[doc = $doc]
                /// The shapes broadcast.
                ///
                /// # Errors
                /// When the shapes do not broadcast, or dtypes or devices differ.
                #[track_caller]
                pub fn $broadcast(&self, rhs: &Self) -> Result<Self> {
                    Self::record(Op::Binary(BinaryOp::$op), &[], &[self, rhs])
                }
            )*
        }
    };
}

extreme! {
    maximum, broadcast_maximum => Maximum, "The larger of a and b.", |v| [v, f64::INFINITY];
    minimum, broadcast_minimum => Minimum, "The smaller of a and b.", |v| [f64::NEG_INFINITY, v];
}

impl LazyTensor {
    /// min(max(x, min), max); the bounds are tensors of this shape and dtype or numbers.
    ///
    /// # Errors
    /// When shapes, dtypes or devices differ.
    #[track_caller]
    pub fn clamp<'a>(&self, min: impl Into<TensorOrScalar<'a>>, max: impl Into<TensorOrScalar<'a>>) -> Result<Self> {
        match (min.into(), max.into()) {
            (TensorOrScalar::Scalar(min), TensorOrScalar::Scalar(max)) if self.dtype().is_float() => {
                Self::record(Op::Clamp, &[min, max], &[self])
            }
            (min, max) => self.maximum(min)?.minimum(max),
        }
    }

    /// x where it is not negative, else alpha·(eˣ − 1) (arXiv:1511.07289, eq. 15).
    ///
    /// # Errors
    /// When the dtype is not floating-point.
    #[track_caller]
    pub fn elu(&self, alpha: f64) -> Result<Self> {
        Self::record(Op::Elu, &[alpha], &[self])
    }

    #[track_caller]
    fn same_shape(&self, rhs: &Self, op: &'static str, broadcast: &str) -> Result<()> {
        if self.dims() == rhs.dims() {
            return Ok(());
        }
        let detail = format!("{:?} and {:?} differ; {broadcast} broadcasts", self.dims(), rhs.dims());
        Self::refuse_on(op, ErrorKind::Shape(detail), &[self, rhs])
    }

    /// x·mul + add, any dtype. Multiplying by one and adding zero records nothing.
    ///
    /// # Errors
    /// When the dtype is not supported.
    #[track_caller]
    pub fn affine(&self, mul: f64, add: f64) -> Result<Self> {
        // −0 as the addend changes nothing; +0 turns −0 into +0, as Candle's affine does
        if mul == 1.0 && add == 0.0 && add.is_sign_negative() {
            return Ok(self.clone());
        }
        Self::record(Op::Affine, &[mul, add], &[self])
    }

    /// xᵉ.
    ///
    /// # Errors
    /// When the dtype is not floating-point.
    #[track_caller]
    pub fn powf(&self, e: f64) -> Result<Self> {
        Self::record(Op::Powf, &[e], &[self])
    }

    /// `on_true` where this tensor (u8, u32 or i64) is not zero, else `on_false`; the shapes broadcast.
    ///
    /// # Errors
    /// When the shapes do not broadcast, this tensor is no integer tensor or the other dtypes differ.
    #[track_caller]
    pub fn where_cond(&self, on_true: &Self, on_false: &Self) -> Result<Self> {
        Self::record(Op::Where, &[], &[self, on_true, on_false])
    }

    /// The same numbers as another dtype, rounded or truncated as Candle does.
    ///
    /// # Errors
    /// When a dtype is not supported.
    #[track_caller]
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        Self::record(Op::Cast(dtype), &[], &[self])
    }
}
