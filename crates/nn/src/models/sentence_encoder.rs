//! Sentence encoders: one vector per text.

use super::bert::{BertConfig, BertModel};
use super::encoder::Encoder;
use crate::error::{Error, Result};
use crate::pooling;
use candle_core::DType;
use candle_lazy_exec::LazyTensor;
use candle_nn::VarBuilder;

/// An encoder whose token vectors are averaged into one vector of length 1 per text (Reimers and Gurevych 2019,
/// arXiv:1908.10084).
#[derive(Debug, Clone)]
pub struct SentenceEncoder {
    model: Encoder,
    normalize: bool,
}

impl SentenceEncoder {
    /// Mean pooling, then division by the Euclidean norm.
    pub fn new(model: impl Into<Encoder>) -> Self {
        Self { model: model.into(), normalize: true }
    }

    /// A BERT from the weights of the builder; see [`BertModel::load`].
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
    pub fn model(&self) -> &Encoder {
        &self.model
    }

    /// One vector per text: (texts, hidden), recorded as one batch, shorter texts padded to the longest.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] where there is no text or one has no token, [`Error::PromptTooLong`],
    /// [`Error::TokenOutOfRange`].
    #[track_caller]
    pub fn embed<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<LazyTensor> {
        let (vocab, most) = (self.model.vocab_size(), self.model.max_tokens());
        let mut longest = 0;
        for text in texts {
            let ids = text.as_ref();
            if ids.is_empty() {
                return Err(Error::empty_prompt());
            }
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
                return Err(Error::token_out_of_range(id, vocab));
            }
            longest = longest.max(ids.len());
        }
        if longest == 0 {
            return Err(Error::empty_prompt());
        }
        if longest > most {
            return Err(Error::prompt_too_long(longest, most));
        }
        let rows = texts.len();
        let mut ids = Vec::with_capacity(rows * longest);
        let mut mask = Vec::with_capacity(rows * longest);
        for text in texts {
            let text = text.as_ref();
            ids.extend_from_slice(text);
            ids.extend(std::iter::repeat_n(self.model.pad_token_id(), longest - text.len()));
            mask.extend(std::iter::repeat_n(1f32, text.len()));
            mask.extend(std::iter::repeat_n(0f32, longest - text.len()));
        }
        let padded = mask.contains(&0.);
        let device = self.model.device();
        let ids = LazyTensor::from_vec(ids, (rows, longest), device)?;
        let mask = LazyTensor::from_vec(mask, (rows, longest), device)?;
        let mask = if self.model.dtype() == DType::F32 { mask } else { mask.to_dtype(self.model.dtype())? };
        let hidden = self.model.forward(&ids, padded.then_some(&mask))?;
        let mean = pooling::mean_pool(&hidden, &mask)?;
        if self.normalize {
            pooling::normalize(&mean)
        } else {
            Ok(mean)
        }
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
