//! Whole models.
//!
//! - [`bert`]: BERT encoders and, on top, sentence encoders with mean pooling.
//! - [`causal_lm`]: decoders of the Llama family (Llama, SmolLM2, Mistral, Qwen2) with [`generate`].

pub mod bert;
pub mod causal_lm;
pub mod causal_lm_config;
pub mod generate;
mod rope_config;

pub use bert::{BertConfig, BertModel, SentenceEncoder};
pub use causal_lm::{Cache, CausalLm};
pub use causal_lm_config::CausalLmConfig;
pub use generate::{GenerateOptions, Generation, StopReason};
