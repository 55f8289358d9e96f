//! BERT encoders (Devlin et al. 2018, arXiv:1810.04805).
//!
//! Weight names are Hugging Face's: `embeddings.*` and `encoder.layer.N.*`, with or without `bert.` in front;
//! layer norms may call their tensors `gamma` and `beta`.

mod config;

pub use config::BertConfig;

use super::encoder;
use crate::activation::Activation;
use crate::embedding::{embedding, Embedding};
use crate::error::{Error, Result};
use crate::linear::{linear, Linear};
use crate::mlp::FeedForward;
use crate::module::Module;
use crate::norm::{layer_norm, LayerNorm};
use crate::scope;
use candle_core::{DType, Device};
use candle_lazy_exec::{AttentionOptions, LazyTensor};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// Token, position and segment vectors, added and normalised.
#[derive(Debug, Clone)]
struct Embeddings {
    words: Embedding,
    positions: Embedding,
    segments: Embedding,
    norm: LayerNorm,
    path: Arc<str>,
}

impl Embeddings {
    #[track_caller]
    fn load(config: &BertConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let hidden = config.hidden_size;
        Ok(Self {
            words: embedding(config.vocab_size, hidden, vb.pp("word_embeddings"))?,
            positions: embedding(config.max_position_embeddings, hidden, vb.pp("position_embeddings"))?,
            segments: embedding(config.type_vocab_size, hidden, vb.pp("token_type_embeddings"))?,
            norm: layer_norm(hidden, config.layer_norm_eps, vb.pp("LayerNorm"))?,
            path: vb.prefix().into(),
        })
    }

    #[track_caller]
    fn forward(&self, ids: &LazyTensor, segments: &LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let (_, s) = ids.dims2()?;
        let xs = self.words.forward(ids)?.add(&self.segments.forward(segments)?)?;
        // Positions count from 0 in every row, so the table's first rows are what an index would pick.
        let positions = self.positions.embeddings().narrow(0, 0, s)?;
        self.norm.forward(&xs.broadcast_add(&positions)?)
    }
}

/// One block: attention, then a feed-forward block, each added to its input and normalised.
#[derive(Debug, Clone)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_out: Linear,
    attention_norm: LayerNorm,
    feed_forward: FeedForward,
    norm: LayerNorm,
    heads: usize,
    path: Arc<str>,
}

impl Layer {
    #[track_caller]
    fn load(config: &BertConfig, activation: Activation, vb: VarBuilder<'_>) -> Result<Self> {
        let (hidden, ffn, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let attention = vb.pp("attention");
        let own = attention.pp("self");
        let up = linear(hidden, ffn, vb.pp("intermediate").pp("dense"))?;
        let down = linear(ffn, hidden, vb.pp("output").pp("dense"))?;
        Ok(Self {
            query: linear(hidden, hidden, own.pp("query"))?,
            key: linear(hidden, hidden, own.pp("key"))?,
            value: linear(hidden, hidden, own.pp("value"))?,
            attention_out: linear(hidden, hidden, attention.pp("output").pp("dense"))?,
            attention_norm: layer_norm(hidden, eps, attention.pp("output").pp("LayerNorm"))?,
            feed_forward: FeedForward::new(up, activation, down),
            norm: layer_norm(hidden, eps, vb.pp("output").pp("LayerNorm"))?,
            heads: config.num_attention_heads,
            path: vb.prefix().into(),
        })
    }

    #[track_caller]
    fn forward(&self, xs: &LazyTensor, mask: Option<&LazyTensor>) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let (b, s, hidden) = xs.dims3()?;
        let head_dim = hidden.checked_div(self.heads).unwrap_or(hidden);
        let split = (b, s, self.heads, head_dim);
        let q = self.query.forward(xs)?.reshape(split)?.transpose(1, 2)?;
        let k = self.key.forward(xs)?.reshape(split)?.transpose(1, 2)?;
        let v = self.value.forward(xs)?.reshape(split)?.transpose(1, 2)?;
        let options =
            AttentionOptions { scale: 1. / (head_dim as f64).sqrt(), causal: false, softcap: None, window: None };
        let y = LazyTensor::attention(&q, &k, &v, mask, &options)?;
        let y = y.transpose(1, 2)?.reshape((b, s, hidden))?;
        let xs = self.attention_norm.forward(&self.attention_out.forward(&y)?.add(xs)?)?;
        self.norm.forward(&self.feed_forward.forward(&xs)?.add(&xs)?)
    }
}

/// A BERT encoder.
#[derive(Debug, Clone)]
pub struct BertModel {
    embeddings: Embeddings,
    layers: Vec<Layer>,
    config: BertConfig,
    dtype: DType,
    device: Device,
}

impl BertModel {
    /// From the weights of the builder, in its dtype and on its device.
    ///
    /// # Errors
    /// [`Error::Config`] where the config contradicts itself or describes fewer blocks than the weights have,
    /// [`Error::MissingTensor`] and [`Error::TensorShape`] where it does not fit the weights.
    #[track_caller]
    pub fn load(vb: VarBuilder<'_>, config: &BertConfig) -> Result<Self> {
        config.validate("the encoder")?;
        let (dtype, device) = (vb.dtype(), vb.device().clone());
        if !dtype.is_float() {
            return Err(Error::float_expected("bert", "", "the weights", dtype));
        }
        let has_words = |vb: &VarBuilder<'_>| vb.contains_tensor("embeddings.word_embeddings.weight");
        let vb = if !has_words(&vb) && has_words(&vb.pp("bert")) { vb.pp("bert") } else { vb };
        let activation = Activation::from_name(&config.hidden_act)?;
        let embeddings = Embeddings::load(config, vb.pp("embeddings"))?;
        let stack = vb.pp("encoder").pp("layer");
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(Layer::load(config, activation, stack.pp(index))?);
        }
        encoder::check_layers(&stack, config.num_hidden_layers)?;
        Ok(Self { embeddings, layers, config: config.clone(), dtype, device })
    }

    /// What the model was loaded with.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The dtype of the weights and of the result.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The hidden states (batch, s, hidden) of `ids` (batch, s).
    ///
    /// `token_type_ids` (batch, s) says which segment a token belongs to, all zeros for one text. `attention_mask`
    /// (batch, s) holds 1 for tokens and 0 for padding, in any dtype; without it every token is seen.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for s = 0, [`Error::PromptTooLong`] where s exceeds the positions, [`Error::Module`] where
    /// the three shapes differ.
    #[track_caller]
    pub fn forward(
        &self,
        ids: &LazyTensor,
        token_type_ids: &LazyTensor,
        attention_mask: Option<&LazyTensor>,
    ) -> Result<LazyTensor> {
        encoder::check_ids(
            "bert",
            ids,
            &[("token_type_ids", Some(token_type_ids)), ("attention_mask", attention_mask)],
        )?;
        encoder::check_length(ids, self.config.max_position_embeddings)?;
        let mask = match attention_mask {
            Some(mask) => Some(encoder::additive_mask(mask, self.dtype)?),
            None => None,
        };
        let mut xs = self.embeddings.forward(ids, token_type_ids)?;
        for layer in &self.layers {
            xs = layer.forward(&xs, mask.as_ref())?;
        }
        Ok(xs)
    }
}
