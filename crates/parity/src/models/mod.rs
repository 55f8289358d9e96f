//! Real models, eager against lazy: results, time and memory.
//!
//! Eager is candle-transformers with the same weights in f32; a model that it has no module for is measured alone. Eager and
//! lazy take turns step by step, and a step counts with its median over several runs ([`measure()`]). Memory is the most that
//! was allocated at once during one more run, beyond what was alive when it began (the weights of both; the engine's pool is
//! emptied): it needs [`CountingAlloc`](crate::alloc::CountingAlloc) installed.

mod decoder;
mod encoder;
mod measure;
mod pair;
mod peft;
mod training;
mod twin;

use crate::Result;
use candle_lazy_nn::ModelDir;
use std::time::Duration;

pub use encoder::{cosine, SENTENCES};
pub use measure::{measure, Measured, Side, Way};
pub use pair::{DecoderPair, EncoderPair};
pub use peft::{trains_as_peft, Agreement, FactorAgreement, PeftRun, FACTOR_TOLERANCE, LOSS_TOLERANCE};
pub use training::TrainingPair;

/// The largest difference of lazy from eager, relative to eager's largest number, that counts as agreement.
pub const TOLERANCE: f64 = 1e-4;

/// Tokens of the greedy decode that is compared.
pub const DECODE_STEPS: usize = 32;

/// A line of the comparison.
#[derive(Debug, Clone)]
pub struct ModelRow {
    /// The model and what it did.
    pub name: String,
    /// What eager Candle made of it, or why candle-transformers has no such model.
    pub eager: std::result::Result<EagerSide, String>,
    /// Lazy's time: the sum over the steps of each step's median.
    pub lazy: Duration,
    /// The most bytes that lazy had allocated at once beyond the weights; 0 where nothing counts them.
    pub lazy_peak: u64,
    /// Measured runs.
    pub runs: usize,
    /// Kernels of ours that ran in the last lazy run.
    pub kernels: usize,
    /// Candle ops that ran in it because no kernel of ours serves.
    pub fallbacks: usize,
    /// Evaluations of all lazy runs, the warm-up's excepted, whose plan came from the cache.
    pub cache_hits: usize,
    /// Those whose plan was made.
    pub cache_misses: usize,
}

/// The eager side of a line.
#[derive(Debug, Clone, Copy)]
pub struct EagerSide {
    /// The largest |lazy − eager|, relative to eager's largest number.
    pub largest_difference: f64,
    /// Whether that is within [`TOLERANCE`], and the greedy ids are the same.
    pub agrees: bool,
    /// Eager's time, made as lazy's.
    pub time: Duration,
    /// The most bytes that eager had allocated at once beyond the weights.
    pub peak: u64,
}

/// Compares a BERT sentence encoder, in at least `repetitions` measured runs. Short work runs more often, unless one run is
/// asked for.
///
/// # Errors
/// When the model cannot be loaded or run.
pub fn compare_encoder(dir: &ModelDir, repetitions: usize) -> Result<Vec<ModelRow>> {
    encoder::compare(dir, repetitions)
}

/// As [`compare_encoder`], for a decoder: a prefill and a greedy decode.
///
/// # Errors
/// When the model cannot be loaded or run.
pub fn compare_decoder(dir: &ModelDir, repetitions: usize) -> Result<Vec<ModelRow>> {
    decoder::compare(dir, repetitions)
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
