//! Generation: a key/value cache, sampling, and the loop around a model.

pub mod cache;
pub mod generator;
pub mod sampling;
#[cfg(feature = "streaming")]
mod stream;

pub use cache::{KVCache, KVCacheConfig};
pub use generator::{Generator, GeneratorConfig};
pub use sampling::{apply_repetition_penalty, sample_token, sample_token_with_metadata, SamplingStrategy};

/// A token as it is generated.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamToken {
    /// The token.
    pub token_id: u32,
    /// Its text. Always `None`: a generator has no tokenizer.
    pub text: Option<String>,
    /// Its logit, after the penalty for repetition.
    pub logit: f32,
    /// Its probability in the softmax of all of the vocabulary's logits after the penalty: neither temperature, top-k nor top-p change it.
    pub probability: f32,
    /// Whether it is the end-of-sequence token.
    pub is_eos: bool,
}
