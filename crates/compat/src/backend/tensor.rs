//! Ops that v1 adds to Candle's tensor.

use crate::eager;
use candle_core::{Result, Tensor, D};

/// Softmax and norms over the last dim, without weights. All are differentiable.
pub trait TensorExt {
    /// exp(x − max)/Σ over the last dim; shape and dtype stay.
    ///
    /// # Errors
    /// For a scalar, or a dtype that is not a float.
    fn softmax_stable(&self) -> Result<Tensor>;

    /// (x − mean)/√(var + eps) over the last dim, biased variance; shape and dtype stay.
    ///
    /// # Errors
    /// As [`TensorExt::softmax_stable`].
    fn layer_norm(&self, eps: f64) -> Result<Tensor>;

    /// x/√(mean(x²) + eps) over the last dim; shape and dtype stay.
    ///
    /// # Errors
    /// As [`TensorExt::softmax_stable`].
    fn rms_norm(&self, eps: f64) -> Result<Tensor>;
}

impl TensorExt for Tensor {
    #[track_caller]
    fn softmax_stable(&self) -> Result<Tensor> {
        eager::softmax(self, candle_core::shape::Dim::to_index(&D::Minus1, self.shape(), "softmax_stable")?)
    }

    #[track_caller]
    fn layer_norm(&self, eps: f64) -> Result<Tensor> {
        eager::layer_norm(self, eps)
    }

    #[track_caller]
    fn rms_norm(&self, eps: f64) -> Result<Tensor> {
        eager::rms_norm(self, eps)
    }
}
