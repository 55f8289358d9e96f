//! The implicit graph: shared nodes that are pending or ready.
//!
//! There is no graph object. An edge is a `NodeRef` in the inputs of a pending node, so a subgraph that nobody can
//! reach frees itself, and a node that becomes ready drops its inputs. Building, reading and dropping are iterative: a chain of a
//! million nodes needs no stack.
//!
//! A node that depends on a *variable* ([`Node::variable`], or a tensor that Candle's autograd tracks) is *traced*: it keeps its inputs
//! when it becomes ready, so that a gradient does not depend on what was evaluated before. It is freed with the last handle above it.

mod extent;
mod id;
mod no_grad;
mod pending;
mod place;
mod release;
mod reuse;
mod state;
mod value;
mod walk;

use crate::custom::CustomOp;
use crate::error::{Error, ErrorKind, Result};
use crate::infer::{at_a_glance, infer, Meta};
use crate::op::{Dims, Op, Scalars};
use crate::site::BuildSite;
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Shape, Tensor};
use extent::Extent;
pub use id::{live_nodes, NodeId};
pub use no_grad::{is_grad_enabled, no_grad, without_grad, WithoutGrad};
use parking_lot::Mutex;
use pending::Pending;
pub use place::storage_address;
use place::Place;
use reuse::fill;
use smallvec::{smallvec, SmallVec};
use state::{State, Waiting};
use std::borrow::{Borrow, Cow};
use std::sync::{Arc, OnceLock};
pub use value::{EngineValue, Expr, Look, Value};
pub use walk::find;

/// What a node is from the beginning. It never changes, so reading it takes no lock.
#[derive(Debug, Clone)]
enum Origin {
    /// A leaf that keeps its value, a tensor or a quantised weight.
    Given(Value, Place),
    /// A leaf on memory of the engine, which a plan may borrow: its value is in the state.
    Held,
    Recorded(Op, Scalars),
}

impl Origin {
    fn given(value: Value) -> Self {
        let place = Place::of(&value);
        Self::Given(value, place)
    }
}

/// A shared handle on a node. Nodes are never referred to weakly.
pub type NodeRef = triomphe::Arc<Node>;

/// What an op reads.
pub type Inputs = SmallVec<[NodeRef; 3]>;

/// A recorded operation or a leaf.
#[derive(Debug)]
pub struct Node {
    id: NodeId,
    extent: Extent,
    dtype: DType,
    device: Device,
    tracked: bool,
    traced: bool,
    quantized: bool,
    site: BuildSite,
    origin: Origin,
    /// What a traced node waited for, from when it is ready.
    history: OnceLock<Box<Waiting>>,
    /// For the pending budget.
    pending: Pending,
    state: Mutex<State>,
}

impl Node {
    /// A ready node that holds `tensor`.
    #[must_use]
    pub fn leaf(tensor: Tensor, site: BuildSite) -> NodeRef {
        let tracked = tensor.track_op();
        let mut node = Self::fresh();
        node.extent.set(tensor.dims(), None);
        node.dtype = tensor.dtype();
        fill(&mut node.device, tensor.device().clone());
        (node.tracked, node.traced) = (tracked, tracked);
        fill(&mut node.site, site);
        fill(&mut node.origin, Origin::given(Value::Tensor(tensor)));
        node.shareable()
    }

    /// A ready node that holds a quantised weight, to be the second input of [`Op::QMatmul`].
    #[must_use]
    pub fn quantized(weight: Arc<QTensor>, site: BuildSite) -> NodeRef {
        let mut node = Self::fresh();
        node.extent.set(weight.shape().dims(), None);
        node.dtype = DType::F32;
        fill(&mut node.device, weight.device());
        node.quantized = true;
        fill(&mut node.site, site);
        fill(&mut node.origin, Origin::given(Value::Quantized(weight)));
        node.shareable()
    }

    /// Records `op` on `inputs`; `device` is used only by ops without inputs and by [`Op::ToDevice`].
    ///
    /// # Errors
    /// When shapes, dtypes or devices do not fit: the error names the op and `site`.
    pub fn record<N: Borrow<NodeRef>>(
        op: Op,
        scalars: &[f64],
        inputs: &[N],
        device: Option<&Device>,
        site: BuildSite,
    ) -> Result<NodeRef> {
        Self::record_on(op, scalars, shared(inputs), None, device, site)
    }

    /// As [`Node::record`], on handles that are given up.
    ///
    /// # Errors
    /// As [`Node::record`].
    pub fn record_owned(op: Op, scalars: &[f64], inputs: Inputs, site: BuildSite) -> Result<NodeRef> {
        Self::record_on(op, scalars, inputs, None, None, site)
    }

    /// Records a custom op, whose result has the shape and dtype that the caller states; both are checked when it runs.
    ///
    /// # Errors
    /// When the number of inputs is not the op's, or the inputs are on different devices.
    pub fn record_custom<N: Borrow<NodeRef>>(
        custom: CustomOp,
        shape: &[usize],
        dtype: DType,
        inputs: &[N],
        site: BuildSite,
    ) -> Result<NodeRef> {
        let op = Op::Custom { name: custom.name(), arity: custom.arity(), shape: Dims::from_slice(shape), dtype };
        // the scalar is the op's number among the custom ops of a captured graph
        Self::record_on(op, &[0.0], shared(inputs), Some(custom), None, site)
    }

    /// Nothing is built twice or moved about on the way: recording is what every op costs.
    fn record_on(
        op: Op,
        scalars: &[f64],
        inputs: Inputs,
        custom: Option<CustomOp>,
        device: Option<&Device>,
        site: BuildSite,
    ) -> Result<NodeRef> {
        let inferred;
        let (dims, last, dtype) = {
            let mut few = [Meta { dims: &[], dtype: DType::U8 }; 4];
            let many: Vec<Meta<'_>>;
            let metas = match few.get_mut(..inputs.len()) {
                Some(few) => {
                    few.iter_mut().zip(&inputs).for_each(|(meta, n)| *meta = n.meta());
                    &*few
                }
                None => {
                    many = inputs.iter().map(|n| n.meta()).collect();
                    &many
                }
            };
            match at_a_glance(&op, metas) {
                Some(glance) => (glance.dims, glance.last, glance.dtype),
                None => {
                    inferred = infer(&op, metas).map_err(|e| e.at(&site))?;
                    (inferred.dims.as_slice(), None, inferred.dtype)
                }
            }
        };
        if scalars.len() != op.scalar_count() {
            let detail = format!("takes {} scalars, got {}", op.scalar_count(), scalars.len());
            return Err(Error::new(op.name(), ErrorKind::Invalid(detail)).at(&site));
        }
        if let Some(i) = inputs.iter().position(|n| n.quantized) {
            if op != Op::QMatmul || i != 1 {
                let detail = "a quantised weight is read by qmatmul alone; dequantise it first".into();
                return Err(Error::new(op.name(), ErrorKind::Unsupported(detail)).at(&site));
            }
        }
        let device = match (inputs.first(), device) {
            (Some(_), Some(device)) if op == Op::ToDevice => device.clone(),
            (Some(first), _) => first.device.clone(),
            (None, Some(device)) => device.clone(),
            (None, None) => Device::Cpu,
        };
        for (i, input) in inputs.iter().enumerate().skip(1) {
            if !input.device.same_device(&device) {
                let detail = format!(
                    "input 0 is on {:?}, input {i} on {:?}; move one of them first",
                    device.location(),
                    input.device.location()
                );
                let metas: SmallVec<[Meta<'_>; 4]> = inputs.iter().map(|n| n.meta()).collect();
                return Err(Error::new(op.name(), ErrorKind::Device(detail)).on(&metas).at(&site));
            }
        }
        let differentiable = op.is_differentiable() && dtype.is_float() && is_grad_enabled();
        let carrying = op.carrying(&inputs);
        let tracked = differentiable && carrying.iter().any(|n| n.tracked);
        let traced = differentiable && carrying.iter().any(|n| n.traced);
        let own_bytes = dims.iter().chain(&last).product::<usize>() * dtype.size_in_bytes();
        let mut node = Self::fresh();
        node.pending = Pending::above(node.id, inputs.iter().map(|n| &n.pending), own_bytes as u64);
        node.extent.set(dims, last);
        node.dtype = dtype;
        fill(&mut node.device, device);
        (node.tracked, node.traced) = (tracked, traced);
        fill(&mut node.site, site);
        fill(&mut node.origin, Origin::Recorded(op, scalars.iter().copied().collect()));
        fill(node.state.get_mut(), State::Pending(Waiting { inputs, custom }));
        Ok(node.shareable())
    }

    /// A node that never has a value, for a handle that holds none.
    #[must_use]
    pub fn nothing() -> &'static NodeRef {
        static NOTHING: OnceLock<NodeRef> = OnceLock::new();
        NOTHING.get_or_init(|| {
            let mut node = Self::fresh();
            node.dtype = DType::U8;
            node.shareable()
        })
    }

    /// Records [`Op::Detach`] on `input`: the one op that no input can make fail.
    #[must_use]
    pub fn detached(input: &NodeRef, site: BuildSite) -> NodeRef {
        Self::cut(input, false, site)
    }

    /// A new variable with the value of `input`: what is recorded on it is traced, and gradients are taken with respect to it. `input`
    /// gets none through it.
    ///
    /// # Errors
    /// When `input` is not of a floating-point dtype.
    pub fn variable(input: &NodeRef, site: BuildSite) -> Result<NodeRef> {
        if !input.dtype.is_float() || input.quantized {
            let detail = "only floating-point tensors have gradients; cast it first, or leave it out".to_string();
            return Err(Error::new("variable", ErrorKind::DType(detail)).on(&[input.meta()]).at(&site));
        }
        let (origin, state) = match input.value() {
            None => return Ok(Self::cut(input, true, site)),
            Some(Value::Tensor(tensor)) => (Origin::given(Value::Tensor(tensor.detach())), State::Given),
            Some(value) => (Origin::Held, State::Ready(value)),
        };
        // a leaf on the same data: a graph has the same key as when the variable was computed by a plan
        let mut node = Self::fresh();
        node.traced = true;
        node.like(input, site);
        fill(&mut node.origin, origin);
        fill(node.state.get_mut(), state);
        Ok(node.shareable())
    }

    fn cut(input: &NodeRef, traced: bool, site: BuildSite) -> NodeRef {
        let own_bytes = input.elem_count() * input.dtype.size_in_bytes();
        let inputs = SmallVec::from_iter([input.clone()]);
        let mut node = Self::fresh();
        node.traced = traced;
        node.like(input, site);
        node.pending = Pending::above(node.id, std::iter::once(&input.pending), own_bytes as u64);
        fill(&mut node.origin, Origin::Recorded(Op::Detach, Scalars::new()));
        fill(node.state.get_mut(), State::Pending(Waiting { inputs, custom: None }));
        node.shareable()
    }

    /// A ready node with this one's history and the value `value`, which nothing that this node holds refers to; `None` if it has none.
    #[must_use]
    pub fn twin(&self, value: Value) -> Option<NodeRef> {
        let Expr { inputs, custom, .. } = self.history()?;
        let history = OnceLock::from(Box::new(Waiting { inputs, custom }));
        let mut node = Self::fresh();
        (node.tracked, node.traced) = (self.tracked, self.traced);
        node.like(self, self.site.clone());
        fill(&mut node.origin, self.origin.clone());
        node.history = history;
        fill(node.state.get_mut(), State::Ready(value));
        Some(node.shareable())
    }

    /// Gets the shape, dtype and device of `other`, and is recorded at `site`.
    fn like(&mut self, other: &Self, site: BuildSite) {
        self.extent.set(other.dims(), None);
        self.dtype = other.dtype;
        fill(&mut self.device, other.device.clone());
        fill(&mut self.site, site);
    }

    /// The node's own number.
    #[inline]
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The shape of the result.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        self.extent.shape()
    }

    /// The dims of the result.
    #[inline]
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        self.extent.dims()
    }

    /// How many elements the result has.
    #[inline]
    #[must_use]
    pub fn elem_count(&self) -> usize {
        self.extent.elem_count()
    }

    /// The dtype of the result.
    #[inline]
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device of the result.
    #[inline]
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether Candle's autograd tracks a leaf that this node depends on.
    #[inline]
    #[must_use]
    pub fn tracked(&self) -> bool {
        self.tracked
    }

    /// Whether the node is a variable or depends on one differentiably, so that gradients can be taken through it.
    #[inline]
    #[must_use]
    pub fn traced(&self) -> bool {
        self.traced
    }

    /// Whether gradients can be taken with respect to the node: a variable, or a leaf that Candle's autograd tracks.
    #[must_use]
    pub fn is_variable(&self) -> bool {
        self.traced && self.recorded().is_none_or(|(op, _)| *op == Op::Detach)
    }

    /// Whether the node is a quantised weight.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        self.quantized
    }

    /// Where the node was recorded.
    #[must_use]
    pub fn site(&self) -> &BuildSite {
        &self.site
    }

    /// Shape and dtype, as inference takes them.
    #[inline]
    #[must_use]
    pub fn meta(&self) -> Meta<'_> {
        Meta { dims: self.dims(), dtype: self.dtype }
    }

    /// Whether the node holds a value.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.given().is_some() || matches!(*self.state.lock(), State::Ready(_))
    }

    /// The value of a leaf that keeps it.
    #[inline]
    fn given(&self) -> Option<&Value> {
        match &self.origin {
            Origin::Given(value, _) => Some(value),
            Origin::Held | Origin::Recorded(..) => None,
        }
    }

    /// Whether the node waits for its inputs.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.recorded().is_some() && matches!(*self.state.lock(), State::Pending(_))
    }

    /// The value, if the node is ready.
    #[must_use]
    pub fn value(&self) -> Option<Value> {
        if let Some(value) = self.given() {
            return Some(value.clone());
        }
        match &*self.state.lock() {
            State::Ready(value) => Some(value.clone()),
            State::Given | State::Pending(_) | State::Lent => None,
        }
    }

    /// The op that was recorded and its scalars, whether the node is pending or not; `None` for a leaf.
    #[inline]
    #[must_use]
    pub fn recorded(&self) -> Option<(&Op, &[f64])> {
        match &self.origin {
            Origin::Recorded(op, scalars) => Some((op, scalars)),
            Origin::Given(..) | Origin::Held => None,
        }
    }

    /// What the node is now, in one look under the lock: a copy of the op and its inputs, the value, or lent out.
    #[must_use]
    pub fn look(&self) -> Look {
        match (&*self.state.lock(), &self.origin) {
            (State::Pending(Waiting { inputs, custom }), Origin::Recorded(op, scalars)) => Look::Pending(Expr {
                op: op.clone(),
                scalars: scalars.clone(),
                inputs: inputs.clone(),
                custom: custom.clone(),
            }),
            (State::Ready(value), _) | (State::Given, Origin::Given(value, _)) => Look::Ready(value.clone()),
            // what is pending was recorded, and what is given has a value
            (State::Lent | State::Pending(_) | State::Given, _) => Look::Lent,
        }
    }

    /// The op and the inputs of a node that is pending, or ready and traced; `None` of a leaf, and of what has dropped them.
    #[must_use]
    pub fn history(&self) -> Option<Expr> {
        let Origin::Recorded(op, scalars) = &self.origin else { return None };
        let of = |waiting: &Waiting| Expr {
            op: op.clone(),
            scalars: scalars.clone(),
            inputs: waiting.inputs.clone(),
            custom: waiting.custom.clone(),
        };
        if let State::Pending(waiting) = &*self.state.lock() {
            return Some(of(waiting));
        }
        self.history.get().map(|waiting| of(waiting))
    }

    /// Calls `pending` with the inputs and the custom op, if it is one, or `ready` with the value, while the node is locked, so that
    /// neither must ask this node for anything that a lock guards, and of others only those above; `None` where the value is lent.
    #[inline]
    pub(crate) fn locked<R>(
        &self,
        pending: impl FnOnce(&[NodeRef], Option<&CustomOp>) -> R,
        ready: impl FnOnce(&Value) -> R,
    ) -> Option<R> {
        if let Some(value) = self.given() {
            return Some(ready(value));
        }
        match &*self.state.lock() {
            State::Pending(Waiting { inputs, custom }) => Some(pending(inputs, custom.as_ref())),
            State::Ready(value) => Some(ready(value)),
            State::Given | State::Lent => None,
        }
    }

    /// Calls `f` with the inputs while the node is locked; `None` unless it is pending. `f` must not ask this node for what the lock
    /// guards: its value, its inputs, whether it is ready.
    pub fn with_inputs<R>(&self, f: impl FnOnce(&[NodeRef]) -> R) -> Option<R> {
        match &*self.state.lock() {
            State::Pending(Waiting { inputs, .. }) => Some(f(inputs)),
            State::Given | State::Ready(_) | State::Lent => None,
        }
    }

    /// The tensor of a ready node that holds one; that of a leaf is borrowed.
    #[must_use]
    pub fn tensor(&self) -> Option<Cow<'_, Tensor>> {
        if let Some(Value::Tensor(tensor)) = self.given() {
            return Some(Cow::Borrowed(tensor));
        }
        match &*self.state.lock() {
            State::Ready(Value::Tensor(tensor)) => Some(Cow::Owned(tensor.clone())),
            State::Given | State::Ready(_) | State::Pending(_) | State::Lent => None,
        }
    }

    /// Where the storage of a leaf that keeps its tensor lies: the same for all tensors on it.
    #[inline]
    #[must_use]
    pub fn storage_address(&self) -> Option<usize> {
        match &self.origin {
            Origin::Given(Value::Tensor(tensor), place) => Some(place.address(tensor)),
            Origin::Given(..) | Origin::Held | Origin::Recorded(..) => None,
        }
    }

    /// Whether the elements of a leaf that keeps its value lie in row-major order.
    #[inline]
    pub(crate) fn is_contiguous_leaf(&self) -> Option<bool> {
        match &self.origin {
            Origin::Given(_, place) => Some(place.is_contiguous()),
            Origin::Held | Origin::Recorded(..) => None,
        }
    }

    /// The inputs, if the node is pending.
    #[must_use]
    pub fn inputs(&self) -> Inputs {
        match &*self.state.lock() {
            State::Pending(waiting) => waiting.inputs.clone(),
            State::Given | State::Ready(_) | State::Lent => SmallVec::new(),
        }
    }

    /// Upper estimates of the pending nodes and bytes at and above this node: exact for a graph that was recorded without another
    /// one between its nodes.
    #[inline]
    #[must_use]
    pub fn pending_estimate(&self) -> (u64, u64) {
        self.pending.estimate()
    }
}

/// Handles on the nodes: a few are written one by one, without a loop that makes room.
#[inline]
fn shared<N: Borrow<NodeRef>>(inputs: &[N]) -> Inputs {
    let of = |n: &N| n.borrow().clone();
    match inputs {
        [a] => smallvec![of(a)],
        [a, b] => smallvec![of(a), of(b)],
        [a, b, c] => smallvec![of(a), of(b), of(c)],
        _ => inputs.iter().map(of).collect(),
    }
}

#[cfg(test)]
mod tests;
