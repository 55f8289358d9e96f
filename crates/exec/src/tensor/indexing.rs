//! Ops that pick, place or repeat elements.

use super::LazyTensor;
use crate::error::Result;
use candle_core::shape::Dim;
use candle_core::{Device, Shape};
use candle_lazy_graph::{ErrorKind, Op, ScatterOp};

impl LazyTensor {
    /// Elements chosen along `dim` one by one: out\[i…\] is this tensor at the same place with the coordinate of `dim` replaced by
    /// ids\[i…\]. `ids` (u8, u32 or i64) has this tensor's rank and is nowhere larger outside `dim`; the result has its shape.
    /// An id equal to its type's largest value gives zero, any other id out of range is an error when the value is computed.
    ///
    /// # Errors
    /// When the dim is out of range or the shapes do not fit.
    #[track_caller]
    pub fn gather<D: Dim>(&self, ids: &Self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "gather")?;
        Self::record(Op::Gather { dim: dim as u8 }, &[], &[self, ids])
    }

    /// This tensor with the elements of `src` written at the coordinates along `dim` that `ids` gives; `ids` and `src` have one
    /// shape, this tensor's outside `dim`. Of several sources for one place the last one counts.
    ///
    /// # Errors
    /// When the dim is out of range, or shapes or dtypes do not fit.
    #[track_caller]
    pub fn scatter<D: Dim>(&self, ids: &Self, src: &Self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "scatter")?;
        Self::record(Op::Scatter { op: ScatterOp::Set, dim: dim as u8 }, &[], &[self, ids, src])
    }

    /// As [`LazyTensor::scatter`], adding instead of writing, in row-major order of the sources. f16 and bf16 add in f32.
    ///
    /// # Errors
    /// As [`LazyTensor::scatter`].
    #[track_caller]
    pub fn scatter_add<D: Dim>(&self, ids: &Self, src: &Self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "scatter_add")?;
        Self::record(Op::Scatter { op: ScatterOp::Add, dim: dim as u8 }, &[], &[self, ids, src])
    }

    /// This tensor with slice j of `src` added to slice ids\[j\] along `dim`, in the order of j; `ids` has one dim. f16 and bf16 add
    /// in f32.
    ///
    /// # Errors
    /// When the dim is out of range, or shapes or dtypes do not fit.
    #[track_caller]
    pub fn index_add<D: Dim>(&self, ids: &Self, src: &Self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "index_add")?;
        Self::record(Op::IndexAdd { dim: dim as u8 }, &[], &[self, ids, src])
    }

    /// The indices `start`, `start + step`, … before `end` of `dim`: a view.
    ///
    /// # Errors
    /// When the dim is out of range, `end` is beyond it or before `start`, or `step` is 0.
    #[track_caller]
    pub fn slice<D: Dim>(&self, dim: D, start: usize, end: usize, step: usize) -> Result<Self> {
        let dim = self.dim_index(dim, "slice")?;
        let size = self.dims()[dim];
        if step == 0 || end > size || start > end {
            let detail = format!("{start}..{end} in steps of {step} of dim {dim} of {:?}", self.dims());
            return Self::refuse("slice", ErrorKind::Range(detail));
        }
        if step == 1 {
            return self.narrow(dim, start, end - start);
        }
        let len = (end - start).div_ceil(step);
        Self::record(Op::Stride { dim: dim as u8, start, len, step }, &[], &[self])
    }

    /// Parts of `sizes` along `dim`, which they fill.
    ///
    /// # Errors
    /// When the dim is out of range or the sizes do not add up to it.
    #[track_caller]
    pub fn split<D: Dim>(&self, sizes: &[usize], dim: D) -> Result<Vec<Self>> {
        let dim = self.dim_index(dim, "split")?;
        if sizes.iter().try_fold(0usize, |sum, &n| sum.checked_add(n)) != Some(self.dims()[dim]) {
            let detail = format!("sizes {sizes:?} do not add up to dim {dim} of {:?}", self.dims());
            return Self::refuse("split", ErrorKind::Shape(detail));
        }
        let mut start = 0;
        let mut parts = Vec::with_capacity(sizes.len());
        for &len in sizes {
            parts.push(self.narrow(dim, start, len)?);
            start += len;
        }
        Ok(parts)
    }

    /// With `left` zeros before and `right` zeros after along `dim`.
    ///
    /// # Errors
    /// When the dim is out of range or the result too large.
    #[track_caller]
    pub fn pad_with_zeros<D: Dim>(&self, dim: D, left: usize, right: usize) -> Result<Self> {
        let dim = self.dim_index(dim, "pad_with_zeros")?;
        let mut dims = self.dims().to_vec();
        let mut parts = Vec::with_capacity(3);
        if left > 0 {
            dims[dim] = left;
            parts.push(Self::zeros(dims.as_slice(), self.dtype(), self.device())?);
        }
        parts.push(self.clone());
        if right > 0 {
            dims[dim] = right;
            parts.push(Self::zeros(dims.as_slice(), self.dtype(), self.device())?);
        }
        Self::cat(&parts, dim)
    }

    /// With the first slice repeated `left` times before and the last one `right` times after along `dim`.
    ///
    /// # Errors
    /// When the dim is out of range or empty.
    #[track_caller]
    pub fn pad_with_same<D: Dim>(&self, dim: D, left: usize, right: usize) -> Result<Self> {
        let dim = self.dim_index(dim, "pad_with_same")?;
        let size = self.dims()[dim];
        if left == 0 && right == 0 {
            return Ok(self.clone());
        }
        if size == 0 {
            let detail = format!("dim {dim} of {:?} has no element to repeat", self.dims());
            return Self::refuse("pad_with_same", ErrorKind::Range(detail));
        }
        let mut dims = self.dims().to_vec();
        let mut parts = Vec::with_capacity(3);
        if left > 0 {
            dims[dim] = left;
            parts.push(self.narrow(dim, 0, 1)?.broadcast_as(dims.as_slice())?);
        }
        parts.push(self.clone());
        if right > 0 {
            dims[dim] = right;
            parts.push(self.narrow(dim, size - 1, 1)?.broadcast_as(dims.as_slice())?);
        }
        Self::cat(&parts, dim)
    }

    /// Repeated `repeats` times along each dim, the rest once; where `repeats` is longer than the rank, dims of size one come in front.
    ///
    /// # Errors
    /// When the result is too large.
    #[track_caller]
    pub fn repeat<S: Into<Shape>>(&self, repeats: S) -> Result<Self> {
        let repeats = repeats.into();
        let repeats = repeats.dims();
        let mut dims = vec![1; repeats.len().saturating_sub(self.rank())];
        dims.extend_from_slice(self.dims());
        let mut result = self.reshape(dims.as_slice())?;
        for (dim, &n) in repeats.iter().enumerate() {
            if n == 1 {
                continue;
            }
            // copies behind one another along a dim: a new dim before it, broadcast, and both made one
            let (left, from): (usize, usize) = (dims[..dim].iter().product(), dims[dim..].iter().product());
            let Some(size) = dims[dim].checked_mul(n) else {
                let detail = format!("{repeats:?} for {:?}: more elements than a machine can count", self.dims());
                return Self::refuse("repeat", ErrorKind::Shape(detail));
            };
            dims[dim] = size;
            result = result.reshape((left, 1, from))?.broadcast_as((left, n, from))?.reshape(dims.as_slice())?;
        }
        Ok(result)
    }

    /// 1 where the last dim's index equals the id, in a new last dim of `depth`: ids (…) (u8, u32 or i64) give (…, depth) with
    /// `on` there and `off` elsewhere. An id that is no index of the new dim, such as −1, gives `off` everywhere.
    ///
    /// # Errors
    /// When this is no integer tensor or the dtype is not supported.
    #[track_caller]
    pub fn one_hot(&self, depth: usize, on: f64, off: f64, dtype: candle_core::DType) -> Result<Self> {
        if self.dtype().is_float() {
            let detail = format!("ids must be integers, got {} {:?}", self.dtype().as_str(), self.dims());
            return Self::refuse("one_hot", ErrorKind::DType(detail));
        }
        // f64 holds every index that a dim can have; a large id that it rounds is no index either way
        let wide = candle_core::DType::F64;
        let places = Self::arange_recorded(0.0, 1.0, depth, wide, self.device())?;
        let hit = self.to_dtype(wide)?.unsqueeze(self.rank())?.broadcast_eq(&places)?;
        let on = Self::filled(on, (), dtype, self.device())?;
        hit.where_cond(&on, &Self::filled(off, (), dtype, self.device())?)
    }

    /// The same tensor on another device; the same handle where it is there already.
    ///
    /// # Errors
    /// None when recorded; the copy can fail when the value is computed.
    #[track_caller]
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device().same_device(device) {
            return Ok(self.clone());
        }
        Self::record_on(Op::ToDevice, &[], &[self], Some(device))
    }
}
