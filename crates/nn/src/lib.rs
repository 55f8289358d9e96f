//! Modules, models and weight loading on candle-lazy's lazy tensors.
//!
//! Everything here records: a module's `forward` adds nodes to the graph behind the [`LazyTensor`] it is given and
//! computes nothing. The names, constructors and weight layouts are `candle_nn`'s, so a checkpoint that loads there
//! loads here.
//!
//! | what | where |
//! |---|---|
//! | building blocks | [`Linear`], [`Embedding`], [`RmsNorm`], [`LayerNorm`], [`Mlp`], [`FeedForward`], [`LoraLinear`], [`KvCache`] |
//! | models | [`models::bert`], [`models::mpnet`] (sentence encoders), [`models::causal_lm`] (Llama, Mistral, Qwen2) |
//! | ported models | [`candle`] and [`candle_nn`]: the names that models written for Candle import |
//! | weights | [`weights`]: safetensors and GGUF behind Candle's `VarBuilder` |
//! | a model on disk | [`ModelDir`] |
//! | training | [`data`], [`params`], [`loss`], [`optim`], [`LoraAdapter`], [`train`] |
//! | many callers | [`service`]: embeddings and generations of independent callers, computed together |
//! | the next token | [`sampling`]: greedy, temperature, top-k, top-p, a penalty for repetition |
//! | text | `tokenizer` (feature `tokenizers`) |
//! | fetching | `hub` (feature `hub`) |
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod activation;
mod attention;
mod embedding;
mod error;
mod fingerprint;
mod kv_cache;
mod linear;
mod lora;
mod mlp;
mod model_dir;
mod module;
mod norm;
pub mod pooling;
mod rope;
mod scope;

pub mod candle;
pub mod candle_nn;
pub mod data;
#[cfg(feature = "hub")]
pub mod hub;
pub mod loss;
pub mod models;
pub mod optim;
pub mod params;
pub mod sampling;
pub mod service;
#[cfg(feature = "tokenizers")]
pub mod tokenizer;
pub mod train;
pub mod weights;

pub use activation::Activation;
pub use attention::{CausalSelfAttention, Positions};
pub use embedding::{embedding, Embedding};
pub use error::{Error, Result};
pub use kv_cache::KvCache;
pub use linear::{linear, linear_b, linear_no_bias, Linear};
pub use lora::{LoraAdapter, LoraConfig, LoraLinear, LoraSet, LoraTargets, LoraWeights};
pub use mlp::{FeedForward, Mlp};
pub use model_dir::{ModelDir, WeightFiles};
pub use module::Module;
pub use norm::{layer_norm, rms_norm, LayerNorm, RmsNorm};
pub use rope::{RopeScaling, RopeTable};

pub use candle_lazy_exec::LazyTensor;
// the crate, not the module of this name
pub use ::candle_nn::VarBuilder;
