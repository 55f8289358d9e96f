//! `candle_core` under its own names, on lazy tensors: what a model written for Candle imports.
//!
//! [`Tensor`] is [`LazyTensor`](candle_lazy_exec::LazyTensor) itself and [`Error`] the engine's, so ported and lazy code mix
//! freely. Plain data (dtypes, devices, shapes) is Candle's own.
//!
//! ```
//! use candle_lazy_nn::candle::{self, DType, Device, IndexOp, Module, Result, Tensor, D};
//!
//! fn centred(xs: &Tensor) -> Result<Tensor> {
//!     if xs.rank() != 2 {
//!         candle::bail!("two dims are needed, got {:?}", xs.dims())
//!     }
//!     xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)
//! }
//!
//! let xs = Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?;
//! assert_eq!(xs.apply(&centred)?.i(0)?.to_vec1::<f32>()?, [-1., 0., 1.]);
//! assert_eq!(xs.to_dtype(DType::F64)?.dtype(), DType::F64);
//! # Ok::<(), candle::Error>(())
//! ```

mod context;
mod modules;
pub mod safetensors;

pub use crate::__candle_bail as bail;
pub use candle_core::backprop;
pub use candle_core::{shape, utils};
pub use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, DeviceLocation, FloatDType, IntDType, Layout, NdArray,
    Shape, Var, WithDType, D,
};
pub use candle_lazy_exec::LazyTensor as Tensor;
pub use candle_lazy_exec::{Error, IndexOp, Module, ModuleT, Result, TensorIndexer};
pub use context::Context;

/// The error type and what belongs to it, under the path that Candle gives it.
pub mod error {
    pub use super::{Context, Error, Result};
}

/// What a comparison asks, under the path that Candle gives it.
pub mod op {
    pub use candle_core::op::CmpOp;
}

/// The result with the engine's error, which names the caller's line unless it names one already.
#[track_caller]
pub(crate) fn here<T, E: Into<Error>>(result: std::result::Result<T, E>) -> Result<T> {
    // no closure here: an error inside of one would name this line
    match result {
        Ok(value) => Ok(value),
        Err(error) => Err(error.into().at_caller()),
    }
}

/// Returns early with [`Error::Msg`], as Candle's `bail!`.
#[doc(hidden)]
#[macro_export]
macro_rules! __candle_bail {
    ($message:literal $(,)?) => {
        return ::std::result::Result::Err($crate::candle::Error::Msg(::std::format!($message)))
    };
    ($format:expr, $($argument:tt)*) => {
        return ::std::result::Result::Err($crate::candle::Error::Msg(::std::format!($format, $($argument)*)))
    };
    ($error:expr $(,)?) => {
        return ::std::result::Result::Err($crate::candle::Error::msg($error))
    };
}
