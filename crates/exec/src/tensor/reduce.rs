//! Reductions.

use super::LazyTensor;
use crate::error::Result;
use candle_core::shape::{Dim, Dims};
use candle_lazy_graph::{ArgOp, Op, ReduceOp};

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

    /// The largest elements over `dims`, which become dims of size one.
    ///
    /// # Errors
    /// When a dim is out of range, named twice or empty.
    #[track_caller]
    pub fn max_keepdim<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "max")?;
        self.reduce(ReduceOp::Max, &dims, true)
    }

    /// The largest elements over `dims`, which disappear.
    ///
    /// # Errors
    /// As [`LazyTensor::max_keepdim`].
    #[track_caller]
    pub fn max<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "max")?;
        self.reduce(ReduceOp::Max, &dims, false)
    }

    /// The largest element.
    ///
    /// # Errors
    /// When there is none.
    #[track_caller]
    pub fn max_all(&self) -> Result<Self> {
        let dims: Vec<usize> = (0..self.rank()).collect();
        self.reduce(ReduceOp::Max, &dims, false)
    }

    /// The smallest elements over `dims`, which become dims of size one.
    ///
    /// # Errors
    /// As [`LazyTensor::max_keepdim`].
    #[track_caller]
    pub fn min_keepdim<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "min")?;
        self.reduce(ReduceOp::Min, &dims, true)
    }

    /// The smallest elements over `dims`, which disappear.
    ///
    /// # Errors
    /// As [`LazyTensor::max_keepdim`].
    #[track_caller]
    pub fn min<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "min")?;
        self.reduce(ReduceOp::Min, &dims, false)
    }

    /// The smallest element.
    ///
    /// # Errors
    /// When there is none.
    #[track_caller]
    pub fn min_all(&self) -> Result<Self> {
        let dims: Vec<usize> = (0..self.rank()).collect();
        self.reduce(ReduceOp::Min, &dims, false)
    }

    /// The unbiased variance over `dims`, Σ(x − mean)²/(n − 1), which become dims of size one. f16 and bf16 compute in f32 and
    /// round once.
    ///
    /// # Errors
    /// When there are no dims, one is out of range or named twice, or the dtype is not floating-point.
    #[track_caller]
    pub fn var_keepdim<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "var")?;
        self.reduce(ReduceOp::Var, &dims, true)
    }

    /// The unbiased variance over `dims`, which disappear.
    ///
    /// # Errors
    /// As [`LazyTensor::var_keepdim`].
    #[track_caller]
    pub fn var<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "var")?;
        self.reduce(ReduceOp::Var, &dims, false)
    }

    /// log Σ exp(x) over `dims`, which disappear; the largest element is taken out first. Where that is infinite, so is the
    /// result (Candle's is not a number).
    ///
    /// # Errors
    /// When a dim is out of range, named twice or empty, or the dtype is not floating-point.
    #[track_caller]
    pub fn log_sum_exp<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "log_sum_exp")?;
        self.reduce(ReduceOp::LogSumExp, &dims, false)
    }

    /// As [`LazyTensor::log_sum_exp`], with dims of size one left.
    ///
    /// # Errors
    /// As [`LazyTensor::log_sum_exp`].
    #[track_caller]
    pub fn log_sum_exp_keepdim<D: Dims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "log_sum_exp")?;
        self.reduce(ReduceOp::LogSumExp, &dims, true)
    }
}

macro_rules! arg {
    ($($name:ident, $keepdim_name:ident => $op:ident, $doc:literal;)*) => {
        impl LazyTensor {
            $(
                #[doc = $doc]
                /// The dim disappears; the result is u32.
                ///
                /// # Errors
                /// When the dim is out of range or empty.
                #[track_caller]
                pub fn $name<D: Dim>(&self, dim: D) -> Result<Self> {
                    let dim = self.dim_index(dim, stringify!($name))? as u8;
                    Self::record(Op::ArgReduce { op: ArgOp::$op, dim, keepdim: false }, &[], &[self])
                }

                #[doc = $doc]
                /// The dim becomes one of size one; the result is u32.
                ///
                /// # Errors
                /// When the dim is out of range or empty.
                #[track_caller]
                pub fn $keepdim_name<D: Dim>(&self, dim: D) -> Result<Self> {
                    let dim = self.dim_index(dim, stringify!($name))? as u8;
                    Self::record(Op::ArgReduce { op: ArgOp::$op, dim, keepdim: true }, &[], &[self])
                }
            )*
        }
    };
}

arg! {
    argmax, argmax_keepdim => Max, "The place of the first largest element along `dim`; a NaN counts only where it comes first.";
    argmin, argmin_keepdim => Min, "The place of the first smallest element along `dim`; a NaN counts only where it comes first.";
}
