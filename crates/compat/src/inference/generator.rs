//! The loop around a model.

use super::sampling::{described, penalized, Choice};
use super::{SamplingStrategy, StreamToken};
use crate::error::{InferenceError, Result};
use crate::models::{DecodingSession, LanguageModel};
use candle_core::{DType, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::sampling::Sampler;

/// What a [`Generator`] does.
///
/// `temperature`, `top_k` and `top_p` act together with `sampling`: its temperature times `temperature`, the smaller of its `k` and
/// `top_k`, the smaller of its `p` and `top_p`. The logits are divided by the temperature, then the `k` largest are kept, and of those
/// the likeliest that have `p` together. None of this changes which token is the likeliest: [`SamplingStrategy::Greedy`] takes that one
/// whatever they are. To draw by the three of them alone, `sampling` is [`SamplingStrategy::Temperature`] with a temperature of 1. A
/// temperature of 0 is greedy.
#[derive(Debug, Clone)]
pub struct GeneratorConfig {
    /// Number of new tokens at most.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: SamplingStrategy,
    /// What logits are divided by; 0 or more.
    pub temperature: f64,
    /// Probability that is kept, 0 to 1.
    pub top_p: Option<f64>,
    /// Number of tokens that may follow, at least 1.
    pub top_k: Option<usize>,
    /// As [`super::apply_repetition_penalty`], for the tokens of the prompt too; 1 does nothing.
    pub repetition_penalty: f32,
    /// Whether `eos_token_id` ends the text.
    pub stop_on_eos: bool,
    /// The token that ends a text.
    pub eos_token_id: Option<u32>,
    /// Further tokens that end it.
    pub stop_tokens: Vec<u32>,
}

impl Default for GeneratorConfig {
    fn default() -> Self {
        Self {
            max_tokens: 100,
            sampling: SamplingStrategy::Greedy,
            temperature: 1.0,
            top_p: None,
            top_k: None,
            repetition_penalty: 1.0,
            stop_on_eos: true,
            eos_token_id: None,
            stop_tokens: Vec::new(),
        }
    }
}

impl GeneratorConfig {
    fn choice(&self) -> Result<Choice> {
        let invalid = |reason: String| InferenceError::InvalidConfig { reason };
        let penalty = self.repetition_penalty;
        if !penalty.is_finite() || penalty <= 0.0 {
            return Err(invalid(format!("a repetition penalty of {penalty}: needs more than 0")).into());
        }
        Ok(Choice::combined(&self.sampling, self.temperature, self.top_k, self.top_p).map_err(invalid)?)
    }

    fn ends_with(&self, token: u32) -> bool {
        (self.stop_on_eos && self.eos_token_id == Some(token)) || self.stop_tokens.contains(&token)
    }
}

/// Continues token sequences with a model.
///
/// A model that has a [`DecodingSession`] (as [`crate::models::Qwen`]) is given each token once. Another one is given the whole sequence
/// at each step, with a causal mask.
pub struct Generator {
    model: Box<dyn LanguageModel>,
    config: GeneratorConfig,
    choice: Choice,
    sampler: Sampler,
}

impl Generator {
    /// A generator around `model`.
    ///
    /// # Errors
    /// [`InferenceError::InvalidConfig`] where a number of the config means nothing.
    pub fn new(model: Box<dyn LanguageModel>, config: GeneratorConfig) -> Result<Self> {
        let choice = config.choice()?;
        Ok(Self { model, config, choice, sampler: Sampler::unseeded() })
    }

    /// What the generator was made with.
    #[must_use]
    pub fn config(&self) -> &GeneratorConfig {
        &self.config
    }

    /// `input_ids` and what follows: at most `max_tokens` more, the last of which is the one that ended the text where one did. Nothing
    /// for an empty prompt.
    ///
    /// # Errors
    /// The model's, [`InferenceError::CacheFull`] where its positions end, and as [`super::sample_token`].
    pub fn generate(&mut self, input_ids: &[u32]) -> Result<Vec<u32>> {
        let mut run = Run::new(self, input_ids)?;
        while run.advance()?.is_some() {}
        Ok(run.ids)
    }

    /// As [`Generator::generate`]; each new token is given to `callback`, which ends the text with `false`. That token stays part of it.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn generate_stream<F>(&mut self, input_ids: &[u32], mut callback: F) -> Result<Vec<u32>>
    where
        F: FnMut(StreamToken) -> bool,
    {
        let mut run = Run::new(self, input_ids)?;
        while let Some(token) = run.advance_described()? {
            if !callback(token) {
                break;
            }
        }
        Ok(run.ids)
    }

    /// The new tokens of [`Generator::generate`] as a stream; it ends after the one that ends the text, and after an error. Each is
    /// computed when it is asked for, on the thread that asks; other tasks have their turn between two.
    #[cfg(feature = "streaming")]
    pub fn generate_stream_async(
        &mut self,
        input_ids: &[u32],
    ) -> impl futures_core::Stream<Item = Result<StreamToken>> + '_ {
        super::stream::TokenStream::new(Run::new(self, input_ids))
    }
}

/// How the model is asked.
enum Asked<'a> {
    /// For what the tokens that it has not seen yet add.
    Session(Box<dyn DecodingSession + 'a>),
    /// For the whole sequence.
    Whole(&'a dyn LanguageModel),
}

/// One text in the making.
pub(super) struct Run<'a> {
    asked: Asked<'a>,
    config: &'a GeneratorConfig,
    choice: Choice,
    sampler: &'a mut Sampler,
    ids: Vec<u32>,
    /// How many of `ids` the session has seen.
    seen: usize,
    left: usize,
}

impl<'a> Run<'a> {
    fn new(generator: &'a mut Generator, prompt: &[u32]) -> Result<Self> {
        let Generator { model, config, choice, sampler } = generator;
        let model: &'a dyn LanguageModel = &**model;
        let left = if prompt.is_empty() { 0 } else { config.max_tokens };
        let asked = match model.decoding_session()? {
            Some(session) => Asked::Session(session),
            None => Asked::Whole(model),
        };
        Ok(Self { asked, config, choice: *choice, sampler, ids: prompt.to_vec(), seen: 0, left })
    }

    /// The next token, appended, with the penalised logits that it was chosen by; `None` at the end.
    fn advance(&mut self) -> Result<Option<(u32, Vec<f32>)>> {
        if self.left == 0 {
            return Ok(None);
        }
        let logits = match &mut self.asked {
            Asked::Session(session) => session.advance(self.ids.get(self.seen..).unwrap_or_default())?,
            Asked::Whole(model) => last_of_whole(*model, &self.ids)?,
        };
        self.seen = self.ids.len();
        let logits = penalized(&logits, &self.ids, self.config.repetition_penalty)?;
        let token = self.choice.token(&logits, self.sampler)?;
        self.ids.push(token);
        self.left = if self.config.ends_with(token) { 0 } else { self.left - 1 };
        Ok(Some((token, logits)))
    }

    /// The next token with what is known of it.
    pub(super) fn advance_described(&mut self) -> Result<Option<StreamToken>> {
        match self.advance()? {
            Some((token, logits)) => Ok(Some(described(token, &logits, self.config.eos_token_id)?)),
            None => Ok(None),
        }
    }
}

/// The logits (vocab) after the last of `ids`, by a forward pass over all of them with a causal mask (1, 1, s, s).
fn last_of_whole(model: &dyn LanguageModel, ids: &[u32]) -> Result<Tensor> {
    let (s, device) = (ids.len(), model.device());
    let mask = LazyTensor::causal_mask(s, s, None, DType::F32, device)?.reshape((1, 1, s, s))?.eval()?;
    let logits = model.forward(&Tensor::from_slice(ids, (1, s), device)?, Some(&mask))?;
    match *logits.dims() {
        [b, positions, _] if b > 0 && positions > 0 => Ok(logits.get(0)?.get(positions - 1)?),
        ref other => {
            let reason = format!("the model's logits must have shape (batch, positions, vocab), got {other:?}");
            Err(InferenceError::Failed { reason }.into())
        }
    }
}
