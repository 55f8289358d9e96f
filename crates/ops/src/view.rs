//! Borrowed typed data and strided layouts: what a kernel reads and writes.

use crate::error::{Error, Result};
use candle_core::DType;
use half::{bf16, f16};
use smallvec::SmallVec;

/// Dims or strides of a layout; six without an allocation.
pub type Dims = SmallVec<[usize; 6]>;

/// Typed elements that a kernel reads.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    /// Unsigned 8 bit.
    U8(&'a [u8]),
    /// Unsigned 32 bit.
    U32(&'a [u32]),
    /// Signed 64 bit.
    I64(&'a [i64]),
    /// Brain float.
    BF16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
    /// Single precision.
    F32(&'a [f32]),
    /// Double precision.
    F64(&'a [f64]),
}

/// Typed elements that a kernel writes.
#[derive(Debug)]
pub enum SliceMut<'a> {
    /// Unsigned 8 bit.
    U8(&'a mut [u8]),
    /// Unsigned 32 bit.
    U32(&'a mut [u32]),
    /// Signed 64 bit.
    I64(&'a mut [i64]),
    /// Brain float.
    BF16(&'a mut [bf16]),
    /// Half precision.
    F16(&'a mut [f16]),
    /// Single precision.
    F32(&'a mut [f32]),
    /// Double precision.
    F64(&'a mut [f64]),
}

/// Runs one generic expression for whichever dtype a `Slice` or `SliceMut` holds.
macro_rules! each_dtype {
    ($enum:ident, $value:expr, $v:ident => $body:expr) => {
        match $value {
            $crate::view::$enum::U8($v) => $body,
            $crate::view::$enum::U32($v) => $body,
            $crate::view::$enum::I64($v) => $body,
            $crate::view::$enum::BF16($v) => $body,
            $crate::view::$enum::F16($v) => $body,
            $crate::view::$enum::F32($v) => $body,
            $crate::view::$enum::F64($v) => $body,
        }
    };
}
pub(crate) use each_dtype;

impl<'a> Slice<'a> {
    /// Dtype of the elements.
    pub fn dtype(&self) -> DType {
        match self {
            Slice::U8(_) => DType::U8,
            Slice::U32(_) => DType::U32,
            Slice::I64(_) => DType::I64,
            Slice::BF16(_) => DType::BF16,
            Slice::F16(_) => DType::F16,
            Slice::F32(_) => DType::F32,
            Slice::F64(_) => DType::F64,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each_dtype!(Slice, self, v => v.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The addresses of the elements' bytes.
    pub fn addresses(&self) -> std::ops::Range<usize> {
        each_dtype!(Slice, self, v => {
            let range = v.as_ptr_range();
            range.start as usize..range.end as usize
        })
    }
}

impl<'a> SliceMut<'a> {
    /// Dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.as_slice().dtype()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each_dtype!(SliceMut, self, v => v.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same elements for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        match self {
            SliceMut::U8(v) => SliceMut::U8(v),
            SliceMut::U32(v) => SliceMut::U32(v),
            SliceMut::I64(v) => SliceMut::I64(v),
            SliceMut::BF16(v) => SliceMut::BF16(v),
            SliceMut::F16(v) => SliceMut::F16(v),
            SliceMut::F32(v) => SliceMut::F32(v),
            SliceMut::F64(v) => SliceMut::F64(v),
        }
    }

    /// The same elements, to read.
    pub fn as_slice(&self) -> Slice<'_> {
        match self {
            SliceMut::U8(v) => Slice::U8(v),
            SliceMut::U32(v) => Slice::U32(v),
            SliceMut::I64(v) => Slice::I64(v),
            SliceMut::BF16(v) => Slice::BF16(v),
            SliceMut::F16(v) => Slice::F16(v),
            SliceMut::F32(v) => Slice::F32(v),
            SliceMut::F64(v) => Slice::F64(v),
        }
    }

    /// Splits into the first `mid` elements and the others; `mid` is capped at the length.
    pub(crate) fn split_at(self, mid: usize) -> (SliceMut<'a>, SliceMut<'a>) {
        macro_rules! split {
            ($($v:ident),*) => {
                match self {
                    $(SliceMut::$v(s) => {
                        let (a, b) = s.split_at_mut(mid.min(s.len()));
                        (SliceMut::$v(a), SliceMut::$v(b))
                    })*
                }
            };
        }
        split!(U8, U32, I64, BF16, F16, F32, F64)
    }
}

/// A strided layout: element `(i0, i1, …)` stands at `offset + Σ ik·strides[k]`, counted in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strided {
    /// Size of each dim.
    pub dims: Dims,
    /// Distance in elements between neighbours along each dim; 0 where a dim is broadcast.
    pub strides: Dims,
    /// Where the first element stands.
    pub offset: usize,
}

/// Row-major strides of `dims`.
pub(crate) fn row_major(dims: &[usize]) -> Dims {
    let mut strides: Dims = SmallVec::from_elem(1, dims.len());
    let mut step = 1usize;
    for (s, &d) in strides.iter_mut().zip(dims).rev() {
        *s = step;
        step = step.saturating_mul(d.max(1));
    }
    strides
}

/// Number of elements of a shape (saturating, so that a nonsensical shape fails a bounds check instead of wrapping).
pub(crate) fn count(dims: &[usize]) -> usize {
    if dims.contains(&0) {
        return 0;
    }
    dims.iter().fold(1usize, |a, &d| a.saturating_mul(d))
}

impl Strided {
    /// Row-major layout from offset 0.
    pub fn contiguous(dims: &[usize]) -> Self {
        Self { dims: SmallVec::from_slice(dims), strides: row_major(dims), offset: 0 }
    }

    /// The layout of a Candle tensor.
    pub fn from_layout(layout: &candle_core::Layout) -> Self {
        Self {
            dims: SmallVec::from_slice(layout.dims()),
            strides: SmallVec::from_slice(layout.stride()),
            offset: layout.start_offset(),
        }
    }

    /// Number of dims.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Number of elements.
    pub fn elem_count(&self) -> usize {
        count(&self.dims)
    }

    /// Whether the elements stand in row-major order without gaps. Strides of size-1 dims do not
    /// matter, an empty layout is contiguous, the offset may be anything.
    pub fn is_contiguous(&self) -> bool {
        if self.elem_count() == 0 {
            return true;
        }
        let mut step = 1usize;
        for (&d, &s) in self.dims.iter().zip(&self.strides).rev() {
            if d != 1 {
                if s != step {
                    return false;
                }
                step = step.saturating_mul(d);
            }
        }
        true
    }

    /// Reorders the dims: dim `i` of the result is dim `perm[i]` of `self`.
    ///
    /// # Errors
    /// `ShapeMismatch` if `perm` is not a permutation of the dims.
    pub fn permute(&self, perm: &[usize]) -> Result<Self> {
        let bad = || Error::shape("permute", format!("{perm:?} is no permutation of the dims of {:?}", self.dims));
        if perm.len() != self.rank() {
            return Err(bad());
        }
        let mut seen: SmallVec<[bool; 6]> = SmallVec::from_elem(false, perm.len());
        let mut dims = Dims::new();
        let mut strides = Dims::new();
        for &p in perm {
            match (seen.get_mut(p), self.dims.get(p), self.strides.get(p)) {
                (Some(s), Some(&d), Some(&st)) if !*s => {
                    *s = true;
                    dims.push(d);
                    strides.push(st);
                }
                _ => return Err(bad()),
            }
        }
        Ok(Self { dims, strides, offset: self.offset })
    }

    /// Keeps `len` elements of `dim` from `start` on.
    ///
    /// # Errors
    /// `ShapeMismatch` if the dim does not exist or the range leaves it.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        let fits = |d: usize| start.checked_add(len).is_some_and(|end| end <= d);
        match self.dims.get(dim) {
            Some(&d) if fits(d) => {
                let mut out = self.clone();
                out.dims[dim] = len;
                if len > 0 {
                    out.offset = out.offset.saturating_add(start.saturating_mul(out.strides[dim]));
                }
                Ok(out)
            }
            _ => Err(Error::shape("narrow", format!("dim {dim}, start {start}, len {len} on {:?}", self.dims))),
        }
    }

    /// Keeps `len` elements of `dim` from `start` on, `step` apart.
    ///
    /// # Errors
    /// `ShapeMismatch` if the dim does not exist, the step is 0 or an element would leave the dim.
    pub fn stride(&self, dim: usize, start: usize, len: usize, step: usize) -> Result<Self> {
        let last = len.saturating_sub(1).checked_mul(step).and_then(|n| n.checked_add(start));
        match (self.dims.get(dim), last) {
            (Some(&d), Some(last)) if step > 0 && (len == 0 || last < d) => {
                let mut out = self.clone();
                out.dims[dim] = len;
                out.strides[dim] = self.strides[dim].saturating_mul(step);
                if len > 0 {
                    out.offset = out.offset.saturating_add(start.saturating_mul(self.strides[dim]));
                }
                Ok(out)
            }
            _ => Err(Error::shape(
                "stride",
                format!("dim {dim}, start {start}, len {len}, step {step} on {:?}", self.dims),
            )),
        }
    }

    /// Broadcasts to `dims`, adding dims on the left; broadcast dims get stride 0.
    ///
    /// # Errors
    /// `ShapeMismatch` unless each dim equals the target's or is 1.
    pub fn broadcast_to(&self, dims: &[usize]) -> Result<Self> {
        let bad = || Error::shape("broadcast", format!("{:?} does not broadcast to {dims:?}", self.dims));
        let pad = dims.len().checked_sub(self.rank()).ok_or_else(bad)?;
        let mut strides: Dims = SmallVec::from_elem(0, pad);
        for ((&d, &s), &want) in self.dims.iter().zip(&self.strides).zip(&dims[pad..]) {
            if d == want {
                strides.push(s);
            } else if d == 1 {
                strides.push(0);
            } else {
                return Err(bad());
            }
        }
        Ok(Self { dims: SmallVec::from_slice(dims), strides, offset: self.offset })
    }

    /// The same elements under another shape, or `None` where that takes a copy (or the number of
    /// elements differs). Splitting a dim always works; neighbours merge where their strides allow.
    pub fn reshape(&self, dims: &[usize]) -> Option<Self> {
        let total = self.elem_count();
        if count(dims) != total {
            return None;
        }
        let mut out = Self::contiguous(dims);
        out.offset = self.offset;
        if total == 0 {
            return Some(out);
        }
        // Size-1 dims never constrain anything: leave them out on both sides.
        let old: SmallVec<[(usize, usize); 6]> =
            self.dims.iter().zip(&self.strides).filter(|(&d, _)| d != 1).map(|(&d, &s)| (d, s)).collect();
        let new: SmallVec<[usize; 6]> = (0..dims.len()).filter(|&i| dims[i] != 1).collect();
        let (mut o, mut n) = (0, 0);
        while o < old.len() && n < new.len() {
            let (o0, n0) = (o, n);
            let (mut po, mut pn) = (old[o].0, dims[new[n]]);
            while po != pn {
                if po < pn {
                    o += 1;
                    po = po.checked_mul(old.get(o)?.0)?;
                } else {
                    n += 1;
                    pn = pn.checked_mul(dims[*new.get(n)?])?;
                }
            }
            // Dims o0..=o become one run, which needs each stride to be the next one's span.
            for k in o0..o {
                if old[k].1 != old[k + 1].0.checked_mul(old[k + 1].1)? {
                    return None;
                }
            }
            let mut step = old[o].1;
            for k in (n0..=n).rev() {
                out.strides[new[k]] = step;
                step = step.saturating_mul(dims[new[k]]);
            }
            o += 1;
            n += 1;
        }
        Some(out)
    }

    /// Checks that every element stands within `len` elements of data.
    ///
    /// # Errors
    /// `OutOfBounds` if one does not; `ShapeMismatch` if there is not one stride per dim.
    pub fn check_bounds(&self, len: usize) -> Result<()> {
        if self.dims.len() != self.strides.len() {
            return Err(Error::shape("layout", format!("{} dims but {} strides", self.dims.len(), self.strides.len())));
        }
        if self.elem_count() == 0 {
            return Ok(());
        }
        let last = self
            .dims
            .iter()
            .zip(&self.strides)
            .try_fold(self.offset, |at, (&d, &s)| (d - 1).checked_mul(s).and_then(|x| at.checked_add(x)));
        match last {
            Some(last) if last < len && self.elem_count() < usize::MAX => Ok(()),
            _ => Err(Error::OutOfBounds {
                op: "layout",
                layout: format!("{:?} with strides {:?} from {}", self.dims, self.strides, self.offset),
                len,
            }),
        }
    }
}

/// Data with a layout: one operand of a kernel.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// The elements.
    pub data: Slice<'a>,
    /// Where each of them stands.
    pub layout: Strided,
}

impl<'a> View<'a> {
    /// Pairs data with a layout.
    ///
    /// # Errors
    /// `OutOfBounds` if the layout reaches past the data.
    pub fn new(data: Slice<'a>, layout: Strided) -> Result<Self> {
        layout.check_bounds(data.len())?;
        Ok(Self { data, layout })
    }

    /// Dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// Size of each dim.
    pub fn dims(&self) -> &[usize] {
        &self.layout.dims
    }

    /// Re-checks the bounds: the fields are public, and kernels rely on them.
    pub(crate) fn check(&self) -> Result<()> {
        self.layout.check_bounds(self.data.len())
    }
}
