//! Random weights, tiny models and comparisons.

use candle_core::{Device, Tensor};
use candle_lazy_nn::models::CausalLmConfig;
use candle_lazy_nn::{RopeScaling, VarBuilder};
use std::collections::HashMap;

pub(crate) type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

/// SplitMix64 (Steele et al. 2014): the same numbers on every machine.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in −1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        ((self.bits() >> 40) as f32 / (1u64 << 23) as f32) - 1.
    }

    pub(crate) fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.unit() * scale).collect()
    }

    pub(crate) fn tensor(&mut self, shape: &[usize], scale: f32) -> candle_core::Result<Tensor> {
        Tensor::from_vec(self.values(shape.iter().product(), scale), shape, &Device::Cpu)
    }

    pub(crate) fn ids(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| (self.bits() % vocab as u64) as u32).collect()
    }
}

pub(crate) type Vars = HashMap<String, Tensor>;

/// Random weights of these names and shapes; norms' scales lie around 1.
pub(crate) fn random_vars(shapes: &[(String, Vec<usize>)], seed: u64) -> candle_core::Result<Vars> {
    let mut rng = Rng::new(seed);
    let mut vars = Vars::new();
    for (name, shape) in shapes {
        let norm = name.to_lowercase().contains("norm") && (name.ends_with("weight") || name.ends_with("gamma"));
        let tensor = if norm { (rng.tensor(shape, 0.2)? + 1.)? } else { rng.tensor(shape, 0.35)? };
        vars.insert(name.clone(), tensor);
    }
    Ok(vars)
}

pub(crate) fn builder(vars: &Vars) -> VarBuilder<'static> {
    VarBuilder::from_tensors(vars.clone(), candle_core::DType::F32, &Device::Cpu)
}

/// Largest difference over the largest reference value.
pub(crate) fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "different lengths");
    let scale = want.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
    let diff = got.iter().zip(want).fold(0f64, |m, (g, w)| {
        let d = (f64::from(*g) - f64::from(*w)).abs();
        if d.is_nan() {
            f64::INFINITY
        } else {
            m.max(d)
        }
    });
    if diff == 0. {
        0.
    } else {
        diff / scale.max(f64::MIN_POSITIVE)
    }
}

/// Fails unless both tensors have one shape and differ by at most `tolerance`, relative to the largest value.
pub(crate) fn close(got: &Tensor, want: &Tensor, tolerance: f64) -> TestResult {
    assert_eq!(got.dims(), want.dims(), "different shapes");
    let got = got.flatten_all()?.to_vec1::<f32>()?;
    let want = want.flatten_all()?.to_vec1::<f32>()?;
    let error = relative(&got, &want);
    assert!(error <= tolerance, "relative error {error:e} > {tolerance:e}");
    Ok(())
}

/// A tiny decoder: grouped heads, three blocks.
pub(crate) fn tiny_config() -> CausalLmConfig {
    CausalLmConfig {
        vocab_size: 61,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 4,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        qkv_bias: false,
        out_bias: false,
        mlp_bias: false,
        sliding_window: None,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

/// Names and shapes of a decoder's weights.
pub(crate) fn decoder_shapes(config: &CausalLmConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![config.vocab_size, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
    ];
    if !config.tie_word_embeddings {
        shapes.push(("lm_head.weight".to_string(), vec![config.vocab_size, hidden]));
    }
    for layer in 0..config.num_hidden_layers {
        let mut push = |name: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{name}"), shape));
        push("input_layernorm.weight", vec![hidden]);
        push("post_attention_layernorm.weight", vec![hidden]);
        for (name, out) in [("q", q), ("k", kv), ("v", kv)] {
            push(&format!("self_attn.{name}_proj.weight"), vec![out, hidden]);
            if config.qkv_bias {
                push(&format!("self_attn.{name}_proj.bias"), vec![out]);
            }
        }
        push("self_attn.o_proj.weight", vec![hidden, q]);
        push("mlp.gate_proj.weight", vec![ffn, hidden]);
        push("mlp.up_proj.weight", vec![ffn, hidden]);
        push("mlp.down_proj.weight", vec![hidden, ffn]);
    }
    shapes
}

pub(crate) fn decoder_vars(config: &CausalLmConfig, seed: u64) -> candle_core::Result<Vars> {
    random_vars(&decoder_shapes(config), seed)
}

/// The ids as a (1, s) tensor.
pub(crate) fn row(ids: &[u32]) -> candle_core::Result<Tensor> {
    Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu)
}

/// The message of what must fail.
#[allow(clippy::expect_used)] // the test fails so
pub(crate) fn text<T>(result: candle_lazy_nn::Result<T>) -> String {
    result.err().expect("an error").to_string()
}
