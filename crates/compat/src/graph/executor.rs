//! One operation at a time on tensors that are there.

use super::Operation;
use crate::error::TrainingError;
use candle_core::{Device, Tensor};
use candle_lazy_exec::LazyTensor as Recorded;

/// Runs single operations. The name is v1's; nothing here is asynchronous.
pub struct AsyncExecutor {
    device: Device,
}

impl std::fmt::Debug for AsyncExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AsyncExecutor").field("device", &self.device.location()).finish()
    }
}

impl AsyncExecutor {
    /// For tensors of this device.
    ///
    /// # Errors
    /// None here.
    pub fn new(device: Device) -> Result<Self, TrainingError> {
        Ok(Self::on(device))
    }

    pub(crate) const fn on(device: Device) -> Self {
        Self { device }
    }

    /// The result of `operation` on `inputs`. Sums, products and matrix products broadcast.
    ///
    /// # Errors
    /// [`TrainingError::Failed`] for another number of inputs than the operation has, and where they do not fit it.
    #[track_caller]
    pub fn execute_operation(&mut self, operation: &Operation, inputs: &[Tensor]) -> Result<Tensor, TrainingError> {
        let recorded: Vec<Recorded> = inputs.iter().cloned().map(Recorded::from_tensor).collect();
        operation.record(&recorded).map_err(TrainingError::failed)?.eval().map_err(TrainingError::failed)
    }

    /// Does nothing: results are there when they are returned.
    ///
    /// # Errors
    /// None here.
    pub fn synchronize(&mut self) -> Result<(), TrainingError> {
        Ok(())
    }
}
