//! Evaluation and reading.

use super::LazyTensor;
use crate::error::{Error, Result};
use crate::report::EvalReport;
use crate::run::NonFinite;
use candle_core::{DType, Tensor, WithDType};
use candle_lazy_graph::{BuildSite, ErrorKind};

impl LazyTensor {
    /// The value as a Candle tensor: plans and runs what is pending. A second call returns the same tensor.
    ///
    /// # Errors
    /// When a kernel fails: the error names the op and the line that recorded it, nothing has changed, and a retry works.
    pub fn eval(&self) -> Result<Tensor> {
        match crate::run::eval_direct(self.node()) {
            Some(tensor) => tensor,
            None => Ok(self.eval_with_report()?.0),
        }
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

    /// The value, after every recorded node above was checked against eager execution: see
    /// [`eval_all_checked`](crate::run::eval_all_checked) for what is compared and what is allowed.
    ///
    /// # Errors
    /// [`Error::Differs`] names the first node whose planned value is wrong, with its line and both values; else as
    /// [`LazyTensor::eval`].
    pub fn eval_checked(&self) -> Result<Tensor> {
        match crate::run::eval_all_checked(&[self])?.pop() {
            Some(tensor) => Ok(tensor),
            None => Err(Error::Internal("no result for a root".into())),
        }
    }

    /// The first leaf or recorded node above (and including) this tensor whose value holds a NaN or an infinity, with its
    /// line; `None` where every number is finite. See [`first_nonfinite`](crate::run::first_nonfinite).
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    pub fn first_nonfinite(&self) -> Result<Option<NonFinite>> {
        crate::run::first_nonfinite(&[self])
    }

    /// The same for the first NaN alone, where infinities are meant, as in a mask. See [`first_nan`](crate::run::first_nan).
    ///
    /// # Errors
    /// As [`LazyTensor::first_nonfinite`].
    pub fn first_nan(&self) -> Result<Option<NonFinite>> {
        crate::run::first_nan(&[self])
    }

    /// Refuses to read another rank or dtype than the tensor has, before anything is computed.
    fn readable(&self, op: &'static str, rank: usize, dtype: DType, site: &BuildSite) -> Result<()> {
        let refuse = |kind| Err(candle_lazy_graph::Error::new(op, kind).on(&[self.node().meta()]).at(site).into());
        if self.rank() != rank {
            let hint = match self.rank() {
                _ if self.elem_count() == 1 && rank == 0 => "; .reshape(()) makes it one",
                _ if rank == 1 => "; .flatten_all() makes it one",
                _ => "",
            };
            let what = ["a scalar", "a tensor of one dim", "a tensor of two dims", "a tensor of three dims"];
            let what = what.get(rank).copied().unwrap_or("another tensor");
            return refuse(ErrorKind::Shape(format!("reads {what}, this has {} dims{hint}", self.rank())));
        }
        if self.dtype() != dtype {
            let hint = format!("reads {}; cast first: .to_dtype(DType::{dtype:?})", dtype.as_str());
            return refuse(ErrorKind::DType(hint));
        }
        Ok(())
    }

    /// Whether there are no elements to read; evaluated all the same, for its errors.
    fn nothing(&self) -> Result<bool> {
        self.eval()?;
        Ok(self.elem_count() == 0)
    }

    /// The value of a tensor with one element.
    ///
    /// # Errors
    /// When there are dims, the dtype is another, or evaluation fails.
    #[track_caller]
    pub fn to_scalar<T: WithDType>(&self) -> Result<T> {
        self.readable("to_scalar", 0, T::DTYPE, &BuildSite::here())?;
        Ok(self.eval()?.to_scalar()?)
    }

    /// The same as [`LazyTensor::to_scalar`].
    ///
    /// # Errors
    /// As [`LazyTensor::to_scalar`].
    #[track_caller]
    pub fn to_vec0<T: WithDType>(&self) -> Result<T> {
        self.readable("to_vec0", 0, T::DTYPE, &BuildSite::here())?;
        Ok(self.eval()?.to_scalar()?)
    }

    /// The values of a tensor of one dim.
    ///
    /// # Errors
    /// When the rank or dtype is another, or evaluation fails.
    #[track_caller]
    pub fn to_vec1<T: WithDType>(&self) -> Result<Vec<T>> {
        self.readable("to_vec1", 1, T::DTYPE, &BuildSite::here())?;
        match self.nothing()? {
            // Candle panics on a view without elements that begins behind its storage
            true => Ok(Vec::new()),
            false => Ok(self.eval()?.to_vec1()?),
        }
    }

    /// The values of a tensor of two dims.
    ///
    /// # Errors
    /// When the rank or dtype is another, or evaluation fails.
    #[track_caller]
    pub fn to_vec2<T: WithDType>(&self) -> Result<Vec<Vec<T>>> {
        self.readable("to_vec2", 2, T::DTYPE, &BuildSite::here())?;
        match (self.nothing()?, self.dims()) {
            (true, &[rows, ..]) => Ok(vec![Vec::new(); rows]),
            _ => Ok(self.eval()?.to_vec2()?),
        }
    }

    /// The values of a tensor of three dims.
    ///
    /// # Errors
    /// When the rank or dtype is another, or evaluation fails.
    #[track_caller]
    pub fn to_vec3<T: WithDType>(&self) -> Result<Vec<Vec<Vec<T>>>> {
        self.readable("to_vec3", 3, T::DTYPE, &BuildSite::here())?;
        match (self.nothing()?, self.dims()) {
            (true, &[planes, rows, _]) => Ok(vec![vec![Vec::new(); rows]; planes]),
            _ => Ok(self.eval()?.to_vec3()?),
        }
    }
}
