//! Group norm.

use super::var_builder::VarBuilder;
use crate::candle::{Error, Module, Result, Tensor};
use crate::scope;
use candle_nn::Init;
use std::sync::Arc;

/// Layer norm over groups of channels (arXiv:1803.08494, eq. 7) of an input (batch, channels, …).
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    num_channels: usize,
    num_groups: usize,
    path: Arc<str>,
}

impl GroupNorm {
    /// From weight and bias (channels).
    ///
    /// # Errors
    /// When the channels do not split into the groups.
    #[track_caller]
    pub fn new(weight: Tensor, bias: Tensor, num_channels: usize, num_groups: usize, eps: f64) -> Result<Self> {
        if num_groups == 0 || !num_channels.is_multiple_of(num_groups) {
            let message = format!("group_norm: {num_channels} channels do not split into {num_groups} groups");
            return Err(Error::Msg(message).at_caller());
        }
        Ok(Self { weight, bias, eps, num_channels, num_groups, path: "".into() })
    }
}

impl Module for GroupNorm {
    #[track_caller]
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let _scope = scope::enter(&self.path);
        if xs.dims().get(1) != Some(&self.num_channels) {
            let message = format!("group_norm: {} channels, got an input {:?}", self.num_channels, xs.dims());
            return Err(Error::Msg(message).at_caller());
        }
        xs.group_norm(self.num_groups, Some(&self.weight), Some(&self.bias), self.eps)
    }
}

/// A group norm from `weight` and `bias`.
///
/// # Errors
/// When a tensor is missing or has another shape, or the channels do not split into the groups.
#[track_caller]
pub fn group_norm(num_groups: usize, num_channels: usize, eps: f64, vb: VarBuilder<'_>) -> Result<GroupNorm> {
    let weight = vb.get_with_hints(num_channels, "weight", Init::Const(1.))?;
    let bias = vb.get_with_hints(num_channels, "bias", Init::Const(0.))?;
    let norm = GroupNorm::new(weight, bias, num_channels, num_groups, eps)?;
    Ok(GroupNorm { path: vb.prefix().into(), ..norm })
}
