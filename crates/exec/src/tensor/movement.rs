//! Products and ops that move data.

use super::LazyTensor;
use crate::error::Result;
use candle_core::shape::Dim;
use candle_lazy_graph::{BuildSite, ErrorKind, NodeRef, Op};
use smallvec::SmallVec;
use std::ops::{Bound, RangeBounds};

impl LazyTensor {
    /// The matrix product (…, m, k) × (…, k, n). The batch dims are the same on both sides.
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn matmul(&self, rhs: &Self) -> Result<Self> {
        let (a, b) = (self.dims(), rhs.dims());
        let same_batch = a.len() >= 2 && a.len() == b.len() && a[..a.len() - 2] == b[..b.len() - 2];
        if !same_batch {
            let detail = match (a, b) {
                ([_, _, ..], [_, _, ..]) => "the batch dims differ; broadcast_matmul broadcasts them",
                _ => "both sides need at least two dims; .unsqueeze(0) or .unsqueeze(1) makes a vector a matrix",
            };
            let detail = format!("{a:?} x {b:?}: {detail}");
            return Self::refuse_on("matmul", ErrorKind::Shape(detail), &[self, rhs]);
        }
        Self::record(Op::Matmul, &[], &[self, rhs])
    }

    /// The matrix product (…, m, k) × (…, k, n) with batch dims that broadcast.
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn broadcast_matmul(&self, rhs: &Self) -> Result<Self> {
        Self::record(Op::Matmul, &[], &[self, rhs])
    }

    /// Tensors behind one another along `dim`.
    ///
    /// # Errors
    /// When there are none, or shapes differ outside `dim`, or dtypes differ.
    #[track_caller]
    pub fn cat<A: AsRef<LazyTensor>, D: Dim>(tensors: &[A], dim: D) -> Result<Self> {
        let Some(first) = tensors.first() else {
            return Self::refuse("cat", ErrorKind::Shape("no tensors".into()));
        };
        let dim = first.as_ref().dim_index(dim, "cat")?;
        if let [only] = tensors {
            return Ok(only.as_ref().clone());
        }
        let inputs: SmallVec<[&NodeRef; 4]> = tensors.iter().map(|t| t.as_ref().node()).collect();
        Self::record_nodes(Op::Concat { dim: dim as u8 }, &[], &inputs, None, BuildSite::here())
    }

    /// Tensors of one shape under a new dim `dim`.
    ///
    /// # Errors
    /// When there are none, or shapes or dtypes differ.
    #[track_caller]
    pub fn stack<A: AsRef<LazyTensor>, D: Dim>(tensors: &[A], dim: D) -> Result<Self> {
        let Some(first) = tensors.first() else {
            return Self::refuse("stack", ErrorKind::Shape("no tensors".into()));
        };
        let site = BuildSite::here();
        let first_shape = first.as_ref().shape();
        let dim =
            dim.to_index_plus_one(first_shape, "stack").map_err(|e| first.as_ref().no_such_dim("stack", &e, &site))?;
        for tensor in tensors {
            if tensor.as_ref().dims() != first.as_ref().dims() {
                let (a, b) = (first.as_ref(), tensor.as_ref());
                let detail = format!("{:?} and {:?} differ; cat puts tensors behind one another", a.dims(), b.dims());
                return Self::refuse_on("stack", ErrorKind::Shape(detail), &[a, b]);
            }
        }
        let mut parts = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            parts.push(tensor.as_ref().unsqueeze(dim)?);
        }
        Self::cat(&parts, dim)
    }

    /// Slices of `dim` chosen by `ids` (one dim; u8, u32 or i64). An id out of range is an error when the value is computed.
    ///
    /// # Errors
    /// When the dim is out of range or `ids` is no vector of integers.
    #[track_caller]
    pub fn index_select<D: Dim>(&self, ids: &Self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "index_select")?;
        Self::record(Op::IndexSelect { dim: dim as u8 }, &[], &[self, ids])
    }

    /// Rows of this table (n, h) chosen by `ids` of any rank: (…) gives (…, h).
    ///
    /// # Errors
    /// When this is no table or `ids` no integers.
    #[track_caller]
    pub fn embedding(&self, ids: &Self) -> Result<Self> {
        Self::record(Op::Embedding, &[], &[self, ids])
    }

    /// This tensor with `src` written at `start` of `dim`; both stay as they are.
    ///
    /// # Errors
    /// When `src` does not fit.
    #[track_caller]
    pub fn slice_scatter<D: Dim>(&self, src: &Self, dim: D, start: usize) -> Result<Self> {
        let dim = self.dim_index(dim, "slice_scatter")?;
        Self::record(Op::SliceAssign { dim: dim as u8, start }, &[], &[self, src])
    }

    /// This tensor with `src` written at `start` of `dim`, giving this tensor away: where nobody else holds it, its memory
    /// is written in place (a cache that grows); otherwise it is copied, and the report counts the copy.
    ///
    /// # Errors
    /// When `src` does not fit.
    #[track_caller]
    pub fn slice_set_owned<D: Dim>(self, src: &Self, dim: D, start: usize) -> Result<Self> {
        let dim = self.dim_index(dim, "slice_set")?;
        Self::record(Op::SliceAssign { dim: dim as u8, start }, &[], &[&self, src])
    }

    /// This tensor with `src` written over the box that `ranges` name, one range per leading dim; the rest is taken whole.
    ///
    /// # Errors
    /// When there are too many ranges, a range is out of range, or `src` does not have the shape of the box.
    #[track_caller]
    pub fn slice_assign<R: RangeBounds<usize>>(&self, ranges: &[R], src: &Self) -> Result<Self> {
        if ranges.len() > self.rank() {
            let detail = format!("{} ranges for {:?}", ranges.len(), self.dims());
            return Self::refuse_on("slice_assign", ErrorKind::Range(detail), &[self, src]);
        }
        let mut bounds = Vec::with_capacity(ranges.len());
        for (range, &size) in ranges.iter().zip(self.dims()) {
            let start = match range.start_bound() {
                Bound::Included(&s) => s,
                Bound::Excluded(&s) => s.saturating_add(1),
                Bound::Unbounded => 0,
            };
            let end = match range.end_bound() {
                Bound::Included(&e) => e.saturating_add(1),
                Bound::Excluded(&e) => e,
                Bound::Unbounded => size,
            };
            if start > end || end > size {
                let detail = format!("range {start}..{end} of {:?}", self.dims());
                return Self::refuse_on("slice_assign", ErrorKind::Range(detail), &[self, src]);
            }
            bounds.push((start, end));
        }
        // from the innermost restricted dim outwards: each level writes the finished inner box into its own slice
        let restricted: Vec<usize> = (0..bounds.len()).filter(|&d| bounds[d] != (0, self.dims()[d])).collect();
        let Some((&last, outer)) = restricted.split_last() else {
            if src.dims() != self.dims() {
                let detail = format!("{:?} does not fit into {:?}", src.dims(), self.dims());
                return Self::refuse_on("slice_assign", ErrorKind::Shape(detail), &[self, src]);
            }
            return Ok(src.clone());
        };
        let mut inner = vec![self.clone()];
        for &d in outer {
            let (start, end) = bounds[d];
            // no closure here: an error inside of one would name this line
            let part = match inner.last() {
                Some(whole) => whole.narrow(d, start, end - start)?,
                None => self.clone(),
            };
            inner.push(part);
        }
        let mut written = src.clone();
        for (&d, whole) in std::iter::once(&last).chain(outer.iter().rev()).zip(inner.iter().rev()) {
            written = whole.slice_scatter(&written, d, bounds[d].0)?;
        }
        Ok(written)
    }
}
