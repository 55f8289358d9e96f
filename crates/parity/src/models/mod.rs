//! The two real models, eager against lazy: results, time and memory.
//!
//! Eager is candle-transformers with the same weights in f32. Time is the median of several runs, eager and lazy in turns
//! after one warm-up of each, so that a busy moment of the machine meets both. Memory is the most that was allocated at once
//! during one more run, beyond what was alive when it began (the weights of both; the engine's pool is emptied): it needs
//! [`CountingAlloc`](crate::alloc::CountingAlloc) installed.

mod decoder;
mod encoder;
mod measure;

use crate::Result;
use candle_lazy_nn::ModelDir;
use std::time::Duration;

pub use encoder::{cosine, SENTENCES};
pub use measure::{measure, Measured, Work};

/// The largest difference of lazy from eager, relative to eager's largest number, that counts as agreement.
pub const TOLERANCE: f64 = 1e-4;

/// Tokens of the greedy decode that is compared.
pub const DECODE_STEPS: usize = 32;

/// What to compare.
#[derive(Debug, Clone)]
pub struct CompareOptions {
    /// A BERT sentence encoder.
    pub encoder: ModelDir,
    /// A Llama-family decoder.
    pub decoder: ModelDir,
    /// Measured runs of each; at least one.
    pub repetitions: usize,
}

/// A line of the comparison.
#[derive(Debug, Clone)]
pub struct ModelRow {
    /// The model and what it did.
    pub name: String,
    /// The largest |lazy − eager|, relative to eager's largest number.
    pub largest_difference: f64,
    /// Whether that is within [`TOLERANCE`], and the greedy ids are the same.
    pub agrees: bool,
    /// Eager's median time.
    pub eager: Duration,
    /// Lazy's median time.
    pub lazy: Duration,
    /// The most bytes that eager had allocated at once beyond the weights; 0 where nothing counts them.
    pub eager_peak: u64,
    /// The most bytes that lazy had allocated at once beyond the weights.
    pub lazy_peak: u64,
    /// Kernels of ours that ran in the last lazy run.
    pub kernels: usize,
    /// Candle ops that ran in it because no kernel of ours serves.
    pub fallbacks: usize,
    /// Evaluations of all lazy runs, the warm-up's excepted, whose plan came from the cache.
    pub cache_hits: usize,
    /// Those whose plan was made.
    pub cache_misses: usize,
}

/// The comparison.
#[derive(Debug, Clone, Default)]
pub struct ModelReport {
    /// A row per model and kind of work.
    pub rows: Vec<ModelRow>,
}

/// Compares both models.
///
/// # Errors
/// When a model cannot be loaded or run.
pub fn compare_models(options: &CompareOptions) -> Result<ModelReport> {
    let mut rows = encoder::compare(&options.encoder, options.repetitions)?;
    rows.extend(decoder::compare(&options.decoder, options.repetitions)?);
    Ok(ModelReport { rows })
}

/// What the published models are known to give, checked one by one: a description and what is wrong with it, if anything.
///
/// # Errors
/// When a model cannot be loaded or run.
pub fn published_facts(encoder: &ModelDir, decoder: &ModelDir) -> Result<Vec<(String, Option<String>)>> {
    let mut facts = encoder::facts(encoder)?;
    facts.extend(decoder::facts(decoder)?);
    Ok(facts)
}
