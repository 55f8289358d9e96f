//! What a BERT encoder is made of.

use crate::activation::Activation;
use crate::error::{Error, Result};
use crate::models::encoder;
use serde::Deserialize;
use std::path::Path;

/// Sizes and constants of a BERT encoder, with the field names of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BertConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of heads; divides the width.
    pub num_attention_heads: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Name of the activation.
    #[serde(default = "gelu")]
    pub hidden_act: String,
    /// Number of positions.
    pub max_position_embeddings: usize,
    /// Number of segment types.
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    /// Added to the variance in layer norms.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
    /// Token that fills shorter rows of a batch.
    #[serde(default)]
    pub pad_token_id: u32,
    /// Kind of positions; only `absolute` is computed.
    #[serde(default = "absolute")]
    pub position_embedding_type: String,
    /// Name of the architecture; `bert` where it is given.
    #[serde(default)]
    pub model_type: Option<String>,
    /// Whether a token sees only those before it; not computed.
    #[serde(default)]
    pub is_decoder: bool,
}

fn gelu() -> String {
    "gelu".to_string()
}
fn absolute() -> String {
    "absolute".to_string()
}
fn two() -> usize {
    2
}
fn eps() -> f64 {
    1e-12
}

impl BertConfig {
    /// From the text of `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or contradicts itself, [`Error::Unsupported`] for another architecture.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::parse(text, "config.json")
    }

    /// As [`Self::from_json`], from a file.
    ///
    /// # Errors
    /// As [`Self::from_json`], and [`Error::Io`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text, &path.display().to_string())
    }

    fn parse(text: &str, what: &str) -> Result<Self> {
        crate::models::check_model_type(text, what, "bert")?;
        let config: Self = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
        config.validate(what)?;
        Ok(config)
    }

    /// Checks that the sizes are positive and fit each other; `what` names the config in the error.
    ///
    /// # Errors
    /// [`Error::Config`] with the first contradiction, [`Error::Unsupported`] for what is not computed.
    pub fn validate(&self, what: &str) -> Result<()> {
        if let Some(other) = self.model_type.as_deref().filter(|name| *name != "bert") {
            return Err(Error::Unsupported { what: "encoder", found: other.to_string(), supported: "bert" });
        }
        if self.is_decoder {
            return Err(Error::Unsupported {
                what: "is_decoder of a BERT",
                found: "true".to_string(),
                supported: "false: every token sees every other",
            });
        }
        if self.position_embedding_type != "absolute" {
            return Err(Error::Unsupported {
                what: "position embedding",
                found: self.position_embedding_type.clone(),
                supported: "absolute",
            });
        }
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ];
        encoder::check_positive(what, &positive)?;
        encoder::check_heads(what, self.hidden_size, self.num_attention_heads)?;
        encoder::check_eps(what, self.layer_norm_eps)?;
        Activation::from_name(&self.hidden_act).map(|_| ())
    }
}
