//! Eager against lazy: cases, references, the matrix of modes, and the two real models.
//!
//! - [`mod@reference`]: what every op means, in plain loops over `Vec<f64>`.
//! - [`case`] and [`cases`]: op × shapes × layouts × dtypes, with deterministic inputs.
//! - [`eager`]: the same op as candle-core and candle-nn compose it.
//! - [`modes`]: the ways in which this workspace computes a case.
//! - [`opaque`]: custom ops and quantised weights for it.
//! - [`compare`]: when two results are the same.
//! - [`programs`]: small graphs with a name; [`random`]: random graphs, minimised on failure.
//! - [`mutants`]: the checker checked, by faults that it must catch.
//! - [`verify`]: the matrix, run and counted; what `cargo xtask verify` prints.
//! - [`models`] and [`alloc`]: the two real models, measured; what the demo prints.

pub mod alloc;
pub mod case;
pub mod cases;
pub mod compare;
pub mod eager;
pub mod error;
pub mod lazy;
pub mod models;
pub mod modes;
pub mod mutants;
pub mod opaque;
pub mod programs;
pub mod random;
pub mod referee;
pub mod reference;
pub mod rng;
pub mod unsupported;
pub mod value;
pub mod verify;

pub use candle_lazy_ops::simd::{arithmetic, ask_for};
pub use error::{Error, Result};
