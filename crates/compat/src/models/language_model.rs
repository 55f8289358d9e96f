//! What a generator needs of a model.

use crate::error::Result;
use candle_core::{Device, Tensor};

/// A decoder that gives logits for token ids.
pub trait LanguageModel {
    /// Logits (batch, positions, vocab) of the ids (batch, positions; u32).
    ///
    /// `attention_mask` is added to the scores, (batch, heads, positions, positions) by broadcasting; without one every position sees
    /// every other.
    ///
    /// # Errors
    /// Where the ids or the mask do not fit.
    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor>;

    /// Where the ids have to be.
    fn device(&self) -> &Device;

    /// Number of tokens.
    fn vocab_size(&self) -> usize;

    /// A text in the making, for models that can continue one without computing all of it again. `None`, as here, makes
    /// [`crate::Generator`] give the whole sequence to [`LanguageModel::forward`] at each step, with a causal mask.
    ///
    /// # Errors
    /// Where it cannot be made.
    fn decoding_session(&self) -> Result<Option<Box<dyn DecodingSession + '_>>> {
        Ok(None)
    }
}

/// A text in the making: what a model keeps of the tokens that it has seen.
pub trait DecodingSession {
    /// Adds `ids` to the text and gives the logits (vocab) after the last of them. Each token sees itself and those before it.
    ///
    /// # Errors
    /// For no ids, where the model has no position left ([`crate::error::InferenceError::CacheFull`]), and where an id is none of its
    /// tokens: the text is as it was then. After a failure to compute, the session is not to be used any more.
    fn advance(&mut self, ids: &[u32]) -> Result<Tensor>;
}
