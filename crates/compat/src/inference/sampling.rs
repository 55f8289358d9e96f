//! The next token from a model's logits.

use super::StreamToken;
use crate::error::{InferenceError, Result};
use candle_core::{DType, Tensor};
use candle_lazy_nn::sampling::{argmax_last, penalize_repetition, softmax, Sampler, SamplingOptions};

/// How the next token is chosen.
#[derive(Debug, Clone, Default)]
pub enum SamplingStrategy {
    /// The largest logit; of equals the last.
    #[default]
    Greedy,
    /// By the softmax of the `k` largest logits.
    TopK {
        /// Number of tokens that may follow, at least 1; more than there are means all.
        k: usize,
    },
    /// By the probabilities of the fewest likeliest tokens that have `p` together.
    TopP {
        /// Probability that is kept, 0 to 1; at least one token is.
        p: f64,
    },
    /// By the softmax of the logits divided by `temperature`.
    Temperature {
        /// Above 1 flatter, below 1 sharper; 0 is [`SamplingStrategy::Greedy`]. Never negative, always finite.
        temperature: f64,
    },
}

impl SamplingStrategy {
    /// The options that the strategy stands for, alone.
    fn options(&self) -> SamplingOptions {
        let all = SamplingOptions::default();
        match *self {
            Self::Greedy => all,
            Self::TopK { k } => SamplingOptions { top_k: Some(k), ..all },
            Self::TopP { p } => SamplingOptions { top_p: Some(p), ..all },
            Self::Temperature { temperature } => SamplingOptions { temperature, ..all },
        }
    }
}

/// What one step does with its logits.
#[derive(Debug, Clone, Copy)]
pub(super) enum Choice {
    /// The last of the largest.
    Greedy,
    /// A draw.
    Draw(SamplingOptions),
}

impl Choice {
    /// A strategy alone.
    ///
    /// # Errors
    /// What is wrong with its parameters.
    fn of(strategy: &SamplingStrategy) -> std::result::Result<Self, String> {
        Self::combined(strategy, 1.0, None, None)
    }

    /// A strategy together with the config's temperature, top-k and top-p: temperatures multiply, of two k and of two p the smaller holds.
    /// None of them changes which logit is the largest, so greedy stays greedy. A temperature of 0 makes it greedy.
    pub(super) fn combined(
        strategy: &SamplingStrategy,
        temperature: f64,
        top_k: Option<usize>,
        top_p: Option<f64>,
    ) -> std::result::Result<Self, String> {
        let own = strategy.options();
        let config = SamplingOptions { temperature, top_k, top_p };
        for options in [own, config] {
            options.validate().map_err(message)?;
        }
        let temperature = own.temperature * temperature;
        if temperature == 0.0 || matches!(strategy, SamplingStrategy::Greedy) {
            return Ok(Self::Greedy);
        }
        let top_k = own.top_k.into_iter().chain(top_k).min();
        let top_p = own.top_p.into_iter().chain(top_p).reduce(f64::min);
        Ok(Self::Draw(SamplingOptions { temperature, top_k, top_p }))
    }

    pub(super) fn token(&self, logits: &[f32], sampler: &mut Sampler) -> Result<u32> {
        let chosen = match self {
            Self::Greedy => argmax_last(logits),
            Self::Draw(options) => sampler.sample(logits, options),
        };
        chosen.map_err(|error| unusable(message(error)))
    }
}

/// What nn says is wrong, without its prefix.
fn message(error: candle_lazy_nn::Error) -> String {
    match error {
        candle_lazy_nn::Error::Sampling { message } => message,
        other => other.to_string(),
    }
}

fn unusable(reason: String) -> crate::Error {
    InferenceError::SamplingError { reason }.into()
}

fn invalid(reason: String) -> crate::Error {
    InferenceError::InvalidSampling { reason }.into()
}

/// The logits (vocab), of any float dtype, on the host.
pub(super) fn values(logits: &Tensor) -> Result<Vec<f32>> {
    if logits.rank() != 1 || !logits.dtype().is_float() {
        let (shape, dtype) = (logits.dims(), logits.dtype());
        return Err(unusable(format!("logits must be floats of shape (vocab), got {shape:?} of {dtype:?}")));
    }
    Ok(logits.to_dtype(DType::F32)?.to_vec1()?)
}

/// Whether a penalty is as good as none.
fn changes_nothing(penalty: f32) -> bool {
    (penalty - 1.0).abs() < 1e-7
}

/// Logits on the host, penalised.
pub(super) fn penalized(logits: &Tensor, generated_ids: &[u32], penalty: f32) -> Result<Vec<f32>> {
    let mut values = values(logits)?;
    if !changes_nothing(penalty) {
        penalize_repetition(&mut values, generated_ids, penalty).map_err(|error| invalid(message(error)))?;
    }
    Ok(values)
}

/// The token with its logit and its probability among all.
pub(super) fn described(token_id: u32, logits: &[f32], eos_token_id: Option<u32>) -> Result<StreamToken> {
    let probabilities = softmax(logits).map_err(|error| unusable(message(error)))?;
    let at = usize::try_from(token_id).ok();
    let found = at.and_then(|at| Some((*logits.get(at)?, *probabilities.get(at)?)));
    let Some((logit, probability)) = found else {
        return Err(unusable(format!("token {token_id} is beyond the {} logits", logits.len())));
    };
    let is_eos = eos_token_id == Some(token_id);
    Ok(StreamToken { token_id, text: None, logit, probability: probability as f32, is_eos })
}

/// Makes the tokens of `generated_ids` less likely to follow: their positive logits are divided by `penalty`, negative ones multiplied
/// (Keskar et al. 2019, arXiv:1909.05858). Each id counts once; ids beyond the logits are not looked at.
///
/// `logits` has shape (vocab) and any float dtype, which stays. A penalty within 1e-7 of 1 changes nothing.
///
/// # Errors
/// [`InferenceError::InvalidSampling`] for a penalty that is not above 0 and finite, [`InferenceError::SamplingError`] for logits of
/// another rank or dtype.
pub fn apply_repetition_penalty(logits: &mut Tensor, generated_ids: &[u32], penalty: f32) -> Result<()> {
    if changes_nothing(penalty) || (generated_ids.is_empty() && penalty > 0.0 && penalty.is_finite()) {
        return Ok(());
    }
    if logits.rank() == 1 && logits.dtype() == DType::F64 {
        let mut values = logits.to_vec1::<f64>()?;
        penalize_repetition(&mut values, generated_ids, penalty).map_err(|error| invalid(message(error)))?;
        *logits = Tensor::from_vec(values, logits.dims(), logits.device())?;
        return Ok(());
    }
    let values = penalized(logits, generated_ids, penalty)?;
    *logits = Tensor::from_vec(values, logits.dims(), logits.device())?.to_dtype(logits.dtype())?;
    Ok(())
}

/// The next token from `logits` (vocab; any float dtype), after the penalty for the tokens of `generated_ids` (as
/// [`apply_repetition_penalty`]). The numbers that draws need come from the system.
///
/// # Errors
/// [`InferenceError::InvalidSampling`] for a strategy or a penalty that means nothing (k = 0, p outside of 0 to 1, a temperature that is
/// negative or not finite), [`InferenceError::SamplingError`] for logits of another rank or dtype, without elements, or with NaN.
pub fn sample_token(
    logits: &Tensor,
    strategy: &SamplingStrategy,
    generated_ids: &[u32],
    repetition_penalty: f32,
) -> Result<u32> {
    let choice = Choice::of(strategy).map_err(invalid)?;
    choice.token(&penalized(logits, generated_ids, repetition_penalty)?, &mut Sampler::unseeded())
}

/// As [`sample_token`], with what is known of the token.
///
/// # Errors
/// As [`sample_token`].
pub fn sample_token_with_metadata(
    logits: &Tensor,
    strategy: &SamplingStrategy,
    generated_ids: &[u32],
    repetition_penalty: f32,
    eos_token_id: Option<u32>,
) -> Result<StreamToken> {
    let choice = Choice::of(strategy).map_err(invalid)?;
    let logits = penalized(logits, generated_ids, repetition_penalty)?;
    let token_id = choice.token(&logits, &mut Sampler::unseeded())?;
    described(token_id, &logits, eos_token_id)
}
