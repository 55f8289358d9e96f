//! The one public error.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// `std::result::Result` with the umbrella's [`Error`], unless another one is named.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any error of the library. It is opaque, so that the layers may change theirs; what a program can act on is asked with
/// the `is_…` methods, what a person reads is its `Display` and the source chain. Cloning is cheap.
#[derive(Clone)]
pub struct Error(Arc<Repr>);

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum Repr {
    Ops(candle_lazy_ops::Error),
    Graph(candle_lazy_graph::Error),
    Exec(candle_lazy_exec::Error),
    Nn(candle_lazy_nn::Error),
    Candle(candle_core::Error),
}

/// What an error is about, where that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Shape,
    DType,
    Device,
    Unsupported,
}

impl Error {
    /// Whether shapes, dims, ranges or sizes do not fit each other or the op.
    #[must_use]
    pub fn is_shape(&self) -> bool {
        self.class() == Some(Class::Shape)
    }

    /// Whether dtypes do not fit each other or the op.
    #[must_use]
    pub fn is_dtype(&self) -> bool {
        self.class() == Some(Class::DType)
    }

    /// Whether tensors lie on different devices, or the build does not have the device.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.class() == Some(Class::Device)
    }

    /// Whether this version does not do what was asked for.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        self.class() == Some(Class::Unsupported)
    }

    fn class(&self) -> Option<Class> {
        match &*self.0 {
            Repr::Ops(error) => of_ops(error),
            Repr::Graph(error) => of_graph(error),
            Repr::Exec(error) => of_exec(error),
            Repr::Nn(error) => of_nn(error),
            Repr::Candle(error) => of_candle(error),
        }
    }
}

fn of_ops(error: &candle_lazy_ops::Error) -> Option<Class> {
    use candle_lazy_ops::Error as E;
    match error {
        E::ShapeMismatch { .. } | E::IndexOutOfRange { .. } | E::OutOfBounds { .. } => Some(Class::Shape),
        E::DTypeMismatch { .. } => Some(Class::DType),
        E::Unsupported { .. } => Some(Class::Unsupported),
        _ => None,
    }
}

fn of_graph(error: &candle_lazy_graph::Error) -> Option<Class> {
    use candle_lazy_graph::ErrorKind as K;
    match &error.kind {
        K::Shape(_) | K::Range(_) => Some(Class::Shape),
        K::DType(_) => Some(Class::DType),
        K::Device(_) => Some(Class::Device),
        K::Unsupported(_) => Some(Class::Unsupported),
        _ => None,
    }
}

fn of_exec(error: &candle_lazy_exec::Error) -> Option<Class> {
    use candle_lazy_exec::Error as E;
    match error {
        E::Record(error) => of_graph(error),
        E::Candle(error) => of_candle(error),
        E::Run { source, .. } | E::Other(source) => of_any(source.as_ref()),
        E::Context { inner, .. } | E::WithPath { inner, .. } | E::At { inner, .. } => of_exec(inner),
        _ => None,
    }
}

fn of_nn(error: &candle_lazy_nn::Error) -> Option<Class> {
    use candle_lazy_nn::Error as E;
    match error {
        E::Exec(error) => of_exec(error),
        E::Candle(error) => of_candle(error),
        E::TensorShape { .. } | E::CacheFull { .. } => Some(Class::Shape),
        E::Unsupported { .. } => Some(Class::Unsupported),
        _ => None,
    }
}

/// The errors that a kernel or a Candle op may return through a boxed source.
fn of_any(error: &(dyn StdError + Send + Sync + 'static)) -> Option<Class> {
    let error: &(dyn StdError + 'static) = error;
    if let Some(error) = error.downcast_ref::<candle_core::Error>() {
        of_candle(error)
    } else if let Some(error) = error.downcast_ref::<candle_lazy_ops::Error>() {
        of_ops(error)
    } else if let Some(error) = error.downcast_ref::<candle_lazy_graph::Error>() {
        of_graph(error)
    } else if let Some(error) = error.downcast_ref::<candle_lazy_nn::Error>() {
        of_nn(error)
    } else {
        error.downcast_ref::<candle_lazy_exec::Error>().and_then(of_exec)
    }
}

fn of_candle(error: &candle_core::Error) -> Option<Class> {
    use candle_core::Error as E;
    match error {
        // layers that Candle puts around an error
        E::Context { inner, .. } | E::WithPath { inner, .. } | E::WithBacktrace { inner, .. } => of_candle(inner),
        E::WrappedContext { wrapped, .. } => of_any(wrapped.as_ref()),
        E::UnexpectedDType { .. } | E::DTypeMismatchBinaryOp { .. } => Some(Class::DType),
        E::DimOutOfRange { .. }
        | E::DuplicateDimIndex { .. }
        | E::UnexpectedNumberOfDims { .. }
        | E::UnexpectedShape { .. }
        | E::ShapeMismatch { .. }
        | E::ShapeMismatchBinaryOp { .. }
        | E::ShapeMismatchCat { .. }
        | E::ShapeMismatchSplit { .. }
        | E::OnlySingleDimension { .. }
        | E::EmptyTensor { .. }
        | E::NarrowInvalidArgs { .. }
        | E::InvalidIndex { .. }
        | E::BroadcastIncompatibleShapes { .. } => Some(Class::Shape),
        E::DeviceMismatchBinaryOp { .. } | E::NotCompiledWithCudaSupport | E::NotCompiledWithMetalSupport => {
            Some(Class::Device)
        }
        E::UnsupportedDTypeForOp(..)
        | E::UnsupportedSafeTensorDtype(_)
        | E::BackwardNotSupported { .. }
        | E::RequiresContiguous { .. } => Some(Class::Unsupported),
        _ => None,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Error {
    /// The text of `Display` and every source below it, as `unwrap` and `main` print.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)?;
        let mut source = self.source();
        while let Some(error) = source {
            write!(f, "\n  because {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

macro_rules! from_layer {
    ($($variant:ident: $error:ty),+ $(,)?) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self(Arc::new(Repr::$variant(error)))
            }
        })+
    };
}

from_layer! {
    Ops: candle_lazy_ops::Error,
    Graph: candle_lazy_graph::Error,
    Exec: candle_lazy_exec::Error,
    Nn: candle_lazy_nn::Error,
    Candle: candle_core::Error,
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};
    use candle_lazy_exec::LazyTensor;

    fn tensor(dims: &[usize], dtype: DType) -> LazyTensor {
        LazyTensor::from(Tensor::zeros(dims, dtype, &Device::Cpu).unwrap())
    }

    #[test]
    fn shapes_are_told_from_dtypes() {
        let a = tensor(&[2, 3], DType::F32);
        let shape = Error::from(a.matmul(&tensor(&[4, 5], DType::F32)).unwrap_err());
        assert!(shape.is_shape() && !shape.is_dtype(), "{shape}");
        let dtype = Error::from(a.add(&tensor(&[2, 3], DType::F64)).unwrap_err());
        assert!(dtype.is_dtype() && !dtype.is_shape(), "{dtype}");
    }

    #[test]
    fn a_range_is_a_shape_error_and_names_the_line() {
        let error = Error::from(tensor(&[2, 3], DType::F32).narrow(5, 0, 1).unwrap_err());
        assert!(error.is_shape(), "{error}");
        assert!(error.to_string().contains(file!().rsplit('/').next().unwrap()), "{error}");
    }

    #[test]
    fn what_fails_while_running_or_in_a_module_keeps_its_class() {
        let x = LazyTensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
        let ids = LazyTensor::new(&[0u32, 7], &Device::Cpu).unwrap();
        let error = Error::from(x.index_select(&ids, 0).unwrap().eval().unwrap_err());
        assert!(error.is_shape(), "{error}");
        let heads = LazyTensor::zeros((1, 1, 4, 6), DType::F32, &Device::Cpu).unwrap();
        let table = LazyTensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
        let error = Error::from(candle_lazy_nn::candle_nn::rotary_emb::rope(&heads, &table, &table).unwrap_err());
        assert!(error.is_shape() && error.to_string().contains("rope(f32 [1, 1, 4, 6], f32 [4, 2])"), "{error}");
        let odd = heads.narrow(3, 0, 5).unwrap();
        let error = candle_lazy_nn::candle_nn::rotary_emb::rope(&odd, &table, &table).unwrap_err().to_string();
        assert!(error.contains("a head of 5 cannot be turned in pairs"), "{error}");
        let error = Error::from(candle_lazy_nn::candle_nn::ops::swiglu(&odd).unwrap_err());
        assert!(error.is_shape() && error.to_string().contains("swiglu(f32 [1, 1, 4, 5])"), "{error}");
    }

    #[test]
    fn candles_layers_are_seen_through() {
        let inner = candle_core::Error::DeviceMismatchBinaryOp {
            lhs: Device::Cpu.location(),
            rhs: Device::Cpu.location(),
            op: "add",
        };
        let error = Error::from(inner.with_path("w.safetensors").context("loading"));
        assert!(error.is_device() && !error.is_unsupported(), "{error}");
    }

    #[test]
    fn layers_above_keep_the_class() {
        let a = tensor(&[2, 3], DType::F32);
        let exec = a.matmul(&tensor(&[4, 5], DType::F32)).unwrap_err();
        assert!(Error::from(candle_lazy_nn::Error::from(exec)).is_shape());
        let unsupported = candle_lazy_ops::Error::Unsupported { op: "softmax", detail: "u8".into() };
        assert!(Error::from(unsupported).is_unsupported());
        let config = candle_lazy_nn::Error::Config { what: "a".into(), message: "b".into() };
        let config = Error::from(config);
        assert!(!config.is_shape() && !config.is_dtype() && !config.is_device() && !config.is_unsupported());
    }

    #[test]
    fn sources_are_chained_and_clones_agree() {
        let io = std::io::Error::other("the disk is gone");
        let error = Error::from(candle_lazy_nn::Error::Io { path: "w.gguf".into(), source: io });
        let mut chain = Vec::new();
        let mut source = StdError::source(&error);
        while let Some(next) = source {
            chain.push(next.to_string());
            source = next.source();
        }
        assert_eq!(chain, ["the disk is gone"]);
        assert_eq!(error.clone().to_string(), error.to_string());
        assert!(format!("{error:?}").ends_with("because the disk is gone"), "{error:?}");
    }
}
