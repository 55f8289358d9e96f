//! The trait of everything that maps one tensor to one, and how modules get their weights.

use crate::error::{Error, Result};
use candle_core::{Shape, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_nn::VarBuilder;

/// A function from one tensor to one, with weights inside.
///
/// `forward` records; nothing is computed before the result (or something made from it) is evaluated. The modules of this crate
/// implement it with `#[track_caller]`, so an error names the line that called the module; a module of your own is named by the
/// lines of its own `forward`, or by its caller's with the same attribute.
pub trait Module {
    /// Records the module applied to `xs`.
    ///
    /// # Errors
    /// Where shape, dtype or device of `xs` do not fit the weights: the op, both shapes and the line are named.
    // no #[track_caller] here: it would hold for every implementation, and the user's lines would never be named
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor>;

    /// `forward`, for modules behind a pointer: the caller's line reaches an implementation that asks for it.
    ///
    /// # Errors
    /// As [`Module::forward`].
    #[doc(hidden)]
    #[track_caller]
    fn forward_at_caller(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        self.forward(xs)
    }
}

impl<M: Module + ?Sized> Module for &M {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        (**self).forward_at_caller(xs)
    }
}

impl<M: Module + ?Sized> Module for Box<M> {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        (**self).forward_at_caller(xs)
    }
}

impl<M: Module + ?Sized> Module for std::sync::Arc<M> {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        (**self).forward_at_caller(xs)
    }
}

impl<M: Module + ?Sized> Module for std::rc::Rc<M> {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        (**self).forward_at_caller(xs)
    }
}

/// A leaf on the memory of a weight, which no gradient passes.
#[track_caller]
pub(crate) fn detached(weight: &LazyTensor) -> Result<LazyTensor> {
    Ok(weight.eval()?.detach().into())
}

/// Full name of tensor `name` under the builder's prefix.
pub(crate) fn full_name(vb: &VarBuilder<'_>, name: &str) -> String {
    let prefix = vb.prefix();
    if prefix.is_empty() {
        name.to_string()
    } else {
        format!("{prefix}.{name}")
    }
}

/// Tensor `name` of the builder, with an error that names tensor, file and shapes; initialised by `init` where the
/// builder makes new variables (training from a `VarMap`).
pub(crate) fn var_init(
    vb: &VarBuilder<'_>,
    shape: impl Into<Shape>,
    name: &str,
    init: candle_nn::Init,
) -> Result<Tensor> {
    vb.get_with_hints(shape, name, init).map_err(|error| Error::from_var(error, &full_name(vb, name)))
}
