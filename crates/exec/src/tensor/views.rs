//! Ops that move no data.

use super::create::shape_for;
use super::LazyTensor;
use crate::error::Result;
use candle_core::shape::{Dim, Dims as CandleDims, ShapeWithOneHole};
use candle_core::Shape;
use candle_lazy_graph::{BuildSite, Dims, ErrorKind, Op};

impl LazyTensor {
    /// The same elements in another shape; one size may be left out: `((), 64)`.
    ///
    /// # Errors
    /// When the shape has another number of elements.
    #[track_caller]
    pub fn reshape<S: ShapeWithOneHole>(&self, shape: S) -> Result<Self> {
        let site = BuildSite::here();
        let shape = shape_for(shape, self.elem_count())
            .map_err(|kind| candle_lazy_graph::Error::new("reshape", kind).on(&[self.node().meta()]).at(&site))?;
        self.reshape_dims(shape.dims())
    }

    #[track_caller]
    fn reshape_dims(&self, dims: &[usize]) -> Result<Self> {
        if dims == self.dims() {
            return Ok(self.clone());
        }
        Self::record(Op::Reshape { shape: Dims::from_slice(dims) }, &[], &[self])
    }

    #[track_caller]
    fn flatten_range(&self, first: usize, last: usize) -> Result<Self> {
        let dims = self.dims();
        if dims.is_empty() || first >= last {
            return if dims.is_empty() { self.reshape_dims(&[1]) } else { Ok(self.clone()) };
        }
        let mut flat = dims[..first].to_vec();
        flat.push(dims[first..=last].iter().product());
        flat.extend_from_slice(&dims[last + 1..]);
        self.reshape_dims(&flat)
    }

    /// Dims `start` to `end` (inclusive) as one; a tensor without dims becomes one of one dim, as Candle's.
    ///
    /// # Errors
    /// When a dim is out of range.
    #[track_caller]
    pub fn flatten<D1: Dim, D2: Dim>(&self, start: D1, end: D2) -> Result<Self> {
        if self.rank() == 0 {
            return self.flatten_all();
        }
        let start = self.dim_index(start, "flatten")?;
        let end = self.dim_index(end, "flatten")?;
        self.flatten_range(start, end)
    }

    /// Dims 0 to `end` (inclusive) as one.
    ///
    /// # Errors
    /// When the dim is out of range.
    #[track_caller]
    pub fn flatten_to<D: Dim>(&self, end: D) -> Result<Self> {
        if self.rank() == 0 {
            return self.flatten_all();
        }
        let end = self.dim_index(end, "flatten_to")?;
        self.flatten_range(0, end)
    }

    /// Dims `start` to the last as one.
    ///
    /// # Errors
    /// When the dim is out of range.
    #[track_caller]
    pub fn flatten_from<D: Dim>(&self, start: D) -> Result<Self> {
        if self.rank() == 0 {
            return self.flatten_all();
        }
        let start = self.dim_index(start, "flatten_from")?;
        self.flatten_range(start, self.rank().saturating_sub(1))
    }

    /// All dims as one.
    ///
    /// # Errors
    /// None for a tensor that could be recorded.
    #[track_caller]
    pub fn flatten_all(&self) -> Result<Self> {
        self.flatten_range(0, self.rank().saturating_sub(1))
    }

    /// Without dim `dim` if its size is one; otherwise the same tensor, as Candle.
    ///
    /// # Errors
    /// When the dim is out of range.
    #[track_caller]
    pub fn squeeze<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "squeeze")?;
        if self.dims()[dim] != 1 {
            return Ok(self.clone());
        }
        let mut dims = self.dims().to_vec();
        dims.remove(dim);
        self.reshape_dims(&dims)
    }

    /// With a dim of size one before dim `dim` (which may be the rank).
    ///
    /// # Errors
    /// When the dim is out of range.
    #[track_caller]
    pub fn unsqueeze<D: Dim>(&self, dim: D) -> Result<Self> {
        let site = BuildSite::here();
        let dim =
            dim.to_index_plus_one(self.shape(), "unsqueeze").map_err(|e| self.no_such_dim("unsqueeze", &e, &site))?;
        let mut dims = self.dims().to_vec();
        dims.insert(dim, 1);
        self.reshape_dims(&dims)
    }

    /// Dims in another order.
    ///
    /// # Errors
    /// When `dims` is no permutation.
    #[track_caller]
    pub fn permute<D: CandleDims>(&self, dims: D) -> Result<Self> {
        let dims = self.dim_indices(dims, "permute")?;
        Self::record(Op::Permute { perm: dims.iter().map(|&d| d as u8).collect() }, &[], &[self])
    }

    /// Two dims swapped.
    ///
    /// # Errors
    /// When a dim is out of range.
    #[track_caller]
    pub fn transpose<D1: Dim, D2: Dim>(&self, dim1: D1, dim2: D2) -> Result<Self> {
        let a = self.dim_index(dim1, "transpose")?;
        let b = self.dim_index(dim2, "transpose")?;
        let mut perm: smallvec::SmallVec<[u8; 8]> = (0..self.rank() as u8).collect();
        perm.swap(a, b);
        Self::record(Op::Permute { perm }, &[], &[self])
    }

    /// The last two dims swapped.
    ///
    /// # Errors
    /// When there are fewer than two dims.
    #[track_caller]
    pub fn t(&self) -> Result<Self> {
        let rank = self.rank();
        if rank < 2 {
            return self.refuse_here("t", ErrorKind::Shape(format!("needs two dims, got {:?}", self.dims())));
        }
        self.transpose(rank - 2, rank - 1)
    }

    /// `len` indices of dim `dim`, beginning at `start`.
    ///
    /// # Errors
    /// When the dim or the range is out of range.
    #[track_caller]
    pub fn narrow<D: Dim>(&self, dim: D, start: usize, len: usize) -> Result<Self> {
        let dim = self.dim_index(dim, "narrow")?;
        if start == 0 && len == self.dims()[dim] {
            return Ok(self.clone());
        }
        Self::record(Op::Narrow { dim: dim as u8, start, len }, &[], &[self])
    }

    /// Index `i` of the first dim; a tensor without dims is itself, as Candle's.
    ///
    /// # Errors
    /// When the index is out of range.
    #[track_caller]
    pub fn get(&self, i: usize) -> Result<Self> {
        if self.rank() == 0 {
            return Ok(self.clone());
        }
        self.index_on("get", 0, i)
    }

    /// Index `i` of dim `dim`, which disappears.
    ///
    /// # Errors
    /// When the dim or the index is out of range.
    #[track_caller]
    pub fn get_on_dim<D: Dim>(&self, dim: D, i: usize) -> Result<Self> {
        self.index_on("get_on_dim", dim, i)
    }

    #[track_caller]
    fn index_on<D: Dim>(&self, op: &'static str, dim: D, i: usize) -> Result<Self> {
        let dim = self.dim_index(dim, op)?;
        if i >= self.dims()[dim] {
            return self.refuse_here(op, ErrorKind::Range(format!("index {i} of dim {dim} of {:?}", self.dims())));
        }
        let mut dims = self.dims().to_vec();
        let part = self.narrow(dim, i, 1)?;
        dims.remove(dim);
        part.reshape_dims(&dims)
    }

    /// Split along `dim` into at most `chunks` parts, the first ones larger by one where it does not divide, as Candle.
    ///
    /// # Errors
    /// When the dim is out of range or `chunks` is 0.
    #[track_caller]
    pub fn chunk<D: Dim>(&self, chunks: usize, dim: D) -> Result<Vec<Self>> {
        let dim = self.dim_index(dim, "chunk")?;
        if chunks == 0 {
            return self.refuse_here("chunk", ErrorKind::Range("0 chunks".into()));
        }
        let size = self.dims()[dim];
        let (each, more) = (size / chunks, size % chunks);
        let mut parts = Vec::with_capacity(chunks.min(size));
        let mut start = 0;
        for i in 0..chunks.min(size) {
            let len = each + usize::from(i < more);
            parts.push(self.narrow(dim, start, len)?);
            start += len;
        }
        Ok(parts)
    }

    /// Broadcast to `shape`: aligned at the end, dims of size one stretch.
    ///
    /// # Errors
    /// When the shape does not fit.
    #[track_caller]
    pub fn broadcast_as<S: Into<Shape>>(&self, shape: S) -> Result<Self> {
        let shape = shape.into();
        if shape.dims() == self.dims() {
            return Ok(self.clone());
        }
        Self::record(Op::Broadcast { shape: Dims::from_slice(shape.dims()) }, &[], &[self])
    }

    /// The same as [`LazyTensor::broadcast_as`].
    ///
    /// # Errors
    /// When the shape does not fit.
    #[track_caller]
    pub fn expand<S: Into<Shape>>(&self, shape: S) -> Result<Self> {
        self.broadcast_as(shape)
    }

    /// Repeated under new leading dims.
    ///
    /// # Errors
    /// When the result is too large.
    #[track_caller]
    pub fn broadcast_left<S: Into<Shape>>(&self, left: S) -> Result<Self> {
        let mut dims = left.into().into_dims();
        dims.extend_from_slice(self.dims());
        self.broadcast_as(dims)
    }

    /// The same tensor in row-major order; a copy only where it is not.
    ///
    /// # Errors
    /// None for a tensor that could be recorded.
    #[track_caller]
    pub fn contiguous(&self) -> Result<Self> {
        Self::record(Op::Contiguous, &[], &[self])
    }

    /// The same values, without the history that Candle's autograd follows. It cannot fail, and does not count towards the
    /// pending budget by itself.
    #[track_caller]
    #[must_use]
    pub fn detach(&self) -> Self {
        Self::from_node(candle_lazy_graph::Node::detached(self.node(), BuildSite::here()))
    }
}

macro_rules! dims_n {
    ($($name:ident => $ty:ty;)*) => {
        impl LazyTensor {
            $(
                /// The dims, if there are that many.
                ///
                /// # Errors
                /// When the rank is another.
                #[track_caller]
                pub fn $name(&self) -> Result<$ty> {
                    match self.shape().$name() {
                        Ok(dims) => Ok(dims),
                        Err(e) => self.refuse_here(stringify!($name), ErrorKind::Shape(crate::error::words(&e))),
                    }
                }
            )*
        }
    };
}

dims_n! {
    dims0 => ();
    dims1 => usize;
    dims2 => (usize, usize);
    dims3 => (usize, usize, usize);
    dims4 => (usize, usize, usize, usize);
    dims5 => (usize, usize, usize, usize, usize);
}
