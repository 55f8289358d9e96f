//! The façade's contract, module by module: one program, so that it is linked once. The three files beside this folder are programs of
//! their own, which v1's users run by name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

#[cfg(feature = "graph")]
#[path = "../common/mod.rs"]
mod common;
mod decoder;
mod training;

mod backend;
#[cfg(all(feature = "custom-metal", feature = "async-exec", feature = "embeddings"))]
mod bounds;
#[cfg(feature = "embeddings")]
mod embeddings;
#[cfg(all(feature = "graph", feature = "custom-metal"))]
mod graph;
mod inference_cache;
mod inference_generator;
mod inference_sampling;
#[cfg(feature = "streaming")]
mod inference_stream;
mod models_adapters;
mod models_config;
mod models_loader;
mod models_qwen;
mod models_transformer;
#[cfg(all(feature = "custom-metal", feature = "async-exec", feature = "embeddings"))]
mod signatures;
mod training_adapter;
mod training_checkpoint;
mod training_lora;
mod training_loss;
mod training_optimizer;
mod training_trainer;
