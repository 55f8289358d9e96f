//! BERT encoders (Devlin et al. 2018, arXiv:1810.04805).
//!
//! Weight names are Hugging Face's: `embeddings.*` and `encoder.layer.N.*`, with or without `bert.` in front;
//! layer norms may call their tensors `gamma` and `beta`.

mod config;

pub use config::BertConfig;

use super::encoder;
use super::encoder_block::{AttentionNames, BlockSizes, EncoderBlock};
use crate::activation::Activation;
use crate::embedding::{embedding, Embedding};
use crate::error::{Error, Result};
use crate::module::Module;
use crate::norm::{layer_norm, LayerNorm};
use crate::scope;
use candle_core::{DType, Device};
use candle_lazy_exec::LazyTensor;
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

const ATTENTION: AttentionNames = AttentionNames {
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    out: "attention.output.dense",
    norm: "attention.output.LayerNorm",
};

/// A BERT encoder.
#[derive(Debug, Clone)]
pub struct BertModel {
    embeddings: Embeddings,
    layers: Vec<EncoderBlock>,
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
        let vb = encoder::without_prefix(vb, "bert");
        let sizes = BlockSizes {
            hidden: config.hidden_size,
            ffn: config.intermediate_size,
            heads: config.num_attention_heads,
            eps: config.layer_norm_eps,
            activation: Activation::from_name(&config.hidden_act)?,
        };
        let embeddings = Embeddings::load(config, vb.pp("embeddings"))?;
        let stack = vb.pp("encoder").pp("layer");
        let layers = EncoderBlock::load_all(&stack, config.num_hidden_layers, sizes, &ATTENTION)?;
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
