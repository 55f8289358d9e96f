//! Differentiable functions on plain Candle tensors.
//!
//! Each is right for every layout, accumulates f16 and bf16 in f32, and records a backward on Candle's tape that gives
//! a gradient to every tracked input. On the CPU the kernels of this crate run; on other devices the same function is composed of
//! Candle's differentiable ops (never of its fused ones, which drop gradients). Which of the two is decided before running.

mod activation;
mod apply;
mod attention;
mod cross_entropy;
mod embedding;
mod group_norm;
mod linear;
mod norm;
mod rope;
mod softmax;

pub use activation::{gelu, gelu_erf, gelu_erf_mul, gelu_mul, silu, silu_mul};
pub use attention::attention;
pub use cross_entropy::cross_entropy;
pub use embedding::embedding;
pub use group_norm::group_norm;
pub use linear::{linear, lora, lora_add, matmul};
pub use norm::{layer_norm, rms_norm};
pub use rope::{rope, rope_i};
pub use softmax::{log_softmax, softmax};

use crate::error::{Error, Result};
use candle_core::{DType, Tensor};

/// Checks that a tensor holds floats.
fn float(op: &'static str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        other => Err(Error::unsupported(op, format!("dtype {} of {:?}", other.as_str(), x.dims()))),
    }
}

/// Checks that a tensor has `x`'s dtype and device.
fn alike(op: &'static str, what: &str, x: &Tensor, other: &Tensor) -> Result<()> {
    if x.dtype() != other.dtype() {
        return Err(Error::dtypes(op, what, x.dtype(), other.dtype()));
    }
    if !x.device().same_device(other.device()) {
        return Err(Error::unsupported(
            op,
            format!("{what} on {:?}, x on {:?}", other.device().location(), x.device().location()),
        ));
    }
    Ok(())
}

/// The dtype that arithmetic on `dtype` is done in.
fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
