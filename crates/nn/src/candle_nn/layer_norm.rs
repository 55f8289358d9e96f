//! Layer norm and RMS norm.

use super::var_builder::VarBuilder;
use crate::candle::{Module, Result, Tensor};
use crate::scope;
use candle_nn::Init;
use std::sync::Arc;

pub use candle_nn::layer_norm::LayerNormConfig;

/// Layer norm over the last dim (arXiv:1607.06450, eq. 4), or RMS norm where the mean is not removed.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    remove_mean: bool,
    eps: f64,
    path: Arc<str>,
}

impl LayerNorm {
    fn make(weight: Tensor, bias: Option<Tensor>, remove_mean: bool, eps: f64) -> Self {
        Self { weight, bias, remove_mean, eps, path: "".into() }
    }

    /// From weight and bias (hidden).
    #[must_use]
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self::make(weight, Some(bias), true, eps)
    }

    /// From a weight (hidden).
    #[must_use]
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self::make(weight, None, true, eps)
    }

    /// An RMS norm from a weight (hidden).
    #[must_use]
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self::make(weight, None, false, eps)
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias.
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is added to the variance.
    #[must_use]
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// Whether the mean is removed.
    #[must_use]
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }
}

impl Module for LayerNorm {
    #[track_caller]
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let _scope = scope::enter(&self.path);
        match (self.remove_mean, &self.bias) {
            (true, bias) => xs.layer_norm(Some(&self.weight), bias.as_ref(), self.eps),
            (false, None) => xs.rms_norm(Some(&self.weight), self.eps),
            (false, Some(bias)) => xs.rms_norm(Some(&self.weight), self.eps)?.broadcast_add(bias),
        }
    }
}

/// A norm from `weight` and `bias`, or from `gamma` and `beta` where the checkpoint has those names.
///
/// # Errors
/// When a tensor is missing or has another shape.
#[track_caller]
pub fn layer_norm<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder<'_>) -> Result<LayerNorm> {
    let config = config.into();
    let either = |new: &'static str, old: &'static str| {
        if !vb.contains_tensor(new) && vb.contains_tensor(old) {
            old
        } else {
            new
        }
    };
    let weight = vb.get_with_hints(size, either("weight", "gamma"), Init::Const(1.))?;
    let bias =
        if config.affine { Some(vb.get_with_hints(size, either("bias", "beta"), Init::Const(0.))?) } else { None };
    Ok(LayerNorm { weight, bias, remove_mean: config.remove_mean, eps: config.eps, path: vb.prefix().into() })
}

/// A layer norm without a bias.
///
/// # Errors
/// As [`layer_norm`].
#[track_caller]
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<LayerNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: true, affine: false }, vb)
}

/// `x/√(mean(x²) + eps)·weight` over the last dim (arXiv:1910.07467, eq. 4).
#[derive(Clone, Debug)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// From a weight (hidden).
    #[must_use]
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The norm inside.
    #[must_use]
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square.
    #[must_use]
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// The same as `forward`: tracked leaves get their gradient either way.
    ///
    /// # Errors
    /// As [`Module::forward`].
    #[track_caller]
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

impl Module for RmsNorm {
    #[track_caller]
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

/// An RMS norm from `weight`.
///
/// # Errors
/// As [`layer_norm`].
#[track_caller]
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<RmsNorm> {
    Ok(RmsNorm(layer_norm(size, LayerNormConfig { eps, remove_mean: false, affine: false }, vb)?))
}
