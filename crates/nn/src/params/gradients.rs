//! Gradients by the names of their parameters.

use super::{quoted, Param, Params};
use crate::error::{Error, Result};
use candle_lazy_exec::config::without_pending_budget;
use candle_lazy_exec::{materialize, EvalReport, LazyTensor};
use std::collections::BTreeMap;

/// Gradients, each of the shape of its parameter and of any float dtype. They may be recorded only: an optimiser's step computes them.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, LazyTensor>,
}

impl Param {
    /// Refuses what is no gradient of it.
    #[track_caller]
    pub(crate) fn grad_fits(&self, grad: &LazyTensor) -> Result<()> {
        let name = self.name();
        if grad.shape() != self.shape() || !grad.dtype().is_float() {
            let (shape, found, dtype) = (self.shape(), grad.shape(), grad.dtype());
            return Err(Error::params(format_args!("`{name}` is {shape:?}, its gradient {found:?} of {dtype:?}")));
        }
        if !grad.device().same_device(self.device()) {
            let (has, found) = (self.device().location(), grad.device().location());
            return Err(Error::params(format_args!("`{name}` is on {has:?}, its gradient on {found:?}")));
        }
        Ok(())
    }
}

impl Gradients {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradients of the trainable parameters, in the order of [`Params::trainable`].
    ///
    /// # Errors
    /// [`Error::Params`] where they are not as many, and as [`Gradients::insert`].
    #[track_caller]
    pub fn of(params: &Params, grads: impl IntoIterator<Item = LazyTensor>) -> Result<Self> {
        let (mut all, mut grads) = (Self::new(), grads.into_iter());
        let (mut given, mut wanted) = (0usize, 0usize);
        for param in params.trainable() {
            wanted += 1;
            if let Some(grad) = grads.next() {
                given += 1;
                all.insert(param, grad)?;
            }
        }
        given += grads.count();
        if given != wanted {
            return Err(Error::params(format_args!("{given} gradients for {wanted} trainable parameters")));
        }
        Ok(all)
    }

    /// Adds the gradient of a parameter.
    ///
    /// # Errors
    /// [`Error::Params`] for another shape or device than the parameter's, for what is no float, and where there is one already.
    #[track_caller]
    pub fn insert(&mut self, param: &Param, grad: impl Into<LazyTensor>) -> Result<()> {
        let (name, grad) = (param.name(), grad.into());
        param.grad_fits(&grad)?;
        if self.by_name.contains_key(name) {
            return Err(Error::params(format_args!("`{name}` has a gradient already")));
        }
        // a gradient is traced where its variables are, and would hold the graph that it was made by
        self.by_name.insert(name.to_string(), grad.detach());
        Ok(())
    }

    /// The gradient of a parameter.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&LazyTensor> {
        self.by_name.get(name)
    }

    /// All of them with their parameters' names, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &LazyTensor)> {
        self.by_name.iter().map(|(name, grad)| (name.as_str(), grad))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Takes one out.
    pub(crate) fn remove(&mut self, name: &str) -> Option<LazyTensor> {
        self.by_name.remove(name)
    }

    /// Names that are there, for a message.
    pub(crate) fn names(&self) -> String {
        quoted(self.by_name.keys())
    }

    /// Adds the gradients of another part of a batch, and computes the sums now, with `also`, as one plan: no graph is held from one
    /// part to the next. The first parts are taken as they are.
    ///
    /// # Errors
    /// [`Error::Params`] where the two are not of the same parameters, and where an evaluation fails; the sums are as they were then.
    #[track_caller]
    pub fn accumulate(&mut self, part: Self, also: &[&LazyTensor]) -> Result<EvalReport> {
        let mut sums = part.by_name;
        if !self.is_empty() {
            if !self.by_name.keys().eq(sums.keys()) {
                let (mine, theirs) = (self.names(), quoted(sums.keys()));
                return Err(Error::params(format_args!("gradients of {mine} and of {theirs} do not add up")));
            }
            // all of it is evaluated below, as one plan
            let _unbounded = without_pending_budget();
            for (sum, grad) in self.by_name.values().zip(sums.values_mut()) {
                *grad = sum.add(grad)?.detach();
            }
        }
        let roots: Vec<&LazyTensor> = sums.values().chain(also.iter().copied()).collect();
        let report = materialize(&roots)?;
        self.by_name = sums;
        Ok(report)
    }

    /// All of them times a number: 1/parts makes the mean of sums.
    ///
    /// # Errors
    /// As [`LazyTensor::affine`].
    #[track_caller]
    pub fn scaled(mut self, factor: f64) -> Result<Self> {
        for grad in self.by_name.values_mut() {
            *grad = grad.affine(factor, 0.0)?;
        }
        Ok(self)
    }
}
