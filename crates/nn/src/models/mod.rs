//! Whole models.
//!
//! - [`bert`] and [`mpnet`]: encoders, and [`SentenceEncoder`] with mean pooling on top of either.
//! - [`causal_lm`]: decoders of the Llama family (Llama, SmolLM2, Mistral, Qwen2) with [`generate`], and [`packed`] for several texts at once.

pub mod bert;
pub mod causal_lm;
pub mod causal_lm_config;
mod decoder_block;
mod encoder;
mod encoder_block;
pub mod generate;
pub mod mpnet;
pub mod packed;
mod rope_config;
mod sentence_encoder;

pub use bert::{BertConfig, BertModel};
pub use causal_lm::{Cache, CausalLm};
pub use causal_lm_config::CausalLmConfig;
pub use decoder_block::DecoderBlock;
pub use encoder::Encoder;
pub use generate::{GenerateOptions, Generation, StopReason};
pub use mpnet::{MpnetConfig, MpnetModel};
pub use packed::{PackedDecoder, Segment};
pub use sentence_encoder::SentenceEncoder;

pub(crate) use decoder_block::PROJECTIONS;

use crate::error::{Error, Result};
use serde::Deserialize;

/// The architecture that a config names.
#[derive(Deserialize)]
struct Architecture {
    model_type: Option<String>,
}

/// The `model_type` of a config's text; `what` names the text in the error.
pub(crate) fn model_type(text: &str, what: &str) -> Result<Option<String>> {
    let named: Architecture = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
    Ok(named.model_type)
}

/// Refuses the config of another encoder; asked before the rest is read, which need not be what `expected` has.
fn check_model_type(text: &str, what: &str, expected: &'static str) -> Result<()> {
    match model_type(text, what)? {
        Some(other) if other != expected => {
            Err(Error::Unsupported { what: "encoder", found: other, supported: expected })
        }
        _ => Ok(()),
    }
}
