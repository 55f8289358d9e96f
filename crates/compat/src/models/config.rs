//! What describes a model: Hugging Face's `config.json`, as far as v1 reads it.

use crate::error::{ModelError, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Sizes and constants of a decoder. Fields of a `config.json` that are not here are ignored.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct ModelConfig {
    /// Names of the architecture; not looked at.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Number of key/value heads; divides the number of query heads. `None`: as many.
    pub num_key_value_heads: Option<usize>,
    /// Number of positions; 2048 where the file says nothing.
    #[serde(default = "default_max_position_embeddings")]
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMS norms; 1e-6 where the file says nothing.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies; 10000 where the file says nothing.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Name of a dtype; not looked at.
    pub torch_dtype: Option<String>,
}

fn default_max_position_embeddings() -> usize {
    2048
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

fn default_rope_theta() -> f64 {
    10_000.0
}

fn invalid(reason: String) -> ModelError {
    ModelError::InvalidConfig { reason }
}

impl ModelConfig {
    /// From a file. What the sizes mean together is left to [`ModelConfig::validate`].
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] where the file cannot be read, and as [`ModelConfig::from_json`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::from_json(&text),
            Err(error) => Err(invalid(format!("failed to read {}: {error}", path.display())).into()),
        }
    }

    /// From the text of a `config.json`. What the sizes mean together is left to [`ModelConfig::validate`].
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] where it is no JSON, or a size is missing or no whole number.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).map_err(|error| invalid(format!("failed to parse the config: {error}")).into())
    }

    /// Checks that no size is 0, that the heads divide the hidden size, and that the key/value heads divide the heads.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`], naming the field.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_kv_heads()),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, size) in sizes {
            if size == 0 {
                return Err(invalid(format!("{name} must be > 0")).into());
            }
        }
        let (hidden, heads, kv_heads) = (self.hidden_size, self.num_attention_heads, self.num_kv_heads());
        if !hidden.is_multiple_of(heads) {
            let reason = format!("hidden_size ({hidden}) must be divisible by num_attention_heads ({heads})");
            return Err(invalid(reason).into());
        }
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("num_attention_heads ({heads}) must be divisible by num_key_value_heads ({kv_heads})");
            return Err(invalid(reason).into());
        }
        Ok(())
    }

    /// Width of a head: `hidden_size / num_attention_heads`, and 0 where there are no heads.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size.checked_div(self.num_attention_heads).unwrap_or(0)
    }

    /// Number of key/value heads: those given, else as many as query heads.
    #[must_use]
    pub fn num_kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }
}
