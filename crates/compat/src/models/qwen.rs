//! The Qwen2 decoder.

use super::adaptation::adapted;
use super::session::QwenSession;
use super::transformer::{additive, RotaryEmbedding};
use super::{DecodingSession, LanguageModel, ModelConfig};
use crate::error::{Result, TrainingError};
use crate::training::{ApplyAdapter, LoRAAdapter};
use candle_core::{Device, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::models::{CausalLmConfig, DecoderBlock};
use candle_lazy_nn::{
    embedding, linear_no_bias, rms_norm, Embedding, Linear, Module, RmsNorm, RopeScaling, VarBuilder,
};
use std::borrow::Cow;
use std::sync::Arc;

/// The sizes of a block in the words of the engine's models: q, k and v with biases, the rest without.
fn block_config(config: &ModelConfig) -> CausalLmConfig {
    CausalLmConfig {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_kv_heads(),
        head_dim: config.head_dim(),
        max_position_embeddings: config.max_position_embeddings,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta as f32,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        qkv_bias: true,
        out_bias: false,
        mlp_bias: false,
        sliding_window: None,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

fn rotary(config: &ModelConfig, device: &Device) -> Result<RotaryEmbedding> {
    RotaryEmbedding::new(config.head_dim(), config.max_position_embeddings, config.rope_theta, device)
}

/// One layer: attention and feed-forward block, each behind an RMS norm and added to the residual stream.
#[derive(Debug)]
pub struct QwenDecoderLayer {
    block: DecoderBlock,
    rope: RotaryEmbedding,
    index: usize,
}

impl QwenDecoderLayer {
    /// From `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp` of the builder. `layer_idx` says which layers of an
    /// adapter belong to it.
    ///
    /// # Errors
    /// [`crate::error::ModelError::InvalidConfig`] where the sizes do not fit together, Candle's error where a tensor is missing or has
    /// another shape.
    #[track_caller]
    pub fn new(config: &ModelConfig, layer_idx: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        Self::with_rope(config, layer_idx, vb, &rotary(config, vb.device())?)
    }

    #[track_caller]
    fn with_rope(config: &ModelConfig, index: usize, vb: &VarBuilder<'_>, rope: &RotaryEmbedding) -> Result<Self> {
        Ok(Self { block: DecoderBlock::load(&block_config(config), vb.clone())?, rope: rope.clone(), index })
    }

    /// The residual stream `x` (batch, s, hidden) after the layer, with what `lora_adapter` has for it: each of its layers acts on what its
    /// projection is given.
    ///
    /// # Errors
    /// As [`super::transformer::Attention::forward`], and [`TrainingError::InvalidConfig`] where the adapter does not fit.
    #[track_caller]
    pub fn forward(
        &self,
        x: &Tensor,
        attention_mask: Option<&Tensor>,
        lora_adapter: Option<&LoRAAdapter>,
    ) -> Result<Tensor> {
        let mask = additive(attention_mask, x.dtype())?;
        Ok(self.record(&LazyTensor::from(x), mask.as_ref(), lora_adapter)?.eval()?)
    }

    #[track_caller]
    fn record(&self, xs: &LazyTensor, mask: Option<&LazyTensor>, adapter: Option<&LoRAAdapter>) -> Result<LazyTensor> {
        let (_, s, _) = xs.dims3()?;
        let at = self.rope.positions(0, s, xs.dtype())?;
        Ok(self.adapted(adapter)?.forward_masked(xs, &at, mask)?)
    }

    /// The block with an adapter on it, where there is one.
    #[track_caller]
    fn adapted(&self, adapter: Option<&LoRAAdapter>) -> Result<Cow<'_, DecoderBlock>> {
        match adapter {
            Some(adapter) => Ok(Cow::Owned(adapted(&self.block, self.index, adapter)?)),
            None => Ok(Cow::Borrowed(&self.block)),
        }
    }
}

/// The decoder: token embedding, layers, norm, and an output projection of its own.
///
/// A forward pass is one graph, recorded and evaluated at once. Weights that are variables, and those of an adapter, get their gradients.
#[derive(Debug)]
pub struct Qwen {
    embed_tokens: Embedding,
    layers: Vec<QwenDecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
    rope: RotaryEmbedding,
    config: ModelConfig,
    device: Device,
    adapter: Option<Arc<LoRAAdapter>>,
}

impl Qwen {
    /// From the weights of the builder, by the names that Hugging Face gives them: `model.embed_tokens`, `model.layers.{i}`, `model.norm`
    /// and `lm_head`, which must be there (embeddings are not tied).
    ///
    /// # Errors
    /// [`crate::error::ModelError::InvalidConfig`] where the sizes do not fit together, Candle's error where a tensor is missing or has
    /// another shape.
    #[track_caller]
    pub fn new(config: &ModelConfig, vb: VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        let model = vb.pp("model");
        let rope = rotary(config, vb.device())?;
        let embed_tokens = embedding(config.vocab_size, config.hidden_size, model.pp("embed_tokens"))?;
        let stack = model.pp("layers");
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(QwenDecoderLayer::with_rope(config, index, &stack.pp(index), &rope)?);
        }
        let norm = rms_norm(config.hidden_size, config.rms_norm_eps, model.pp("norm"))?;
        let lm_head = linear_no_bias(config.hidden_size, config.vocab_size, vb.pp("lm_head"))?;
        let (config, device) = (config.clone(), vb.device().clone());
        Ok(Self { embed_tokens, layers, norm, lm_head, rope, config, device, adapter: None })
    }

    /// Logits (batch, s, vocab) of the ids (batch, s; u32).
    ///
    /// The mask is added to the scores, (batch, heads, s, s) by broadcasting. Without one every position sees every other: `None` is
    /// not causal.
    ///
    /// # Errors
    /// Where the ids or the mask have another shape, an id is no token, or there are more positions than `max_position_embeddings`.
    #[track_caller]
    pub fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        let mut xs = self.embed_tokens.forward(&LazyTensor::from(input_ids))?;
        let mask = additive(attention_mask, xs.dtype())?;
        for layer in &self.layers {
            xs = layer.record(&xs, mask.as_ref(), self.adapter.as_deref())?;
        }
        Ok(self.lm_head.forward(&self.norm.forward(&xs)?)?.eval()?)
    }

    /// Number of layers.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// v1's estimate: both vocabulary matrices and the last norm exactly, and 1,000,000 for each layer whatever its size.
    /// [`Qwen::parameter_count`] counts.
    #[must_use]
    #[cfg_attr(not(feature = "silence-deprecated"), deprecated(note = "an estimate: `parameter_count` counts"))]
    pub fn num_parameters(&self) -> usize {
        self.outside_of_layers().saturating_add(self.layers.len().saturating_mul(1_000_000))
    }

    /// Number of weights of the model, adapters not included.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let (hidden, ffn) = (self.config.hidden_size, self.config.intermediate_size);
        let kv = self.config.num_kv_heads() * self.config.head_dim();
        let attention = 2 * hidden * hidden + hidden + 2 * (hidden * kv + kv);
        let layer = attention + 3 * hidden * ffn + 2 * hidden;
        self.outside_of_layers() + self.layers.len() * layer
    }

    /// Weights of the vocabulary matrices and the last norm.
    fn outside_of_layers(&self) -> usize {
        2 * self.config.vocab_size * self.config.hidden_size + self.config.hidden_size
    }
}

impl LanguageModel for Qwen {
    #[track_caller]
    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        Self::forward(self, input_ids, attention_mask)
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// A session with a key/value cache that grows with the text. It computes without gradients, and without an adapter's dropout.
    fn decoding_session(&self) -> Result<Option<Box<dyn DecodingSession + '_>>> {
        let mut blocks = Vec::new();
        for layer in &self.layers {
            blocks.push(layer.adapted(self.adapter.as_deref())?.detached()?);
        }
        let parts = (self.embed_tokens.detached()?, self.norm.detached()?, self.lm_head.detached()?);
        Ok(Some(Box::new(QwenSession::new(blocks, parts, self.rope.clone(), self.device.clone()))))
    }
}

impl ApplyAdapter for Qwen {
    /// Puts `adapter` on the model: its layers for q, k, v, o, gate, up and down all act. The variables are shared, so what is trained or
    /// loaded into them later is seen. Keys and values that [`LoRAAdapter::new`] made wider than those of a model with grouped heads
    /// count with their first columns; [`LoRAAdapter::for_model`] makes them as wide as they are.
    ///
    /// # Errors
    /// [`TrainingError::InvalidConfig`] where the number of layers, a shape or the dtype differ; the model keeps what it had.
    fn apply_adapter(&mut self, adapter: Arc<LoRAAdapter>) -> Result<()> {
        if adapter.num_layers() != self.layers.len() {
            let (has, wanted) = (adapter.num_layers(), self.layers.len());
            let reason = format!("the adapter has {has} layers, the model has {wanted}");
            return Err(TrainingError::InvalidConfig { reason }.into());
        }
        for layer in &self.layers {
            layer.adapted(Some(&adapter))?;
        }
        self.adapter = Some(adapter);
        Ok(())
    }

    fn remove_adapter(&mut self) -> Result<()> {
        self.adapter = None;
        Ok(())
    }

    fn has_adapter(&self) -> bool {
        self.adapter.is_some()
    }
}
