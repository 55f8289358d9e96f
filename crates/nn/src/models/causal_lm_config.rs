//! What describes a decoder of the Llama family: Hugging Face's `config.json`, or the metadata of a GGUF file.

use super::rope_config::{self, RopeJson};
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
#[serde(untagged, expecting = "a token id must be a whole number from 0 on, or a list of such")]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// What is looked at first: the rest of another architecture's config need not be what ours is.
#[derive(Deserialize)]
struct Architecture {
    model_type: Option<String>,
}

#[derive(Deserialize)]
struct Json {
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
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
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
        let first: Architecture = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
        let architecture = first.model_type.as_deref().unwrap_or("llama");
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
        let json: Json = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
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
        if let Some(factor) = json.partial_rotary_factor.filter(|factor| *factor != 1.) {
            return Err(rope_config::partial(factor));
        }
        let sliding_window = window(&json, qwen2, what)?;
        let rope = rope_config::read(json.rope_scaling, json.rope_parameters, what)?;
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
            rope_theta: json.rope_theta.or(rope.theta).unwrap_or(10_000.),
            rope_scaling: rope.scaling,
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

/// Qwen2 looks through a window from layer `max_window_layers` on, which is this many where the config does not say.
const QWEN2_WINDOW_FROM: usize = 28;

/// The window of all layers, if there is one. Some layers with one and others without are not computed.
fn window(json: &Json, qwen2: bool, what: &str) -> Result<Option<usize>> {
    // Qwen2 writes a window into every config and says beside it whether it is used.
    let window = match (qwen2, json.use_sliding_window) {
        (_, Some(false)) | (true, None) => None,
        _ => json.sliding_window,
    };
    let layers = json.num_hidden_layers;
    let mixed = |name: &str, found: String| {
        Error::config(what, format_args!("{name} gives {found} of {layers} layers a window: all or none are computed"))
    };
    let with_window = match (&json.layer_types, qwen2) {
        (Some(types), _) => {
            if types.len() != layers {
                let count = types.len();
                return Err(Error::config(what, format_args!("layer_types names {count} layers, there are {layers}")));
            }
            if let Some(other) = types.iter().find(|t| !matches!(t.as_str(), "full_attention" | "sliding_attention")) {
                return Err(Error::Unsupported {
                    what: "layer type",
                    found: other.clone(),
                    supported: "full_attention, sliding_attention",
                });
            }
            let count = types.iter().filter(|t| *t == "sliding_attention").count();
            if count > 0 && window.is_none() {
                return Err(Error::config(what, "layer_types has sliding_attention and no sliding_window is in use"));
            }
            count
        }
        (None, true) => layers.saturating_sub(json.max_window_layers.unwrap_or(QWEN2_WINDOW_FROM)),
        (None, false) => layers,
    };
    match with_window {
        _ if window.is_none() => Ok(None),
        0 => Ok(None),
        n if n == layers => Ok(window),
        n => Err(mixed(if json.layer_types.is_some() { "layer_types" } else { "max_window_layers" }, n.to_string())),
    }
}
