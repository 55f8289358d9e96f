//! The implicit graph: shared nodes that are pending or ready.
//!
//! There is no graph object. An edge is an `Arc<Node>` in the inputs of a pending node, so a subgraph that nobody can
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
mod state;
mod value;

use crate::custom::CustomOp;
use crate::error::{Error, ErrorKind, Result};
use crate::hash::FastMap;
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
use smallvec::{smallvec, SmallVec};
use state::{State, Waiting};
use std::borrow::{Borrow, Cow};
use std::sync::{Arc, OnceLock};
pub use value::{EngineValue, Expr, Look, Value};

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
    pub fn leaf(tensor: Tensor, site: BuildSite) -> Arc<Self> {
        Arc::new(Self {
            id: NodeId::next(),
            extent: Extent::from(tensor.shape()),
            dtype: tensor.dtype(),
            device: tensor.device().clone(),
            tracked: tensor.track_op(),
            traced: tensor.track_op(),
            quantized: false,
            site,
            origin: Origin::given(Value::Tensor(tensor)),
            history: OnceLock::new(),
            pending: Pending::none(),
            state: Mutex::new(State::Given),
        })
    }

    /// A ready node that holds a quantised weight, to be the second input of [`Op::QMatmul`].
    #[must_use]
    pub fn quantized(weight: Arc<QTensor>, site: BuildSite) -> Arc<Self> {
        Arc::new(Self {
            id: NodeId::next(),
            extent: Extent::from(weight.shape()),
            dtype: DType::F32,
            device: weight.device(),
            tracked: false,
            traced: false,
            quantized: true,
            site,
            origin: Origin::given(Value::Quantized(weight)),
            history: OnceLock::new(),
            pending: Pending::none(),
            state: Mutex::new(State::Given),
        })
    }

    /// Records `op` on `inputs`; `device` is used only by ops without inputs and by [`Op::ToDevice`].
    ///
    /// # Errors
    /// When shapes, dtypes or devices do not fit: the error names the op and `site`.
    pub fn record<N: Borrow<Arc<Self>>>(
        op: Op,
        scalars: &[f64],
        inputs: &[N],
        device: Option<&Device>,
        site: BuildSite,
    ) -> Result<Arc<Self>> {
        Self::record_any(op, scalars, inputs, None, device, site)
    }

    /// Records a custom op, whose result has the shape and dtype that the caller states; both are checked when it runs.
    ///
    /// # Errors
    /// When the number of inputs is not the op's, or the inputs are on different devices.
    pub fn record_custom<N: Borrow<Arc<Self>>>(
        custom: CustomOp,
        shape: &[usize],
        dtype: DType,
        inputs: &[N],
        site: BuildSite,
    ) -> Result<Arc<Self>> {
        let op = Op::Custom { name: custom.name(), arity: custom.arity(), shape: Dims::from_slice(shape), dtype };
        // the scalar is the op's number among the custom ops of a captured graph
        Self::record_any(op, &[0.0], inputs, Some(custom), None, site)
    }

    /// Nothing is built twice or moved about on the way: recording is what every op costs.
    fn record_any<N: Borrow<Arc<Self>>>(
        op: Op,
        scalars: &[f64],
        inputs: &[N],
        custom: Option<CustomOp>,
        device: Option<&Device>,
        site: BuildSite,
    ) -> Result<Arc<Self>> {
        let meta = {
            let mut few = [Meta { dims: &[], dtype: DType::U8 }; 4];
            let many: Vec<Meta<'_>>;
            let metas = match few.get_mut(..inputs.len()) {
                Some(few) => {
                    few.iter_mut().zip(inputs).for_each(|(meta, n)| *meta = n.borrow().meta());
                    &*few
                }
                None => {
                    many = inputs.iter().map(|n| n.borrow().meta()).collect();
                    &many
                }
            };
            match at_a_glance(&op, metas) {
                Some(meta) => meta,
                None => infer(&op, metas).map_err(|e| e.at(&site))?,
            }
        };
        if scalars.len() != op.scalar_count() {
            let detail = format!("takes {} scalars, got {}", op.scalar_count(), scalars.len());
            return Err(Error::new(op.name(), ErrorKind::Invalid(detail)).at(&site));
        }
        if let Some(i) = inputs.iter().position(|n| n.borrow().quantized) {
            if op != Op::QMatmul || i != 1 {
                let detail = "a quantised weight is read by qmatmul alone; dequantise it first".into();
                return Err(Error::new(op.name(), ErrorKind::Unsupported(detail)).at(&site));
            }
        }
        let device = match (inputs.first(), device) {
            (Some(_), Some(device)) if op == Op::ToDevice => device.clone(),
            (Some(first), _) => first.borrow().device.clone(),
            (None, Some(device)) => device.clone(),
            (None, None) => Device::Cpu,
        };
        for (i, input) in inputs.iter().enumerate().skip(1) {
            let input: &Arc<Self> = input.borrow();
            if !input.device.same_device(&device) {
                let detail = format!(
                    "input 0 is on {:?}, input {i} on {:?}; move one of them first",
                    device.location(),
                    input.device.location()
                );
                let metas: SmallVec<[Meta<'_>; 4]> = inputs.iter().map(|n| n.borrow().meta()).collect();
                return Err(Error::new(op.name(), ErrorKind::Device(detail)).on(&metas).at(&site));
            }
        }
        let differentiable = op.is_differentiable() && meta.dtype.is_float() && is_grad_enabled();
        let carrying = op.carrying(inputs);
        let tracked = differentiable && carrying.iter().any(|n| n.borrow().tracked);
        let traced = differentiable && carrying.iter().any(|n| n.borrow().traced);
        let own_bytes = meta.dims.iter().product::<usize>() * meta.dtype.size_in_bytes();
        let id = NodeId::next();
        let pending = Pending::above(id, inputs.iter().map(|n| &n.borrow().pending), own_bytes as u64);
        Ok(Arc::new(Self {
            id,
            extent: Extent::from(meta.dims),
            dtype: meta.dtype,
            device,
            tracked,
            traced,
            quantized: false,
            site,
            origin: Origin::Recorded(op, Scalars::from_slice(scalars)),
            history: OnceLock::new(),
            pending,
            state: Mutex::new(State::Pending(Waiting { inputs: shared(inputs), custom })),
        }))
    }

    /// Records [`Op::Detach`] on `input`: the one op that no input can make fail.
    #[must_use]
    pub fn detached(input: &Arc<Node>, site: BuildSite) -> Arc<Self> {
        Self::cut(input, false, site)
    }

    /// A new variable with the value of `input`: what is recorded on it is traced, and gradients are taken with respect to it. `input`
    /// gets none through it.
    ///
    /// # Errors
    /// When `input` is not of a floating-point dtype.
    pub fn variable(input: &Arc<Node>, site: BuildSite) -> Result<Arc<Self>> {
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
        Ok(Arc::new(Self {
            id: NodeId::next(),
            extent: input.extent.clone(),
            dtype: input.dtype,
            device: input.device.clone(),
            tracked: false,
            traced: true,
            quantized: false,
            site,
            origin,
            history: OnceLock::new(),
            pending: Pending::none(),
            state: Mutex::new(state),
        }))
    }

    fn cut(input: &Arc<Node>, traced: bool, site: BuildSite) -> Arc<Self> {
        let own_bytes = input.elem_count() * input.dtype.size_in_bytes();
        let inputs = SmallVec::from_iter([input.clone()]);
        let id = NodeId::next();
        Arc::new(Self {
            id,
            extent: input.extent.clone(),
            dtype: input.dtype,
            device: input.device.clone(),
            tracked: false,
            traced,
            quantized: false,
            site,
            origin: Origin::Recorded(Op::Detach, Scalars::new()),
            history: OnceLock::new(),
            pending: Pending::above(id, std::iter::once(&input.pending), own_bytes as u64),
            state: Mutex::new(State::Pending(Waiting { inputs, custom: None })),
        })
    }

    /// A ready node with this one's history and the value `value`, which nothing that this node holds refers to; `None` if it has none.
    #[must_use]
    pub fn twin(&self, value: Value) -> Option<Arc<Self>> {
        let Expr { inputs, custom, .. } = self.history()?;
        let history = OnceLock::from(Box::new(Waiting { inputs, custom }));
        Some(Arc::new(Self {
            id: NodeId::next(),
            extent: self.extent.clone(),
            dtype: self.dtype,
            device: self.device.clone(),
            tracked: self.tracked,
            traced: self.traced,
            quantized: false,
            site: self.site.clone(),
            origin: self.origin.clone(),
            history,
            pending: Pending::none(),
            state: Mutex::new(State::Ready(value)),
        }))
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
        pending: impl FnOnce(&[Arc<Node>], Option<&CustomOp>) -> R,
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
    pub fn with_inputs<R>(&self, f: impl FnOnce(&[Arc<Node>]) -> R) -> Option<R> {
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
    pub fn inputs(&self) -> SmallVec<[Arc<Node>; 3]> {
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

    /// Counts pending nodes and bytes exactly and stores the result as the new estimate.
    pub fn count_pending(self: &Arc<Self>) -> (u64, u64) {
        // a node is marked when it is first met, so that shared inputs are neither cloned nor pushed twice
        let mut seen: FastMap<NodeId, ()> = FastMap::default();
        seen.insert(self.id, ());
        let mut stack = vec![self.clone()];
        let (mut nodes, mut bytes) = (0u64, 0u64);
        while let Some(node) = stack.pop() {
            if let State::Pending(waiting) = &*node.state.lock() {
                nodes += 1;
                bytes += (node.elem_count() * node.dtype.size_in_bytes()) as u64;
                stack.extend(waiting.inputs.iter().filter(|n| seen.insert(n.id, ()).is_none()).cloned());
            }
        }
        self.pending.set(nodes, bytes);
        (nodes, bytes)
    }
}

/// Handles on the nodes: a few are written one by one, without a loop that makes room.
#[inline]
fn shared<N: Borrow<Arc<Node>>>(inputs: &[N]) -> SmallVec<[Arc<Node>; 3]> {
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
