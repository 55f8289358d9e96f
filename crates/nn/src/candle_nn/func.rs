//! Functions as modules.

use crate::candle::{Module, ModuleT, Result, Tensor};
use std::sync::Arc;

type Boxed<'a> = Arc<dyn 'a + Fn(&Tensor) -> Result<Tensor> + Send + Sync>;
type BoxedT<'a> = Arc<dyn 'a + Fn(&Tensor, bool) -> Result<Tensor> + Send + Sync>;

/// A function as a module.
#[derive(Clone)]
pub struct Func<'a> {
    f: Boxed<'a>,
}

impl std::fmt::Debug for Func<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("func")
    }
}

/// A function as a module.
pub fn func<'a>(f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'a) -> Func<'a> {
    Func { f: Arc::new(f) }
}

impl<'a> Func<'a> {
    /// The same as [`func`].
    pub fn new(f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'a) -> Self {
        func(f)
    }
}

impl Module for Func<'_> {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        (self.f)(xs)
    }
}

/// A function of a tensor and whether it is training, as a module.
#[derive(Clone)]
pub struct FuncT<'a> {
    f: BoxedT<'a>,
}

impl std::fmt::Debug for FuncT<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("func_t")
    }
}

/// A function of a tensor and whether it is training, as a module.
pub fn func_t<'a>(f: impl Fn(&Tensor, bool) -> Result<Tensor> + Send + Sync + 'a) -> FuncT<'a> {
    FuncT { f: Arc::new(f) }
}

impl<'a> FuncT<'a> {
    /// The same as [`func_t`].
    pub fn new(f: impl Fn(&Tensor, bool) -> Result<Tensor> + Send + Sync + 'a) -> Self {
        func_t(f)
    }
}

impl ModuleT for FuncT<'_> {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        (self.f)(xs, train)
    }
}
