//! Softmax and log-softmax over any dim.

use super::apply::{axis, RowCall, Tracked1};
use super::float;
use crate::error::Error;
use crate::fault;
use crate::row::programs::Ready;
use crate::row::{BinaryFn as B, Class, ReduceFn, RowProgram, UnaryFn as U};
use candle_core::shape::Dim;
use candle_core::{DType, Result, Tensor};

fn class(op: &'static str, dtype: DType) -> Result<Class> {
    Ok(Class::of(dtype).ok_or_else(|| Error::unsupported(op, format!("dtype {}", dtype.as_str())))?)
}

/// exp(x - max) / Σ exp(x - max) along `dim`; same shape and dtype as x (f16, bf16, f32 or f64).
///
/// # Errors
/// A dim that does not exist, or a dtype that is not a float.
pub fn softmax<D: Dim>(x: &Tensor, dim: D) -> Result<Tensor> {
    const OP: &str = "softmax";
    let dim = dim.to_index(x.shape(), OP)?;
    float(OP, x)?;
    if !x.device().is_cpu() {
        let y = candle_nn::ops::softmax(&x.to_dtype(super::wide(x.dtype()))?, dim)?;
        return y.to_dtype(x.dtype());
    }
    let dtype = x.dtype();
    let program = Ready::Softmax.program(dtype)?;
    let axes = axis(OP, dim, x.rank())?;
    let call = RowCall::new(OP, program, axes);
    x.apply_op1(Tracked1(call, move |_: &Tensor, y: &Tensor, g: &Tensor| softmax_grad(y, g, axes)))
}

/// Gradient of the softmax's input from its result and the result's gradient: y·(g - Σ g·y).
pub(super) fn softmax_grad(y: &Tensor, g: &Tensor, axes: u32) -> Result<Tensor> {
    let mut b = RowProgram::builder(class("softmax", y.dtype())?);
    let (y_, g_) = (b.load(0), b.load(1));
    let p = b.binary(B::Mul, g_, y_);
    let s = b.reduce(ReduceFn::Sum, p);
    let d = if fault::active("grad.softmax.sum") { g_ } else { b.binary(B::Sub, g_, s) };
    let dx = b.binary(B::Mul, y_, d);
    b.output(dx, y.dtype());
    RowCall::new("softmax-grad", b.finish()?, axes).detached(&[y, g])
}

/// x - max - log Σ exp(x - max) along `dim`; same shape and dtype as x (f16, bf16, f32 or f64).
///
/// # Errors
/// A dim that does not exist, or a dtype that is not a float.
pub fn log_softmax<D: Dim>(x: &Tensor, dim: D) -> Result<Tensor> {
    const OP: &str = "log-softmax";
    let dim = dim.to_index(x.shape(), OP)?;
    float(OP, x)?;
    if !x.device().is_cpu() {
        let y = candle_nn::ops::log_softmax(&x.to_dtype(super::wide(x.dtype()))?, dim)?;
        return y.to_dtype(x.dtype());
    }
    let dtype = x.dtype();
    let class = class(OP, dtype)?;
    let axes = axis(OP, dim, x.rank())?;
    let call = RowCall::new(OP, Ready::LogSoftmax.program(dtype)?, axes);
    // g - softmax(x)·Σg, from x and not from the rounded result.
    x.apply_op1(Tracked1(call, move |x: &Tensor, _: &Tensor, g: &Tensor| {
        let mut b = RowProgram::builder(class);
        let (x_, g_) = (b.load(0), b.load(1));
        let y = crate::row::emit::log_softmax(&mut b, x_)?;
        let p = b.unary(U::Exp, y);
        let s = b.reduce(ReduceFn::Sum, g_);
        let ps = if fault::active("grad.log_softmax.weight") { s } else { b.binary(B::Mul, p, s) };
        let dx = b.binary(B::Sub, g_, ps);
        b.output(dx, x.dtype());
        RowCall::new("log-softmax-grad", b.finish()?, axes).detached(&[x, g])
    }))
}
