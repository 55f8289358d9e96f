//! `candle_nn` under its own names, on lazy tensors: what a model written for Candle imports.
//!
//! Modules here have Candle's constructors and signatures, implement [`Module`] and return [`crate::candle::Result`]. Plain
//! data (initialisers, norm configs, `VarMap`) is Candle's own.

pub mod activation;
pub mod embedding;
pub mod encoding;
pub mod func;
pub mod group_norm;
pub mod kv_cache;
pub mod layer_norm;
pub mod linear;
pub mod loss;
pub mod ops;
pub mod rotary_emb;
pub mod sequential;
pub mod var_builder;

pub use activation::{prelu, Activation, PReLU};
pub use embedding::{embedding, Embedding};
pub use func::{func, func_t, Func, FuncT};
pub use group_norm::{group_norm, GroupNorm};
pub use layer_norm::{layer_norm, layer_norm_no_bias, rms_norm, LayerNorm, RmsNorm};
pub use linear::{linear, linear_b, linear_no_bias, Linear};
pub use ops::Dropout;
pub use sequential::{seq, Sequential};
pub use var_builder::VarBuilder;

pub use crate::candle::{Module, ModuleT};
pub use candle_nn::layer_norm::LayerNormConfig;
pub use candle_nn::{init, var_map, Init, VarMap};
