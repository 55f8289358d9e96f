//! Evaluation and reading.

use super::LazyTensor;
use crate::error::{Error, Result};
use crate::report::EvalReport;
use candle_core::{Tensor, WithDType};

impl LazyTensor {
    /// The value as a Candle tensor: plans and runs what is pending. A second call returns the same tensor.
    ///
    /// # Errors
    /// When a kernel fails: the error names the op and the line that recorded it, nothing has changed, and a retry works.
    pub fn eval(&self) -> Result<Tensor> {
        Ok(self.eval_with_report()?.0)
    }

    /// The value, and what computing it did.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    pub fn eval_with_report(&self) -> Result<(Tensor, EvalReport)> {
        let (mut tensors, report) = crate::run::eval_all_with_report(&[self])?;
        match tensors.pop() {
            Some(tensor) => Ok((tensor, report)),
            None => Err(Error::Internal("no result for a root".into())),
        }
    }

    /// The value of a tensor with one element.
    ///
    /// # Errors
    /// When there are dims, the dtype is another, or evaluation fails.
    pub fn to_scalar<T: WithDType>(&self) -> Result<T> {
        Ok(self.eval()?.to_scalar()?)
    }

    /// The same as [`LazyTensor::to_scalar`].
    ///
    /// # Errors
    /// As [`LazyTensor::to_scalar`].
    pub fn to_vec0<T: WithDType>(&self) -> Result<T> {
        self.to_scalar()
    }

    /// The values of a tensor of one dim.
    ///
    /// # Errors
    /// When the rank or dtype is another, or evaluation fails.
    pub fn to_vec1<T: WithDType>(&self) -> Result<Vec<T>> {
        Ok(self.eval()?.to_vec1()?)
    }

    /// The values of a tensor of two dims.
    ///
    /// # Errors
    /// When the rank or dtype is another, or evaluation fails.
    pub fn to_vec2<T: WithDType>(&self) -> Result<Vec<Vec<T>>> {
        Ok(self.eval()?.to_vec2()?)
    }

    /// The values of a tensor of three dims.
    ///
    /// # Errors
    /// When the rank or dtype is another, or evaluation fails.
    pub fn to_vec3<T: WithDType>(&self) -> Result<Vec<Vec<Vec<T>>>> {
        Ok(self.eval()?.to_vec3()?)
    }
}
