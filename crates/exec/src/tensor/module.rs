//! What maps a tensor to a tensor, under the names and signatures that Candle gives it.

use super::LazyTensor;
use crate::error::Result;

/// A function from one tensor to one, with weights inside; the lazy twin of `candle_core::Module`.
///
/// `forward` records; nothing is computed before the result, or something made from it, is evaluated. It is
/// `#[track_caller]`, also in implementations that do not say so: a module that records directly names the line that
/// called it.
pub trait Module {
    /// Records the module applied to `xs`.
    ///
    /// # Errors
    /// Where shape, dtype or device of `xs` do not fit.
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor>;
}

impl<F: Fn(&LazyTensor) -> Result<LazyTensor>> Module for F {
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        self(xs)
    }
}

impl<M: Module> Module for Option<&M> {
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        match self {
            None => Ok(xs.clone()),
            Some(module) => module.forward(xs),
        }
    }
}

/// A module that does something else while training; the lazy twin of `candle_core::ModuleT`.
pub trait ModuleT {
    /// Records the module applied to `xs`.
    ///
    /// # Errors
    /// As [`Module::forward`].
    #[track_caller]
    fn forward_t(&self, xs: &LazyTensor, train: bool) -> Result<LazyTensor>;
}

impl<M: Module> ModuleT for M {
    fn forward_t(&self, xs: &LazyTensor, _train: bool) -> Result<LazyTensor> {
        self.forward(xs)
    }
}

impl LazyTensor {
    /// `module.forward(self)`.
    ///
    /// # Errors
    /// As [`Module::forward`].
    #[track_caller]
    pub fn apply<M: Module>(&self, module: &M) -> Result<Self> {
        module.forward(self)
    }

    /// `module.forward_t(self, train)`.
    ///
    /// # Errors
    /// As [`ModuleT::forward_t`].
    #[track_caller]
    pub fn apply_t<M: ModuleT>(&self, module: &M, train: bool) -> Result<Self> {
        module.forward_t(self, train)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    struct Wide;

    impl Module for Wide {
        fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
            xs.broadcast_add(&LazyTensor::ones((7, 1), xs.dtype(), xs.device())?)
        }
    }

    #[test]
    fn closures_and_options_are_modules() {
        let x = LazyTensor::new(&[1f32, -2.], &Device::Cpu).unwrap();
        let twice = |xs: &LazyTensor| xs * 2.0;
        assert_eq!(x.apply(&twice).unwrap().to_vec1::<f32>().unwrap(), [2., -4.]);
        assert_eq!(x.apply(&Some(&twice)).unwrap().to_vec1::<f32>().unwrap(), [2., -4.]);
        let none: Option<&Wide> = None;
        assert_eq!(x.apply_t(&none, true).unwrap().to_vec1::<f32>().unwrap(), [1., -2.]);
    }

    #[test]
    fn an_error_in_a_module_names_the_line_that_wrote_the_op() {
        let x = LazyTensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
        let error = x.apply(&Wide).unwrap_err();
        let site = error.site().unwrap();
        assert!(site.location().file().ends_with("module.rs"), "{error}");
    }
}
