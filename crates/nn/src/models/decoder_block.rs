//! One block of a decoder of the Llama family.

use super::causal_lm_config::CausalLmConfig;
use crate::attention::{AttentionSizes, CausalSelfAttention, Positions};
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::lora::{AdaptedRows, LoraLinear};
use crate::mlp::Mlp;
use crate::module::Module;
use crate::norm::{rms_norm, RmsNorm};
use crate::scope;
use candle_lazy_exec::LazyTensor;
use candle_nn::VarBuilder;
use std::sync::Arc;

/// The names that the linear maps of a block have in checkpoints, by the part that they belong to.
pub(crate) const PROJECTIONS: [(&str, &str); 7] = [
    ("self_attn", "q_proj"),
    ("self_attn", "k_proj"),
    ("self_attn", "v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj"),
    ("mlp", "up_proj"),
    ("mlp", "down_proj"),
];

/// Attention and MLP, each behind an RMS norm and added to the residual stream.
#[derive(Debug, Clone)]
pub struct DecoderBlock {
    input_norm: RmsNorm,
    attention: CausalSelfAttention,
    mlp_norm: RmsNorm,
    mlp: Mlp,
    path: Arc<str>,
}

impl DecoderBlock {
    /// From `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp` of the builder. The config's sizes must multiply
    /// ([`CausalLmConfig::validate`]).
    ///
    /// # Errors
    /// Where a tensor is missing or has another shape.
    #[track_caller]
    pub fn load(config: &CausalLmConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let sizes = AttentionSizes {
            hidden: config.hidden_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            qkv_bias: config.qkv_bias,
            out_bias: config.out_bias,
            window: config.sliding_window,
        };
        Ok(Self {
            input_norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("input_layernorm"))?,
            attention: CausalSelfAttention::load(sizes, vb.pp("self_attn"))?,
            mlp_norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("post_attention_layernorm"))?,
            mlp: Mlp::load(config.hidden_size, config.intermediate_size, config.mlp_bias, vb.pp("mlp"))?,
            path: vb.prefix().into(),
        })
    }

    /// The attention, to set adapters.
    pub fn attention_mut(&mut self) -> &mut CausalSelfAttention {
        &mut self.attention
    }

    /// The MLP, to set adapters.
    pub fn mlp_mut(&mut self) -> &mut Mlp {
        &mut self.mlp
    }

    /// The map called `name` in checkpoints (`q_proj`, …, `down_proj`).
    pub fn projection_mut(&mut self, name: &str) -> Option<&mut LoraLinear> {
        match self.attention.projection_mut(name) {
            Some(projection) => Some(projection),
            None => self.mlp.projection_mut(name),
        }
    }

    /// The linear maps in the order of [`PROJECTIONS`].
    pub(crate) fn projections(&self) -> impl Iterator<Item = &LoraLinear> {
        self.attention.projections().into_iter().chain(self.mlp.projections())
    }

    /// Removes all adapters.
    ///
    /// # Errors
    /// None in practice: taking an adapter away needs nothing to fit.
    pub fn clear_lora(&mut self) -> Result<()> {
        for (_, name) in PROJECTIONS {
            if let Some(projection) = self.projection_mut(name) {
                projection.set_adapter(None)?;
            }
        }
        Ok(())
    }

    /// The residual stream `xs` (batch, s, hidden) after the block: the new positions see what `cache` holds and, causally, themselves.
    ///
    /// # Errors
    /// As [`CausalSelfAttention::forward`].
    #[track_caller]
    pub fn forward(&self, xs: &LazyTensor, at: &Positions, cache: &mut KvCache) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let attended = self.attention.forward(&self.input_norm.forward(xs)?, at, cache)?;
        self.fed(xs, &attended)
    }

    /// The same for rows `xs` (1, rows, hidden) of several texts, see [`CausalSelfAttention::forward_packed`].
    #[track_caller]
    pub(super) fn forward_packed<'c>(
        &self,
        xs: &LazyTensor,
        at: &Positions,
        caches: impl Iterator<Item = (usize, &'c mut KvCache)>,
        adapters: &[Vec<AdaptedRows<'_>>; PROJECTIONS.len()],
    ) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let [q, k, v, o, gate, up, down] = adapters;
        let attended = self.attention.forward_packed(&self.input_norm.forward(xs)?, at, caches, [q, k, v, o])?;
        let xs = xs.add(&attended)?;
        let fed = self.mlp.forward_packed(&self.mlp_norm.forward(&xs)?, [gate, up, down])?;
        Ok(xs.add(&fed)?)
    }

    /// The same without a cache: the positions see themselves and those before them.
    ///
    /// # Errors
    /// As [`CausalSelfAttention::forward_causal`].
    #[track_caller]
    pub fn forward_causal(&self, xs: &LazyTensor, at: &Positions) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let attended = self.attention.forward_causal(&self.input_norm.forward(xs)?, at)?;
        self.fed(xs, &attended)
    }

    /// The same without a cache, where all positions see one another but for `mask` ([`CausalSelfAttention::forward_masked`]).
    ///
    /// # Errors
    /// As [`CausalSelfAttention::forward_masked`].
    #[track_caller]
    pub fn forward_masked(&self, xs: &LazyTensor, at: &Positions, mask: Option<&LazyTensor>) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let attended = self.attention.forward_masked(&self.input_norm.forward(xs)?, at, mask)?;
        self.fed(xs, &attended)
    }

    #[track_caller]
    fn fed(&self, xs: &LazyTensor, attended: &LazyTensor) -> Result<LazyTensor> {
        let xs = xs.add(attended)?;
        let fed = self.mlp.forward(&self.mlp_norm.forward(&xs)?)?;
        Ok(xs.add(&fed)?)
    }

    /// The same block on the same memory, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a weight that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        Ok(Self {
            input_norm: self.input_norm.detached()?,
            attention: self.attention.detached()?,
            mlp_norm: self.mlp_norm.detached()?,
            mlp: self.mlp.detached()?,
            path: Arc::clone(&self.path),
        })
    }
}
