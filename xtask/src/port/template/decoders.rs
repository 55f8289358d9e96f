//! The decoders: prefill, decode steps with the cache, and a second piece of prompt after it.

use crate::check::{greedy, say, Check, Result};
use crate::models as ported;
use crate::weights::{Random, RandomWeights};
use candle_core::{DType, Device, Tensor};
use candle_lazy::candle;
use candle_lazy::exec::LazyTensor;
use candle_lazy::nn::models::CausalLmConfig;
use candle_lazy::nn::weights::Gguf;
use candle_lazy::nn::{ModelDir, RopeScaling, WeightFiles};
use candle_transformers::models as eager;
use serde_json::json;
use std::path::Path;

const VOCAB: usize = 89;

/// How many positions each step adds: a prefill, decoding, another piece of prompt, decoding. A step of one position takes
/// what the eager model said last.
const STEPS: [usize; 7] = [6, 1, 1, 3, 1, 1, 1];

/// Runs both models through the steps.
fn steps(
    check: &mut Check,
    name: &str,
    (seed, batch): (u64, usize),
    mut eager: impl FnMut(&Tensor, usize) -> candle_core::Result<Tensor>,
    mut ported: impl FnMut(&LazyTensor, usize) -> candle::Result<LazyTensor>,
) -> Result<()> {
    let mut random = Random::new(seed);
    let mut next = None;
    let mut position = 0;
    for (step, added) in STEPS.into_iter().enumerate() {
        let ids = match next.take() {
            Some(ids) if added == 1 => ids,
            _ => random.ids((batch, added), VOCAB)?,
        };
        let want = eager(&ids, position)?;
        let got = ported(&LazyTensor::from(&ids), position)?;
        check.compare(&format!("{name}, step {step}"), &want, &got)?;
        next = Some(greedy(&want)?);
        position += added;
    }
    Ok(())
}

/// Heads, heads of keys and values, head dim: plain, grouped, one for all.
const HEADS: [(usize, usize, usize); 4] = [(4, 4, 8), (4, 2, 8), (6, 2, 4), (3, 1, 10)];

pub fn llama(check: &mut Check) -> Result<()> {
    let scaling = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_type": "llama3",
    });
    for (seed, (heads, kv_heads, head_dim)) in HEADS.into_iter().enumerate() {
        let config = json!({
            "hidden_size": heads * head_dim, "intermediate_size": 44 + seed, "vocab_size": VOCAB,
            "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 48,
            "rope_scaling": if seed == 1 { scaling.clone() } else { json!(null) },
            "tie_word_embeddings": seed == 2,
        });
        let weights = RandomWeights { seed: seed as u64, biases: true, absent: &[] };
        let eager_config = serde_json::from_value::<eager::llama::LlamaConfig>(config.clone())?.into_config(false);
        let ported_config = serde_json::from_value::<ported::llama::LlamaConfig>(config)?.into_config(false);
        let model = eager::llama::Llama::load(weights.eager(), &eager_config)?;
        let lazy = ported::llama::Llama::load(weights.ported(), &ported_config)?;
        check.another_model();
        for cached in [true, false] {
            let mut cache = eager::llama::Cache::new(cached, DType::F32, &eager_config, &Device::Cpu)?;
            let mut lazy_cache = ported::llama::Cache::new(cached, DType::F32, &ported_config, &Device::Cpu)?;
            let name = format!("seed {seed}, {heads} heads on {kv_heads}, cache {cached}");
            steps(
                check,
                &name,
                (seed as u64, 1 + seed % 3),
                // without a cache, a step sees its own positions only
                |ids, at| model.forward(ids, if cached { at } else { 0 }, &mut cache),
                |ids, at| lazy.forward(ids, if cached { at } else { 0 }, &mut lazy_cache),
            )?;
        }
    }
    Ok(())
}

pub fn qwen2(check: &mut Check) -> Result<()> {
    for (seed, (heads, kv_heads, head_dim)) in HEADS.into_iter().enumerate() {
        let tied = seed % 2 == 1;
        let config = json!({
            "vocab_size": VOCAB, "hidden_size": heads * head_dim, "intermediate_size": 44 + seed,
            "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": 48, "sliding_window": if seed == 2 { 3 } else { 48 }, "max_window_layers": 2,
            "tie_word_embeddings": tied, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
            "use_sliding_window": false, "hidden_act": if seed == 3 { "gelu" } else { "silu" },
        });
        let absent: &[&str] = if tied { &["lm_head.weight"] } else { &[] };
        let weights = RandomWeights { seed: seed as u64, biases: seed != 2, absent };
        let eager_config: eager::qwen2::Config = serde_json::from_value(config.clone())?;
        let ported_config: ported::qwen2::Config = serde_json::from_value(config)?;
        let mut model = eager::qwen2::ModelForCausalLM::new(&eager_config, weights.eager())?;
        let mut lazy = ported::qwen2::ModelForCausalLM::new(&ported_config, weights.ported())?;
        check.another_model();
        let name = format!("seed {seed}, {heads} heads on {kv_heads}");
        for round in ["first", "cleared"] {
            let name = format!("{name}, {round}");
            let sizes = (seed as u64, 1 + seed % 3);
            steps(check, &name, sizes, |ids, at| model.forward(ids, at), |ids, at| lazy.forward(ids, at))?;
            model.clear_kv_cache();
            lazy.clear_kv_cache();
        }
        // the base model takes a mask of its own, 1 where a key is seen
        let mut base = eager::qwen2::Model::new(&eager_config, weights.eager())?;
        let mut lazy_base = ported::qwen2::Model::new(&ported_config, weights.ported())?;
        let ids = Random::new(seed as u64).ids((2, 5), VOCAB)?;
        let mask = Tensor::new(&[[1u8, 1, 1, 0, 1], [1, 0, 1, 1, 1]], &Device::Cpu)?;
        let want = base.forward(&ids, 0, Some(&mask))?;
        let got = lazy_base.forward(&LazyTensor::from(&ids), 0, Some(&LazyTensor::from(&mask)))?;
        check.compare(&format!("{name}, a mask"), &want, &got)?;
    }
    Ok(())
}

pub fn mistral(check: &mut Check) -> Result<()> {
    for (seed, (heads, kv_heads, head_dim)) in HEADS.into_iter().enumerate() {
        let config = json!({
            "vocab_size": VOCAB, "hidden_size": heads * head_dim, "intermediate_size": 44 + seed,
            "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": if seed == 1 { json!(12) } else { json!(null) },
            "hidden_act": if seed == 3 { "gelu" } else { "silu" },
            "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
            "sliding_window": if seed == 2 { json!(3) } else { json!(null) },
        });
        let weights = RandomWeights { seed: seed as u64, biases: true, absent: &[] };
        let eager_config: eager::mistral::Config = serde_json::from_value(config.clone())?;
        let ported_config: ported::mistral::Config = serde_json::from_value(config)?;
        let mut model = eager::mistral::Model::new(&eager_config, weights.eager())?;
        let mut lazy = ported::mistral::Model::new(&ported_config, weights.ported())?;
        check.another_model();
        for round in ["first", "cleared"] {
            let name = format!("seed {seed}, {heads} heads on {kv_heads}, {round}");
            let sizes = (seed as u64, 1 + seed % 3);
            steps(check, &name, sizes, |ids, at| model.forward(ids, at), |ids, at| lazy.forward(ids, at))?;
            model.clear_kv_cache();
            lazy.clear_kv_cache();
        }
    }
    Ok(())
}

const PROMPT: &str = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
const NEW_TOKENS: usize = 16;

/// The decoder in `dir`: a prompt and greedy tokens after it.
pub fn real_llama(check: &mut Check, dir: &Path) -> Result<()> {
    let dir = ModelDir::open(dir)?;
    let config = match dir.weights() {
        WeightFiles::Gguf(path) => Gguf::open(path)?.config().clone(),
        _ => CausalLmConfig::from_file(dir.file("config.json")?)?,
    };
    if config.qkv_bias || config.rope_scaling != RopeScaling::None {
        return Err("this test takes a Llama model without biases and without scaled positions".into());
    }
    let config = json!({
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    });
    let eager_config = serde_json::from_value::<eager::llama::LlamaConfig>(config.clone())?.into_config(false);
    let ported_config = serde_json::from_value::<ported::llama::LlamaConfig>(config)?.into_config(false);
    let vb = || dir.var_builder(DType::F32, &Device::Cpu);
    let model = eager::llama::Llama::load(vb()?, &eager_config)?;
    let lazy = ported::llama::Llama::load(vb()?.into(), &ported_config)?;
    check.another_model();
    let mut cache = eager::llama::Cache::new(true, DType::F32, &eager_config, &Device::Cpu)?;
    let mut lazy_cache = ported::llama::Cache::new(true, DType::F32, &ported_config, &Device::Cpu)?;
    let tokenizer = dir.tokenizer()?;
    let prompt = tokenizer.encode(PROMPT, true)?;
    let mut ids = Tensor::from_slice(&prompt, (1, prompt.len()), &Device::Cpu)?;
    let mut position = 0;
    let mut said = Vec::new();
    for step in 0..=NEW_TOKENS {
        let want = model.forward(&ids, position, &mut cache)?;
        let got = lazy.forward(&LazyTensor::from(&ids), position, &mut lazy_cache)?;
        check.compare(&format!("step {step}"), &want, &got)?;
        position += ids.dim(1)?;
        ids = greedy(&want)?;
        said.extend(ids.flatten_all()?.to_vec1::<u32>()?);
    }
    say(format_args!("llama, real weights: both say {:?}", tokenizer.decode(&said)?))
}
