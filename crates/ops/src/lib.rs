#![doc = include_str!("../README.md")]

mod element;
pub mod error;
#[doc(hidden)]
pub mod fault;
pub mod functional;
pub mod kernels;
mod math;
pub mod row;
pub mod simd;
pub mod storage;
pub mod view;

pub use error::{Error, Result};
pub use functional::{
    attention, cross_entropy, embedding, gelu, gelu_erf, gelu_erf_mul, gelu_mul, group_norm, layer_norm, linear,
    log_softmax, lora, lora_add, matmul, rms_norm, rope, rope_i, silu, silu_mul, softmax,
};
pub use kernels::AttentionParams;
