//! What describes a decoder of the Llama family: Hugging Face's `config.json`, or the metadata of a GGUF file.

use crate::error::{Error, Result};
use crate::rope::RopeScaling;
use serde::Deserialize;
use std::path::Path;

/// Names of the architectures that [`super::CausalLm`] computes.
pub(crate) const ARCHITECTURES: &str = "llama, mistral, qwen2";

/// Sizes and constants of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct CausalLmConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of positions the model was trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Change of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases (Qwen2).
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub out_bias: bool,
    /// Whether the MLP's maps have biases.
    pub mlp_bias: bool,
    /// Number of positions a query sees, itself included; `None` for all.
    pub sliding_window: Option<usize>,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end one.
    pub eos_token_ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// `rope_scaling` (older files) and `rope_parameters` (newer ones) of a config.
#[derive(Deserialize)]
struct RopeJson {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f32>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Deserialize)]
struct Json {
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeJson>,
    rope_parameters: Option<RopeJson>,
    partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<usize>,
    hidden_act: Option<String>,
    bos_token_id: Option<OneOrMany>,
    eos_token_id: Option<OneOrMany>,
}

impl CausalLmConfig {
    /// From the text of Hugging Face's `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or contradicts itself, [`Error::Unsupported`] (by name) for another
    /// architecture, activation or rope scaling.
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
        let json: Json = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
        let architecture = json.model_type.as_deref().unwrap_or("llama");
        let qwen2 = match architecture {
            "llama" | "mistral" => false,
            "qwen2" => true,
            other => {
                return Err(Error::Unsupported {
                    what: "architecture",
                    found: other.to_string(),
                    supported: ARCHITECTURES,
                })
            }
        };
        match json.hidden_act.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => {
                return Err(Error::Unsupported {
                    what: "activation of a decoder",
                    found: other.to_string(),
                    supported: "silu",
                })
            }
        }
        let of_rope = [&json.rope_scaling, &json.rope_parameters];
        let partial = of_rope.into_iter().flatten().filter_map(|rope| rope.partial_rotary_factor);
        if let Some(factor) = json.partial_rotary_factor.into_iter().chain(partial).find(|factor| *factor != 1.) {
            return Err(Error::Unsupported {
                what: "partial_rotary_factor",
                found: factor.to_string(),
                supported: "1: whole heads are rotated",
            });
        }
        let theta_in_parameters = json.rope_parameters.as_ref().and_then(|r| r.rope_theta);
        let rope = json.rope_scaling.or(json.rope_parameters);
        // Qwen2 writes a window into every config and says beside it whether it is used.
        let sliding_window = match (qwen2, json.use_sliding_window) {
            (_, Some(false)) | (true, None) => None,
            _ => json.sliding_window,
        };
        let attention_bias = json.attention_bias.unwrap_or(false);
        let config = Self {
            vocab_size: json.vocab_size,
            hidden_size: json.hidden_size,
            intermediate_size: json.intermediate_size,
            num_hidden_layers: json.num_hidden_layers,
            num_attention_heads: json.num_attention_heads,
            num_key_value_heads: json.num_key_value_heads.unwrap_or(json.num_attention_heads),
            head_dim: match json.head_dim {
                Some(head_dim) => head_dim,
                None => json.hidden_size.checked_div(json.num_attention_heads).unwrap_or(0),
            },
            max_position_embeddings: json.max_position_embeddings,
            rms_norm_eps: json.rms_norm_eps,
            rope_theta: json.rope_theta.or(theta_in_parameters).unwrap_or(10_000.),
            rope_scaling: rope_scaling(rope.as_ref(), what)?,
            tie_word_embeddings: json.tie_word_embeddings.unwrap_or(false),
            qkv_bias: qwen2 || attention_bias,
            out_bias: !qwen2 && attention_bias,
            mlp_bias: json.mlp_bias.unwrap_or(false),
            sliding_window,
            bos_token_id: match json.bos_token_id {
                Some(OneOrMany::One(id)) => Some(id),
                Some(OneOrMany::Many(ids)) => ids.first().copied(),
                None => None,
            },
            eos_token_ids: match json.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
        };
        config.validate(what)?;
        Ok(config)
    }

    /// Checks that the sizes are positive and fit each other; `what` names the config in the error.
    ///
    /// # Errors
    /// [`Error::Config`] with the first contradiction.
    pub fn validate(&self, what: &str) -> Result<()> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(Error::config(what, format_args!("{name} is 0")));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::config(
                what,
                format_args!(
                    "num_attention_heads {} is no multiple of num_key_value_heads {}",
                    self.num_attention_heads, self.num_key_value_heads
                ),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::config(
                what,
                format_args!("head_dim {} is odd: rotary embedding needs pairs", self.head_dim),
            ));
        }
        let products = [
            self.num_attention_heads.checked_mul(self.head_dim).and_then(|n| n.checked_mul(self.hidden_size)),
            self.intermediate_size.checked_mul(self.hidden_size),
            self.vocab_size.checked_mul(self.hidden_size),
            self.max_position_embeddings.checked_mul(self.head_dim),
        ];
        if products.iter().any(Option::is_none) {
            return Err(Error::config(what, "the sizes multiply to more than a machine can address"));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.) {
            return Err(Error::config(what, format_args!("rms_norm_eps is {}", self.rms_norm_eps)));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.) {
            return Err(Error::config(what, format_args!("rope_theta is {}", self.rope_theta)));
        }
        let tokens =
            self.bos_token_id.iter().map(|id| ("bos", id)).chain(self.eos_token_ids.iter().map(|id| ("eos", id)));
        for (name, &id) in tokens {
            if id as usize >= self.vocab_size {
                return Err(Error::config(
                    what,
                    format_args!("{name}_token_id is {id}, the vocabulary has {} tokens", self.vocab_size),
                ));
            }
        }
        if self.sliding_window == Some(0) {
            return Err(Error::config(what, "sliding_window is 0: a position sees at least itself"));
        }
        Ok(())
    }
}

fn rope_scaling(json: Option<&RopeJson>, what: &str) -> Result<RopeScaling> {
    let Some(json) = json else {
        return Ok(RopeScaling::None);
    };
    let field = |name: &str, value: Option<f32>| match value {
        Some(value) if value.is_finite() && value > 0. => Ok(value),
        Some(value) => Err(Error::config(what, format_args!("rope_scaling.{name} is {value}"))),
        None => Err(Error::config(what, format_args!("rope_scaling has no {name}"))),
    };
    match json.rope_type.as_deref() {
        Some("default") => Ok(RopeScaling::None),
        None => {
            let factors = [json.factor, json.low_freq_factor, json.high_freq_factor];
            if factors.iter().any(Option::is_some) || json.original_max_position_embeddings.is_some() {
                return Err(Error::config(
                    what,
                    "rope_scaling has factors and no rope_type: how they scale is not said",
                ));
            }
            Ok(RopeScaling::None)
        }
        Some("linear") => Ok(RopeScaling::Linear { factor: field("factor", json.factor)? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: field("factor", json.factor)?,
            low_freq_factor: field("low_freq_factor", json.low_freq_factor)?,
            high_freq_factor: field("high_freq_factor", json.high_freq_factor)?,
            original_context: json
                .original_max_position_embeddings
                .ok_or_else(|| Error::config(what, "rope_scaling has no original_max_position_embeddings"))?,
        }),
        Some(other) => Err(Error::Unsupported {
            what: "rope scaling",
            found: other.to_string(),
            supported: "default, linear, llama3",
        }),
    }
}
