//! One op on plain tensors.
//!
//! There is nothing to plan about a single op, and recording it would cost more than a small one takes: these are the engine's kernels
//! themselves, each with its own backward on Candle's tape. Layers and models, which are several ops, go through the engine. What the kernels
//! refuse is recorded after all: that error names the caller's line.

use candle_core::{Error, Result, Tensor};
use candle_lazy_exec::LazyTensor;

/// The error of recording an op that a kernel refused; the kernel's own where recording it succeeds.
fn refused(recorded: candle_lazy_exec::Result<LazyTensor>, error: Error) -> Error {
    recorded.err().map_or(error, Error::from)
}

/// Softmax over `dim`.
#[track_caller]
pub(crate) fn softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    match candle_lazy_ops::softmax(x, dim) {
        Err(error) => Err(refused(LazyTensor::from(x).softmax(dim), error)),
        done => done,
    }
}

/// x/√(mean(x²) + eps) over the last dim.
#[track_caller]
pub(crate) fn rms_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    match candle_lazy_ops::rms_norm(x, None, eps) {
        Err(error) => Err(refused(LazyTensor::from(x).rms_norm(None, eps), error)),
        done => done,
    }
}

/// (x − mean)/√(var + eps) over the last dim.
#[track_caller]
pub(crate) fn layer_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    match candle_lazy_ops::layer_norm(x, None, None, eps) {
        Err(error) => Err(refused(LazyTensor::from(x).layer_norm(None, None, eps), error)),
        done => done,
    }
}

/// (x·a)·b·scale.
#[track_caller]
pub(crate) fn lora(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    match candle_lazy_ops::lora(x, a, b, f64::from(scale)) {
        Err(error) => Err(refused(LazyTensor::from(x).lora(&a.into(), &b.into(), f64::from(scale)), error)),
        done => done,
    }
}

/// dropout(x·a)·b·scale. Gradients flow as far as the parts are tracked.
#[track_caller]
pub(crate) fn lora_with_dropout(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32, dropout: f32) -> Result<Tensor> {
    let mid = candle_nn::ops::dropout(&candle_lazy_ops::linear(x, &a.t()?, None)?, dropout)?;
    candle_lazy_ops::linear(&mid, &b.t()?, None)?.affine(f64::from(scale), 0.0)
}
