//! GGUF files written by Candle's writer, read by ours.

use crate::common::{builder, close, decoder_vars, row, tiny_config, Rng, TestResult, Vars};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::models::{CausalLm, CausalLmConfig};
use candle_lazy_nn::weights::Gguf;
use candle_lazy_nn::{Error, RopeScaling};
use std::path::{Path, PathBuf};

/// What a file is made of; tests change it before it is written.
pub(crate) struct Parts {
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<(String, QTensor)>,
}

impl Parts {
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.to_string(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| name != key);
    }

    pub(crate) fn add(&mut self, name: &str, tensor: &Tensor, dtype: GgmlDType) -> candle_core::Result<()> {
        self.tensors.push((name.to_string(), QTensor::quantize(tensor, dtype)?));
        Ok(())
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<PathBuf, Box<dyn std::error::Error>> {
        let path = dir.join("model.gguf");
        let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
        let metadata: Vec<(&str, &Value)> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<(&str, &QTensor)> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut file, &metadata, &tensors)?;
        Ok(path)
    }
}

fn gguf_name(name: &str) -> String {
    let mut name = name.to_string();
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(from, to);
    }
    name
}

/// What llama.cpp's converter does to q and k: the two halves of each head's rows become neighbours.
fn permute(tensor: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let shape = tensor.shape().clone();
    let rows = shape.dims()[0];
    tensor.reshape((heads, 2, rows / heads / 2, ()))?.transpose(1, 2)?.contiguous()?.reshape(shape)
}

/// A file of these weights as the converter of `architecture` writes it, all matrices stored as `dtype`.
pub(crate) fn parts(
    config: &CausalLmConfig,
    vars: &Vars,
    architecture: &str,
    dtype: GgmlDType,
) -> candle_core::Result<Parts> {
    let size = |n: usize| Value::U32(n as u32);
    let key = |name: &str| format!("{architecture}.{name}");
    let mut parts = Parts {
        metadata: vec![
            ("general.architecture".to_string(), Value::String(architecture.to_string())),
            (key("block_count"), size(config.num_hidden_layers)),
            (key("context_length"), size(config.max_position_embeddings)),
            (key("embedding_length"), size(config.hidden_size)),
            (key("feed_forward_length"), size(config.intermediate_size)),
            (key("attention.head_count"), size(config.num_attention_heads)),
            (key("attention.head_count_kv"), size(config.num_key_value_heads)),
            (key("attention.layer_norm_rms_epsilon"), Value::F32(config.rms_norm_eps as f32)),
            (key("rope.freq_base"), Value::F32(config.rope_theta)),
            (key("rope.dimension_count"), size(config.head_dim)),
            ("tokenizer.ggml.bos_token_id".to_string(), Value::U32(1)),
            ("tokenizer.ggml.eos_token_id".to_string(), Value::U32(2)),
        ],
        tensors: Vec::new(),
    };
    let mut names: Vec<&String> = vars.keys().collect();
    names.sort();
    for name in names {
        let tensor = &vars[name];
        let tensor = match (architecture, name) {
            ("llama", name) if name.contains("q_proj") => permute(tensor, config.num_attention_heads)?,
            ("llama", name) if name.contains("k_proj") => permute(tensor, config.num_key_value_heads)?,
            _ => tensor.clone(),
        };
        let dtype = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
        parts.add(&gguf_name(name), &tensor, dtype)?;
    }
    Ok(parts)
}

/// The tiny decoder with widths that blocks of 32 divide.
pub(crate) fn wide_config() -> CausalLmConfig {
    CausalLmConfig {
        hidden_size: 32,
        intermediate_size: 64,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        ..tiny_config()
    }
}

#[test]
fn config_and_weights_come_back() -> TestResult {
    let dir = tempfile::tempdir()?;
    for tie_word_embeddings in [false, true] {
        let config = CausalLmConfig { tie_word_embeddings, rms_norm_eps: f64::from(1e-5f32), ..wide_config() };
        let vars = decoder_vars(&config, 1)?;
        let gguf = Gguf::open(parts(&config, &vars, "llama", GgmlDType::F32)?.write(dir.path())?)?;
        assert_eq!(gguf.config(), &config);
        assert_eq!(gguf.architecture(), "llama");
        assert_eq!(gguf.tensors().count(), vars.len());
        let vb = gguf.var_builder(DType::F32, &Device::Cpu);
        for (name, tensor) in &vars {
            close(&vb.get(tensor.shape(), name)?, tensor, 0.)?;
        }
    }
    Ok(())
}

#[test]
fn every_storage_is_dequantised_as_candle_does() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = CausalLmConfig {
        hidden_size: 256,
        intermediate_size: 256,
        num_hidden_layers: 1,
        head_dim: 64,
        ..wide_config()
    };
    let vars = decoder_vars(&config, 2)?;
    use GgmlDType::{BF16, F16, Q2K, Q3K, Q4K, Q4_0, Q4_1, Q5K, Q5_0, Q5_1, Q6K, Q8_0};
    for dtype in [F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
        let parts = parts(&config, &vars, "llama", dtype)?;
        let vb = Gguf::open(parts.write(dir.path())?)?.var_builder(DType::F32, &Device::Cpu);
        for name in ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"] {
            let stored = parts.tensors.iter().find(|(stored, _)| *stored == gguf_name(name)).ok_or("not stored")?;
            let mut want = stored.1.dequantize(&Device::Cpu)?;
            if name.contains("q_proj") {
                // Permuting with halves and head width exchanged undoes the converter's permutation.
                let (heads, half) = (config.num_attention_heads, config.head_dim / 2);
                let shape = want.shape().clone();
                want = want.reshape((heads, half, 2, ()))?.transpose(1, 2)?.contiguous()?.reshape(shape)?;
            }
            close(&vb.get(want.shape(), name)?, &want, 0.)?;
        }
    }
    Ok(())
}

fn logits(model: &CausalLm) -> Result<Tensor, Box<dyn std::error::Error>> {
    let ids = Rng::new(3).ids(9, model.config().vocab_size);
    Ok(model.forward(&row(&ids)?.into(), &mut model.new_cache(16)?)?.eval()?)
}

#[test]
fn a_llama_from_gguf_computes_what_its_weights_do() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = wide_config();
    let vars = decoder_vars(&config, 4)?;
    let gguf = Gguf::open(parts(&config, &vars, "llama", GgmlDType::F32)?.write(dir.path())?)?;
    let from_file = CausalLm::load(gguf.var_builder(DType::F32, &Device::Cpu), gguf.config())?;
    let direct = CausalLm::load(builder(&vars), gguf.config())?;
    close(&logits(&from_file)?, &logits(&direct)?, 0.)
}

#[test]
fn a_qwen2_from_gguf_keeps_its_rows_and_biases() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = CausalLmConfig { qkv_bias: true, ..wide_config() };
    let vars = decoder_vars(&config, 5)?;
    let gguf = Gguf::open(parts(&config, &vars, "qwen2", GgmlDType::F32)?.write(dir.path())?)?;
    assert!(gguf.config().qkv_bias);
    let vb = gguf.var_builder(DType::F32, &Device::Cpu);
    for (name, tensor) in &vars {
        close(&vb.get(tensor.shape(), name)?, tensor, 0.)?;
    }
    let from_file = CausalLm::load(vb, gguf.config())?;
    close(&logits(&from_file)?, &logits(&CausalLm::load(builder(&vars), gguf.config())?)?, 0.)
}

#[test]
fn permuted_biases_of_a_llama_are_put_back() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = CausalLmConfig { qkv_bias: true, ..wide_config() };
    let vars = decoder_vars(&config, 6)?;
    let gguf = Gguf::open(parts(&config, &vars, "llama", GgmlDType::F32)?.write(dir.path())?)?;
    let vb = gguf.var_builder(DType::F32, &Device::Cpu);
    let name = "model.layers.1.self_attn.k_proj.bias";
    close(&vb.get(16, name)?, &vars[name], 0.)
}

#[test]
fn half_precision_is_made_on_the_way() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = wide_config();
    let vars = decoder_vars(&config, 7)?;
    let gguf = Gguf::open(parts(&config, &vars, "llama", GgmlDType::F32)?.write(dir.path())?)?;
    let got = gguf.var_builder(DType::BF16, &Device::Cpu).get((61, 32), "model.embed_tokens.weight")?;
    assert_eq!(got.dtype(), DType::BF16);
    let want = vars["model.embed_tokens.weight"].to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    close(&got.to_dtype(DType::F32)?, &want, 0.)
}

#[test]
fn frequency_factors_and_linear_scaling_are_read() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = wide_config();
    let vars = decoder_vars(&config, 8)?;
    let mut with_factors = parts(&config, &vars, "llama", GgmlDType::F32)?;
    with_factors.add("rope_freqs.weight", &Tensor::new(&[1f32, 2., 4., 8.], &Device::Cpu)?, GgmlDType::F32)?;
    let gguf = Gguf::open(with_factors.write(dir.path())?)?;
    assert_eq!(gguf.config().rope_scaling, RopeScaling::Factors(vec![1., 2., 4., 8.]));
    let model = CausalLm::load(gguf.var_builder(DType::F32, &Device::Cpu), gguf.config())?;
    assert!(
        crate::common::relative(
            &logits(&model)?.flatten_all()?.to_vec1::<f32>()?,
            &logits(&CausalLm::load(builder(&vars), &config)?)?.flatten_all()?.to_vec1::<f32>()?
        ) > 1e-4
    );
    let mut linear = parts(&config, &vars, "llama", GgmlDType::F32)?;
    linear.set("llama.rope.scaling.type", Value::String("linear".into()));
    linear.set("llama.rope.scaling.factor", Value::F32(4.));
    assert_eq!(Gguf::open(linear.write(dir.path())?)?.config().rope_scaling, RopeScaling::Linear { factor: 4. });
    Ok(())
}

#[test]
fn what_is_missing_or_misshapen_is_named_with_the_file() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = wide_config();
    let vars = decoder_vars(&config, 9)?;
    let mut lacking = parts(&config, &vars, "llama", GgmlDType::F32)?;
    lacking.tensors.retain(|(name, _)| name != "blk.1.ffn_up.weight");
    let gguf = Gguf::open(lacking.write(dir.path())?)?;
    let error = CausalLm::load(gguf.var_builder(DType::F32, &Device::Cpu), gguf.config()).map(|_| ());
    assert!(
        matches!(&error, Err(Error::MissingTensor { name, file: Some(_) }) if name == "model.layers.1.mlp.up_proj.weight"),
        "{error:?}"
    );
    let mut misshapen = parts(&config, &vars, "llama", GgmlDType::F32)?;
    misshapen.set("llama.feed_forward_length", Value::U32(96));
    let gguf = Gguf::open(misshapen.write(dir.path())?)?;
    let error = CausalLm::load(gguf.var_builder(DType::F32, &Device::Cpu), gguf.config()).map(|_| ());
    assert!(matches!(&error, Err(Error::TensorShape { name, .. }) if name.contains("gate_proj")), "{error:?}");
    Ok(())
}
