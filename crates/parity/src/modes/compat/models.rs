//! `models`: rotary embedding, attention, feed-forward block, one layer, and the decoder with an adapter on every projection, its
//! gradients and what a generator makes of it.

use super::ops::{product, softmax};
use super::{Call, Dtypes};
use candle_core::{DType, Result, Tensor, Var, D};
use candle_lazy_compat::inference::{Generator, GeneratorConfig};
use candle_lazy_compat::models::qwen::QwenDecoderLayer;
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

/// An adapter on every projection, with these factors.
fn adapter(factors: &[Tensor]) -> Compat<LoRAAdapter> {
    let adapter_config = LoRAAdapterConfig {
        rank: RANK,
        alpha: (SCALING * RANK as f64) as f32,
        dropout: 0.0,
        target_modules: PROJECTIONS.to_vec(),
    };
    let adapter = LoRAAdapter::for_model(&config(), &adapter_config, factors[0].device())?;
    for (target, factors) in PROJECTIONS.iter().zip(factors.chunks_exact(2)) {
        if let Some(layer) = adapter.get_layer(0, target) {
            layer.lora_a().set(&factors[0].detach())?;
            layer.lora_b().set(&factors[1].detach())?;
        }
    }
    Ok(adapter)
}

/// The decoder, with an adapter on every projection or without one.
fn model(x: &[Tensor], with_adapter: bool) -> Compat<Qwen> {
    let mut model = Qwen::new(&config(), builder(QWEN, x))?;
    if with_adapter {
        model.apply_adapter(Arc::new(adapter(&x[QWEN.len()..])?))?;
    }
    Ok(model)
}

fn decode(x: &[Tensor], with_adapter: bool) -> Compat<Vec<Tensor>> {
    Ok(vec![model(x, with_adapter)?.forward(&ids(&x[0])?, Some(&bias(&x[0])?))?])
}

fn normed(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + NORM_EPS)?.sqrt()?)?.broadcast_mul(w)
}

/// One layer on the residual stream, and the sizes of the terms of its last sum. `w` as in [`QWEN`], the embedding first; of `factors` every
/// projection's are merged into its weight: W + (A·B)ᵀ·scaling.
fn layer(xs: &Tensor, w: &[Tensor], factors: &[Tensor], mask: &Tensor) -> Result<(Tensor, Tensor)> {
    let weight = |at: usize, projection: usize| -> Result<Tensor> {
        match factors.get(2 * projection..2 * projection + 2) {
            Some(factors) => &w[at] + (factors[0].matmul(&factors[1])?.t()? * SCALING)?,
            None => Ok(w[at].clone()),
        }
    };
    let h = normed(xs, &w[1])?;
    let project = |at: usize, projection: usize| linear(&h, &weight(at, projection)?)?.broadcast_add(&w[at + 1]);
    let context = context(&project(2, 0)?, &project(4, 1)?, &project(6, 2)?, Some(mask))?;
    let attended = linear(&context, &weight(8, 3)?)?;
    let middle = (xs + &attended)?;
    let h = normed(&middle, &w[9])?;
    let inner = (linear(&h, &weight(10, 4)?)?.silu()? * linear(&h, &weight(11, 5)?)?)?;
    let down = weight(12, 6)?;
    let sizes = ((xs.abs()? + attended.abs()?)? + linear(&inner.abs()?, &down.abs()?)?)?;
    Ok(((middle + linear(&inner, &down)?)?, sizes))
}

/// Logits for ids (b, s).
fn logits(x: &[Tensor], with_adapter: bool, ids: &Tensor, mask: &Tensor) -> Result<(Tensor, Tensor)> {
    let (b, s) = ids.dims2()?;
    let xs = x[0].contiguous()?.embedding(&ids.flatten_all()?)?.reshape((b, s, HIDDEN))?;
    let (xs, _) = layer(&xs, x, if with_adapter { &x[QWEN.len()..] } else { &[] }, mask)?;
    let h = normed(&xs, &x[13])?;
    Ok((linear(&h, &x[14])?, linear(&h.abs()?, &x[14].abs()?)?))
}

fn decoded(x: &[Tensor], with_adapter: bool) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let (value, magnitude) = logits(x, with_adapter, &ids(&x[0])?, &bias(&x[0])?)?;
    Ok((vec![value], vec![magnitude]))
}

/// The gradients of Σlogits² in A and B of every projection, by Candle's tape over the formula. Those of an attention's scores are
/// differences that can cancel: they are measured by the largest of their attention.
fn adapters_gradients(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let (weights, factors) = x.split_at(QWEN.len());
    let vars = factors.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let all: Vec<Tensor> = weights.iter().chain(vars.iter().map(Var::as_tensor)).cloned().collect();
    let store = logits(&all, true, &ids(&x[0])?, &bias(&x[0])?)?.0.sqr()?.sum_all()?.backward()?;
    let none = || candle_core::Error::Msg("no gradient".into());
    let gradients = vars.iter().map(|var| store.get(var).cloned().ok_or_else(none)).collect::<Result<Vec<_>>>()?;
    let largest = gradients.iter().map(|gradient| gradient.abs()?.max_all()).collect::<Result<Vec<_>>>()?;
    let attention = Tensor::stack(&largest[..8], 0)?.max(0)?;
    let mut sizes = Vec::new();
    for (at, gradient) in gradients.iter().enumerate() {
        let size = if at < 8 { &attention } else { &largest[at] };
        sizes.push(size.broadcast_as(gradient.shape())?);
    }
    Ok((gradients, sizes))
}

const PROMPT: [u32; 2] = [1, 5];

/// The tokens of a text that takes the likeliest one three times, as numbers.
fn continued(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let mut text = PROMPT.to_vec();
    for _ in 0..3 {
        let s = text.len();
        let causal = (0..s * s).map(|at| if at % s > at / s { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(causal, (1, 1, s, s), x[0].device())?;
        let ids = Tensor::new(text.as_slice(), x[0].device())?.unsqueeze(0)?;
        let last = logits(x, true, &ids, &mask)?.0.get(0)?.get(s - 1)?;
        text.push(last.argmax(0)?.to_scalar::<u32>()?);
    }
    Ok((vec![Tensor::new(text.as_slice(), x[0].device())?.to_dtype(x[0].dtype())?], Vec::new()))
}

/// The stream (2, 3, hidden), then as [`QWEN_INPUTS`] without the last norm and the output projection.
const LAYER_WITH_ADAPTER_INPUTS: &[&[usize]] = &{
    let mut shapes: [&[usize]; QWEN_INPUTS.len() - 2] = [&[2, 3, HIDDEN]; QWEN_INPUTS.len() - 2];
    let mut i = 1;
    while i < shapes.len() {
        shapes[i] = QWEN_INPUTS[if i < LAYER_WEIGHTS { i } else { i + 2 }];
        i += 1;
    }
    shapes
};
/// The stream and the weights of a layer.
const LAYER_WEIGHTS: usize = QWEN.len() - 2;
/// The same without an adapter.
const LAYER_INPUTS: &[&[usize]] = LAYER_WITH_ADAPTER_INPUTS.split_at(LAYER_WEIGHTS).0;

fn run_layer(x: &[Tensor], adapter: Option<&LoRAAdapter>) -> Compat<Vec<Tensor>> {
    let names: Vec<&str> =
        QWEN[1..LAYER_INPUTS.len()].iter().filter_map(|name| name.strip_prefix("model.layers.0.")).collect();
    let vb = builder(&names, &x[1..LAYER_INPUTS.len()]);
    let layer = QwenDecoderLayer::new(&config(), 0, &vb)?;
    Ok(vec![layer.forward(&x[0], Some(&bias(&x[0])?), adapter)?])
}

fn layer_formula(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let (value, sizes) = layer(&x[0], x, &x[LAYER_INPUTS.len()..], &bias(&x[0])?)?;
    Ok((vec![value], vec![sizes]))
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
    Call {
        name: "Qwen's gradients of A and B of all seven projections",
        inputs: QWEN_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| {
            let adapter = Arc::new(adapter(&x[QWEN.len()..])?);
            let mut model = Qwen::new(&config(), builder(QWEN, x))?;
            model.apply_adapter(adapter.clone())?;
            let store = model.forward(&ids(&x[0])?, Some(&bias(&x[0])?))?.sqr()?.sum_all()?.backward()?;
            let none = || candle_core::Error::Msg("no gradient".into());
            let variables = adapter.layers().flat_map(|(_, layer)| layer.trainable_variables());
            variables.map(|var| Ok(store.get(var).cloned().ok_or_else(none)?)).collect()
        },
        formula: adapters_gradients,
        roundings: 32.0,
        gradients: false,
    },
    Call {
        name: "QwenDecoderLayer::forward(x, Some(mask), None)",
        inputs: LAYER_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| run_layer(x, None),
        formula: layer_formula,
        roundings: 16.0,
        gradients: true,
    },
    Call {
        name: "QwenDecoderLayer::forward(x, Some(mask), Some(adapter))",
        inputs: LAYER_WITH_ADAPTER_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| run_layer(x, Some(&adapter(&x[LAYER_INPUTS.len()..])?)),
        formula: layer_formula,
        roundings: 16.0,
        gradients: false,
    },
    Call {
        name: "Generator::generate(prompt), greedy, with an adapter: the tokens",
        inputs: QWEN_INPUTS,
        dtypes: Dtypes::F32,
        ours: |x| {
            let config = GeneratorConfig { max_tokens: 3, ..GeneratorConfig::default() };
            let text = Generator::new(Box::new(model(x, true)?), config)?.generate(&PROMPT)?;
            Ok(vec![Tensor::new(text, x[0].device())?.to_dtype(DType::F32)?])
        },
        formula: continued,
        roundings: 0.0,
        gradients: false,
    },
];
