//! The affine map `y = x·Wᵀ + b`.

use crate::error::{Error, Result};
use crate::module::{detached, var_init, Module};
use crate::scope;
use candle_lazy_exec::LazyTensor;
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// `y = x·Wᵀ + b` with `W` of shape (out, in), as `candle_nn::Linear` stores it; the bias is optional.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: LazyTensor,
    bias: Option<LazyTensor>,
    path: Arc<str>,
}

impl Linear {
    /// From a weight (out, in) and an optional bias (out).
    ///
    /// # Errors
    /// Where the weight is no matrix or the bias does not have `out` elements.
    #[track_caller]
    pub fn new(weight: impl Into<LazyTensor>, bias: Option<LazyTensor>) -> Result<Self> {
        Self::with_path(weight.into(), bias, "")
    }

    #[track_caller]
    pub(crate) fn with_path(weight: LazyTensor, bias: Option<LazyTensor>, path: &str) -> Result<Self> {
        let &[out, _] = weight.dims() else {
            return Err(Error::module(
                "linear",
                path,
                format_args!("the weight must have shape (out, in), found {:?}", weight.shape()),
            ));
        };
        if let Some(bias) = &bias {
            if bias.dims() != [out] {
                return Err(Error::module(
                    "linear",
                    path,
                    format_args!("the bias must have shape [{out}], found {:?}", bias.shape()),
                ));
            }
        }
        Ok(Self { weight, bias, path: path.into() })
    }

    /// The weight, (out, in).
    pub fn weight(&self) -> &LazyTensor {
        &self.weight
    }

    /// The bias, (out), where there is one.
    pub fn bias(&self) -> Option<&LazyTensor> {
        self.bias.as_ref()
    }

    /// Width of the result.
    pub fn out_features(&self) -> usize {
        self.weight.dims().first().copied().unwrap_or(0)
    }

    /// Width of the input.
    pub fn in_features(&self) -> usize {
        self.weight.dims().get(1).copied().unwrap_or(0)
    }

    /// The same module on the same memory, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a weight that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        let weight = detached(&self.weight)?;
        let bias = match &self.bias {
            Some(bias) => Some(detached(bias)?),
            None => None,
        };
        Ok(Self { weight, bias, path: Arc::clone(&self.path) })
    }

    /// Where the module stands in its model; empty for one made from tensors.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl Module for Linear {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        Ok(xs.linear(&self.weight, self.bias.as_ref())?)
    }
}

/// A linear map with bias, from `weight` (out, in) and `bias` (out) of the builder.
///
/// # Errors
/// Where a tensor is missing or has another shape.
#[track_caller]
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    let _scope = scope::enter(&vb.prefix());
    let weight = var_init(&vb, (out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let bound = 1. / (in_dim.max(1) as f64).sqrt();
    let bias = var_init(&vb, out_dim, "bias", Init::Uniform { lo: -bound, up: bound })?;
    Linear::with_path(weight.into(), Some(bias.into()), &vb.prefix())
}

/// A linear map without bias, from `weight` (out, in) of the builder.
///
/// # Errors
/// Where the tensor is missing or has another shape.
#[track_caller]
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    let _scope = scope::enter(&vb.prefix());
    let weight = var_init(&vb, (out_dim, in_dim), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    Linear::with_path(weight.into(), None, &vb.prefix())
}

/// [`linear`] where `bias`, else [`linear_no_bias`].
///
/// # Errors
/// As those.
#[track_caller]
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder<'_>) -> Result<Linear> {
    if bias {
        linear(in_dim, out_dim, vb)
    } else {
        linear_no_bias(in_dim, out_dim, vb)
    }
}
