//! Gradients of a loss with respect to a tree of parameters, and what each parameter got.

use super::{quoted, Gradients, Params};
use crate::error::{Error, Result};
use candle_core::DType;
use candle_lazy_exec::{eval_all, grad, vjp, LazyTensor};
use std::fmt;

/// What one parameter got.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GradEntry {
    /// Its name.
    pub name: String,
    /// Its dims.
    pub dims: Vec<usize>,
    /// What came of it.
    pub outcome: GradOutcome,
}

/// What came of the gradient of a parameter.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum GradOutcome {
    /// A gradient, with its Euclidean norm.
    Norm(f64),
    /// None: the loss does not reach it, and why.
    Unreached(String),
    /// None was asked for.
    Frozen,
}

/// What every parameter of a tree got from a loss; its `Display` is a table.
#[derive(Debug, Clone, PartialEq)]
pub struct GradReport {
    /// One entry per parameter, sorted by name.
    pub entries: Vec<GradEntry>,
}

impl GradReport {
    /// The parameters that are trainable and got nothing.
    pub fn unreached(&self) -> impl Iterator<Item = &GradEntry> {
        self.entries.iter().filter(|entry| matches!(entry.outcome, GradOutcome::Unreached(_)))
    }
}

impl fmt::Display for GradReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for GradEntry { name, dims, outcome } in &self.entries {
            match outcome {
                GradOutcome::Norm(norm) => writeln!(f, "{name} {dims:?}: norm {norm:.3e}")?,
                GradOutcome::Unreached(why) => writeln!(f, "{name} {dims:?}: no gradient: {why}")?,
                GradOutcome::Frozen => writeln!(f, "{name} {dims:?}: frozen")?,
            }
        }
        Ok(())
    }
}

impl Params {
    /// The gradients of a scalar `loss` with respect to the trainable parameters: recorded, to be computed by an optimiser's step.
    ///
    /// # Errors
    /// As [`candle_lazy_exec::grad()`]: where the loss does not reach a trainable parameter, the op and the line are named that cut it off.
    /// [`Error::Params`] where a parameter is new, or has got another value, since the loss was recorded.
    #[track_caller]
    pub fn grad(&self, loss: &LazyTensor) -> Result<Gradients> {
        let values: Vec<LazyTensor> = self.trainable().map(|param| param.value()).collect();
        // a node is younger than all that it is made of
        let younger = self.trainable().zip(&values).filter(|(_, value)| value.node().id() > loss.node().id());
        let younger: Vec<&str> = younger.map(|(param, _)| param.name()).collect();
        if !younger.is_empty() {
            let names = quoted(younger);
            let what =
                "are new, or got another value, since the loss was recorded (an optimizer, a step and a file give one): record it again";
            return Err(Error::params(format_args!("{names} {what}")));
        }
        let gradients = grad(loss, &values.iter().collect::<Vec<_>>())?;
        Gradients::of(self, gradients)
    }

    /// What every parameter gets from `loss`: the norm of its gradient, or why it gets none. All of them are computed.
    ///
    /// # Errors
    /// Where the loss is no scalar of a float dtype, or an evaluation fails.
    #[track_caller]
    pub fn grad_report(&self, loss: &LazyTensor) -> Result<GradReport> {
        let one = LazyTensor::ones(loss.shape(), loss.dtype(), loss.device())?;
        let values: Vec<LazyTensor> = self.trainable().map(|param| param.value()).collect();
        let found = vjp(&[loss], &[&one], &values.iter().collect::<Vec<_>>())?;
        let mut norms = Vec::new();
        for gradient in found.iter().flatten() {
            norms.push(gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()?.detach());
        }
        let mut norms = eval_all(&norms.iter().collect::<Vec<_>>())?.into_iter();
        let mut found = found.iter().zip(&values);
        let mut entries = Vec::with_capacity(self.len());
        for param in self.iter() {
            let outcome = match param.is_trainable().then(|| found.next()).flatten() {
                None => GradOutcome::Frozen,
                Some((Some(_), _)) => match norms.next() {
                    Some(norm) => GradOutcome::Norm(norm.to_scalar()?),
                    None => GradOutcome::Norm(f64::NAN),
                },
                Some((None, value)) => GradOutcome::Unreached(match grad(loss, &[value]) {
                    Err(why) => why.to_string(),
                    Ok(_) => String::new(),
                }),
            };
            let (name, dims) = (param.name().to_string(), param.shape().dims().to_vec());
            entries.push(GradEntry { name, dims, outcome });
        }
        Ok(GradReport { entries })
    }
}
