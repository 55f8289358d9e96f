//! Lazy tensors from numbers.

use super::LazyTensor;
use crate::error::Result;
use candle_core::scalar::Scalar;
use candle_core::shape::ShapeWithOneHole;
use candle_core::{DType, Device, NdArray, Shape, Tensor, WithDType};
use candle_lazy_graph::infer::elem_count;
use candle_lazy_graph::{BuildSite, Dims, Error, ErrorKind, Meta, Op};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// The shape that `shape` means for `count` elements, or why it means none.
///
/// Candle multiplies sizes without a check: a product that overflows panics or wraps there, and is refused here.
pub(super) fn shape_for<S: ShapeWithOneHole>(shape: S, count: usize) -> std::result::Result<Shape, ErrorKind> {
    let overflow = || ErrorKind::Shape(format!("the shape has more elements than a machine can count, not {count}"));
    let shape = catch_unwind(AssertUnwindSafe(|| shape.into_shape(count))).map_err(|_| overflow())?;
    let shape = shape.map_err(|e| ErrorKind::Shape(crate::error::words(&e)))?;
    match elem_count(shape.dims()) {
        Some(n) if n == count => Ok(shape),
        Some(n) => Err(ErrorKind::Shape(format!("{:?} has {n} elements, not {count}", shape.dims()))),
        None => Err(overflow()),
    }
}

/// What Candle refused outside of a graph, at the line that asked for it.
fn refused(op: &'static str, error: candle_core::Error, site: &BuildSite) -> crate::error::Error {
    Error::new(op, ErrorKind::Shape(crate::error::words(&error))).at(site).into()
}

/// A shape that does not fit the data it is for.
fn of_data<T: WithDType>(op: &'static str, kind: ErrorKind, count: usize, site: &BuildSite) -> crate::error::Error {
    let data = [count];
    Error::new(op, kind).on(&[Meta { dims: &data, dtype: T::DTYPE }]).at(site).into()
}

/// An integer.
fn whole<T: WithDType>(value: T) -> Option<i128> {
    match value.to_scalar() {
        Scalar::U8(v) => Some(v.into()),
        Scalar::U32(v) => Some(v.into()),
        Scalar::I16(v) => Some(v.into()),
        Scalar::I32(v) => Some(v.into()),
        Scalar::I64(v) => Some(v.into()),
        _ => None,
    }
}

impl LazyTensor {
    /// A leaf from a scalar, an array or nested arrays.
    ///
    /// # Errors
    /// When Candle cannot make the tensor.
    #[track_caller]
    pub fn new<A: NdArray>(array: A, device: &Device) -> Result<Self> {
        let site = BuildSite::here();
        Ok(Self::from(Tensor::new(array, device).map_err(|e| refused("new", e, &site))?))
    }

    /// A leaf that takes over `data`.
    ///
    /// # Errors
    /// When the shape does not have as many elements as `data`.
    #[track_caller]
    pub fn from_vec<S: ShapeWithOneHole, T: WithDType>(data: Vec<T>, shape: S, device: &Device) -> Result<Self> {
        let site = BuildSite::here();
        let shape = shape_for(shape, data.len()).map_err(|kind| of_data::<T>("from_vec", kind, data.len(), &site))?;
        Ok(Self::from(Tensor::from_vec(data, shape, device).map_err(|e| refused("from_vec", e, &site))?))
    }

    /// A leaf that copies `data`.
    ///
    /// # Errors
    /// When the shape does not have as many elements as `data`.
    #[track_caller]
    pub fn from_slice<S: ShapeWithOneHole, T: WithDType>(data: &[T], shape: S, device: &Device) -> Result<Self> {
        let site = BuildSite::here();
        let shape = shape_for(shape, data.len()).map_err(|kind| of_data::<T>("from_slice", kind, data.len(), &site))?;
        Ok(Self::from(Tensor::from_slice(data, shape, device).map_err(|e| refused("from_slice", e, &site))?))
    }

    /// The numbers from `start` to before `end`, one apart: a leaf of one dim.
    ///
    /// # Errors
    /// When there are more numbers than memory, or numbers so large that the dtype cannot count by one.
    #[track_caller]
    pub fn arange<T: WithDType>(start: T, end: T, device: &Device) -> Result<Self> {
        let site = BuildSite::here();
        let (from, to) = (start.to_f64(), end.to_f64());
        // beyond these the next number is the same number, and counting never ends
        let largest = match T::DTYPE {
            DType::BF16 => 256.0,
            DType::F16 => 2048.0,
            DType::F32 => f64::from(1u32 << 24),
            DType::F64 => 2f64.powi(53),
            _ => f64::INFINITY,
        };
        if to > from && (to > largest || from < -largest) {
            let detail = format!("{} cannot count from {from:?} to {to:?} by one", T::DTYPE.as_str());
            return Err(Error::new("arange", ErrorKind::Range(detail)).at(&site).into());
        }
        let count = if to > from { (to - from).ceil() } else { 0.0 };
        crate::buffer::granted(T::DTYPE, count as usize)
            .map_err(|e| Error::new("arange", ErrorKind::Range(e.to_string())).at(&site))?;
        Ok(Self::from(Tensor::arange(start, end, device).map_err(|e| refused("arange", e, &site))?))
    }

    /// The numbers from `start` to before `end`, `step` apart: a leaf of one dim.
    ///
    /// # Errors
    /// When the step is 0 or lost in rounding, or there are more numbers than memory.
    #[track_caller]
    pub fn arange_step<T: WithDType>(start: T, end: T, step: T, device: &Device) -> Result<Self> {
        if step == T::zero() {
            let detail = format!("a step of 0 from {start} to {end}");
            return Self::refuse("arange", candle_lazy_graph::ErrorKind::Range(detail));
        }
        let site = BuildSite::here();
        let refuse = |detail: String| Error::new("arange", ErrorKind::Range(detail)).at(&site);
        let up = step > T::zero();
        let inside = |v: T| if up { v < end } else { v > end };
        let (from, to, by) = (start.to_f64(), end.to_f64(), step.to_f64());
        // rounding errors of the sum may add a few
        let count = if inside(start) { ((to - from) / by).ceil() } else { 0.0 };
        crate::buffer::granted(T::DTYPE, count as usize).map_err(|e| refuse(e.to_string()))?;
        let mut data = Vec::new();
        let mut current = start;
        while inside(current) {
            data.push(current);
            // what is left is less than a step: the next sum might overflow the dtype, and is not needed
            if let (Some(to), Some(at), Some(by)) = (whole(end), whole(current), whole(step)) {
                if (to - at).abs() <= by.abs() {
                    break;
                }
            }
            let before = current;
            current += step;
            if current == before {
                let dtype = T::DTYPE.as_str();
                return Err(refuse(format!(
                    "{dtype} cannot count from {start} to {end} by {step}: {before} + {step} is {before}"
                ))
                .into());
            }
        }
        let len = data.len();
        Self::from_vec(data, len, device)
    }

    /// start + i·step for `len` numbers, computed in f64 and rounded once: recorded, so that another length makes no new plan.
    ///
    /// # Errors
    /// When the dtype is not supported or the length too large.
    #[track_caller]
    pub fn arange_recorded(start: f64, step: f64, len: usize, dtype: DType, device: &Device) -> Result<Self> {
        Self::record_on(Op::Arange { len, dtype }, &[start, step], &[], Some(device))
    }

    #[track_caller]
    fn index_pairs(n: usize, device: &Device) -> Result<(Self, Self)> {
        // f64 holds every index that a dim can have
        let index = Self::arange_recorded(0.0, 1.0, n, DType::F64, device)?;
        Ok((index.reshape((n, 1))?, index.reshape((1, n))?))
    }

    /// The lower triangle, diagonal included, of an n × n matrix of ones; zeros above.
    ///
    /// # Errors
    /// When the dtype is not supported or the size too large.
    #[track_caller]
    pub fn tril2(n: usize, dtype: DType, device: &Device) -> Result<Self> {
        let (row, column) = Self::index_pairs(n, device)?;
        column.broadcast_le(&row)?.to_dtype(dtype)
    }

    /// The upper triangle, diagonal included, of an n × n matrix of ones; zeros below.
    ///
    /// # Errors
    /// As [`LazyTensor::tril2`].
    #[track_caller]
    pub fn triu2(n: usize, dtype: DType, device: &Device) -> Result<Self> {
        let (row, column) = Self::index_pairs(n, device)?;
        column.broadcast_ge(&row)?.to_dtype(dtype)
    }

    /// The n × n identity matrix.
    ///
    /// # Errors
    /// As [`LazyTensor::tril2`].
    #[track_caller]
    pub fn eye(n: usize, dtype: DType, device: &Device) -> Result<Self> {
        let (row, column) = Self::index_pairs(n, device)?;
        column.broadcast_eq(&row)?.to_dtype(dtype)
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
