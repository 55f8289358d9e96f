//! Elementwise ops.

use super::LazyTensor;
use crate::error::Result;
use candle_core::scalar::Scalar;
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
    silu => Silu, "x/(1 + e⁻ˣ).";
    sigmoid => Sigmoid, "1/(1 + e⁻ˣ).";
}

macro_rules! unary_of_any {
    ($($name:ident => $op:ident, $doc:literal, |$x:ident| $whole:expr;)*) => {
        impl LazyTensor {
            $(
                #[doc = $doc]
                /// Floats and integers, as Candle's.
                ///
                /// # Errors
                /// When the dtype is not supported.
                #[track_caller]
                pub fn $name(&self) -> Result<Self> {
                    if !matches!(self.dtype(), DType::U8 | DType::U32 | DType::I64) {
                        return Self::record(Op::Unary(UnaryOp::$op), &[], &[self]);
                    }
                    let $x = self;
                    $whole
                }
            )*
        }
    };
}

// of integers these are other ops, or nothing at all
unary_of_any! {
    abs => Abs, "|x|.", |x| if x.dtype() == DType::I64 { x.mul(&x.sign()?) } else { Ok(x.clone()) };
    relu => Relu, "max(x, 0).", |x| if x.dtype() == DType::I64 { x.maximum(0i64) } else { Ok(x.clone()) };
    floor => Floor, "The largest integer not above x.", |x| Ok(x.clone());
    ceil => Ceil, "The smallest integer not below x.", |x| Ok(x.clone());
    round => Round, "The nearest integer, halves away from zero.", |x| Ok(x.clone());
    sign => Sign, "−1, 0 or 1.", |x| if x.dtype() == DType::I64 { x.maximum(-1i64)?.minimum(1i64) } else { x.minimum(1u8) };
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
                    self.same_shape(rhs, stringify!($name))?;
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
    pow, broadcast_pow => Op::Binary(BinaryOp::Pow), "aᵇ, float; unlike Candle's also of a negative a and a whole b (a tracked tensor runs Candle's: NaN there).";
}

/// The right-hand side of a comparison: a tensor or a number.
#[derive(Debug)]
pub enum TensorOrScalar<'a> {
    /// A tensor of the same shape.
    Tensor(&'a LazyTensor),
    /// A number, converted to the tensor's dtype as Candle does: a whole number wraps where it is too large for an integer
    /// tensor, a float saturates.
    Scalar(Scalar),
}

/// A number in a tensor's dtype.
enum Number {
    /// One that f64 holds; a scalar of the op.
    Param(f64),
    /// An integer that f64 does not hold; a leaf.
    Leaf(LazyTensor),
}

impl LazyTensor {
    /// `scalar` as this tensor's dtype has it.
    #[track_caller]
    fn number(&self, scalar: Scalar) -> Result<Number> {
        let whole = match scalar {
            Scalar::U8(v) => Some(i64::from(v)),
            Scalar::U32(v) => Some(i64::from(v)),
            Scalar::I16(v) => Some(i64::from(v)),
            Scalar::I32(v) => Some(i64::from(v)),
            Scalar::I64(v) => Some(v),
            _ => None,
        };
        let float = scalar.to_f64();
        let value = match (self.dtype(), whole) {
            (DType::U8, Some(v)) => i64::from(v as u8),
            (DType::U32, Some(v)) => i64::from(v as u32),
            (DType::I64, Some(v)) => v,
            (DType::U8, None) => i64::from(float as u8),
            (DType::U32, None) => i64::from(float as u32),
            (DType::I64, None) => float as i64,
            // a float tensor; i64 rounds once, not by way of f64
            (DType::F32, Some(v)) => return Ok(Number::Param(f64::from(v as f32))),
            _ => return Ok(Number::Param(float)),
        };
        // a float is that large only where the value lies beyond what f64 holds
        if value.unsigned_abs() <= 1 << 53 {
            return Ok(Number::Param(value as f64));
        }
        Ok(Number::Leaf(Self::new(value, self.device())?))
    }
}

impl<'a> From<&'a LazyTensor> for TensorOrScalar<'a> {
    fn from(tensor: &'a LazyTensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl<T: WithDType> From<T> for TensorOrScalar<'_> {
    fn from(value: T) -> Self {
        Self::Scalar(value.to_scalar())
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
                            self.same_shape(rhs, stringify!($name))?;
                            Self::record(Op::Compare(CmpOp::$op), &[], &[self, rhs])
                        }
                        TensorOrScalar::Scalar(value) => match self.number(value)? {
                            Number::Param(value) => Self::record(Op::CompareScalar(CmpOp::$op), &[value], &[self]),
                            Number::Leaf(rhs) => Self::record(Op::Compare(CmpOp::$op), &[], &[self, &rhs]),
                        },
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
                            self.same_shape(rhs, stringify!($name))?;
                            Self::record(Op::Binary(BinaryOp::$op), &[], &[self, rhs])
                        }
                        TensorOrScalar::Scalar(value) => match self.number(value)? {
                            Number::Param(value) if self.dtype().is_float() => {
                                let bounds: fn(f64) -> [f64; 2] = $bounds;
                                Self::record(Op::Clamp, &bounds(value), &[self])
                            }
                            Number::Param(value) => {
                                let rhs = Self::filled(value, (), self.dtype(), self.device())?;
                                Self::record(Op::Binary(BinaryOp::$op), &[], &[self, &rhs])
                            }
                            Number::Leaf(rhs) => Self::record(Op::Binary(BinaryOp::$op), &[], &[self, &rhs]),
                        },
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
    /// The comparison `op` with a tensor of the same shape and dtype, or with a number; see [`LazyTensor::eq`].
    ///
    /// # Errors
    /// When shapes, dtypes or devices differ.
    #[track_caller]
    pub fn cmp<'a>(&self, rhs: impl Into<TensorOrScalar<'a>>, op: candle_core::op::CmpOp) -> Result<Self> {
        use candle_core::op::CmpOp as C;
        match op {
            C::Eq => self.eq(rhs),
            C::Ne => self.ne(rhs),
            C::Lt => self.lt(rhs),
            C::Le => self.le(rhs),
            C::Gt => self.gt(rhs),
            C::Ge => self.ge(rhs),
        }
    }

    /// min(max(x, min), max); the bounds are tensors of this shape and dtype or numbers.
    ///
    /// # Errors
    /// When shapes, dtypes or devices differ.
    #[track_caller]
    pub fn clamp<'a>(&self, min: impl Into<TensorOrScalar<'a>>, max: impl Into<TensorOrScalar<'a>>) -> Result<Self> {
        match (min.into(), max.into()) {
            (TensorOrScalar::Scalar(min), TensorOrScalar::Scalar(max)) if self.dtype().is_float() => {
                Self::record(Op::Clamp, &[min.to_f64(), max.to_f64()], &[self])
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
    #[inline]
    fn same_shape(&self, rhs: &Self, op: &'static str) -> Result<()> {
        if self.dims() == rhs.dims() {
            return Ok(());
        }
        let detail = format!("{:?} and {:?} differ; broadcast_{op} broadcasts", self.dims(), rhs.dims());
        Self::refuse_on(op, ErrorKind::Shape(detail), &[self, rhs])
    }

    /// x·mul + add, any dtype. Multiplying by one and adding zero records nothing.
    ///
    /// # Errors
    /// When the dtype is not supported.
    #[track_caller]
    pub fn affine(&self, mul: f64, add: f64) -> Result<Self> {
        if is_nothing(mul, add) {
            return Ok(self.clone());
        }
        Self::record(Op::Affine, &[mul, add], &[self])
    }

    /// The same of a handle that is given up.
    #[track_caller]
    pub(super) fn into_affine(self, mul: f64, add: f64) -> Result<Self> {
        if is_nothing(mul, add) {
            return Ok(self);
        }
        self.record_taking(Op::Affine, &[mul, add], None)
    }

    /// A function of a handle that is given up and of a tensor of the same shape.
    #[track_caller]
    pub(super) fn into_binary(self, op: BinaryOp, rhs: &Self) -> Result<Self> {
        self.same_shape(rhs, op.name())?;
        self.record_taking(Op::Binary(op), &[], Some(rhs))
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

/// Whether x·mul + add is x, bit for bit: −0 as the addend changes nothing; +0 turns −0 into +0, as Candle's affine does.
fn is_nothing(mul: f64, add: f64) -> bool {
    mul == 1.0 && add == 0.0 && add.is_sign_negative()
}
