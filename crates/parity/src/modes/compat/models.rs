//! `models`: rotary embedding, attention, feed-forward block, and the decoder with an adapter on every projection.

use super::ops::{product, softmax};
use super::{Call, Dtypes};
use candle_core::{DType, Result, Tensor, D};
use candle_lazy_compat::models::transformer::{Attention, RotaryEmbedding, MLP};
use candle_lazy_compat::models::{ModelConfig, Qwen};
use candle_lazy_compat::training::{ApplyAdapter, LoRAAdapter, LoRAAdapterConfig, TargetModule};
use candle_lazy_compat::Result as Compat;
use candle_nn::VarBuilder;
use std::collections::HashMap;
use std::sync::Arc;

const THETA: f64 = 100.0;
const POSITIONS: usize = 8;
const HIDDEN: usize = 8;
const FFN: usize = 12;
const HEADS: usize = 2;
const HEAD_DIM: usize = 4;
const VOCAB: usize = 7;
const NORM_EPS: f64 = 1e-3;
const RANK: usize = 2;
/// alpha / rank.
const SCALING: f64 = 1.5;

fn builder(names: &[&str], tensors: &[Tensor]) -> VarBuilder<'static> {
    let map: HashMap<String, Tensor> =
        names.iter().map(|name| (*name).to_string()).zip(tensors.iter().cloned()).collect();
    let dtype = tensors.first().map_or(DType::F32, Tensor::dtype);
    VarBuilder::from_tensors(map, dtype, &candle_core::Device::Cpu)
}

/// Half-split rotation of (batch, s, heads, head dim), positions from 0 (Su et al. 2021, arXiv:2104.09864).
fn rope(x: &Tensor) -> Result<Tensor> {
    let (_, s, _, d) = x.dims4()?;
    let half = d / 2;
    let angle = |at: usize| (at / half) as f64 / THETA.powf(2.0 * (at % half) as f64 / d as f64);
    let table = |f: fn(f64) -> f64| {
        let numbers: Vec<f64> = (0..s * half).map(|at| f(angle(at))).collect();
        Tensor::from_vec(numbers, (s, 1, half), x.device())?.to_dtype(x.dtype())
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 3)
}

fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    product(x, &w.t()?.contiguous()?)
}

/// What attention hands to its output projection, (batch, s, hidden): one K/V head for all query heads.
fn context(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let (b, s, _) = q.dims3()?;
    let split = |x: &Tensor, heads: usize| x.reshape((b, s, heads, HEAD_DIM));
    let q = rope(&split(q, HEADS)?)?.transpose(1, 2)?.contiguous()?;
    let k = rope(&split(k, 1)?)?.transpose(1, 2)?.contiguous()?;
    let v = split(v, 1)?.transpose(1, 2)?.contiguous()?;
    let scores = (q.broadcast_matmul(&k.t()?.contiguous()?)? / (HEAD_DIM as f64).sqrt())?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?,
        None => scores,
    };
    softmax(&scores, 3)?.broadcast_matmul(&v)?.transpose(1, 2)?.reshape((b, s, HIDDEN))
}

/// A bias on the scores of three positions, not causal.
fn bias(x: &Tensor) -> Result<Tensor> {
    Tensor::new(&[[0f32, -1.0, 0.5], [0.25, 0.0, -3.0], [1.0, 0.0, 0.0]], x.device())?.unsqueeze(0)?.unsqueeze(0)
}

const ATTENTION: &[&str] =
    &["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "o_proj.weight"];
const ATTENTION_INPUTS: &[&[usize]] = &[
    &[2, 3, HIDDEN],
    &[HIDDEN, HIDDEN],
    &[HIDDEN],
    &[HEAD_DIM, HIDDEN],
    &[HEAD_DIM],
    &[HEAD_DIM, HIDDEN],
    &[HEAD_DIM],
    &[HIDDEN, HIDDEN],
];

fn attend(x: &[Tensor], masked: bool) -> Compat<Vec<Tensor>> {
    let vb = builder(ATTENTION, &x[1..]);
    let attention = Attention::new(HIDDEN, HEADS, Some(1), POSITIONS, THETA, &vb)?;
    let mask = if masked { Some(bias(&x[0])?) } else { None };
    Ok(vec![attention.forward(&x[0], mask.as_ref())?])
}

fn attended(x: &[Tensor], masked: bool) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let mask = if masked { Some(bias(&x[0])?) } else { None };
    let project = |w: usize| linear(&x[0], &x[w])?.broadcast_add(&x[w + 1]);
    let context = context(&project(1)?, &project(3)?, &project(5)?, mask.as_ref())?;
    Ok((vec![linear(&context, &x[7])?], vec![linear(&context.abs()?, &x[7].abs()?)?]))
}

const PROJECTIONS: [TargetModule; 7] = [
    TargetModule::QProj,
    TargetModule::KProj,
    TargetModule::VProj,
    TargetModule::OProj,
    TargetModule::GateProj,
    TargetModule::UpProj,
    TargetModule::DownProj,
];

const QWEN: &[&str] = &[
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.k_proj.bias",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.self_attn.v_proj.bias",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
];
/// As many as [`QWEN`], then A and B of each of [`PROJECTIONS`].
const QWEN_INPUTS: &[&[usize]] = &[
    &[VOCAB, HIDDEN],
    &[HIDDEN],
    &[HIDDEN, HIDDEN],
    &[HIDDEN],
    &[HEAD_DIM, HIDDEN],
    &[HEAD_DIM],
    &[HEAD_DIM, HIDDEN],
    &[HEAD_DIM],
    &[HIDDEN, HIDDEN],
    &[HIDDEN],
    &[FFN, HIDDEN],
    &[FFN, HIDDEN],
    &[HIDDEN, FFN],
    &[HIDDEN],
    &[VOCAB, HIDDEN],
    &[HIDDEN, RANK],
    &[RANK, HIDDEN],
    &[HIDDEN, RANK],
    &[RANK, HEAD_DIM],
    &[HIDDEN, RANK],
    &[RANK, HEAD_DIM],
    &[HIDDEN, RANK],
    &[RANK, HIDDEN],
    &[HIDDEN, RANK],
    &[RANK, FFN],
    &[HIDDEN, RANK],
    &[RANK, FFN],
    &[FFN, RANK],
    &[RANK, HIDDEN],
];

fn config() -> ModelConfig {
    ModelConfig {
        architectures: Vec::new(),
        vocab_size: VOCAB,
        hidden_size: HIDDEN,
        intermediate_size: FFN,
        num_hidden_layers: 1,
        num_attention_heads: HEADS,
        num_key_value_heads: Some(1),
        max_position_embeddings: POSITIONS,
        rms_norm_eps: NORM_EPS,
        rope_theta: THETA,
        torch_dtype: None,
    }
}

fn ids(x: &Tensor) -> Result<Tensor> {
    Tensor::new(&[[1u32, 5, 2], [0, 3, 6]], x.device())
}

/// Logits with an adapter on every projection, or without one.
fn decode(x: &[Tensor], with_adapter: bool) -> Compat<Vec<Tensor>> {
    let mut model = Qwen::new(&config(), builder(QWEN, x))?;
    if with_adapter {
        let adapter_config = LoRAAdapterConfig {
            rank: RANK,
            alpha: (SCALING * RANK as f64) as f32,
            dropout: 0.0,
            target_modules: PROJECTIONS.to_vec(),
        };
        let adapter = LoRAAdapter::for_model(&config(), &adapter_config, x[0].device())?;
        for (at, target) in PROJECTIONS.iter().enumerate() {
            if let Some(layer) = adapter.get_layer(0, target) {
                layer.lora_a().set(&x[QWEN.len() + 2 * at].detach())?;
                layer.lora_b().set(&x[QWEN.len() + 2 * at + 1].detach())?;
            }
        }
        model.apply_adapter(Arc::new(adapter))?;
    }
    Ok(vec![model.forward(&ids(&x[0])?, Some(&bias(&x[0])?))?])
}

/// The same with every adapter merged into its weight: W + (A·B)ᵀ·scaling.
fn decoded(x: &[Tensor], with_adapter: bool) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let weight = |at: usize, projection: usize| -> Result<Tensor> {
        if !with_adapter {
            return Ok(x[at].clone());
        }
        let from = QWEN.len() + 2 * projection;
        &x[at] + (x[from].matmul(&x[from + 1])?.t()? * SCALING)?
    };
    let normed = |x: &Tensor, w: &Tensor| {
        x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + NORM_EPS)?.sqrt()?)?.broadcast_mul(w)
    };
    let xs = x[0].contiguous()?.embedding(&ids(&x[0])?.flatten_all()?)?.reshape((2, 3, HIDDEN))?;
    let h = normed(&xs, &x[1])?;
    let project = |at: usize, projection: usize| linear(&h, &weight(at, projection)?)?.broadcast_add(&x[at + 1]);
    let context = context(&project(2, 0)?, &project(4, 1)?, &project(6, 2)?, Some(&bias(&x[0])?))?;
    let xs = (xs + linear(&context, &weight(8, 3)?)?)?;
    let h = normed(&xs, &x[9])?;
    let inner = (linear(&h, &weight(10, 4)?)?.silu()? * linear(&h, &weight(11, 5)?)?)?;
    let xs = (xs + linear(&inner, &weight(12, 6)?)?)?;
    let h = normed(&xs, &x[13])?;
    Ok((vec![linear(&h, &x[14])?], vec![linear(&h.abs()?, &x[14].abs()?)?]))
}

pub(super) const CALLS: &[Call] = &[
    Call {
        name: "RotaryEmbedding::apply_rotary_emb(x, 3)",
        inputs: &[&[2, 3, 2, HEAD_DIM]],
        dtypes: Dtypes::F32,
        ours: |x| {
            let rope = RotaryEmbedding::new(HEAD_DIM, POSITIONS, THETA, x[0].device())?;
            Ok(vec![rope.apply_rotary_emb(&x[0], 3)?])
        },
        formula: |x| Ok((vec![rope(&x[0])?], vec![(x[0].abs()? * 2.0)?])),
        roundings: 2.0,
        gradients: true,
    },
    Call {
        name: "MLP::forward(x)",
        inputs: &[&[2, 3, HIDDEN], &[FFN, HIDDEN], &[FFN, HIDDEN], &[HIDDEN, FFN]],
        dtypes: Dtypes::F32,
        ours: |x| {
            let names = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];
            Ok(vec![MLP::new(HIDDEN, FFN, &builder(&names, &x[1..]))?.forward(&x[0])?])
        },
        formula: |x| {
            let inner = (linear(&x[0], &x[1])?.silu()? * linear(&x[0], &x[2])?)?;
            Ok((vec![linear(&inner, &x[3])?], vec![linear(&inner.abs()?, &x[3].abs()?)?]))
        },
        roundings: 5.0,
        gradients: true,
    },
    Call {
        name: "Attention::forward(x, None), one K/V head",
        inputs: ATTENTION_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| attend(x, false),
        formula: |x| attended(x, false),
        roundings: 8.0,
        gradients: true,
    },
    Call {
        name: "Attention::forward(x, Some(mask))",
        inputs: ATTENTION_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| attend(x, true),
        formula: |x| attended(x, true),
        roundings: 8.0,
        gradients: true,
    },
    Call {
        name: "Qwen::forward(ids, Some(mask))",
        inputs: QWEN_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| decode(x, false),
        formula: |x| decoded(x, false),
        roundings: 16.0,
        gradients: false,
    },
    Call {
        name: "Qwen::forward(ids, Some(mask)), an adapter on all seven projections",
        inputs: QWEN_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| decode(x, true),
        formula: |x| decoded(x, true),
        roundings: 16.0,
        gradients: false,
    },
];
