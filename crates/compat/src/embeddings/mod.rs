//! Sentence embeddings with three published models.

mod config;
mod model;
pub mod pooling;

pub use config::{EmbeddingConfig, EmbeddingModelType};
pub use model::EmbeddingModel;
