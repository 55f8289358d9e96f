//! What maps a tensor to a tensor, under the names and signatures that Candle gives it.

use super::LazyTensor;
use crate::error::Result;

/// A function from one tensor to one, with weights inside; the lazy twin of `candle_core::Module`.
///
/// `forward` records; nothing is computed before the result, or something made from it, is evaluated. The ops of a module
/// name the lines of its own `forward`; with `#[track_caller]` on an implementation, as on those of this library, they name
/// the line that called it. Rust hands the caller's line neither through a pointer to a function (`map(LazyTensor::relu)`) nor
/// through a bare trait object (`forward` on a `&dyn Module` or an `Arc<dyn Module>`): there the line is the module's own. A
/// `Box<dyn Module>`, and `xs.apply(&module)` with a reference to one, keep it.
pub trait Module {
    /// Records the module applied to `xs`.
    ///
    /// # Errors
    /// Where shape, dtype or device of `xs` do not fit.
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

// Not for every pointer to every module: that would overlap with closures below, which are modules too.
macro_rules! behind_a_pointer {
    ($($pointer:ty),* $(,)?) => {
        $(impl Module for $pointer {
            #[track_caller]
            fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
                (**self).forward_at_caller(xs)
            }
        })*
    };
}

behind_a_pointer!(
    Box<dyn Module>,
    Box<dyn Module + Send>,
    Box<dyn Module + Send + Sync>,
    &dyn Module,
    &(dyn Module + Send),
    &(dyn Module + Send + Sync),
);

impl<F: Fn(&LazyTensor) -> Result<LazyTensor>> Module for F {
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        self(xs)
    }
}

impl<M: Module> Module for Option<&M> {
    #[track_caller]
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
    fn forward_t(&self, xs: &LazyTensor, train: bool) -> Result<LazyTensor>;
}

impl<M: Module> ModuleT for M {
    #[track_caller]
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

    /// The line of the op in `Wide`.
    const WIDE: u32 = line!() + 5;

    impl Module for Wide {
        fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
            let rows = LazyTensor::ones((7, 1), xs.dtype(), xs.device())?;
            xs.broadcast_add(&rows)
        }
    }

    /// A module that names its caller, as those of the library do.
    struct Native;

    impl Module for Native {
        #[track_caller]
        fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
            xs.narrow(0, 5, 1)
        }
    }

    fn line_of(result: Result<LazyTensor>) -> u32 {
        result.unwrap_err().site().unwrap().location().line()
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
    fn an_error_names_the_line_of_the_users_module_or_of_its_caller() {
        let x = LazyTensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(line_of(x.apply(&Wide)), WIDE);
        assert_eq!(line_of(x.apply(&Native)), line!());
        assert_eq!(line_of(x.apply(&Some(&Native))), line!());
        assert_eq!(line_of(x.apply_t(&Native, true)), line!());
        let boxed: [Box<dyn Module>; 2] = [Box::new(Wide), Box::new(Native)];
        assert_eq!(line_of(boxed[0].forward(&x)), WIDE);
        assert_eq!(line_of(boxed[1].forward(&x)), line!());
        assert_eq!(line_of(x.apply(&boxed[1])), line!());
        let shared: Box<dyn Module + Send + Sync> = Box::new(Native);
        assert_eq!(line_of(shared.forward(&x)), line!());
        assert_eq!(line_of(x.apply(&shared)), line!());
        let lent: &dyn Module = &Native;
        assert_eq!(line_of(x.apply(&lent)), line!());
    }
}
