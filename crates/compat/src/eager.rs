//! One op on plain tensors, through the engine.
//!
//! What no gradient can reach is recorded and evaluated, which for one op is the kernel at once. What Candle's autograd tracks runs the
//! same kernel with its own backward on Candle's tape: the engine would replay Candle's ops there, and this is one op only.

use candle_core::{Result, Tensor};
use candle_lazy_exec::LazyTensor;

/// Softmax over `dim`.
#[track_caller]
pub(crate) fn softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    if x.track_op() {
        return candle_lazy_ops::softmax(x, dim);
    }
    Ok(LazyTensor::from(x).softmax(dim)?.eval()?)
}

/// x/√(mean(x²) + eps) over the last dim.
#[track_caller]
pub(crate) fn rms_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    if x.track_op() {
        return candle_lazy_ops::rms_norm(x, None, eps);
    }
    Ok(LazyTensor::from(x).rms_norm(None, eps)?.eval()?)
}

/// (x − mean)/√(var + eps) over the last dim.
#[track_caller]
pub(crate) fn layer_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    if x.track_op() {
        return candle_lazy_ops::layer_norm(x, None, None, eps);
    }
    Ok(LazyTensor::from(x).layer_norm(None, None, eps)?.eval()?)
}

/// (x·a)·b·scale.
#[track_caller]
pub(crate) fn lora(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    let scale = f64::from(scale);
    if x.track_op() || a.track_op() || b.track_op() {
        return candle_lazy_ops::lora(x, a, b, scale);
    }
    Ok(LazyTensor::from(x).lora(&a.into(), &b.into(), scale)?.eval()?)
}

/// dropout(x·a)·b·scale. Gradients flow as far as the parts are tracked.
#[track_caller]
pub(crate) fn lora_with_dropout(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32, dropout: f32) -> Result<Tensor> {
    let mid = candle_nn::ops::dropout(&candle_lazy_ops::linear(x, &a.t()?, None)?, dropout)?;
    candle_lazy_ops::linear(&mid, &b.t()?, None)?.affine(f64::from(scale), 0.0)
}
