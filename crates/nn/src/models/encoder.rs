//! An encoder of either kind, and what the kinds have in common.

use super::bert::BertModel;
use super::mpnet::MpnetModel;
use crate::error::{Error, Result};
use candle_core::{DType, Device};
use candle_lazy_exec::LazyTensor;
use candle_nn::VarBuilder;

/// A model that gives every token of a text a vector.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Encoder {
    /// BERT, and what has its architecture (MiniLM, E5).
    Bert(BertModel),
    /// MPNet.
    Mpnet(MpnetModel),
}

impl From<BertModel> for Encoder {
    fn from(model: BertModel) -> Self {
        Self::Bert(model)
    }
}

impl From<MpnetModel> for Encoder {
    fn from(model: MpnetModel) -> Self {
        Self::Mpnet(model)
    }
}

impl Encoder {
    /// Number of tokens that have a vector of their own; ids are below it.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Bert(model) => model.config().vocab_size,
            Self::Mpnet(model) => model.config().vocab_size,
        }
    }

    /// Width of a token's vector.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Bert(model) => model.config().hidden_size,
            Self::Mpnet(model) => model.config().hidden_size,
        }
    }

    /// Tokens of the longest text.
    pub fn max_tokens(&self) -> usize {
        match self {
            Self::Bert(model) => model.config().max_position_embeddings,
            Self::Mpnet(model) => model.config().max_tokens(),
        }
    }

    /// The token that fills shorter rows of a batch.
    pub fn pad_token_id(&self) -> u32 {
        match self {
            Self::Bert(model) => model.config().pad_token_id,
            Self::Mpnet(model) => model.config().pad_token_id,
        }
    }

    /// The device of the weights.
    pub fn device(&self) -> &Device {
        match self {
            Self::Bert(model) => model.device(),
            Self::Mpnet(model) => model.device(),
        }
    }

    /// The dtype of the weights and of the result.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Bert(model) => model.dtype(),
            Self::Mpnet(model) => model.dtype(),
        }
    }

    /// The hidden states (batch, s, hidden) of `ids` (batch, s), each row one text (segment 0 for BERT).
    ///
    /// `attention_mask` (batch, s) holds 1 for tokens and 0 for padding, in any dtype; without it every token is seen.
    ///
    /// # Errors
    /// As [`BertModel::forward`] and [`MpnetModel::forward`].
    #[track_caller]
    pub fn forward(&self, ids: &LazyTensor, attention_mask: Option<&LazyTensor>) -> Result<LazyTensor> {
        match self {
            Self::Bert(model) => {
                let segments = LazyTensor::zeros(ids.shape().clone(), DType::U32, ids.device())?;
                model.forward(ids, &segments, attention_mask)
            }
            Self::Mpnet(model) => model.forward(ids, attention_mask),
        }
    }
}

/// Refuses ids that are no (batch, s) with s > 0, and companions of another shape.
#[track_caller]
pub(super) fn check_ids(
    module: &'static str,
    ids: &LazyTensor,
    companions: &[(&str, Option<&LazyTensor>)],
) -> Result<()> {
    let &[_, s] = ids.dims() else {
        return Err(Error::module(
            module,
            "",
            format_args!("ids must have shape (batch, length), found {:?}", ids.shape()),
        ));
    };
    if s == 0 {
        return Err(Error::empty_prompt());
    }
    for (name, other) in companions {
        if let Some(other) = other.filter(|other| other.dims() != ids.dims()) {
            return Err(Error::module(
                module,
                "",
                format_args!("ids have shape {:?}, {name} {:?}", ids.shape(), other.shape()),
            ));
        }
    }
    Ok(())
}

/// Refuses ids (batch, s) that are longer than `most`.
#[track_caller]
pub(super) fn check_length(ids: &LazyTensor, most: usize) -> Result<()> {
    let (_, s) = ids.dims2()?;
    if s > most {
        return Err(Error::prompt_too_long(s, most));
    }
    Ok(())
}

/// Refuses weights that have more blocks than the config says.
pub(super) fn check_layers(stack: &VarBuilder<'_>, layers: usize) -> Result<()> {
    let has = |index: usize| stack.pp(index).pp("output").pp("dense").contains_tensor("weight");
    // A builder that makes what is missing has any block.
    if has(layers) && !has(usize::MAX) {
        return Err(Error::config(
            "the encoder",
            format_args!("num_hidden_layers is {layers}, the weights have `encoder.layer.{layers}` and more"),
        ));
    }
    Ok(())
}

/// 0 where the mask (batch, s) is 1, the dtype's smallest number where it is 0: (batch, 1, 1, s), broadcastable over heads and
/// queries.
#[track_caller]
pub(super) fn additive_mask(mask: &LazyTensor, dtype: DType) -> Result<LazyTensor> {
    let large = match dtype {
        DType::F16 => 65504.,
        // bf16's largest number is below f32's and would round to infinity, which times 0 is no number.
        DType::BF16 => 3.38e38,
        _ => f32::MAX as f64,
    };
    let mask = if mask.dtype() == dtype { mask.clone() } else { mask.to_dtype(dtype)? };
    Ok(mask.affine(large, -large)?.unsqueeze(1)?.unsqueeze(1)?)
}

/// The builder below `prefix`, where the weights have their names behind it and not at once.
pub(super) fn without_prefix<'a>(vb: VarBuilder<'a>, prefix: &str) -> VarBuilder<'a> {
    let has_words = |vb: &VarBuilder<'_>| vb.contains_tensor("embeddings.word_embeddings.weight");
    if !has_words(&vb) && has_words(&vb.pp(prefix)) {
        vb.pp(prefix)
    } else {
        vb
    }
}

/// Refuses a size of 0.
pub(super) fn check_positive(what: &str, sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, value)| *value == 0) {
        Some((name, _)) => Err(Error::config(what, format_args!("{name} is 0"))),
        None => Ok(()),
    }
}

/// Refuses a width that the heads do not share evenly.
pub(super) fn check_heads(what: &str, hidden: usize, heads: usize) -> Result<()> {
    if hidden.is_multiple_of(heads) {
        return Ok(());
    }
    Err(Error::config(what, format_args!("hidden_size {hidden} is no multiple of num_attention_heads {heads}")))
}

/// Refuses an epsilon of layer norms that is negative or no number.
pub(super) fn check_eps(what: &str, eps: f64) -> Result<()> {
    if eps.is_finite() && eps >= 0. {
        return Ok(());
    }
    Err(Error::config(what, format_args!("layer_norm_eps is {eps}")))
}
