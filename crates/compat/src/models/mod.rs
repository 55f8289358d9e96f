//! Model configs, weights and the Qwen2 decoder.

mod adaptation;
pub mod config;
mod language_model;
pub mod loader;
pub mod qwen;
mod session;
pub mod transformer;

pub use config::ModelConfig;
pub use language_model::{DecodingSession, LanguageModel};
pub use loader::ModelLoader;
pub use qwen::Qwen;
