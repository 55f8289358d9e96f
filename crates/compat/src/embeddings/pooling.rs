//! From a vector per token to a vector per text. Both functions are differentiable.

use candle_core::{Error, Result, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::pooling;

/// The mean over s of the rows of `hidden` (batch, s, dim) where `mask` (batch, s) is 1: (batch, dim).
///
/// A mask of another dtype is converted. A row of it without a 1 gives zeros: the count is at least 1e-9.
///
/// # Errors
/// Where the shapes are others.
#[track_caller]
pub fn mean_pool(hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let hidden = LazyTensor::from(hidden);
    let mask = LazyTensor::from(mask);
    let mask = if mask.dtype() == hidden.dtype() { mask } else { mask.to_dtype(hidden.dtype())? };
    Ok(pooling::mean_pool(&hidden, &mask).map_err(Error::wrap)?.eval()?)
}

/// `xs` (batch, dim) with rows of length 1; zeros stay zeros (the norm is at least 1e-12).
///
/// # Errors
/// Where `xs` has no dim 1 or no float dtype.
#[track_caller]
pub fn normalize(xs: &Tensor) -> Result<Tensor> {
    Ok(pooling::normalize(&LazyTensor::from(xs)).map_err(Error::wrap)?.eval()?)
}
