//! From logits to a token: greedy, temperature, top-k, top-p (nucleus), and a penalty for repetition.
//!
//! ```
//! use candle_lazy_nn::sampling::{penalize_repetition, Sampler, SamplingOptions};
//!
//! let mut logits = vec![1.0, 4.0, 3.5, -2.0];
//! penalize_repetition(&mut logits, &[1], 1.3)?;
//! let options = SamplingOptions { temperature: 0.8, top_k: Some(2), top_p: None };
//! let token = Sampler::seeded(1).sample(&logits, &options)?;
//! assert!(token == 1 || token == 2);
//! # Ok::<(), candle_lazy_nn::Error>(())
//! ```

use crate::error::{Error, Result};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::{Div, Mul};

/// Which tokens may follow, and how likely each is.
///
/// Logits are divided by `temperature`; of the result the `top_k` largest are kept, and of their softmax the smallest set of most
/// likely tokens whose probabilities reach `top_p`; what is left is made to sum to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Above 1 flatter, below 1 sharper (Ackley et al. 1985). 0 is the limit: all of the probability on the largest logit.
    pub temperature: f64,
    /// Number of tokens kept (Fan et al. 2018, arXiv:1805.04833). More than there are: all.
    pub top_k: Option<usize>,
    /// Probability kept (Holtzman et al. 2019, arXiv:1904.09751); at least one token stays.
    pub top_p: Option<f64>,
}

impl Default for SamplingOptions {
    /// The softmax of the logits as they are.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None }
    }
}

impl SamplingOptions {
    /// Always the token with the largest logit, the first of equals.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks the options without logits.
    ///
    /// # Errors
    /// [`Error::Sampling`] for a temperature that is negative or not finite, `top_k` 0, and `top_p` outside of 0..=1.
    pub fn validate(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return Err(Error::sampling(format_args!("a temperature of {}: needs 0 or more", self.temperature)));
        }
        if self.top_k == Some(0) {
            return Err(Error::sampling("a top-k of 0 keeps no token: needs 1 or more"));
        }
        if let Some(p) = self.top_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return Err(Error::sampling(format_args!("a top-p of {p}: needs 0 to 1")));
        }
        Ok(())
    }

    /// The tokens that may follow `logits` (vocab), with probabilities that sum to 1: the likeliest first, of equals the first.
    ///
    /// # Errors
    /// [`Error::Sampling`] as [`SamplingOptions::validate`], and as [`softmax`].
    pub fn distribution(&self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        self.validate()?;
        if self.temperature == 0.0 {
            return Ok(vec![(argmax(logits)?, 1.0)]);
        }
        let weights = exponentials(logits, self.temperature)?;
        let mut kept: Vec<(u32, f64)> = (0u32..).zip(weights).collect();
        // by weight, which the temperature may have made equal: among those the first
        let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = self.top_k.filter(|&k| k < kept.len()) {
            kept.select_nth_unstable_by(k, likelier);
            kept.truncate(k);
        }
        if let Some(p) = self.top_p {
            // What is less likely than (1 − p)/n is in no such set: all of them together have less than 1 − p. Sorting the rest is
            // much less work than sorting a vocabulary.
            let sum: f64 = kept.iter().map(|(_, weight)| weight).sum();
            let least = (1.0 - p) / kept.len() as f64 * sum;
            let largest = kept.iter().map(|(_, weight)| *weight).fold(0.0, f64::max);
            kept.retain(|(_, weight)| *weight >= least.min(largest));
            kept.sort_unstable_by(likelier);
            let mut reached = 0.0;
            let enough = kept.iter().position(|(_, weight)| {
                reached += weight;
                reached >= p * sum
            });
            if let Some(last) = enough {
                kept.truncate(last + 1);
            }
        } else {
            kept.sort_unstable_by(likelier);
        }
        let sum: f64 = kept.iter().map(|(_, weight)| weight).sum();
        for (_, weight) in &mut kept {
            *weight /= sum;
        }
        Ok(kept)
    }
}

/// Draws tokens. The same seed gives the same tokens with the same version of this crate.
#[derive(Debug, Clone)]
pub struct Sampler {
    rng: StdRng,
}

impl Sampler {
    /// A sampler that repeats itself.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed) }
    }

    /// A sampler with a seed of the system's.
    #[must_use]
    pub fn unseeded() -> Self {
        Self { rng: StdRng::from_rng(&mut rand::rng()) }
    }

    /// A token of [`SamplingOptions::distribution`], by its probabilities.
    ///
    /// # Errors
    /// As [`SamplingOptions::distribution`].
    pub fn sample(&mut self, logits: &[f32], options: &SamplingOptions) -> Result<u32> {
        let tokens = options.distribution(logits)?;
        let mut left: f64 = self.rng.random();
        for (token, probability) in &tokens {
            left -= probability;
            if left < 0.0 {
                return Ok(*token);
            }
        }
        // the probabilities may sum to a little less than 1
        tokens.first().map(|(token, _)| *token).ok_or_else(|| Error::sampling("there are no logits"))
    }
}

/// How each token of a text is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// From which distribution.
    pub options: SamplingOptions,
    /// As [`penalize_repetition`], of all tokens before, the prompt's included; 1 is none.
    pub repetition_penalty: f32,
    /// What the text repeats itself by; `None` for a seed of the system's.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    /// [`SamplingOptions::default`], without a penalty or a seed.
    fn default() -> Self {
        Self { options: SamplingOptions::default(), repetition_penalty: 1.0, seed: None }
    }
}

impl Sampling {
    /// Always the token with the largest logit, the first of equals.
    #[must_use]
    pub fn greedy() -> Self {
        Self { options: SamplingOptions::greedy(), ..Self::default() }
    }

    /// Checks it without logits.
    ///
    /// # Errors
    /// As [`SamplingOptions::validate`], and [`Error::Sampling`] for a penalty that is not finite or not above 0.
    pub fn validate(&self) -> Result<()> {
        self.options.validate()?;
        penalize_repetition::<f32>(&mut [], &[], self.repetition_penalty)
    }

    /// Begins a text.
    #[must_use]
    pub fn chooser(&self) -> Chooser {
        let sampler = match self.seed {
            Some(seed) => Sampler::seeded(seed),
            None => Sampler::unseeded(),
        };
        Chooser { sampling: *self, sampler }
    }
}

/// Chooses the tokens of one text, by [`Sampling::chooser`].
#[derive(Debug, Clone)]
pub struct Chooser {
    sampling: Sampling,
    sampler: Sampler,
}

impl Chooser {
    /// The token that follows `before`, by the logits after it. At a temperature of 0 a NaN never wins, and `None` means that every logit
    /// is one.
    ///
    /// # Errors
    /// As [`penalize_repetition`] and [`Sampler::sample`].
    pub fn choose(&mut self, logits: &[f32], before: &[u32]) -> Result<Option<u32>> {
        let penalized = if self.sampling.repetition_penalty == 1.0 {
            None
        } else {
            let mut logits = logits.to_vec();
            penalize_repetition(&mut logits, before, self.sampling.repetition_penalty)?;
            Some(logits)
        };
        let logits = penalized.as_deref().unwrap_or(logits);
        if self.sampling.options.temperature == 0.0 {
            return Ok(crate::models::generate::argmax(logits));
        }
        self.sampler.sample(logits, &self.sampling.options).map(Some)
    }
}

/// Refuses logits that cannot be compared.
fn comparable(logits: &[f32]) -> Result<()> {
    if logits.is_empty() {
        return Err(Error::sampling("there are no logits"));
    }
    match logits.iter().position(|logit| logit.is_nan()) {
        Some(at) => Err(Error::sampling(format_args!("logit {at} of {} is NaN", logits.len()))),
        None => Ok(()),
    }
}

fn position_of_largest(logits: &[f32], takes_over: impl Fn(f32, f32) -> bool) -> Result<u32> {
    comparable(logits)?;
    let mut best = (0u32, f32::NEG_INFINITY);
    for (index, &logit) in (0u32..).zip(logits) {
        if takes_over(logit, best.1) {
            best = (index, logit);
        }
    }
    Ok(best.0)
}

/// Index of the largest logit, the first of equals.
///
/// # Errors
/// [`Error::Sampling`] where there is no logit, or one is NaN.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    position_of_largest(logits, |logit, best| logit > best)
}

/// Index of the largest logit, the last of equals.
///
/// # Errors
/// As [`argmax`].
pub fn argmax_last(logits: &[f32]) -> Result<u32> {
    position_of_largest(logits, |logit, best| logit >= best)
}

/// exp((logit − max)/temperature) in f64.
fn exponentials(logits: &[f32], temperature: f64) -> Result<Vec<f64>> {
    comparable(logits)?;
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return Err(Error::sampling("every logit is −∞"));
    }
    let weight = |logit: f32| {
        if logit == largest {
            1.0 // also where both are ∞, and their difference is NaN
        } else {
            ((f64::from(logit) - f64::from(largest)) / temperature).exp()
        }
    };
    Ok(logits.iter().map(|&logit| weight(logit)).collect())
}

/// Probabilities of all tokens: exp(logit − max)/Σ in f64.
///
/// # Errors
/// [`Error::Sampling`] where there is no logit, one is NaN, or all are −∞.
pub fn softmax(logits: &[f32]) -> Result<Vec<f64>> {
    let mut weights = exponentials(logits, 1.0)?;
    let sum: f64 = weights.iter().sum();
    for weight in &mut weights {
        *weight /= sum;
    }
    Ok(weights)
}

/// Makes tokens that were there less likely: a positive logit is divided by `penalty`, a negative one multiplied (Keskar et al. 2019,
/// arXiv:1909.05858, §4.1, with Hugging Face's rule for the sign). Each of `ids` counts once, however often it is there; ids beyond the
/// logits are not looked at. 1 changes nothing; below 1 repetition is made likelier.
///
/// # Errors
/// [`Error::Sampling`] for a penalty that is not finite or not above 0; the logits are as they were.
pub fn penalize_repetition<T>(logits: &mut [T], ids: &[u32], penalty: f32) -> Result<()>
where
    T: Copy + Default + PartialOrd + From<f32> + Mul<Output = T> + Div<Output = T>,
{
    if !penalty.is_finite() || penalty <= 0.0 {
        return Err(Error::sampling(format_args!("a repetition penalty of {penalty}: needs more than 0")));
    }
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if let Some(logit) = usize::try_from(id).ok().and_then(|id| logits.get_mut(id)) {
            let penalty = T::from(penalty);
            *logit = if *logit > T::default() { *logit / penalty } else { *logit * penalty };
        }
    }
    Ok(())
}
