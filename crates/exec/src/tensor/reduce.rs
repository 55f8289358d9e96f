//! Reductions.

use super::LazyTensor;
use crate::error::Result;
use candle_core::shape::{Dim, Dims};
use candle_lazy_graph::{Op, ReduceOp};

impl LazyTensor {
    #[track_caller]
    fn reduce(&self, op: ReduceOp, dims: &[usize], keepdim: bool) -> Result<Self> {
        let axes = dims.iter().fold(0u32, |mask, d| mask | (1u32 << (d % 32)));
        Self::record(Op::Reduce { op, axes, keepdim }, &[], &[self])
    }

    /// The sum over `dims`, which become dims of size one. f16 and bf16 accumulate in f32 and round once.
    ///
    /// # Errors
    /// When a dim is out of range or named twice.
    #[track_caller]
    pub fn sum_keepdim<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "sum")?;
        self.reduce(ReduceOp::Sum, &dims, true)
    }

    /// The sum over `dims`, which disappear.
    ///
    /// # Errors
    /// As [`LazyTensor::sum_keepdim`].
    #[track_caller]
    pub fn sum<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "sum")?;
        self.reduce(ReduceOp::Sum, &dims, false)
    }

    /// The sum of all elements.
    ///
    /// # Errors
    /// When the dtype is not supported.
    #[track_caller]
    pub fn sum_all(&self) -> Result<Self> {
        let dims: Vec<usize> = (0..self.rank()).collect();
        self.reduce(ReduceOp::Sum, &dims, false)
    }

    /// The mean over `dims`, which become dims of size one: the sum times 1/n.
    ///
    /// # Errors
    /// When a dim is out of range or named twice, or the dtype is not floating-point.
    #[track_caller]
    pub fn mean_keepdim<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "mean")?;
        self.reduce(ReduceOp::Mean, &dims, true)
    }

    /// The mean over `dims`, which disappear.
    ///
    /// # Errors
    /// As [`LazyTensor::mean_keepdim`].
    #[track_caller]
    pub fn mean<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "mean")?;
        self.reduce(ReduceOp::Mean, &dims, false)
    }

    /// The mean of all elements.
    ///
    /// # Errors
    /// When the dtype is not floating-point.
    #[track_caller]
    pub fn mean_all(&self) -> Result<Self> {
        let dims: Vec<usize> = (0..self.rank()).collect();
        self.reduce(ReduceOp::Mean, &dims, false)
    }

    /// The largest elements along `dim`, which becomes a dim of size one.
    ///
    /// # Errors
    /// When the dim is out of range or empty.
    #[track_caller]
    pub fn max_keepdim<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "max")?;
        self.reduce(ReduceOp::Max, &[dim], true)
    }

    /// The largest elements along `dim`, which disappears.
    ///
    /// # Errors
    /// As [`LazyTensor::max_keepdim`].
    #[track_caller]
    pub fn max<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "max")?;
        self.reduce(ReduceOp::Max, &[dim], false)
    }

    /// The smallest elements along `dim`, which becomes a dim of size one.
    ///
    /// # Errors
    /// As [`LazyTensor::max_keepdim`].
    #[track_caller]
    pub fn min_keepdim<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "min")?;
        self.reduce(ReduceOp::Min, &[dim], true)
    }

    /// The smallest elements along `dim`, which disappears.
    ///
    /// # Errors
    /// As [`LazyTensor::max_keepdim`].
    #[track_caller]
    pub fn min<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "min")?;
        self.reduce(ReduceOp::Min, &[dim], false)
    }
}
