//! Clipping of gradients by their common norm (Pascanu et al. 2013, arXiv:1211.5063).

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::{eval_all, LazyTensor};

/// Added to the norm that is divided by, as in PyTorch's `clip_grad_norm_`.
pub(super) const EPSILON: f64 = 1e-6;

/// Σ g², recorded: a scalar of f64 (on Metal, which has none, of f32).
#[track_caller]
pub(super) fn square(grad: &LazyTensor) -> Result<LazyTensor> {
    let wide = if grad.device().is_metal() { DType::F32 } else { DType::F64 };
    Ok(grad.to_dtype(wide)?.sqr()?.sum_all()?)
}

/// √(Σ g²) over all elements of all gradients; 0 for none. Summed in f64 (on Metal, which has none, in f32).
///
/// # Errors
/// For tensors that are no floats.
#[track_caller]
pub fn grad_norm(grads: &[Tensor]) -> Result<f64> {
    let mut squares = Vec::with_capacity(grads.len());
    for grad in grads {
        if !grad.dtype().is_float() {
            return Err(Error::float_expected("grad_norm", "", "a gradient", grad.dtype()));
        }
        squares.push(square(&LazyTensor::from_tensor(grad.detach()))?);
    }
    let mut sum = 0.0;
    for value in eval_all(&squares.iter().collect::<Vec<_>>())? {
        sum += value.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}

/// Scales all gradients by max_norm/(norm + 1e-6) where that is below 1, and returns their norm before: PyTorch's `clip_grad_norm_`.
///
/// # Errors
/// For a `max_norm` that is not finite and above 0, and for a norm that is not finite: such gradients cannot be scaled. They are as
/// they were then.
#[track_caller]
pub fn clip_grad_norm(grads: &mut [Tensor], max_norm: f64) -> Result<f64> {
    if !(max_norm > 0.0 && max_norm.is_finite()) {
        let message = format_args!("the largest norm must be finite and above 0, got {max_norm}");
        return Err(Error::module("clip_grad_norm", "", message));
    }
    let norm = grad_norm(grads)?;
    if !norm.is_finite() {
        return Err(Error::module("clip_grad_norm", "", format_args!("the norm of the gradients is {norm}")));
    }
    let scale = max_norm / (norm + EPSILON);
    if scale < 1.0 {
        let mut scaled = Vec::with_capacity(grads.len());
        for grad in grads.iter() {
            scaled.push(LazyTensor::from_tensor(grad.detach()).affine(scale, 0.0)?);
        }
        let values = eval_all(&scaled.iter().collect::<Vec<_>>())?;
        for (grad, value) in grads.iter_mut().zip(values) {
            *grad = value;
        }
    }
    Ok(norm)
}
