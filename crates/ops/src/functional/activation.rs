//! Activations: gelu in both forms, silu, and the products of gated units.

use super::apply::{RowCall, Tracked1, Tracked2};
use super::{alike, float, wide};
use crate::error::Error;
use crate::fault;
use crate::row::programs::Ready;
use crate::row::{emit, BinaryFn as B, Builder, Class, Reg, RowProgram, UnaryFn as U};
use candle_core::{DType, Result, Tensor};

/// Emits f'(x).
type Slope = fn(&mut Consts<'_>, Reg) -> Reg;

/// A builder that has its constants as parameters.
struct Consts<'a> {
    b: &'a mut Builder,
    values: Vec<f64>,
}

impl Consts<'_> {
    fn value(&mut self, v: f64) -> Reg {
        let index = self.values.len();
        self.values.push(v);
        self.b.param(u16::try_from(index).unwrap_or(u16::MAX))
    }
    fn mul(&mut self, a: Reg, b: Reg) -> Reg {
        self.b.binary(B::Mul, a, b)
    }
    fn add(&mut self, a: Reg, b: Reg) -> Reg {
        self.b.binary(B::Add, a, b)
    }
    fn sub(&mut self, a: Reg, b: Reg) -> Reg {
        self.b.binary(B::Sub, a, b)
    }
}

fn class(op: &'static str, dtype: DType) -> Result<Class> {
    Ok(Class::of(dtype).ok_or_else(|| Error::unsupported(op, format!("dtype {}", dtype.as_str())))?)
}

/// s·(1 + x·(1 - s)) for s = sigmoid(x).
fn silu_slope(c: &mut Consts<'_>, x: Reg) -> Reg {
    let one = c.value(1.0);
    let s = c.b.unary(U::Sigmoid, x);
    let rest = c.sub(one, s);
    let t = c.mul(x, rest);
    let t = if fault::active("grad.silu.term") { one } else { c.add(one, t) };
    c.mul(s, t)
}

/// 0.5·(1 + t) + 0.5·x·(1 - t²)·u' for t = tanh(u), u = √(2/π)·(x + 0.044715·x³).
fn gelu_slope(c: &mut Consts<'_>, x: Reg) -> Reg {
    let k = (2.0 / std::f64::consts::PI).sqrt();
    let (half, one) = (c.value(0.5), c.value(1.0));
    let (k1, cubic) = (c.value(k), c.value(0.044715));
    let slope3 = c.value(3.0 * 0.044715);
    let sqr = c.b.unary(U::Sqr, x);
    let inner = c.mul(cubic, sqr);
    let inner = c.add(one, inner);
    let u = c.mul(k1, x);
    let u = c.mul(u, inner);
    let t = c.b.unary(U::Tanh, u);
    let du = c.mul(slope3, sqr);
    let du = if fault::active("grad.gelu.cubic") { one } else { c.add(one, du) };
    let du = c.mul(k1, du);
    let t2 = c.b.unary(U::Sqr, t);
    let sech2 = if fault::active("grad.gelu.sech") { one } else { c.sub(one, t2) };
    let left = c.add(one, t);
    let left = c.mul(half, left);
    let right = c.mul(half, x);
    let right = c.mul(right, sech2);
    let right = c.mul(right, du);
    c.add(left, right)
}

/// 0.5·(1 + erf(x/√2)) + x·exp(-x²/2)/√(2π).
fn gelu_erf_slope(c: &mut Consts<'_>, x: Reg) -> Reg {
    let (half, one) = (c.value(0.5), c.value(1.0));
    let root = c.value(std::f64::consts::FRAC_1_SQRT_2);
    let density = c.value(1.0 / (2.0 * std::f64::consts::PI).sqrt());
    let z = c.mul(x, root);
    let e = c.b.unary(U::Erf, z);
    let cdf = c.add(one, e);
    let cdf = c.mul(half, cdf);
    let sqr = c.b.unary(U::Sqr, x);
    let arg = c.mul(half, sqr);
    let arg = c.b.unary(U::Neg, arg);
    let pdf = c.b.unary(U::Exp, arg);
    let pdf = c.mul(density, pdf);
    let right = c.mul(x, pdf);
    if fault::active("grad.gelu_erf.density") {
        return cdf;
    }
    c.add(cdf, right)
}

fn unary(op: &'static str, x: &Tensor, f: U, slope: Slope, composed: fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    float(op, x)?;
    let dtype = x.dtype();
    if !x.device().is_cpu() {
        return composed(&x.to_dtype(wide(dtype))?)?.to_dtype(dtype);
    }
    let class = class(op, dtype)?;
    let call = RowCall::new(op, Ready::Unary(f).program(dtype)?, 0);
    x.apply_op1(Tracked1(call, move |x: &Tensor, _: &Tensor, g: &Tensor| {
        let mut b = RowProgram::builder(class);
        let (x_, g_) = (b.load(0), b.load(1));
        let mut c = Consts { b: &mut b, values: Vec::new() };
        let d = slope(&mut c, x_);
        let dx = if fault::active("grad.unary.chain") { d } else { c.mul(g_, d) };
        let values = c.values;
        b.output(dx, dtype);
        RowCall::new(op, b.finish()?, 0).with_params(&values).detached(&[x, g])
    }))
}

/// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))); same shape and dtype as x (a float).
///
/// # Errors
/// A dtype that is not a float.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    unary("gelu", x, U::Gelu, gelu_slope, Tensor::gelu)
}

/// 0.5·x·(1 + erf(x/√2)); same shape and dtype as x (a float).
///
/// # Errors
/// A dtype that is not a float.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    unary("gelu-erf", x, U::GeluErf, gelu_erf_slope, Tensor::gelu_erf)
}

/// x/(1 + e⁻ˣ); same shape and dtype as x (a float).
///
/// # Errors
/// A dtype that is not a float.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    unary("silu", x, U::Silu, silu_slope, Tensor::silu)
}

/// silu(gate)·up for two tensors of one shape and dtype (a float): SwiGLU's product (Shazeer, arXiv:2002.05202, §2).
///
/// # Errors
/// Shapes or dtypes that differ, or a dtype that is not a float.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    glu("silu-mul", gate, up, U::Silu, silu_slope, Tensor::silu)
}

/// gelu(gate)·up with gelu's tanh form for two tensors of one shape and dtype (a float): GeGLU's product (Shazeer,
/// arXiv:2002.05202, §2).
///
/// # Errors
/// Shapes or dtypes that differ, or a dtype that is not a float.
pub fn gelu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    glu("gelu-mul", gate, up, U::Gelu, gelu_slope, Tensor::gelu)
}

/// gelu(gate)·up with gelu's exact form for two tensors of one shape and dtype (a float).
///
/// # Errors
/// Shapes or dtypes that differ, or a dtype that is not a float.
pub fn gelu_erf_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    glu("gelu-erf-mul", gate, up, U::GeluErf, gelu_erf_slope, Tensor::gelu_erf)
}

fn glu(
    op: &'static str,
    gate: &Tensor,
    up: &Tensor,
    act: U,
    slope: Slope,
    composed: fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    float(op, gate)?;
    alike(op, "up", gate, up)?;
    if gate.dims() != up.dims() {
        return Err(Error::shape(op, format!("gate {:?}, up {:?}", gate.dims(), up.dims())).into());
    }
    let dtype = gate.dtype();
    if !gate.device().is_cpu() {
        let (g, u) = (gate.to_dtype(wide(dtype))?, up.to_dtype(wide(dtype))?);
        return composed(&g)?.mul(&u)?.to_dtype(dtype);
    }
    let class = class(op, dtype)?;
    let call = RowCall::new(op, Ready::Glu(act).program(dtype)?, 0);
    let bwd = move |gate: &Tensor, up: &Tensor, g: &Tensor| {
        let (tg, tu) = (gate.track_op(), up.track_op());
        let (gate, up) = (gate.detach(), up.detach());
        let d_gate = if tg {
            let mut b = RowProgram::builder(class);
            let (gate_, up_, g_) = (b.load(0), b.load(1), b.load(2));
            let mut c = Consts { b: &mut b, values: Vec::new() };
            let d = slope(&mut c, gate_);
            let t = if fault::active("grad.glu.up_factor") { g_ } else { c.mul(g_, up_) };
            let dx = c.mul(t, d);
            let values = c.values;
            b.output(dx, dtype);
            let call = RowCall::new(op, b.finish()?, 0).with_params(&values);
            Some(call.detached(&[&gate, &up, g])?)
        } else {
            None
        };
        let d_up = if tu && !fault::active("grad.glu.no_up") {
            let mut b = RowProgram::builder(class);
            let (gate_, g_) = (b.load(0), b.load(1));
            let y = if fault::active("grad.glu.up") { g_ } else { emit::glu(&mut b, act, gate_, g_)? };
            b.output(y, dtype);
            Some(RowCall::new(op, b.finish()?, 0).detached(&[&gate, g])?)
        } else {
            None
        };
        Ok((d_gate, d_up))
    };
    gate.apply_op2(up, Tracked2(call, bwd))
}
