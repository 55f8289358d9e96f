//! Gradients of recorded tensors, as recorded tensors.
//!
//! A gradient is taken with respect to a *variable* ([`LazyTensor::variable`]): what is recorded on it keeps its history, so the gradient
//! is the same whatever has been evaluated meanwhile, for as long as a handle on the result lives. The backward pass is recorded by
//! [`candle_lazy_graph::grad`] and evaluated as any graph; evaluated together with the loss, both are one plan.

#[cfg(feature = "testing")]
mod broken;
mod checkpoint;
mod transform;

pub use candle_lazy_graph::{without_grad, WithoutGrad};
pub use checkpoint::{checkpoint, Checkpoint, CheckpointRegion, Tensors};
pub use transform::{value_and_grad, ValueAndGrad};

use crate::error::{Error, Result};
use crate::tensor::LazyTensor;
use candle_lazy_graph::{why_unreached, BuildSite, ErrorKind, Node, NodeRef};

/// Calls `f`; what this thread records meanwhile keeps no history, and variables and leaves that Candle tracks count as constants, so
/// that values are freed as soon as nobody needs them: for inference on a model with trainable parameters. Scopes nest, and one ends with
/// `f` however `f` ends.
///
/// What was recorded before keeps its history, and gradients of it can be taken inside: they have no gradients of their own.
///
/// ```
/// use candle_core::Device;
/// use candle_lazy_exec::{no_grad, LazyTensor};
/// # fn main() -> candle_lazy_exec::Result<()> {
/// let w = LazyTensor::new(&[1f32, 2.0], &Device::Cpu)?.variable()?;
/// let y = no_grad(|| w.sqr()?.sum_all())?;
/// assert!(!y.is_traced() && w.is_variable());
/// # Ok(())
/// # }
/// ```
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    candle_lazy_graph::no_grad(f)
}

/// Whether what this thread records now keeps the history that gradients need: not within [`no_grad`].
#[must_use]
pub fn is_grad_enabled() -> bool {
    candle_lazy_graph::is_grad_enabled()
}

impl LazyTensor {
    /// A variable with this tensor's value: gradients can be taken with respect to it ([`grad`]), and this tensor itself gets none
    /// through it. Nothing is copied.
    ///
    /// What is recorded on a variable, and on that, keeps its inputs after it was evaluated; a training loop records its new
    /// parameters from [`LazyTensor::detach`]ed gradients and makes variables of them again, or the history of all steps would live on.
    ///
    /// ```
    /// use candle_core::Device;
    /// use candle_lazy_exec::{grad, LazyTensor};
    /// # fn main() -> candle_lazy_exec::Result<()> {
    /// let x = LazyTensor::new(&[1f32, 2.0, 3.0], &Device::Cpu)?.variable()?;
    /// let loss = x.sqr()?.sum_all()?;
    /// let dx = &grad(&loss, &[&x])?[0]; // recorded
    /// assert_eq!(dx.to_vec1::<f32>()?, [2.0, 4.0, 6.0]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When the dtype is not floating-point.
    #[track_caller]
    pub fn variable(&self) -> Result<Self> {
        Ok(Self::from_node(Node::variable(self.node(), BuildSite::here())?))
    }

    /// Whether gradients can be taken with respect to this tensor: a variable, or a leaf that Candle's autograd tracks.
    #[must_use]
    pub fn is_variable(&self) -> bool {
        self.node().is_variable()
    }

    /// Whether a gradient can pass this tensor: it is a variable, or depends on one.
    #[must_use]
    pub fn is_traced(&self) -> bool {
        self.node().traced()
    }
}

/// The gradients of a scalar `loss` with respect to the variables `wrt`, each of its variable's shape and dtype; recorded, not evaluated.
///
/// They can be differentiated again.
///
/// # Errors
/// When `loss` has not one element or is not floating-point, one of `wrt` is no variable, or the loss does not reach it: the error names
/// the op and the line that cut it off (a detach, a comparison, a cast to integers), where that can still be seen. [`vjp`] gives `None`
/// for such a variable instead.
#[track_caller]
pub fn grad(loss: &LazyTensor, wrt: &[&LazyTensor]) -> Result<Vec<LazyTensor>> {
    let one = seed(loss)?;
    let gradients = vjp(&[loss], &[&one], wrt)?;
    let missing = |variable: &LazyTensor| Error::from(why_unreached(&[loss.node().clone()], variable.node()));
    gradients.into_iter().zip(wrt).map(|(g, variable)| g.ok_or_else(|| missing(variable))).collect()
}

/// The gradient of a scalar with respect to itself.
#[track_caller]
fn seed(loss: &LazyTensor) -> Result<LazyTensor> {
    if loss.elem_count() != 1 {
        let detail = "the gradient of a loss of one element; sum it, or give vjp a cotangent".to_string();
        return loss.refuse_here("grad", ErrorKind::Shape(detail));
    }
    if !loss.dtype().is_float() {
        let detail = "the gradient of a floating-point loss".to_string();
        return loss.refuse_here("grad", ErrorKind::DType(detail));
    }
    LazyTensor::ones(loss.shape(), loss.dtype(), loss.device())
}

/// The vector–Jacobian product: for each of the variables `wrt` the gradient of Σₖ Σ cotangentₖ·outputₖ, or `None` where no gradient
/// reaches it. A cotangent has its output's shape, dtype and device.
///
/// # Errors
/// As [`grad`], but for what is not reached; and when a cotangent does not fit its output.
#[track_caller]
pub fn vjp(
    outputs: &[&LazyTensor],
    cotangents: &[&LazyTensor],
    wrt: &[&LazyTensor],
) -> Result<Vec<Option<LazyTensor>>> {
    let nodes = |tensors: &[&LazyTensor]| tensors.iter().map(|t| t.node().clone()).collect::<Vec<NodeRef>>();
    #[cfg(feature = "testing")]
    let change = broken::change();
    #[cfg(not(feature = "testing"))]
    let change = None;
    let gradients = candle_lazy_graph::vjp_changed(&nodes(outputs), &nodes(cotangents), &nodes(wrt), change)
        .map_err(|e| e.at(&BuildSite::here()))?;
    // whatever their size: they are one graph, and evaluated together nothing of it is computed twice
    Ok(gradients.into_iter().map(|g| g.map(LazyTensor::from_node)).collect())
}

#[cfg(test)]
mod tests;
