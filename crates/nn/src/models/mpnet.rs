//! MPNet encoders (Song et al. 2020, arXiv:2004.09297): BERT's blocks without segments, with a bias on the attention scores that
//! depends on the distance of two tokens (Raffel et al. 2020, arXiv:1910.10683, section 2.1), the same in every block.
//!
//! Weight names are Hugging Face's: `embeddings.*`, `encoder.layer.N.*` and `encoder.relative_attention_bias`, with or without
//! `mpnet.` in front.

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
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// The id that takes no position, whatever the config's `pad_token_id` says: as in Hugging Face's implementation, positions
/// count from the next number on.
const UNPLACED: u32 = 1;

/// The distance from which on all distances share a bucket.
const MAX_DISTANCE: f32 = 128.;

/// Sizes and constants of an MPNet encoder, with the field names of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct MpnetConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of heads; divides the width.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Name of the activation.
    #[serde(default = "gelu")]
    pub hidden_act: String,
    /// Rows of the table of positions, two more than the longest text has tokens.
    pub max_position_embeddings: usize,
    /// Added to the variance in layer norms.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
    /// Kinds of distances that the attention tells apart; a multiple of 4 below 512.
    #[serde(default = "buckets")]
    pub relative_attention_num_buckets: usize,
    /// Token that fills shorter rows of a batch.
    #[serde(default = "one")]
    pub pad_token_id: u32,
    /// Name of the architecture; `mpnet` where it is given.
    #[serde(default)]
    pub model_type: Option<String>,
}

fn gelu() -> String {
    "gelu".to_string()
}
fn eps() -> f64 {
    1e-12
}
fn buckets() -> usize {
    32
}
fn one() -> u32 {
    1
}

impl MpnetConfig {
    /// From the text of `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or contradicts itself, [`Error::Unsupported`] for another architecture.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::parse(text, "config.json")
    }

    /// As [`Self::from_json`], from a file.
    ///
    /// # Errors
    /// As [`Self::from_json`], and [`Error::Io`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text, &path.display().to_string())
    }

    fn parse(text: &str, what: &str) -> Result<Self> {
        super::check_model_type(text, what, "mpnet")?;
        let config: Self = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
        config.validate(what)?;
        Ok(config)
    }

    /// Tokens of the longest text.
    pub fn max_tokens(&self) -> usize {
        self.max_position_embeddings.saturating_sub(UNPLACED as usize + 1)
    }

    /// Checks that the sizes are positive and fit each other; `what` names the config in the error.
    ///
    /// # Errors
    /// [`Error::Config`] with the first contradiction, [`Error::Unsupported`] for what is not computed.
    pub fn validate(&self, what: &str) -> Result<()> {
        if let Some(other) = self.model_type.as_deref().filter(|name| *name != "mpnet") {
            return Err(Error::Unsupported { what: "encoder", found: other.to_string(), supported: "mpnet" });
        }
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
        ];
        encoder::check_positive(what, &positive)?;
        if self.max_tokens() == 0 {
            return Err(Error::config(
                what,
                format_args!(
                    "max_position_embeddings is {}: the first two are no token's",
                    self.max_position_embeddings
                ),
            ));
        }
        encoder::check_heads(what, self.hidden_size, self.num_attention_heads)?;
        let buckets = self.relative_attention_num_buckets;
        // Half of a side's buckets are single distances, which must be fewer than the largest distance.
        if buckets < 4 || !buckets.is_multiple_of(4) || buckets / 4 >= MAX_DISTANCE as usize {
            return Err(Error::config(
                what,
                format_args!("relative_attention_num_buckets is {buckets}: expected a multiple of 4 below 512"),
            ));
        }
        encoder::check_eps(what, self.layer_norm_eps)?;
        Activation::from_name(&self.hidden_act).map(|_| ())
    }
}

/// Token and position vectors, added and normalised.
#[derive(Debug, Clone)]
struct Embeddings {
    words: Embedding,
    positions: Embedding,
    norm: LayerNorm,
    path: Arc<str>,
}

impl Embeddings {
    #[track_caller]
    fn load(config: &MpnetConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let hidden = config.hidden_size;
        Ok(Self {
            words: embedding(config.vocab_size, hidden, vb.pp("word_embeddings"))?,
            positions: embedding(config.max_position_embeddings, hidden, vb.pp("position_embeddings"))?,
            norm: layer_norm(hidden, config.layer_norm_eps, vb.pp("LayerNorm"))?,
            path: vb.prefix().into(),
        })
    }

    /// A token's position is how many tokens stand before it in its row, after those that no token has; padding has the last of these.
    #[track_caller]
    fn forward(&self, ids: &LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        // Counted in f32, exact to 2^24: an integer has no product.
        let placed = ids.ne(UNPLACED)?.to_dtype(DType::F32)?;
        let positions = placed.cumsum(1)?.mul(&placed)?.affine(1., f64::from(UNPLACED))?.to_dtype(DType::U32)?;
        let xs = self.words.forward(ids)?.add(&self.positions.forward(&positions)?)?;
        self.norm.forward(&xs)
    }
}

const ATTENTION: AttentionNames = AttentionNames {
    query: "attention.attn.q",
    key: "attention.attn.k",
    value: "attention.attn.v",
    out: "attention.attn.o",
    norm: "attention.LayerNorm",
};

/// The bucket of every distance from −(s−1) to s−1, key minus query: half of the buckets for keys on either side, half of these for
/// single distances and the others for ranges that grow by a constant factor (Raffel et al. 2020).
///
/// In f32, as the reference computes it: where a range begins depends on the rounding.
fn distance_buckets(s: usize, buckets: usize) -> Vec<u32> {
    let side = buckets / 2;
    let single = side / 2;
    let factor = (side - single) as f32 / (MAX_DISTANCE / single as f32).ln();
    let bucket = |distance: usize| {
        if distance < single {
            return distance;
        }
        let beyond = (distance as f32 / single as f32).ln() * factor;
        side.saturating_sub(1).min(single + beyond as usize)
    };
    let before = (1..s).rev().map(bucket);
    let after = (0..s).map(|distance| if distance == 0 { 0 } else { side + bucket(distance) });
    before.chain(after).filter_map(|bucket| u32::try_from(bucket).ok()).collect()
}

/// An MPNet encoder.
#[derive(Debug, Clone)]
pub struct MpnetModel {
    embeddings: Embeddings,
    layers: Vec<EncoderBlock>,
    /// (buckets, heads)
    distance_bias: Embedding,
    config: MpnetConfig,
    dtype: DType,
    device: Device,
}

impl MpnetModel {
    /// From the weights of the builder, in its dtype and on its device.
    ///
    /// # Errors
    /// [`Error::Config`] where the config contradicts itself or describes fewer blocks than the weights have,
    /// [`Error::MissingTensor`] and [`Error::TensorShape`] where it does not fit the weights.
    #[track_caller]
    pub fn load(vb: VarBuilder<'_>, config: &MpnetConfig) -> Result<Self> {
        config.validate("the encoder")?;
        let (dtype, device) = (vb.dtype(), vb.device().clone());
        if !dtype.is_float() {
            return Err(Error::float_expected("mpnet", "", "the weights", dtype));
        }
        let vb = encoder::without_prefix(vb, "mpnet");
        let sizes = BlockSizes {
            hidden: config.hidden_size,
            ffn: config.intermediate_size,
            heads: config.num_attention_heads,
            eps: config.layer_norm_eps,
            activation: Activation::from_name(&config.hidden_act)?,
        };
        let embeddings = Embeddings::load(config, vb.pp("embeddings"))?;
        let encoder = vb.pp("encoder");
        let buckets = config.relative_attention_num_buckets;
        let distance_bias = embedding(buckets, sizes.heads, encoder.pp("relative_attention_bias"))?;
        let layers = EncoderBlock::load_all(&encoder.pp("layer"), config.num_hidden_layers, sizes, &ATTENTION)?;
        Ok(Self { embeddings, layers, distance_bias, config: config.clone(), dtype, device })
    }

    /// What the model was loaded with.
    pub fn config(&self) -> &MpnetConfig {
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
    /// `attention_mask` (batch, s) holds 1 for tokens and 0 for padding, in any dtype; without it every token is seen. Id 1 takes no
    /// position, wherever it stands.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for s = 0, [`Error::PromptTooLong`] where s exceeds [`MpnetConfig::max_tokens`], [`Error::Module`]
    /// where the shapes differ.
    #[track_caller]
    pub fn forward(&self, ids: &LazyTensor, attention_mask: Option<&LazyTensor>) -> Result<LazyTensor> {
        encoder::check_ids("mpnet", ids, &[("attention_mask", attention_mask)])?;
        encoder::check_length(ids, self.config.max_tokens())?;
        let mut bias = self.scores_bias(ids)?;
        if let Some(mask) = attention_mask {
            bias = bias.broadcast_add(&encoder::additive_mask(mask, self.dtype)?)?;
        }
        let mut xs = self.embeddings.forward(ids)?;
        for layer in &self.layers {
            xs = layer.forward(&xs, Some(&bias))?;
        }
        Ok(xs)
    }

    /// What distances add to the scores: (1, heads, s, s).
    #[track_caller]
    fn scores_bias(&self, ids: &LazyTensor) -> Result<LazyTensor> {
        let (_, s) = ids.dims2()?;
        let by_distance = distance_buckets(s, self.config.relative_attention_num_buckets);
        // Row q of the matrix is the stretch of `by_distance` that ends s − q places before its end.
        let buckets: Vec<u32> = by_distance.windows(s).rev().flatten().copied().collect();
        let buckets = LazyTensor::from_vec(buckets, (s, s), &self.device)?;
        Ok(self.distance_bias.forward(&buckets)?.permute((2, 0, 1))?.unsqueeze(0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::distance_buckets;

    /// Bucket of a distance with 32 buckets, by hand: 8 single distances, then ranges that begin at 8·16^(i/8).
    #[test]
    fn buckets_are_single_distances_then_growing_ranges() {
        let s = 200;
        let buckets = distance_buckets(s, 32);
        assert_eq!(buckets.len(), 2 * s - 1);
        // 8·2^(i/2) for i = 0…7: 8, 11.3, 16, 22.6, 32, 45.3, 64, 90.5
        for (distance, bucket) in [
            (0, 0),
            (1, 1),
            (7, 7),
            (8, 8),
            (11, 8),
            (12, 9),
            (16, 10),
            (23, 11),
            (33, 12),
            (46, 13),
            (65, 14),
            (91, 15),
            (199, 15),
        ] {
            assert_eq!(buckets.get(s - 1 - distance), Some(&bucket), "a key {distance} before");
            let after = if distance == 0 { 0 } else { bucket + 16 };
            assert_eq!(buckets.get(s - 1 + distance), Some(&after), "a key {distance} after");
        }
    }
}
