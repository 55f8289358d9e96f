//! The fused ops as methods of a tensor.
//!
//! The name is v1's. Here they run on every device, with kernels on the CPU and Candle's own ops elsewhere, and all of them are
//! differentiable.

use crate::eager;
use crate::error::TrainingError;
use candle_core::{Result as CandleResult, Tensor};

/// Fused ops on tensors of any device.
pub trait CustomMetalOps {
    /// (x·A·B)·scaling: self (…, in), A (in, rank), B (rank, out), result (…, out).
    ///
    /// # Errors
    /// [`TrainingError::Failed`] where shapes, dtypes or devices do not fit.
    fn lora_forward_fused(&self, lora_a: &Tensor, lora_b: &Tensor, scaling: f32) -> Result<Tensor, TrainingError>;

    /// Softmax over the last dim.
    ///
    /// # Errors
    /// [`TrainingError::Failed`] for a scalar, or a dtype that is not a float.
    fn softmax_fused(&self) -> Result<Tensor, TrainingError>;

    /// x/√(mean(x²) + eps) over the last dim.
    ///
    /// # Errors
    /// As [`CustomMetalOps::softmax_fused`].
    fn rms_norm_fused(&self, eps: f32) -> Result<Tensor, TrainingError>;
}

fn named(op: &str, result: CandleResult<Tensor>) -> Result<Tensor, TrainingError> {
    result.map_err(|error| TrainingError::Failed { reason: format!("{op}: {error}") })
}

impl CustomMetalOps for Tensor {
    #[track_caller]
    fn lora_forward_fused(&self, lora_a: &Tensor, lora_b: &Tensor, scaling: f32) -> Result<Tensor, TrainingError> {
        named("lora_forward_fused", eager::lora(self, lora_a, lora_b, scaling))
    }

    #[track_caller]
    fn softmax_fused(&self) -> Result<Tensor, TrainingError> {
        let last = self.rank().checked_sub(1);
        let last = last.ok_or_else(|| TrainingError::failed("softmax_fused: a scalar has no dim to sum over"))?;
        named("softmax_fused", eager::softmax(self, last))
    }

    #[track_caller]
    fn rms_norm_fused(&self, eps: f32) -> Result<Tensor, TrainingError> {
        named("rms_norm_fused", eager::rms_norm(self, f64::from(eps)))
    }
}
