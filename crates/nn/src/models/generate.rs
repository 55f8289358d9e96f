//! Generation, one token per step: greedy, or sampled.

use super::causal_lm::{Cache, CausalLm};
use crate::error::{Error, Result};
use crate::sampling::{Chooser, Sampling};
use candle_core::DType;
use candle_lazy_exec::{no_grad, EvalReport, LazyTensor};

/// What [`CausalLm::generate`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerateOptions {
    /// Number of new tokens at most.
    pub max_new_tokens: usize,
    /// Tokens that end the text; they are not part of the result. Empty: only the length ends it.
    pub eos_token_ids: Vec<u32>,
    /// Positions of the prompt that are computed at once; bounds the memory of a long prompt. 0 counts as 1.
    pub prefill_chunk: usize,
}

impl Default for GenerateOptions {
    /// 128 new tokens, no end token, prompts in pieces of 512.
    fn default() -> Self {
        Self { max_new_tokens: 128, eos_token_ids: Vec::new(), prefill_chunk: 512 }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The model gave one of the end tokens.
    EndOfText,
    /// The text reached one of the stop strings (of a [`service`](crate::service)'s request).
    StopString,
    /// As many tokens as were asked for.
    MaxNewTokens,
    /// The model has no more positions.
    ContextFull,
    /// An evaluation failed.
    Failed,
}

/// A running generation: an iterator over the new token ids.
///
/// Nothing keeps a history for gradients, whether the model has trainable parameters or not ([`candle_lazy_exec::no_grad`]).
/// Each step is one evaluation, of the logits together with the cache's buffers, so that the buffers are written in
/// place and no graph outlives its step.
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a CausalLm,
    cache: Cache,
    options: GenerateOptions,
    chooser: Chooser,
    /// The prompt and the new tokens.
    history: Vec<u32>,
    pending: Vec<u32>,
    produced: usize,
    stop: Option<StopReason>,
    report: Option<EvalReport>,
}

impl CausalLm {
    /// Begins to continue `prompt` greedily: each new token is the one with the largest logit, the first of equals.
    ///
    /// The cache is made for the prompt and the new tokens, at most for the model's context.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::PromptTooLong`] where the prompt fills the context, [`Error::TokenOutOfRange`].
    #[track_caller]
    pub fn generate(&self, prompt: &[u32], options: GenerateOptions) -> Result<Generation<'_>> {
        let context = self.config().max_position_embeddings;
        check_prompt(prompt, self.config().vocab_size)?;
        if prompt.len() >= context {
            return Err(Error::prompt_too_long(prompt.len(), context));
        }
        let capacity = prompt.len().saturating_add(options.max_new_tokens).min(context);
        let cache = self.new_cache(capacity)?;
        Ok(Generation {
            model: self,
            cache,
            stop: (options.max_new_tokens == 0).then_some(StopReason::MaxNewTokens),
            options,
            chooser: Sampling::greedy().chooser(),
            history: prompt.to_vec(),
            pending: prompt.to_vec(),
            produced: 0,
            report: None,
        })
    }
}

/// Refuses a prompt without tokens, and ids that the vocabulary does not have.
#[track_caller]
pub(crate) fn check_prompt(prompt: &[u32], vocab: usize) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::empty_prompt());
    }
    match prompt.iter().find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(Error::token_out_of_range(id, vocab)),
        None => Ok(()),
    }
}

/// Index of the largest value, the first of equals; NaN never wins. `None` where there is no number.
pub(crate) fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (index, &value) in logits.iter().enumerate() {
        let better = match best {
            None => !value.is_nan(),
            Some((_, largest)) => value > largest,
        };
        if better {
            best = Some((index, value));
        }
    }
    best.and_then(|(index, _)| u32::try_from(index).ok())
}

impl Generation<'_> {
    /// The same with tokens chosen in another way than greedily: the same seed gives the same tokens.
    ///
    /// # Errors
    /// As [`Sampling::validate`].
    pub fn sampled(self, sampling: &Sampling) -> Result<Self> {
        sampling.validate()?;
        Ok(Self { chooser: sampling.chooser(), ..self })
    }

    /// Why the generation ended; `None` while it runs.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.stop
    }

    /// The engine's report on the last step.
    pub fn report(&self) -> Option<&EvalReport> {
        self.report.as_ref()
    }

    /// Positions that the cache holds so far.
    pub fn position(&self) -> usize {
        self.cache.position()
    }

    /// Computes the logits after what is pending: the prompt piece by piece, or the last token.
    fn advance(&mut self) -> Result<Vec<f32>> {
        let pending = std::mem::take(&mut self.pending);
        let chunk = self.options.prefill_chunk.max(1);
        let last = pending.len().saturating_sub(1) / chunk;
        let mut row = Vec::new();
        for (index, piece) in pending.chunks(chunk).enumerate() {
            let ids = LazyTensor::from_slice(piece, (1, piece.len()), self.model.device())?;
            let logits = no_grad(|| self.model.forward(&ids, &mut self.cache))?;
            if index < last {
                // Only keys and values are wanted of this piece; its logits are dropped before anything computes them.
                drop(logits);
                self.report = Some(candle_lazy_exec::materialize(&self.cache.handles())?);
                continue;
            }
            let logits = logits.to_dtype(DType::F32)?.flatten_all()?;
            let mut roots = self.cache.handles();
            roots.push(&logits);
            self.report = Some(candle_lazy_exec::materialize(&roots)?);
            row = logits.to_vec1::<f32>()?;
        }
        Ok(row)
    }

    fn step(&mut self) -> Result<Option<u32>> {
        if self.produced >= self.options.max_new_tokens {
            self.stop = Some(StopReason::MaxNewTokens);
            return Ok(None);
        }
        if self.cache.position().saturating_add(self.pending.len()) > self.cache.capacity() {
            self.stop = Some(StopReason::ContextFull);
            return Ok(None);
        }
        let row = self.advance()?;
        let id = self.chooser.choose(&row, &self.history)?.ok_or(Error::Logits { position: self.cache.position() })?;
        if self.options.eos_token_ids.contains(&id) {
            self.stop = Some(StopReason::EndOfText);
            return Ok(None);
        }
        self.produced += 1;
        self.history.push(id);
        self.pending = vec![id];
        Ok(Some(id))
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.stop.is_some() {
            return None;
        }
        let item = self.step().transpose();
        if matches!(item, Some(Err(_))) {
            self.stop = Some(StopReason::Failed);
        }
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argmax_takes_the_first_of_equals_and_no_nan() {
        assert_eq!(argmax(&[1., 3., 3., 2.]), Some(1));
        assert_eq!(argmax(&[f32::NAN, -1., f32::NAN, -0.5]), Some(3));
        assert_eq!(argmax(&[f32::NEG_INFINITY]), Some(0));
        assert_eq!(argmax(&[f32::NAN]), None);
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn prompts_are_checked() {
        assert!(matches!(check_prompt(&[], 10), Err(Error::EmptyPrompt { .. })));
        assert!(matches!(check_prompt(&[1, 10], 10), Err(Error::TokenOutOfRange { id: 10, vocab: 10, .. })));
        assert!(check_prompt(&[1, 9], 10).is_ok());
    }
}
