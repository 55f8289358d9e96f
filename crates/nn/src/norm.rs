//! Normalisation over the last dim: RMS norm and layer norm.

use crate::error::{Error, Result};
use crate::module::{detached, full_name, var_init, Module};
use crate::scope;
use candle_lazy_exec::LazyTensor;
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// Checks that `tensor` is a vector, as scales and shifts are.
#[track_caller]
fn vector(kind: &str, what: &str, tensor: &LazyTensor, path: &str) -> Result<()> {
    if tensor.rank() != 1 {
        return Err(Error::module(
            kind,
            path,
            format_args!("the {what} must have shape (hidden), found {:?}", tensor.shape()),
        ));
    }
    Ok(())
}

/// `y = x / sqrt(mean(x²) + eps) · weight` over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467).
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: LazyTensor,
    eps: f64,
    path: Arc<str>,
}

impl RmsNorm {
    /// From a scale (hidden).
    ///
    /// # Errors
    /// Where the scale is no vector.
    #[track_caller]
    pub fn new(weight: impl Into<LazyTensor>, eps: f64) -> Result<Self> {
        Self::with_path(weight.into(), eps, "")
    }

    #[track_caller]
    fn with_path(weight: LazyTensor, eps: f64, path: &str) -> Result<Self> {
        vector("rms_norm", "weight", &weight, path)?;
        Ok(Self { weight, eps, path: path.into() })
    }

    /// The same module on the same memory, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a weight that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        Ok(Self { weight: detached(&self.weight)?, eps: self.eps, path: Arc::clone(&self.path) })
    }
}

impl Module for RmsNorm {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        Ok(xs.rms_norm(Some(&self.weight), self.eps)?)
    }
}

/// An RMS norm from `weight` (hidden) of the builder.
///
/// # Errors
/// Where the tensor is missing or has another shape.
#[track_caller]
pub fn rms_norm(hidden: usize, eps: f64, vb: VarBuilder<'_>) -> Result<RmsNorm> {
    let _scope = scope::enter(&vb.prefix());
    let weight = var_init(&vb, hidden, "weight", Init::Const(1.))?;
    RmsNorm::with_path(weight.into(), eps, &vb.prefix())
}

/// `y = (x − mean(x)) / sqrt(var(x) + eps) · weight + bias` over the last dim (Ba et al. 2016, arXiv:1607.06450).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: LazyTensor,
    bias: Option<LazyTensor>,
    eps: f64,
    path: Arc<str>,
}

impl LayerNorm {
    /// From a scale (hidden) and an optional shift (hidden).
    ///
    /// # Errors
    /// Where either is no vector, or they differ in length.
    #[track_caller]
    pub fn new(weight: impl Into<LazyTensor>, bias: Option<LazyTensor>, eps: f64) -> Result<Self> {
        Self::with_path(weight.into(), bias, eps, "")
    }

    #[track_caller]
    fn with_path(weight: LazyTensor, bias: Option<LazyTensor>, eps: f64, path: &str) -> Result<Self> {
        vector("layer_norm", "weight", &weight, path)?;
        if let Some(bias) = &bias {
            vector("layer_norm", "bias", bias, path)?;
            if bias.dims() != weight.dims() {
                return Err(Error::module(
                    "layer_norm",
                    path,
                    format_args!("weight {:?} and bias {:?} differ in length", weight.shape(), bias.shape()),
                ));
            }
        }
        Ok(Self { weight, bias, eps, path: path.into() })
    }
}

impl Module for LayerNorm {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        Ok(xs.layer_norm(Some(&self.weight), self.bias.as_ref(), self.eps)?)
    }
}

/// A layer norm from `weight` and `bias` (hidden) of the builder.
///
/// Checkpoints converted from TensorFlow call them `gamma` and `beta`; those names are taken where the others are absent.
///
/// # Errors
/// Where a tensor is missing or has another shape.
#[track_caller]
pub fn layer_norm(hidden: usize, eps: f64, vb: VarBuilder<'_>) -> Result<LayerNorm> {
    let _scope = scope::enter(&vb.prefix());
    let old_names = !vb.contains_tensor("weight") && vb.contains_tensor("gamma");
    let (weight, bias) = if old_names { ("gamma", "beta") } else { ("weight", "bias") };
    let weight = var_init(&vb, hidden, weight, Init::Const(1.))?;
    let bias = var_init(&vb, hidden, bias, Init::Const(0.))?;
    if !weight.dtype().is_float() {
        return Err(Error::float_expected("layer_norm", &full_name(&vb, "weight"), "the weight", weight.dtype()));
    }
    LayerNorm::with_path(weight.into(), Some(bias.into()), eps, &vb.prefix())
}
