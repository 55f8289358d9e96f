//! The decoder of candle-transformers that computes what a config of ours describes.

use crate::Result;
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::models::CausalLmConfig;
use candle_lazy_nn::{ModelDir, RopeScaling};
use candle_transformers::models::{llama, mistral, qwen2};

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// No biases; scaled positions.
    Llama,
    /// Biases on q, k and v.
    Qwen2,
    /// No biases; a head size of its own.
    Mistral,
}

/// The twin of a config, or why there is none.
///
/// A sliding window is no reason: it changes nothing as long as the texts are no longer than it.
pub(super) fn kind(config: &CausalLmConfig) -> std::result::Result<Kind, String> {
    if config.out_bias || config.mlp_bias {
        return Err("no decoder of candle-transformers has biases on o_proj or in the MLP".into());
    }
    let split = config.head_dim * config.num_attention_heads == config.hidden_size;
    match (&config.rope_scaling, config.qkv_bias, split) {
        (RopeScaling::None, true, true) => Ok(Kind::Qwen2),
        (_, true, true) => Err("candle-transformers' qwen2 has no scaled positions".into()),
        (_, true, false) => Err("candle-transformers' qwen2 has no head size of its own".into()),
        (RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. }, false, true) => Ok(Kind::Llama),
        (RopeScaling::None, false, false) => Ok(Kind::Mistral),
        (_, false, false) => Err("candle-transformers' mistral has no scaled positions".into()),
        (_, false, true) => Err("candle-transformers' llama has no divisor per frequency".into()),
    }
}

fn scaling(scaling: &RopeScaling) -> Option<llama::Llama3RopeConfig> {
    let (factor, low, high, original) = match scaling {
        // with a context of 0 every wavelength is a long one, and all frequencies are divided by the factor
        RopeScaling::Linear { factor } => (*factor, 1., 1., 0),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            (*factor, *low_freq_factor, *high_freq_factor, *original_context)
        }
        _ => return None,
    };
    Some(llama::Llama3RopeConfig {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
        rope_type: llama::Llama3RopeType::Llama3,
    })
}

fn llama_config(config: &CausalLmConfig) -> llama::Config {
    llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta,
        bos_token_id: config.bos_token_id,
        eos_token_id: None,
        rope_scaling: scaling(&config.rope_scaling),
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
    }
}

fn qwen2_config(config: &CausalLmConfig) -> qwen2::Config {
    qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        // the mask of a prompt, at every position
        sliding_window: config.max_position_embeddings,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: f64::from(config.rope_theta),
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: candle_nn::Activation::Silu,
    }
}

fn mistral_config(config: &CausalLmConfig) -> mistral::Config {
    mistral::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        head_dim: Some(config.head_dim),
        num_key_value_heads: config.num_key_value_heads,
        hidden_act: candle_nn::Activation::Silu,
        max_position_embeddings: config.max_position_embeddings,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: f64::from(config.rope_theta),
        sliding_window: None,
        use_flash_attn: false,
    }
}

enum Model {
    Llama { model: llama::Llama, config: llama::Config, cache: Option<llama::Cache> },
    Qwen2(qwen2::ModelForCausalLM),
    Mistral(mistral::Model),
}

/// An eager decoder and the text that it has read so far.
pub(super) struct Twin {
    model: Model,
    dtype: DType,
    position: usize,
}

/// A place in a text.
pub(super) struct Mark {
    cache: llama::Cache,
    position: usize,
}

impl Twin {
    /// Loads the twin of a config that a lazy model was loaded with.
    pub(super) fn load(kind: Kind, dir: &ModelDir, config: &CausalLmConfig, dtype: DType) -> Result<Self> {
        let vb = dir.var_builder(dtype, &Device::Cpu)?;
        let tied = |name: &str| {
            let name = if name == "lm_head.weight" { "model.embed_tokens.weight" } else { name };
            name.to_string()
        };
        let model = match kind {
            Kind::Llama => {
                let config = llama_config(config);
                Model::Llama { model: llama::Llama::load(vb, &config)?, config, cache: None }
            }
            Kind::Qwen2 => Model::Qwen2(qwen2::ModelForCausalLM::new(&qwen2_config(config), vb)?),
            Kind::Mistral => {
                let vb = if config.tie_word_embeddings { vb.rename_f(tied) } else { vb };
                Model::Mistral(mistral::Model::new(&mistral_config(config), vb)?)
            }
        };
        Ok(Self { model, dtype, position: 0 })
    }

    /// Forgets the text and makes ready for a new one.
    pub(super) fn begin(&mut self) -> Result<()> {
        self.end();
        if let Model::Llama { config, cache, .. } = &mut self.model {
            *cache = Some(llama::Cache::new(true, self.dtype, config, &Device::Cpu)?);
        }
        Ok(())
    }

    /// The text so far, to come back to; `None` where candle-transformers keeps it to itself.
    pub(super) fn mark(&self) -> Option<Mark> {
        match &self.model {
            Model::Llama { cache, .. } => cache.clone().map(|cache| Mark { cache, position: self.position }),
            Model::Qwen2(_) | Model::Mistral(_) => None,
        }
    }

    /// Comes back to a text: nothing is copied, since eager Candle's cache makes new tensors when it grows.
    pub(super) fn back(&mut self, mark: &Mark) {
        if let Model::Llama { cache, .. } = &mut self.model {
            *cache = Some(mark.cache.clone());
            self.position = mark.position;
        }
    }

    /// Forgets the text.
    pub(super) fn end(&mut self) {
        self.position = 0;
        match &mut self.model {
            Model::Llama { cache, .. } => *cache = None,
            Model::Qwen2(model) => model.clear_kv_cache(),
            Model::Mistral(model) => model.clear_kv_cache(),
        }
    }

    /// The logits after the new ids.
    pub(super) fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        Ok(self.forward(ids)?.flatten_all()?.to_vec1()?)
    }

    /// As [`Twin::logits`], as Candle gives them: (1, vocabulary).
    pub(super) fn forward(&mut self, ids: &[u32]) -> Result<Tensor> {
        let input = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match &mut self.model {
            Model::Llama { model, config, cache } => {
                let cache = match cache {
                    Some(cache) => cache,
                    None => cache.insert(llama::Cache::new(true, self.dtype, config, &Device::Cpu)?),
                };
                model.forward(&input, self.position, cache)?
            }
            Model::Qwen2(model) => model.forward(&input, self.position)?,
            Model::Mistral(model) => model.forward(&input, self.position)?,
        };
        self.position += ids.len();
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl Fn(&mut CausalLmConfig)) -> CausalLmConfig {
        let json = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}"#;
        let mut config = CausalLmConfig::from_json(json).unwrap();
        change(&mut config);
        config
    }

    #[test]
    fn a_config_gets_the_twin_that_computes_it() {
        let llama3 =
            RopeScaling::Llama3 { factor: 8., low_freq_factor: 1., high_freq_factor: 4., original_context: 16 };
        assert_eq!(kind(&config(|_| ())), Ok(Kind::Llama));
        assert_eq!(kind(&config(|c| c.rope_scaling = llama3.clone())), Ok(Kind::Llama));
        assert_eq!(kind(&config(|c| c.rope_scaling = RopeScaling::Linear { factor: 2. })), Ok(Kind::Llama));
        assert_eq!(kind(&config(|c| c.qkv_bias = true)), Ok(Kind::Qwen2));
        assert_eq!(kind(&config(|c| c.head_dim = 32)), Ok(Kind::Mistral));
        assert_eq!(kind(&config(|c| c.sliding_window = Some(4))), Ok(Kind::Llama));
    }

    #[test]
    fn a_config_without_a_twin_says_why() {
        for (change, why) in [
            (Box::new(|c: &mut CausalLmConfig| c.out_bias = true) as Box<dyn Fn(&mut CausalLmConfig)>, "o_proj"),
            (Box::new(|c| c.mlp_bias = true), "MLP"),
            (Box::new(|c| (c.qkv_bias, c.head_dim) = (true, 4)), "head size"),
            (Box::new(|c| (c.qkv_bias, c.rope_scaling) = (true, RopeScaling::Linear { factor: 2. })), "scaled"),
            (Box::new(|c| (c.head_dim, c.rope_scaling) = (4, RopeScaling::Linear { factor: 2. })), "scaled"),
            (Box::new(|c| c.rope_scaling = RopeScaling::Factors(vec![1.; 4])), "per frequency"),
        ] {
            let error = kind(&config(change)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
