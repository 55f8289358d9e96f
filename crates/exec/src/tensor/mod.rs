//! The lazy tensor: a cheap handle on a recorded node.
//!
//! Names and argument order are Candle's. Every op validates at once, so an error names the line that wrote it; nothing is
//! computed until a value is asked for.

mod candle_names;
mod composites;
mod convert;
mod create;
mod custom;
mod elementwise;
mod index;
mod indexing;
mod module;
mod movement;
mod operators;
mod random;
mod read;
mod reduce;
mod views;

pub use composites::{AttentionOptions, LoraSegment};
pub use elementwise::TensorOrScalar;
pub use index::{IndexOp, TensorIndexer};
pub use module::{Module, ModuleT};
pub use random::RandomKey;

use crate::config;
use crate::error::Result;
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_graph::node::find;
use candle_lazy_graph::{BuildSite, Node, NodeId, NodeRef, Op};
use smallvec::{smallvec, SmallVec};
use std::borrow::Borrow;
use std::collections::BTreeMap;

/// A tensor that is computed when its value is asked for.
///
/// Cloning is cheap, and handles may be used from several threads at once.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_lazy_exec::LazyTensor;
/// # fn main() -> candle_lazy_exec::Result<()> {
/// let x = LazyTensor::from(Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?);
/// let y = ((&x * 2.0)? + &x)?.softmax(1)?; // recorded
/// let values = y.to_vec2::<f32>()?; // planned and run
/// assert!((values[0][0] + values[0][1] - 1.0).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LazyTensor {
    /// Taken when the handle is dropped, and by operators that consume it.
    node: Option<NodeRef>,
}

impl Drop for LazyTensor {
    #[inline]
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            Node::release(node);
        }
    }
}

impl std::fmt::Debug for LazyTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = if self.is_ready() { "ready" } else { "pending" };
        write!(
            f,
            "LazyTensor[{:?}, {}, {:?}, {state}, recorded at {}]",
            self.dims(),
            self.dtype().as_str(),
            self.device().location(),
            self.node().site()
        )
    }
}

impl From<Tensor> for LazyTensor {
    /// A leaf. The tensor is read when a result is computed: a change of its storage until then is seen.
    #[track_caller]
    fn from(tensor: Tensor) -> Self {
        Self::from_node(Node::leaf(tensor, BuildSite::here()))
    }
}

impl From<&Tensor> for LazyTensor {
    #[track_caller]
    fn from(tensor: &Tensor) -> Self {
        Self::from(tensor.clone())
    }
}

impl AsRef<LazyTensor> for LazyTensor {
    fn as_ref(&self) -> &LazyTensor {
        self
    }
}

impl Borrow<NodeRef> for &LazyTensor {
    fn borrow(&self) -> &NodeRef {
        self.node()
    }
}

impl LazyTensor {
    /// A leaf that holds `tensor`; the same as `From<Tensor>`.
    #[track_caller]
    #[must_use]
    pub fn from_tensor(tensor: Tensor) -> Self {
        Self::from(tensor)
    }

    /// The recorded node.
    #[inline]
    #[must_use]
    pub fn node(&self) -> &NodeRef {
        match &self.node {
            Some(node) => node,
            // nobody can ask a handle that is gone
            None => Node::nothing(),
        }
    }

    /// A handle on `node`.
    #[must_use]
    pub fn from_node(node: NodeRef) -> Self {
        Self { node: Some(node) }
    }

    /// Whether nothing else holds the node: no other handle, and no graph.
    #[must_use]
    pub fn is_sole(&self) -> bool {
        NodeRef::strong_count(self.node()) == 1
    }

    /// Those of `roots`, and of what they wait for, with one of these numbers: a handle would keep a value from being written in place, its
    /// number does not.
    #[must_use]
    pub fn find(roots: &[&Self], ids: impl IntoIterator<Item = NodeId>) -> BTreeMap<NodeId, Self> {
        let found = find(roots.iter().map(|root| root.node()), ids);
        found.into_iter().map(|node| (node.id(), Self::from_node(node))).collect()
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        self.node().shape()
    }

    /// The dimensions.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        self.node().dims()
    }

    /// The size of one dim.
    ///
    /// # Errors
    /// When the dim is out of range.
    #[track_caller]
    pub fn dim<D: candle_core::shape::Dim>(&self, dim: D) -> Result<usize> {
        let dim = self.dim_index(dim, "dim")?;
        Ok(self.dims()[dim])
    }

    /// The number of dims.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.dims().len()
    }

    /// The number of elements.
    #[must_use]
    pub fn elem_count(&self) -> usize {
        self.node().elem_count()
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.node().dtype()
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.node().device()
    }

    /// Whether the value has been computed.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.node().is_ready()
    }

    /// Whether Candle's autograd tracks a leaf that this tensor depends on.
    #[must_use]
    pub fn track_op(&self) -> bool {
        self.node().tracked()
    }

    /// Where the tensor was recorded.
    #[must_use]
    pub fn site(&self) -> &BuildSite {
        self.node().site()
    }

    /// Records an op at the caller's line.
    #[track_caller]
    pub(crate) fn record(op: Op, scalars: &[f64], inputs: &[&LazyTensor]) -> Result<Self> {
        Self::record_on(op, scalars, inputs, None)
    }

    #[track_caller]
    pub(crate) fn record_on(op: Op, scalars: &[f64], inputs: &[&LazyTensor], device: Option<&Device>) -> Result<Self> {
        let site = BuildSite::here();
        Self::within_budget(Node::record(op, scalars, inputs, device, site)?)
    }

    /// Records an op on this handle, which is given up: who counts no handle to drop one needs no atomic operation.
    #[track_caller]
    pub(crate) fn record_taking(mut self, op: Op, scalars: &[f64], rhs: Option<&Self>) -> Result<Self> {
        let site = BuildSite::here();
        let inputs = match (self.node.take(), rhs) {
            (Some(lhs), Some(rhs)) => smallvec![lhs, rhs.node().clone()],
            (lhs, _) => lhs.into_iter().collect(),
        };
        Self::within_budget(Node::record_owned(op, scalars, inputs, site)?)
    }

    pub(crate) fn record_nodes(
        op: Op,
        scalars: &[f64],
        inputs: &[&NodeRef],
        device: Option<&Device>,
        site: BuildSite,
    ) -> Result<Self> {
        Self::within_budget(Node::record(op, scalars, inputs, device, site)?)
    }

    /// A handle on a new node; evaluated at once where the pending graph passed its budget. As by every evaluation, what is held or read by
    /// others on the way is kept with it.
    pub(crate) fn within_budget(node: NodeRef) -> Result<Self> {
        let (nodes, bytes) = node.pending_estimate();
        if config::over_budget(nodes, bytes, node.traced()) && !config::is_unbounded() {
            // the estimate counts shared parts more than once: look before evaluating
            let (nodes, bytes) = node.count_pending();
            if config::over_budget(nodes, bytes, node.traced()) {
                config::count_budget_evaluation();
                let tensor = Self::from_node(node);
                crate::run::materialize(&[&tensor])?;
                return Ok(tensor);
            }
        }
        Ok(Self::from_node(node))
    }

    /// The index of a dim, or an error at the caller's line.
    #[track_caller]
    pub(crate) fn dim_index<D: candle_core::shape::Dim>(&self, dim: D, op: &'static str) -> Result<usize> {
        let site = BuildSite::here();
        dim.to_index(self.shape(), op).map_err(|e| self.no_such_dim(op, &e, &site))
    }

    /// The indices of dims, or an error at the caller's line.
    #[track_caller]
    pub(crate) fn dim_indices<D: candle_core::shape::Dims>(&self, dims: D, op: &'static str) -> Result<Vec<usize>> {
        let site = BuildSite::here();
        dims.to_indexes(self.shape(), op).map_err(|e| self.no_such_dim(op, &e, &site))
    }

    pub(crate) fn no_such_dim(
        &self,
        op: &'static str,
        error: &candle_core::Error,
        site: &BuildSite,
    ) -> crate::error::Error {
        use candle_lazy_graph::{Error, ErrorKind};
        let detail = crate::error::words(error);
        Error::new(op, ErrorKind::Range(detail)).on(&[self.node().meta()]).at(site).into()
    }

    /// A recording error of this crate's own checks on this tensor, at the caller's line.
    #[track_caller]
    pub(crate) fn refuse_here<T>(&self, op: &'static str, kind: candle_lazy_graph::ErrorKind) -> Result<T> {
        Self::refuse_on(op, kind, &[self])
    }

    /// The same on several tensors.
    #[track_caller]
    pub(crate) fn refuse_on<T>(op: &'static str, kind: candle_lazy_graph::ErrorKind, on: &[&Self]) -> Result<T> {
        let metas: SmallVec<[_; 4]> = on.iter().map(|t| t.node().meta()).collect();
        Err(candle_lazy_graph::Error::new(op, kind).on(&metas).at(&BuildSite::here()).into())
    }

    /// The error of an op of a layer above that refuses the shapes of its operands: it names them and the caller's line, as the errors
    /// of this crate's ops do.
    #[track_caller]
    #[must_use]
    pub fn shape_error(op: &'static str, detail: impl std::fmt::Display, operands: &[&Self]) -> crate::error::Error {
        let metas: SmallVec<[_; 4]> = operands.iter().map(|t| t.node().meta()).collect();
        let kind = candle_lazy_graph::ErrorKind::Shape(detail.to_string());
        candle_lazy_graph::Error::new(op, kind).on(&metas).at(&BuildSite::here()).into()
    }

    /// A recording error of this crate's own checks, at the caller's line.
    #[track_caller]
    pub(crate) fn refuse<T>(op: &'static str, kind: candle_lazy_graph::ErrorKind) -> Result<T> {
        Err(candle_lazy_graph::Error::new(op, kind).at(&BuildSite::here()).into())
    }
}
