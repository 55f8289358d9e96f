//! The umbrella crate: everything that a program needs, under one name.
//!
//! | module | what it holds |
//! |---|---|
//! | [`prelude`] | what most programs import |
//! | [`ops`] | kernels on plain Candle tensors, each with a backward on Candle's tape |
//! | [`graph`] | the recorded program: ops, shape inference, capture, passes |
//! | [`exec`] | [`LazyTensor`](exec::LazyTensor), plans, the plan cache, reports |
//! | [`nn`] | modules, models, weights |
//! | `compat` | the names of metal-candle 1.x (feature `compat`) |
//! | [`candle`], [`candle_nn`] | Candle's own names on lazy tensors, for models written for Candle |
//!
//! Functions of the layers return their own layer's error; `?` turns each of them into the one [`Error`] here.
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
pub mod prelude;

pub use error::{Error, Result};

#[cfg(feature = "compat")]
pub use candle_lazy_compat as compat;
pub use candle_lazy_exec as exec;
pub use candle_lazy_graph as graph;
pub use candle_lazy_nn as nn;
pub use candle_lazy_nn::{candle, candle_nn};
pub use candle_lazy_ops as ops;
