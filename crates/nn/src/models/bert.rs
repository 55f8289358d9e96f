//! BERT encoders (Devlin et al. 2018, arXiv:1810.04805) and sentence encoders on top of them.
//!
//! Weight names are Hugging Face's: `embeddings.*` and `encoder.layer.N.*`, with or without `bert.` in front;
//! layer norms may call their tensors `gamma` and `beta`.

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
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// Sizes and constants of a BERT encoder, with the field names of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BertConfig {
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
    /// Number of positions.
    pub max_position_embeddings: usize,
    /// Number of segment types.
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    /// Added to the variance in layer norms.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
    /// Token that fills shorter rows of a batch.
    #[serde(default)]
    pub pad_token_id: u32,
    /// Kind of positions; only `absolute` is computed.
    #[serde(default = "absolute")]
    pub position_embedding_type: String,
    /// Name of the architecture; `bert` where it is given.
    #[serde(default)]
    pub model_type: Option<String>,
    /// Whether a token sees only those before it; not computed.
    #[serde(default)]
    pub is_decoder: bool,
}

fn gelu() -> String {
    "gelu".to_string()
}
fn absolute() -> String {
    "absolute".to_string()
}
fn two() -> usize {
    2
}
fn eps() -> f64 {
    1e-12
}

#[derive(Deserialize)]
struct Architecture {
    model_type: Option<String>,
}

impl BertConfig {
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
        // looked at first: the rest of another architecture's config need not be what ours is
        let first: Architecture = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
        if let Some(other) = first.model_type.filter(|name| name != "bert") {
            return Err(Error::Unsupported { what: "encoder", found: other, supported: "bert" });
        }
        let config: Self = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
        config.validate(what)?;
        Ok(config)
    }

    /// Checks that the sizes are positive and fit each other; `what` names the config in the error.
    ///
    /// # Errors
    /// [`Error::Config`] with the first contradiction, [`Error::Unsupported`] for what is not computed.
    pub fn validate(&self, what: &str) -> Result<()> {
        if let Some(other) = self.model_type.as_deref().filter(|name| *name != "bert") {
            return Err(Error::Unsupported { what: "encoder", found: other.to_string(), supported: "bert" });
        }
        if self.is_decoder {
            return Err(Error::Unsupported {
                what: "is_decoder of a BERT",
                found: "true".to_string(),
                supported: "false: every token sees every other",
            });
        }
        if self.position_embedding_type != "absolute" {
            return Err(Error::Unsupported {
                what: "position embedding",
                found: self.position_embedding_type.clone(),
                supported: "absolute",
            });
        }
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(Error::config(what, format_args!("{name} is 0")));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(Error::config(
                what,
                format_args!(
                    "hidden_size {} is no multiple of num_attention_heads {}",
                    self.hidden_size, self.num_attention_heads
                ),
            ));
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps >= 0.) {
            return Err(Error::config(what, format_args!("layer_norm_eps is {}", self.layer_norm_eps)));
        }
        Activation::from_name(&self.hidden_act).map(|_| ())
    }
}

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
        let one_more = |index: usize| stack.pp(index).pp("output").pp("dense").contains_tensor("weight");
        if one_more(config.num_hidden_layers) && !one_more(usize::MAX) {
            return Err(Error::config(
                "the encoder",
                format_args!(
                    "num_hidden_layers is {}, the weights have `encoder.layer.{}` and more",
                    config.num_hidden_layers, config.num_hidden_layers
                ),
            ));
        }
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
        let &[_, s] = ids.dims() else {
            return Err(Error::module(
                "bert",
                "",
                format_args!("ids must have shape (batch, length), found {:?}", ids.shape()),
            ));
        };
        if s == 0 {
            return Err(Error::empty_prompt());
        }
        if s > self.config.max_position_embeddings {
            return Err(Error::prompt_too_long(s, self.config.max_position_embeddings));
        }
        for (name, other) in [("token_type_ids", Some(token_type_ids)), ("attention_mask", attention_mask)] {
            if let Some(other) = other.filter(|other| other.dims() != ids.dims()) {
                return Err(Error::module(
                    "bert",
                    "",
                    format_args!("ids have shape {:?}, {name} {:?}", ids.shape(), other.shape()),
                ));
            }
        }
        let mask = match attention_mask {
            Some(mask) => Some(self.additive_mask(mask)?),
            None => None,
        };
        let mut xs = self.embeddings.forward(ids, token_type_ids)?;
        for layer in &self.layers {
            xs = layer.forward(&xs, mask.as_ref())?;
        }
        Ok(xs)
    }

    /// 0 where the mask is 1, the dtype's smallest number where it is 0, broadcastable over heads and queries.
    #[track_caller]
    fn additive_mask(&self, mask: &LazyTensor) -> Result<LazyTensor> {
        let large = match self.dtype {
            DType::F16 => 65504.,
            // bf16's largest number is below f32's and would round to infinity, which times 0 is no number.
            DType::BF16 => 3.38e38,
            _ => f32::MAX as f64,
        };
        let mask = if mask.dtype() == self.dtype { mask.clone() } else { mask.to_dtype(self.dtype)? };
        Ok(mask.affine(large, -large)?.unsqueeze(1)?.unsqueeze(1)?)
    }
}

/// A BERT encoder whose token vectors are averaged into one vector of length 1 per text (Reimers and Gurevych 2019,
/// arXiv:1908.10084).
#[derive(Debug, Clone)]
pub struct SentenceEncoder {
    model: BertModel,
    normalize: bool,
}

impl SentenceEncoder {
    /// Mean pooling, then division by the Euclidean norm.
    pub fn new(model: BertModel) -> Self {
        Self { model, normalize: true }
    }

    /// From the weights of the builder; see [`BertModel::load`].
    ///
    /// # Errors
    /// As [`BertModel::load`].
    #[track_caller]
    pub fn load(vb: VarBuilder<'_>, config: &BertConfig) -> Result<Self> {
        Ok(Self::new(BertModel::load(vb, config)?))
    }

    /// Whether vectors are divided by their Euclidean norm (they are, unless this says otherwise).
    pub fn normalize(mut self, normalize: bool) -> Self {
        self.normalize = normalize;
        self
    }

    /// The encoder below the pooling.
    pub fn model(&self) -> &BertModel {
        &self.model
    }

    /// One vector per text: (texts, hidden), recorded as one batch, shorter texts padded to the longest.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] where there is no text or one has no token, [`Error::PromptTooLong`],
    /// [`Error::TokenOutOfRange`].
    #[track_caller]
    pub fn embed<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<LazyTensor> {
        let config = &self.model.config;
        let mut longest = 0;
        for text in texts {
            let ids = text.as_ref();
            if ids.is_empty() {
                return Err(Error::empty_prompt());
            }
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
                return Err(Error::token_out_of_range(id, config.vocab_size));
            }
            longest = longest.max(ids.len());
        }
        if longest == 0 {
            return Err(Error::empty_prompt());
        }
        if longest > config.max_position_embeddings {
            return Err(Error::prompt_too_long(longest, config.max_position_embeddings));
        }
        let rows = texts.len();
        let mut ids = Vec::with_capacity(rows * longest);
        let mut mask = Vec::with_capacity(rows * longest);
        for text in texts {
            let text = text.as_ref();
            ids.extend_from_slice(text);
            ids.extend(std::iter::repeat_n(config.pad_token_id, longest - text.len()));
            mask.extend(std::iter::repeat_n(1f32, text.len()));
            mask.extend(std::iter::repeat_n(0f32, longest - text.len()));
        }
        let padded = mask.contains(&0.);
        let device = &self.model.device;
        let ids = LazyTensor::from_vec(ids, (rows, longest), device)?;
        let segments = LazyTensor::zeros((rows, longest), DType::U32, device)?;
        let mask = LazyTensor::from_vec(mask, (rows, longest), device)?;
        let mask = if self.model.dtype == DType::F32 { mask } else { mask.to_dtype(self.model.dtype)? };
        let hidden = self.model.forward(&ids, &segments, padded.then_some(&mask))?;
        self.pool(&hidden, &mask)
    }

    /// The mean of the rows of `hidden` (batch, s, hidden) where `mask` (batch, s) is 1, of length 1.
    #[track_caller]
    fn pool(&self, hidden: &LazyTensor, mask: &LazyTensor) -> Result<LazyTensor> {
        let kept = hidden.broadcast_mul(&mask.unsqueeze(2)?)?.sum(1)?;
        let mean = kept.broadcast_div(&mask.sum_keepdim(1)?)?;
        if !self.normalize {
            return Ok(mean);
        }
        let norm = mean.sqr()?.sum_keepdim(1)?.sqrt()?;
        // The floor that PyTorch's `normalize` has: a zero vector stays zero instead of becoming NaN.
        let floor = LazyTensor::filled(1e-12, norm.shape().clone(), norm.dtype(), norm.device())?;
        Ok(mean.broadcast_div(&norm.maximum(&floor)?)?)
    }

    /// The vectors of any number of texts, `batch` of them per evaluation, in the order of the texts.
    ///
    /// Texts of similar length share a batch, so that little is computed for padding. A `batch` of 0 counts as 1.
    ///
    /// # Errors
    /// As [`SentenceEncoder::embed`], and [`Error::NonFinite`] for a vector with a NaN or an infinity in it.
    #[track_caller]
    pub fn embed_batched<T: AsRef<[u32]>>(&self, texts: &[T], batch: usize) -> Result<Vec<Vec<f32>>> {
        let mut by_length: Vec<(usize, &[u32])> = texts.iter().map(AsRef::as_ref).enumerate().collect();
        by_length.sort_by_key(|(_, ids)| ids.len());
        let mut vectors = vec![Vec::new(); texts.len()];
        for piece in by_length.chunks(batch.max(1)) {
            let ids: Vec<&[u32]> = piece.iter().map(|(_, ids)| *ids).collect();
            let embedded = self.embed(&ids)?;
            let embedded = if embedded.dtype() == DType::F32 { embedded } else { embedded.to_dtype(DType::F32)? };
            for (row, (index, _)) in embedded.to_vec2::<f32>()?.into_iter().zip(piece) {
                if row.iter().any(|value| !value.is_finite()) {
                    // Recorded once more: what was evaluated has forgotten how it came about.
                    let first = self.embed(&ids)?.first_nonfinite()?.map(Box::new);
                    return Err(Error::NonFinite { text: *index, first });
                }
                if let Some(slot) = vectors.get_mut(*index) {
                    *slot = row;
                }
            }
        }
        Ok(vectors)
    }
}
