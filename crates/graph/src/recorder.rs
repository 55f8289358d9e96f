//! Recording ops one after another: what decompositions and derivatives are written with.

use crate::error::Result;
use crate::op::{BinaryOp, Dims, Op, ReduceOp, Scalars, UnaryOp};
use candle_core::DType;
use smallvec::{smallvec, SmallVec};

/// Something that ops can be recorded into.
pub trait Recorder {
    /// A recorded node.
    type Ref: Clone;
    /// The dims of a node.
    fn dims(&self, node: &Self::Ref) -> Dims;
    /// The dtype of a node.
    fn dtype(&self, node: &Self::Ref) -> DType;
    /// Records an op.
    ///
    /// # Errors
    /// When inference refuses it.
    fn push(&mut self, op: Op, scalars: Scalars, inputs: &[Self::Ref]) -> Result<Self::Ref>;
}

/// Short names for recording primitives.
pub(crate) struct Rec<'r, R: Recorder>(pub(crate) &'r mut R);

impl<R: Recorder> Rec<'_, R> {
    pub(crate) fn unary(&mut self, op: UnaryOp, x: &R::Ref) -> Result<R::Ref> {
        self.0.push(Op::Unary(op), smallvec![], std::slice::from_ref(x))
    }
    pub(crate) fn binary(&mut self, op: BinaryOp, a: &R::Ref, b: &R::Ref) -> Result<R::Ref> {
        self.0.push(Op::Binary(op), smallvec![], &[a.clone(), b.clone()])
    }
    pub(crate) fn affine(&mut self, x: &R::Ref, mul: f64, add: f64) -> Result<R::Ref> {
        self.0.push(Op::Affine, smallvec![mul, add], std::slice::from_ref(x))
    }
    pub(crate) fn reduce(&mut self, op: ReduceOp, x: &R::Ref, dim: usize) -> Result<R::Ref> {
        let op = Op::Reduce { op, axes: 1 << dim, keepdim: true };
        self.0.push(op, smallvec![], std::slice::from_ref(x))
    }
    pub(crate) fn cast(&mut self, x: &R::Ref, dtype: DType) -> Result<R::Ref> {
        if self.0.dtype(x) == dtype {
            return Ok(x.clone());
        }
        self.0.push(Op::Cast(dtype), smallvec![], std::slice::from_ref(x))
    }
    /// f16 and bf16 to f32; wider dtypes stay.
    pub(crate) fn widen(&mut self, x: &R::Ref) -> Result<R::Ref> {
        match self.0.dtype(x) {
            DType::F16 | DType::BF16 => self.cast(x, DType::F32),
            _ => Ok(x.clone()),
        }
    }
    pub(crate) fn reshape(&mut self, x: &R::Ref, dims: &[usize]) -> Result<R::Ref> {
        if self.0.dims(x).as_slice() == dims {
            return Ok(x.clone());
        }
        let op = Op::Reshape { shape: Dims::from_slice(dims) };
        self.0.push(op, smallvec![], std::slice::from_ref(x))
    }
    pub(crate) fn swap_last(&mut self, x: &R::Ref) -> Result<R::Ref> {
        let rank = self.0.dims(x).len();
        let mut perm: SmallVec<[u8; 8]> = (0..rank as u8).collect();
        if rank >= 2 {
            perm.swap(rank - 1, rank - 2);
        }
        self.0.push(Op::Permute { perm }, smallvec![], std::slice::from_ref(x))
    }
    pub(crate) fn narrow(&mut self, x: &R::Ref, dim: usize, start: usize, len: usize) -> Result<R::Ref> {
        let op = Op::Narrow { dim: dim as u8, start, len };
        self.0.push(op, smallvec![], std::slice::from_ref(x))
    }
    /// Pieces behind one another along a dim; a single one as it is.
    pub(crate) fn cat(&mut self, pieces: &[R::Ref], dim: usize) -> Result<R::Ref> {
        match pieces {
            [only] => Ok(only.clone()),
            _ => self.0.push(Op::Concat { dim: dim as u8 }, smallvec![], pieces),
        }
    }
    pub(crate) fn matmul(&mut self, a: &R::Ref, b: &R::Ref) -> Result<R::Ref> {
        self.0.push(Op::Matmul, smallvec![], &[a.clone(), b.clone()])
    }
    /// a·b where a may have a single dim.
    pub(crate) fn product(&mut self, a: &R::Ref, b: &R::Ref) -> Result<R::Ref> {
        let dims = self.0.dims(a);
        if dims.len() != 1 {
            return self.matmul(a, b);
        }
        let row = self.reshape(a, &[1, dims[0]])?;
        let result = self.matmul(&row, b)?;
        let width = self.0.dims(&result)[1];
        self.reshape(&result, &[width])
    }
}
