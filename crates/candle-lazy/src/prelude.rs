//! What most programs import: `use candle_lazy::prelude::*;`.

pub use crate::error::{Error, Result};
pub use candle_core::{DType, Device, IndexOp, Shape, Tensor, Var, D};
pub use candle_lazy_exec::{eval_all, AttentionOptions, EvalReport, LazyTensor};
pub use candle_lazy_nn::{Module, VarBuilder};
