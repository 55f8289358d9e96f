#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod backend;
mod eager;
#[cfg(feature = "embeddings")]
pub mod embeddings;
pub mod error;
#[cfg(feature = "graph")]
pub mod graph;
pub mod inference;
pub mod models;
pub mod training;

pub use backend::{Device, DeviceInfo, DeviceType, TensorExt};
pub use error::{Error, Result};
pub use inference::{
    apply_repetition_penalty, sample_token, Generator, GeneratorConfig, KVCache, KVCacheConfig, SamplingStrategy,
};
pub use training::{
    cross_entropy_loss, cross_entropy_loss_with_smoothing, AdamW, AdamWConfig, LRScheduler, LoRAAdapter,
    LoRAAdapterConfig, LoRAConfig, LoRALayer, StepMetrics, TargetModule, Trainer, TrainingConfig, TrainingStep,
};

/// The version of this crate. It is not v1's.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
