//! Whole tensors from asynchronous code.

use super::{AsyncExecutor, LazyTensor};
use crate::backend::Device;
use crate::error::Result;
use candle_core::Tensor;

/// Evaluates lazy tensors; see [`LazyTensor::eval_async`] for where.
#[derive(Debug)]
pub struct AsyncGraphExecutor {
    executor: AsyncExecutor,
}

impl AsyncGraphExecutor {
    /// For tensors of this device.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self { executor: AsyncExecutor::on(device.into_candle_device()) }
    }

    /// The value of `tensor`.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    pub async fn execute_tensor(&mut self, tensor: &LazyTensor) -> Result<Tensor> {
        Ok(tensor.eval_async().await?)
    }

    /// The executor of single operations.
    #[must_use]
    pub const fn sync_executor(&self) -> &AsyncExecutor {
        &self.executor
    }
}
