//! Lazy tensors from numbers.

use super::LazyTensor;
use crate::error::Result;
use candle_core::shape::ShapeWithOneHole;
use candle_core::{DType, Device, NdArray, Shape, Tensor, WithDType};
use candle_lazy_graph::{Dims, Op};

impl LazyTensor {
    /// A leaf from a scalar, an array or nested arrays.
    ///
    /// # Errors
    /// When Candle cannot make the tensor.
    #[track_caller]
    pub fn new<A: NdArray>(array: A, device: &Device) -> Result<Self> {
        Ok(Self::from(Tensor::new(array, device)?))
    }

    /// A leaf that takes over `data`.
    ///
    /// # Errors
    /// When the shape does not have as many elements as `data`.
    #[track_caller]
    pub fn from_vec<S: ShapeWithOneHole, T: WithDType>(data: Vec<T>, shape: S, device: &Device) -> Result<Self> {
        Ok(Self::from(Tensor::from_vec(data, shape, device)?))
    }

    /// A leaf that copies `data`.
    ///
    /// # Errors
    /// When the shape does not have as many elements as `data`.
    #[track_caller]
    pub fn from_slice<S: ShapeWithOneHole, T: WithDType>(data: &[T], shape: S, device: &Device) -> Result<Self> {
        Ok(Self::from(Tensor::from_slice(data, shape, device)?))
    }

    /// The numbers from `start` to before `end`, one apart: a leaf of one dim.
    ///
    /// # Errors
    /// When Candle cannot make the tensor.
    #[track_caller]
    pub fn arange<T: WithDType>(start: T, end: T, device: &Device) -> Result<Self> {
        Ok(Self::from(Tensor::arange(start, end, device)?))
    }

    /// A tensor filled with `value`, of the value's dtype, recorded: its memory is taken when it is first needed.
    ///
    /// # Errors
    /// When the dtype is not supported or the shape is too large.
    #[track_caller]
    pub fn full<D: WithDType, S: Into<Shape>>(value: D, shape: S, device: &Device) -> Result<Self> {
        let wide = value.to_f64();
        let exact = D::from_f64(wide) == value || wide.is_nan();
        if !exact {
            // an integer that f64 does not hold
            return Self::new(value, device)?.broadcast_as(shape);
        }
        Self::filled(wide, shape, D::DTYPE, device)
    }

    /// A tensor of `dtype` filled with `value`; see [`LazyTensor::full`].
    ///
    /// # Errors
    /// As [`LazyTensor::full`].
    #[track_caller]
    pub fn filled<S: Into<Shape>>(value: f64, shape: S, dtype: DType, device: &Device) -> Result<Self> {
        let shape = shape.into();
        let op = Op::Full { shape: Dims::from_slice(shape.dims()), dtype };
        Self::record_on(op, &[value], &[], Some(device))
    }

    /// A tensor of zeros; see [`LazyTensor::full`].
    ///
    /// # Errors
    /// As [`LazyTensor::full`].
    #[track_caller]
    pub fn zeros<S: Into<Shape>>(shape: S, dtype: DType, device: &Device) -> Result<Self> {
        Self::filled(0.0, shape, dtype, device)
    }

    /// A tensor of ones; see [`LazyTensor::full`].
    ///
    /// # Errors
    /// As [`LazyTensor::full`].
    #[track_caller]
    pub fn ones<S: Into<Shape>>(shape: S, dtype: DType, device: &Device) -> Result<Self> {
        Self::filled(1.0, shape, dtype, device)
    }

    /// Zeros of this tensor's shape, dtype and device.
    ///
    /// # Errors
    /// As [`LazyTensor::full`].
    #[track_caller]
    pub fn zeros_like(&self) -> Result<Self> {
        Self::zeros(self.shape(), self.dtype(), self.device())
    }

    /// Ones of this tensor's shape, dtype and device.
    ///
    /// # Errors
    /// As [`LazyTensor::full`].
    #[track_caller]
    pub fn ones_like(&self) -> Result<Self> {
        Self::ones(self.shape(), self.dtype(), self.device())
    }

    /// An additive causal mask (queries, keys): 0 where query i sees key j ≤ keys − queries + i (and, with a window, only the
    /// last `window` of them), −∞ elsewhere.
    ///
    /// # Errors
    /// When there are more queries than keys, the window is 0 or the dtype is no float.
    #[track_caller]
    pub fn causal_mask(
        queries: usize,
        keys: usize,
        window: Option<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::record_on(Op::CausalMask { queries, keys, window, dtype }, &[], &[], Some(device))
    }
}
