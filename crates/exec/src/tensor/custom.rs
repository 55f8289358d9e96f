//! Candle's custom ops and quantised weights: what the graph passes through without reading it.

use super::LazyTensor;
use crate::error::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CustomOp1, CustomOp2, CustomOp3, DType, Shape};
use candle_lazy_graph::{BuildSite, CustomOp, ErrorKind, Node, NodeRef, Op};
use smallvec::SmallVec;
use std::sync::Arc;

impl LazyTensor {
    /// A custom op of Candle's on this tensor. `shape` and `dtype` of its result are what the caller says; they are checked when it
    /// runs. It gets Candle tensors, and its backward works where Candle's autograd tracks this tensor.
    ///
    /// # Errors
    /// When the dtype is not supported or the shape too large.
    #[track_caller]
    pub fn custom_op1<C>(&self, op: C, shape: impl Into<Shape>, dtype: DType) -> Result<Self>
    where
        C: CustomOp1 + Send + Sync + 'static,
    {
        let op: Box<dyn CustomOp1 + Send + Sync> = Box::new(op);
        self.custom_op1_arc(&Arc::new(op), shape, dtype)
    }

    /// As [`LazyTensor::custom_op1`] with a shared op: recorded twice on one tensor, it runs once.
    ///
    /// # Errors
    /// As [`LazyTensor::custom_op1`].
    #[track_caller]
    pub fn custom_op1_arc(
        &self,
        op: &Arc<Box<dyn CustomOp1 + Send + Sync>>,
        shape: impl Into<Shape>,
        dtype: DType,
    ) -> Result<Self> {
        Self::custom(CustomOp::One(op.clone()), shape.into(), dtype, &[self])
    }

    /// A custom op of two inputs; see [`LazyTensor::custom_op1`].
    ///
    /// # Errors
    /// As [`LazyTensor::custom_op1`], and when the devices differ.
    #[track_caller]
    pub fn custom_op2<C>(&self, rhs: &Self, op: C, shape: impl Into<Shape>, dtype: DType) -> Result<Self>
    where
        C: CustomOp2 + Send + Sync + 'static,
    {
        let op: Box<dyn CustomOp2 + Send + Sync> = Box::new(op);
        self.custom_op2_arc(rhs, &Arc::new(op), shape, dtype)
    }

    /// As [`LazyTensor::custom_op2`] with a shared op.
    ///
    /// # Errors
    /// As [`LazyTensor::custom_op2`].
    #[track_caller]
    pub fn custom_op2_arc(
        &self,
        rhs: &Self,
        op: &Arc<Box<dyn CustomOp2 + Send + Sync>>,
        shape: impl Into<Shape>,
        dtype: DType,
    ) -> Result<Self> {
        Self::custom(CustomOp::Two(op.clone()), shape.into(), dtype, &[self, rhs])
    }

    /// A custom op of three inputs; see [`LazyTensor::custom_op1`].
    ///
    /// # Errors
    /// As [`LazyTensor::custom_op1`], and when the devices differ.
    #[track_caller]
    pub fn custom_op3<C>(&self, b: &Self, c: &Self, op: C, shape: impl Into<Shape>, dtype: DType) -> Result<Self>
    where
        C: CustomOp3 + Send + Sync + 'static,
    {
        let op: Box<dyn CustomOp3 + Send + Sync> = Box::new(op);
        self.custom_op3_arc(b, c, &Arc::new(op), shape, dtype)
    }

    /// As [`LazyTensor::custom_op3`] with a shared op.
    ///
    /// # Errors
    /// As [`LazyTensor::custom_op3`].
    #[track_caller]
    pub fn custom_op3_arc(
        &self,
        b: &Self,
        c: &Self,
        op: &Arc<Box<dyn CustomOp3 + Send + Sync>>,
        shape: impl Into<Shape>,
        dtype: DType,
    ) -> Result<Self> {
        Self::custom(CustomOp::Three(op.clone()), shape.into(), dtype, &[self, b, c])
    }

    #[track_caller]
    fn custom(op: CustomOp, shape: Shape, dtype: DType, inputs: &[&Self]) -> Result<Self> {
        let inputs: SmallVec<[&NodeRef; 3]> = inputs.iter().map(|t| t.node()).collect();
        let node = Node::record_custom(op, shape.dims(), dtype, &inputs, BuildSite::here())?;
        Self::within_budget(node)
    }

    /// x·weightᵀ with a quantised weight (out, in), which stays quantised: (…, in) gives (…, out), in this tensor's dtype (float).
    /// Candle's own kernel runs, which rounds the input to eight bits for most kinds of weight; where Candle's autograd tracks
    /// this tensor, a product with the dequantised weight.
    ///
    /// # Errors
    /// When the shapes do not fit, the devices differ or the dtype is no float; and where Candle's kernel cannot: Q4_1, Q5_0 and
    /// Q5_1 with an odd number of blocks of 32 per row.
    #[track_caller]
    pub fn qmatmul(&self, weight: &Arc<QTensor>) -> Result<Self> {
        let site = BuildSite::here();
        let paired = matches!(weight.dtype(), GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1);
        let width = weight.shape().dims().last().copied().unwrap_or(0);
        if paired && width % (2 * weight.dtype().block_size()) != 0 && !self.track_op() {
            let (kind, dims) = (weight.dtype(), weight.shape().dims());
            let detail = format!("{kind:?} {dims:?}: Candle's kernel takes pairs of blocks of 32; dequantise it first");
            return Self::refuse_on("qmatmul", ErrorKind::Unsupported(detail), &[self]);
        }
        let weight = Node::quantized(weight.clone(), site.clone());
        Self::record_nodes(Op::QMatmul, &[], &[self.node(), &weight], None, site)
    }
}
