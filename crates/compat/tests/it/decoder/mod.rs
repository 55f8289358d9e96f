//! A decoder in f64 by plain loops, one sequence at a time, and random weights for it.
#![allow(dead_code)] // each test file uses its part

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_compat::models::ModelConfig;
use candle_lazy_nn::VarBuilder;
use std::collections::HashMap;

pub(crate) type Rows = Vec<Vec<f64>>;
pub(crate) type Weights = HashMap<String, Tensor>;

/// Two layers with four heads of six dims over two key/value heads.
pub(crate) fn config() -> ModelConfig {
    ModelConfig {
        architectures: vec!["Qwen2ForCausalLM".to_string()],
        vocab_size: 19,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some(2),
        max_position_embeddings: 40,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        torch_dtype: None,
    }
}

/// Values in ±scale without a pattern that a wrong layout would keep.
pub(crate) fn random(shape: &[usize], seed: usize, scale: f64) -> Tensor {
    let n: usize = shape.iter().product();
    let value = |i: usize| (((i * 7919 + seed * 104_729 + 13) % 2003) as f64 / 1001.0 - 1.0) * scale;
    Tensor::from_vec((0..n).map(|i| value(i) as f32).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
}

/// Names and shapes of all weights of a config.
pub(crate) fn shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, ffn, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let kv = config.num_kv_heads() * config.head_dim();
    let mut all = vec![("model.embed_tokens.weight".to_string(), vec![vocab, hidden])];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: &[usize]| all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        for (name, out) in [("q", hidden), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{name}_proj.weight"), &[out, hidden]);
            add(&format!("self_attn.{name}_proj.bias"), &[out]);
        }
        add("self_attn.o_proj.weight", &[hidden, hidden]);
        add("mlp.gate_proj.weight", &[ffn, hidden]);
        add("mlp.up_proj.weight", &[ffn, hidden]);
        add("mlp.down_proj.weight", &[hidden, ffn]);
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
    }
    all.push(("model.norm.weight".to_string(), vec![hidden]));
    all.push(("lm_head.weight".to_string(), vec![vocab, hidden]));
    all
}

/// Random weights; norms' scales lie around 1.
pub(crate) fn weights(config: &ModelConfig) -> Weights {
    let make = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
        let norm = name.contains("norm");
        let tensor = random(&shape, seed + 1, if norm { 0.2 } else { 0.4 });
        (name, if norm { (tensor + 1.0).unwrap() } else { tensor })
    };
    shapes(config).into_iter().enumerate().map(make).collect()
}

pub(crate) fn builder(weights: &Weights) -> VarBuilder<'static> {
    VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu)
}

/// The same weights as variables, and a builder of them.
pub(crate) fn variables(weights: &Weights) -> (HashMap<String, Var>, VarBuilder<'static>) {
    let vars: HashMap<String, Var> =
        weights.iter().map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap())).collect();
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    (vars, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

pub(crate) fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A matrix as rows.
pub(crate) fn rows(tensor: &Tensor) -> Rows {
    let width = tensor.dims().last().copied().unwrap();
    flat(tensor).chunks(width).map(<[f64]>::to_vec).collect()
}

/// No value further from the reference than `bound`, relative where values are above 1.
#[track_caller]
pub(crate) fn assert_near(got: &Tensor, want: &[f64], bound: f64) {
    let got = flat(got);
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= bound * w.abs().max(1.0), "{i}: {g} against {w}, {bound} allowed");
    }
}

/// x·Wᵀ + b.
pub(crate) fn linear(x: &Rows, weight: &Tensor, bias: Option<&Tensor>) -> Rows {
    let (weight, bias) = (rows(weight), bias.map(flat));
    let one = |x: &Vec<f64>, (at, w): (usize, &Vec<f64>)| {
        let product: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
        product + bias.as_ref().map_or(0.0, |bias| bias[at])
    };
    x.iter().map(|x| weight.iter().enumerate().map(|w| one(x, w)).collect()).collect()
}

pub(crate) fn rms_norm(x: &Rows, weight: &Tensor, eps: f64) -> Rows {
    let weight = flat(weight);
    let one = |x: &Vec<f64>| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(&weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
    };
    x.iter().map(one).collect()
}

/// One head's vector turned by the angles of `position`: pairs (i, i + d/2), angle position·theta^(−2i/d).
pub(crate) fn rotated(x: &[f64], position: usize, theta: f64) -> Vec<f64> {
    let (d, half) = (x.len(), x.len() / 2);
    let mut y = vec![0.0; d];
    for i in 0..half {
        let (sin, cos) = (position as f64 * theta.powf(-2.0 * i as f64 / d as f64)).sin_cos();
        y[i] = x[i] * cos - x[i + half] * sin;
        y[i + half] = x[i + half] * cos + x[i] * sin;
    }
    y
}

/// Attention of rows (s, hidden) with the weights under `prefix`; `mask` (s, s) is added to every head's scores.
pub(crate) fn attention(x: &Rows, weights: &Weights, prefix: &str, config: &ModelConfig, mask: Option<&Rows>) -> Rows {
    let (heads, d) = (config.num_attention_heads, config.head_dim());
    let group = heads / config.num_kv_heads();
    let weight = |name: &str| &weights[&format!("{prefix}.{name}")];
    let project = |name: &str| linear(x, weight(&format!("{name}.weight")), Some(weight(&format!("{name}.bias"))));
    let (q, k, v) = (project("q_proj"), project("k_proj"), project("v_proj"));
    let head = |rows: &Rows, at: usize, head: usize| rows[at][head * d..(head + 1) * d].to_vec();
    let mut joined: Rows = vec![Vec::new(); x.len()];
    for (i, out) in joined.iter_mut().enumerate() {
        for h in 0..heads {
            let query = rotated(&head(&q, i, h), i, config.rope_theta);
            let score = |j: usize| {
                let key = rotated(&head(&k, j, h / group), j, config.rope_theta);
                let product: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                product / (d as f64).sqrt() + mask.map_or(0.0, |mask| mask[i][j])
            };
            let scores: Vec<f64> = (0..x.len()).map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            let weighted = |dim: usize| -> f64 {
                let term = |(j, s): (usize, &f64)| (s - largest).exp() / sum * v[j][h / group * d + dim];
                scores.iter().enumerate().map(term).sum()
            };
            out.extend((0..d).map(weighted));
        }
    }
    linear(&joined, weight("o_proj.weight"), None)
}

/// down(silu(gate(x))·up(x)) with the weights under `prefix`.
pub(crate) fn swiglu(x: &Rows, weights: &Weights, prefix: &str) -> Rows {
    let weight = |name: &str| &weights[&format!("{prefix}.{name}_proj.weight")];
    let (gate, up) = (linear(x, weight("gate"), None), linear(x, weight("up"), None));
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let product = |(gate, up): (&Vec<f64>, &Vec<f64>)| gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect();
    linear(&gate.iter().zip(&up).map(product).collect(), weight("down"), None)
}

fn added(a: &Rows, b: &Rows) -> Rows {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
}

/// One layer of the decoder.
pub(crate) fn layer(x: &Rows, weights: &Weights, prefix: &str, config: &ModelConfig, mask: Option<&Rows>) -> Rows {
    let norm = |x: &Rows, name: &str| rms_norm(x, &weights[&format!("{prefix}.{name}.weight")], config.rms_norm_eps);
    let attended = attention(&norm(x, "input_layernorm"), weights, &format!("{prefix}.self_attn"), config, mask);
    let x = added(x, &attended);
    added(&x, &swiglu(&norm(&x, "post_attention_layernorm"), weights, &format!("{prefix}.mlp")))
}

/// Logits (s, vocab) of one sequence.
pub(crate) fn logits(ids: &[u32], weights: &Weights, config: &ModelConfig, mask: Option<&Rows>) -> Rows {
    let table = rows(&weights["model.embed_tokens.weight"]);
    let mut x: Rows = ids.iter().map(|&id| table[id as usize].clone()).collect();
    for index in 0..config.num_hidden_layers {
        x = layer(&x, weights, &format!("model.layers.{index}"), config, mask);
    }
    let x = rms_norm(&x, &weights["model.norm.weight"], config.rms_norm_eps);
    linear(&x, &weights["lm_head.weight"], None)
}

/// 0 on and below the diagonal, −∞ above.
pub(crate) fn causal(s: usize) -> Rows {
    (0..s).map(|i| (0..s).map(|j| if j > i { f64::NEG_INFINITY } else { 0.0 }).collect()).collect()
}

/// A mask as a tensor of the given shape.
pub(crate) fn mask_tensor(mask: &Rows, shape: &[usize]) -> Tensor {
    let values: Vec<f32> = mask.concat().into_iter().map(|v| v as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}
