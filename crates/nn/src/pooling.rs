//! From a vector per token to a vector per text.

use crate::error::{Error, Result};
use candle_core::DType;
use candle_lazy_exec::LazyTensor;

/// The mean over s of the rows of `hidden` (batch, s, hidden) where `mask` (batch, s), of the same float dtype, is 1: (batch, hidden).
///
/// A row of the mask without a 1 gives zeros: the count is at least 1e-9, as in sentence-transformers.
///
/// # Errors
/// Where the shapes or dtypes differ from these.
#[track_caller]
pub fn mean_pool(hidden: &LazyTensor, mask: &LazyTensor) -> Result<LazyTensor> {
    let fits = matches!((hidden.dims(), mask.dims()), ([b, s, _], [mask_b, mask_s]) if b == mask_b && s == mask_s);
    if !fits {
        return Err(Error::module(
            "mean_pool",
            "",
            format_args!(
                "expected hidden (batch, s, width) and mask (batch, s), found {:?} and {:?}",
                hidden.shape(),
                mask.shape()
            ),
        ));
    }
    let kept = hidden.broadcast_mul(&mask.unsqueeze(2)?)?.sum(1)?;
    let count = mask.sum_keepdim(1)?;
    Ok(kept.broadcast_div(&at_least(1e-9, &count)?)?)
}

/// `xs` over its Euclidean norm along dim 1, (batch, hidden): rows of length 1, and zeros stay zeros (the norm is at least 1e-12, as in
/// PyTorch's `normalize`).
///
/// # Errors
/// Where `xs` has no dim 1 or no float dtype.
#[track_caller]
pub fn normalize(xs: &LazyTensor) -> Result<LazyTensor> {
    let norm = xs.sqr()?.sum_keepdim(1)?.sqrt()?;
    Ok(xs.broadcast_div(&at_least(1e-12, &norm)?)?)
}

/// The larger of `floor` and each element; in f16, which has no such small numbers, its smallest normal number takes their place.
#[track_caller]
fn at_least(floor: f64, xs: &LazyTensor) -> Result<LazyTensor> {
    let floor = if xs.dtype() == DType::F16 { f64::from(half::f16::MIN_POSITIVE.to_f32()) } else { floor };
    let floor = LazyTensor::filled(floor, xs.shape().clone(), xs.dtype(), xs.device())?;
    Ok(xs.maximum(&floor)?)
}
