//! Tests of modules, models, weights, tokenizers and model directories, all on made-up weights: no network.

mod common;

mod bert;
mod causal_lm;
mod config;
mod data;
mod decoder_block;
mod generate;
mod gguf;
mod gguf_broken;
mod kv_cache;
mod lora;
mod lora_adapter;
mod loss;
mod model_dir;
mod modules;
mod mpnet;
mod optim;
mod optimizer;
mod optimizer_state;
mod params;
mod ported;
mod rope;
mod safetensors;
mod sampling;
mod service_embedding;
mod service_generation;
mod sites;
mod token_loss;
#[cfg(feature = "tokenizers")]
mod tokenizer;
#[cfg(feature = "tokenizers")]
mod tokenizer_ids;
mod train_step;
