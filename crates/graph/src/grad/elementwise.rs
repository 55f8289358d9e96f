//! Derivatives of elementwise functions and of reductions.
//!
//! f16 and bf16 are computed in f32 and rounded once, as the kernels of the composites do.

use super::{Call, Parts, Ref, R};
use crate::error::Result;
use crate::op::{BinaryOp, CmpOp, Dims, Op, ReduceOp, UnaryOp};
use crate::recorder::Recorder;
use candle_core::DType;
use smallvec::smallvec;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};

/// Whether values of this dtype are computed in f32.
pub(super) fn is_narrow(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// The result of a call, in f32 where it is narrow: computed again then, since the rounded one is less exact.
pub(super) fn wide_result(call: &Call<'_>, r: &mut R<'_, '_>) -> Result<Ref> {
    if !is_narrow(call.y.dtype()) {
        return Ok(call.y.clone());
    }
    let mut inputs = Vec::with_capacity(call.expr.inputs.len());
    for x in &call.expr.inputs {
        inputs.push(r.widen(x)?);
    }
    r.0.push(call.expr.op.clone(), call.expr.scalars.clone(), &inputs)
}

/// 1 where the comparison with a scalar holds, else 0, in the dtype of `x`.
fn mask(r: &mut R<'_, '_>, op: CmpOp, x: &Ref, scalar: f64) -> Result<Ref> {
    let holds = r.0.push(Op::CompareScalar(op), smallvec![scalar], std::slice::from_ref(x))?;
    r.cast(&holds, x.dtype())
}

/// 1 where a equals b, else 0.
fn equal(r: &mut R<'_, '_>, a: &Ref, b: &Ref) -> Result<Ref> {
    let holds = r.0.push(Op::Compare(CmpOp::Eq), smallvec![], &[a.clone(), b.clone()])?;
    r.cast(&holds, a.dtype())
}

pub(super) fn mul(r: &mut R<'_, '_>, a: &Ref, b: &Ref) -> Result<Ref> {
    r.binary(BinaryOp::Mul, a, b)
}

/// f'(x), given y = f(x), or `None` where it is 0 everywhere. Neither is narrow.
pub(super) fn derivative(r: &mut R<'_, '_>, f: UnaryOp, x: &Ref, y: &Ref) -> Result<Option<Ref>> {
    Ok(Some(match f {
        UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round | UnaryOp::Sign => return Ok(None),
        UnaryOp::Neg => r.affine(x, 0.0, -1.0)?,
        UnaryOp::Abs => {
            let above = mask(r, CmpOp::Ge, x, 0.0)?;
            r.affine(&above, 2.0, -1.0)?
        }
        UnaryOp::Recip => {
            let square = r.unary(UnaryOp::Sqr, y)?;
            r.affine(&square, -1.0, 0.0)?
        }
        UnaryOp::Sqr => r.affine(x, 2.0, 0.0)?,
        UnaryOp::Sqrt => {
            let inverse = r.unary(UnaryOp::Recip, y)?;
            r.affine(&inverse, 0.5, 0.0)?
        }
        UnaryOp::Rsqrt => {
            let square = r.unary(UnaryOp::Sqr, y)?;
            let cube = mul(r, &square, y)?;
            r.affine(&cube, -0.5, 0.0)?
        }
        UnaryOp::Exp => y.clone(),
        UnaryOp::Log => r.unary(UnaryOp::Recip, x)?,
        UnaryOp::Sin => r.unary(UnaryOp::Cos, x)?,
        UnaryOp::Cos => {
            let sin = r.unary(UnaryOp::Sin, x)?;
            r.affine(&sin, -1.0, 0.0)?
        }
        UnaryOp::Tanh => {
            let square = r.unary(UnaryOp::Sqr, y)?;
            r.affine(&square, -1.0, 1.0)?
        }
        UnaryOp::Erf => {
            let bell = gauss(r, x, -1.0)?;
            r.affine(&bell, FRAC_2_SQRT_PI, 0.0)?
        }
        UnaryOp::Gelu => {
            // with t = tanh(u), u = c(x + 0.044715x³): (1 + t)/2 + x(1 − t²)·c(1 + 3·0.044715x²)/2
            let c = (2.0 / PI).sqrt();
            let square = r.unary(UnaryOp::Sqr, x)?;
            let inner = r.affine(&square, c * 0.044_715, c)?;
            let u = mul(r, &inner, x)?;
            let t = r.unary(UnaryOp::Tanh, &u)?;
            let first = r.affine(&t, 0.5, 0.5)?;
            let t2 = r.unary(UnaryOp::Sqr, &t)?;
            let slope = r.affine(&t2, -0.5, 0.5)?;
            let du = r.affine(&square, 3.0 * 0.044_715 * c, c)?;
            let slope = mul(r, &slope, &du)?;
            let second = mul(r, &slope, x)?;
            r.binary(BinaryOp::Add, &first, &second)?
        }
        UnaryOp::GeluErf => {
            // Φ(x) + x·φ(x), with the normal distribution and its density
            let scaled = r.affine(x, FRAC_1_SQRT_2, 0.0)?;
            let erf = r.unary(UnaryOp::Erf, &scaled)?;
            let first = r.affine(&erf, 0.5, 0.5)?;
            let bell = gauss(r, x, -0.5)?;
            let density = r.affine(&bell, 1.0 / (2.0 * PI).sqrt(), 0.0)?;
            let second = mul(r, &density, x)?;
            r.binary(BinaryOp::Add, &first, &second)?
        }
        UnaryOp::Relu => mask(r, CmpOp::Ge, x, 0.0)?,
        UnaryOp::Silu => {
            // s(x)·(1 + x·(1 − s(x)))
            let s = r.unary(UnaryOp::Sigmoid, x)?;
            let rest = r.affine(&s, -1.0, 1.0)?;
            let rest = mul(r, &rest, x)?;
            let rest = r.affine(&rest, 1.0, 1.0)?;
            mul(r, &s, &rest)?
        }
        UnaryOp::Sigmoid => {
            let rest = r.affine(y, -1.0, 1.0)?;
            mul(r, y, &rest)?
        }
    }))
}

/// exp(factor·x²)
fn gauss(r: &mut R<'_, '_>, x: &Ref, factor: f64) -> Result<Ref> {
    let square = r.unary(UnaryOp::Sqr, x)?;
    let square = r.affine(&square, factor, 0.0)?;
    r.unary(UnaryOp::Exp, &square)
}

/// The sum of `g` over the dims that were broadcast from `dims`.
pub(super) fn unbroadcast(r: &mut R<'_, '_>, g: &Ref, dims: &[usize]) -> Result<Ref> {
    let from = r.0.dims(g);
    let new = from.len().saturating_sub(dims.len());
    let stretched = |d: usize| d < new || dims[d - new] != from[d];
    let axes = (0..from.len()).filter(|&d| stretched(d)).fold(0u32, |axes, d| axes | 1 << d);
    if axes == 0 {
        return r.reshape(g, dims);
    }
    let sum = Op::Reduce { op: ReduceOp::Sum, axes, keepdim: true };
    let sum = r.0.push(sum, smallvec![], std::slice::from_ref(g))?;
    r.reshape(&sum, dims)
}

pub(super) fn broadcast(r: &mut R<'_, '_>, x: &Ref, dims: &[usize]) -> Result<Ref> {
    if r.0.dims(x).as_slice() == dims {
        return Ok(x.clone());
    }
    r.0.push(Op::Broadcast { shape: Dims::from_slice(dims) }, smallvec![], std::slice::from_ref(x))
}

pub(super) fn apply(call: &Call<'_>, r: &mut R<'_, '_>) -> Result<Parts> {
    let mut parts = call.none();
    match &call.expr.op {
        Op::Binary(op) => return binary(call, *op, r),
        Op::Where => {
            let g = call.g;
            let zero = r.0.push(Op::Full { shape: Dims::new(), dtype: g.dtype() }, smallvec![0.0], &[])?;
            let zero = broadcast(r, &zero, g.dims())?;
            for (i, (a, b)) in [(1, (g, &zero)), (2, (&zero, g))] {
                if call.needs(i) {
                    let chosen = r.0.push(Op::Where, smallvec![], &[call.x(0).clone(), a.clone(), b.clone()])?;
                    parts[i] = Some(unbroadcast(r, &chosen, call.x(i).dims())?);
                }
            }
            return Ok(parts);
        }
        _ => {}
    }
    let dtype = call.x(0).dtype();
    let (x, g) = (r.widen(call.x(0))?, r.widen(call.g)?);
    let y = |r: &mut R<'_, '_>| wide_result(call, r);
    let scalars = &call.expr.scalars;
    let dx = match &call.expr.op {
        Op::Unary(UnaryOp::Neg) => Some(r.affine(&g, -1.0, 0.0)?),
        Op::Unary(f) => {
            let reads_result = matches!(
                f,
                UnaryOp::Recip | UnaryOp::Sqrt | UnaryOp::Rsqrt | UnaryOp::Exp | UnaryOp::Tanh | UnaryOp::Sigmoid
            );
            let y = if reads_result { y(r)? } else { x.clone() };
            match derivative(r, *f, &x, &y)? {
                Some(slope) => Some(mul(r, &g, &slope)?),
                None => None,
            }
        }
        Op::Affine => Some(r.affine(&g, scalars[0], 0.0)?),
        Op::Powf => {
            let power = r.0.push(Op::Powf, smallvec![scalars[0] - 1.0], &[x])?;
            let slope = r.affine(&power, scalars[0], 0.0)?;
            Some(mul(r, &g, &slope)?)
        }
        Op::Elu => {
            // 1 above 0, alpha·eˣ = y + alpha elsewhere
            let below = y(r)?;
            let below = r.affine(&below, 1.0, scalars[0])?;
            let above = r.0.push(Op::CompareScalar(CmpOp::Gt), smallvec![0.0], &[x])?;
            let ones = r.affine(&below, 0.0, 1.0)?;
            let slope = r.0.push(Op::Where, smallvec![], &[above, ones, below])?;
            Some(mul(r, &g, &slope)?)
        }
        Op::Clamp => {
            // at a bound two equal elements share the gradient: half of "within" and half of "strictly within"
            let mut slope = None;
            for (low, high) in [(CmpOp::Ge, CmpOp::Le), (CmpOp::Gt, CmpOp::Lt)] {
                let (low, high) = (mask(r, low, &x, scalars[0])?, mask(r, high, &x, scalars[1])?);
                let within = mul(r, &low, &high)?;
                slope = Some(match slope {
                    None => within,
                    Some(other) => r.binary(BinaryOp::Add, &other, &within)?,
                });
            }
            match slope {
                Some(slope) => {
                    let slope = r.affine(&slope, 0.5, 0.0)?;
                    Some(mul(r, &g, &slope)?)
                }
                None => None,
            }
        }
        Op::Cast(_) if dtype.is_float() => Some(call.g.clone()),
        Op::Reduce { op, axes, .. } => Some(reduction(call, *op, *axes, &x, &g, r)?),
        _ => None,
    };
    parts[0] = match dx {
        Some(dx) => Some(r.cast(&dx, dtype)?),
        None => None,
    };
    Ok(parts)
}

fn binary(call: &Call<'_>, op: BinaryOp, r: &mut R<'_, '_>) -> Result<Parts> {
    let mut parts = call.none();
    let dtype = call.g.dtype();
    // sums need neither operand, and no rounding either
    let (a, b, g) = match op {
        BinaryOp::Add | BinaryOp::Sub => (call.x(0).clone(), call.x(1).clone(), call.g.clone()),
        _ => (r.widen(call.x(0))?, r.widen(call.x(1))?, r.widen(call.g)?),
    };
    for i in (0..2).filter(|&i| call.needs(i)) {
        let full = match (op, i) {
            (BinaryOp::Add, _) | (BinaryOp::Sub, 0) => g.clone(),
            (BinaryOp::Sub, _) => r.affine(&g, -1.0, 0.0)?,
            (BinaryOp::Mul, 0) => mul(r, &g, &b)?,
            (BinaryOp::Mul, _) => mul(r, &g, &a)?,
            (BinaryOp::Div, 0) => r.binary(BinaryOp::Div, &g, &b)?,
            (BinaryOp::Div, _) => {
                let product = mul(r, &g, &a)?;
                let square = r.unary(UnaryOp::Sqr, &b)?;
                let quotient = r.binary(BinaryOp::Div, &product, &square)?;
                r.affine(&quotient, -1.0, 0.0)?
            }
            (BinaryOp::Maximum | BinaryOp::Minimum, i) => {
                let y = r.binary(op, &a, &b)?;
                let (own, other) = if i == 0 { (&a, &b) } else { (&b, &a) };
                let (own, other) = (equal(r, &y, own)?, equal(r, &y, other)?);
                let share = r.affine(&other, 1.0, 1.0)?;
                let slope = r.binary(BinaryOp::Div, &own, &share)?;
                mul(r, &g, &slope)?
            }
            (BinaryOp::Pow, 0) => {
                // b·a^(b − 1)
                let less = r.affine(&b, 1.0, -1.0)?;
                let power = r.binary(BinaryOp::Pow, &a, &less)?;
                let slope = mul(r, &power, &b)?;
                mul(r, &g, &slope)?
            }
            (BinaryOp::Pow, _) => {
                // aᵇ·log a, 0 for a = 0
                let y = r.binary(BinaryOp::Pow, &a, &b)?;
                let zero = r.0.push(Op::CompareScalar(CmpOp::Eq), smallvec![0.0], std::slice::from_ref(&a))?;
                let ones = r.affine(&a, 0.0, 1.0)?;
                let safe = r.0.push(Op::Where, smallvec![], &[zero, ones, a.clone()])?;
                let log = r.unary(UnaryOp::Log, &safe)?;
                let slope = mul(r, &y, &log)?;
                mul(r, &g, &slope)?
            }
        };
        let part = unbroadcast(r, &full, call.x(i).dims())?;
        parts[i] = Some(r.cast(&part, dtype)?);
    }
    Ok(parts)
}

fn reduction(call: &Call<'_>, op: ReduceOp, axes: u32, x: &Ref, g: &Ref, r: &mut R<'_, '_>) -> Result<Ref> {
    let dims = r.0.dims(x);
    let kept: Dims = dims.iter().enumerate().map(|(d, &n)| if axes & 1 << d != 0 { 1 } else { n }).collect();
    let count: usize = dims.iter().zip(0..).filter(|(_, d)| axes & 1 << d != 0).map(|(&n, _)| n).product();
    let g = r.reshape(g, &kept)?;
    let again = |r: &mut R<'_, '_>, op: ReduceOp| {
        r.0.push(Op::Reduce { op, axes, keepdim: true }, smallvec![], std::slice::from_ref(x))
    };
    Ok(match op {
        ReduceOp::Sum => broadcast(r, &g, &dims)?,
        ReduceOp::Mean => {
            let share = r.affine(&g, 1.0 / count as f64, 0.0)?;
            broadcast(r, &share, &dims)?
        }
        ReduceOp::Max | ReduceOp::Min => {
            let y = if is_narrow(call.y.dtype()) { again(r, op)? } else { r.reshape(call.y, &kept)? };
            let y = broadcast(r, &y, &dims)?;
            let extreme = equal(r, x, &y)?;
            mul(r, &extreme, &g)?
        }
        ReduceOp::Var => {
            // 2(x − mean)/(n − 1)
            let mean = again(r, ReduceOp::Mean)?;
            let distance = r.binary(BinaryOp::Sub, x, &mean)?;
            let slope = r.affine(&distance, 2.0 / (count as f64 - 1.0), 0.0)?;
            mul(r, &slope, &g)?
        }
        ReduceOp::LogSumExp => {
            // the softmax of x: exp(x − y) would have the error of a large y
            let max = again(r, ReduceOp::Max)?;
            let distance = r.binary(BinaryOp::Sub, x, &max)?;
            let weight = r.unary(UnaryOp::Exp, &distance)?;
            let sum = Op::Reduce { op: ReduceOp::Sum, axes, keepdim: true };
            let sum = r.0.push(sum, smallvec![], std::slice::from_ref(&weight))?;
            let weight = r.binary(BinaryOp::Div, &weight, &sum)?;
            mul(r, &weight, &g)?
        }
    })
}
