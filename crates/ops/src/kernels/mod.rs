//! Kernels on views: free functions that check all shapes first and write contiguous outputs.
//!
//! Nothing here panics on bad operands: they give an [`crate::Error`] that names the operation and the shapes.

mod arg;
mod attention;
mod copy;
mod dot;
mod dots;
pub mod extra;
mod fresh;
mod index;
mod lora;
mod matmul;
mod products;
mod random;
mod rope;
mod scatter;
pub(crate) mod scratch;
mod square;
pub(crate) mod team;

pub use arg::arg_reduce;
pub(crate) use attention::visible;
pub use attention::{attention, attention_backward, AttentionParams};
pub use copy::{arange, cast, copy_into, fill};
pub use fresh::{fresh, spoil};
pub use index::index_select;
pub(crate) use index::{index_select_as, read_ids};
pub use lora::{lora, lora_dense, lora_is_skinny, lora_segments, Segment};
pub use matmul::matmul;
pub use products::{products, Epilogue, Head, Source};
pub use random::{philox, random, Distribution};
pub use rope::rope;
pub use scatter::{gather, index_add, scatter, Scatter};
pub use team::{each, rouse, threads, with_threads};

use crate::error::{Error, Result};
use crate::view::SliceMut;
use candle_core::DType;

/// Below this many elements a kernel stays on the caller's thread.
pub(crate) const PARALLEL: usize = 65_536;

/// Checks an output's dtype and length.
pub(crate) fn check_out(op: &'static str, out: &SliceMut<'_>, dtype: DType, len: usize) -> Result<()> {
    if out.dtype() != dtype {
        return Err(Error::dtypes(op, "the output", dtype, out.dtype()));
    }
    if out.len() != len {
        return Err(Error::shape(op, format!("the output needs {len} elements, has {}", out.len())));
    }
    Ok(())
}

/// Checks that a dtype is a float.
pub(crate) fn check_float(op: &'static str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        other => Err(Error::unsupported(op, format!("dtype {}", other.as_str()))),
    }
}
