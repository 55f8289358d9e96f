//! The affine map.

use super::var_builder::VarBuilder;
use crate::candle::{Module, Result, Tensor};
use crate::scope;
use candle_nn::Init;
use std::sync::Arc;

/// `x·Wᵀ + b`, weight (out, in), bias (out).
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    path: Arc<str>,
}

impl Linear {
    /// From a weight (out, in) and a bias (out). Whether they fit is seen when the module is applied.
    #[must_use]
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias, path: "".into() }
    }

    /// The weight, (out, in).
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, (out).
    #[must_use]
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for Linear {
    #[track_caller]
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let _scope = scope::enter(&self.path);
        xs.linear(&self.weight, self.bias.as_ref())
    }
}

/// A linear map with a bias, from `weight` and `bias`.
///
/// # Errors
/// When a tensor is missing or has another shape.
#[track_caller]
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    linear_b(in_dim, out_dim, true, vb)
}

/// A linear map without a bias, from `weight`.
///
/// # Errors
/// When the tensor is missing or has another shape.
#[track_caller]
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    linear_b(in_dim, out_dim, false, vb)
}

/// A linear map with or without a bias.
///
/// # Errors
/// When a tensor is missing or has another shape.
#[track_caller]
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder<'_>) -> Result<Linear> {
    let weight = vb.get_with_hints((out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let bias = if bias {
        let bound = 1. / (in_dim as f64).sqrt();
        Some(vb.get_with_hints(out_dim, "bias", Init::Uniform { lo: -bound, up: bound })?)
    } else {
        None
    };
    Ok(Linear { weight, bias, path: vb.prefix().into() })
}
