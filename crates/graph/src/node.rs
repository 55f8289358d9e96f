//! The implicit graph: shared nodes that are pending or ready.
//!
//! There is no graph object. An edge is an `Arc<Node>` in the inputs of a pending node, so a subgraph that nobody can
//! reach frees itself, and a node that becomes ready drops its inputs. Building, reading and dropping are iterative: a chain of a
//! million nodes needs no stack.
//!
//! A node that depends on a *variable* ([`Node::variable`], or a tensor that Candle's autograd tracks) is *traced*: it keeps its inputs
//! when it becomes ready, so that a gradient does not depend on what was evaluated before. It is freed with the last handle above it.

mod id;
mod no_grad;
mod pending;
mod value;

use crate::custom::CustomOp;
use crate::error::{Error, ErrorKind, Result};
use crate::hash::FastMap;
use crate::infer::{infer, Meta};
use crate::op::{Dims, Op, Scalars};
use crate::site::BuildSite;
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Shape, Tensor};
pub use id::{live_nodes, NodeId};
pub use no_grad::{is_grad_enabled, no_grad, without_grad, WithoutGrad};
use parking_lot::Mutex;
use pending::Pending;
use smallvec::{smallvec, SmallVec};
use std::borrow::Borrow;
use std::sync::{Arc, OnceLock};
pub use value::{EngineValue, Expr, Look, Value};

#[derive(Debug)]
enum State {
    Pending(Waiting),
    Ready(Value),
    /// The value was given to a running plan, which writes it in place; the plan gives it back if it fails.
    Lent,
}

/// What a pending node holds and a ready one has dropped.
#[derive(Debug)]
struct Waiting {
    inputs: SmallVec<[Arc<Node>; 3]>,
    custom: Option<CustomOp>,
}

/// A recorded operation or a leaf.
#[derive(Debug)]
pub struct Node {
    id: NodeId,
    shape: Shape,
    dtype: DType,
    device: Device,
    tracked: bool,
    traced: bool,
    quantized: bool,
    site: BuildSite,
    /// What was recorded; `None` for a leaf. It never changes, so reading it takes no lock.
    recorded: Option<(Op, Scalars)>,
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
            shape: tensor.shape().clone(),
            dtype: tensor.dtype(),
            device: tensor.device().clone(),
            tracked: tensor.track_op(),
            traced: tensor.track_op(),
            quantized: false,
            site,
            recorded: None,
            history: OnceLock::new(),
            pending: Pending::none(),
            state: Mutex::new(State::Ready(Value::Tensor(tensor))),
        })
    }

    /// A ready node that holds a quantised weight, to be the second input of [`Op::QMatmul`].
    #[must_use]
    pub fn quantized(weight: Arc<QTensor>, site: BuildSite) -> Arc<Self> {
        Arc::new(Self {
            id: NodeId::next(),
            shape: weight.shape().clone(),
            dtype: DType::F32,
            device: weight.device(),
            tracked: false,
            traced: false,
            quantized: true,
            site,
            recorded: None,
            history: OnceLock::new(),
            pending: Pending::none(),
            state: Mutex::new(State::Ready(Value::Quantized(weight))),
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
            infer(&op, metas).map_err(|e| e.at(&site))?
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
            shape: Shape::from(meta.dims.as_slice()),
            dtype: meta.dtype,
            device,
            tracked,
            traced,
            quantized: false,
            site,
            recorded: Some((op, Scalars::from_slice(scalars))),
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
        let value = match input.value() {
            None => return Ok(Self::cut(input, true, site)),
            Some(Value::Tensor(tensor)) => Value::Tensor(tensor.detach()),
            Some(value) => value,
        };
        // a leaf on the same data: a graph has the same key as when the variable was computed by a plan
        Ok(Arc::new(Self {
            id: NodeId::next(),
            shape: input.shape.clone(),
            dtype: input.dtype,
            device: input.device.clone(),
            tracked: false,
            traced: true,
            quantized: false,
            site,
            recorded: None,
            history: OnceLock::new(),
            pending: Pending::none(),
            state: Mutex::new(State::Ready(value)),
        }))
    }

    fn cut(input: &Arc<Node>, traced: bool, site: BuildSite) -> Arc<Self> {
        let own_bytes = input.shape.elem_count() * input.dtype.size_in_bytes();
        let inputs = SmallVec::from_iter([input.clone()]);
        let id = NodeId::next();
        Arc::new(Self {
            id,
            shape: input.shape.clone(),
            dtype: input.dtype,
            device: input.device.clone(),
            tracked: false,
            traced,
            quantized: false,
            site,
            recorded: Some((Op::Detach, Scalars::new())),
            history: OnceLock::new(),
            pending: Pending::above(id, std::iter::once(&input.pending), own_bytes as u64),
            state: Mutex::new(State::Pending(Waiting { inputs, custom: None })),
        })
    }

    /// What the node waits for or has kept of it; the node is being dropped.
    fn take_waiting(&mut self) -> Option<Waiting> {
        match std::mem::replace(self.state.get_mut(), State::Lent) {
            State::Pending(waiting) => Some(waiting),
            State::Ready(_) | State::Lent => self.history.take().map(|waiting| *waiting),
        }
    }

    /// A ready node with this one's history and the value `value`, which nothing that this node holds refers to; `None` if it has none.
    #[must_use]
    pub fn twin(&self, value: Value) -> Option<Arc<Self>> {
        let Expr { inputs, custom, .. } = self.history()?;
        let history = OnceLock::from(Box::new(Waiting { inputs, custom }));
        Some(Arc::new(Self {
            id: NodeId::next(),
            shape: self.shape.clone(),
            dtype: self.dtype,
            device: self.device.clone(),
            tracked: self.tracked,
            traced: self.traced,
            quantized: false,
            site: self.site.clone(),
            recorded: self.recorded.clone(),
            history,
            pending: Pending::none(),
            state: Mutex::new(State::Ready(value)),
        }))
    }

    /// The node's own number.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The shape of the result.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The dtype of the result.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device of the result.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether Candle's autograd tracks a leaf that this node depends on.
    #[must_use]
    pub fn tracked(&self) -> bool {
        self.tracked
    }

    /// Whether the node is a variable or depends on one differentiably, so that gradients can be taken through it.
    #[must_use]
    pub fn traced(&self) -> bool {
        self.traced
    }

    /// Whether gradients can be taken with respect to the node: a variable, or a leaf that Candle's autograd tracks.
    #[must_use]
    pub fn is_variable(&self) -> bool {
        self.traced && self.recorded.as_ref().is_none_or(|(op, _)| *op == Op::Detach)
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
    #[must_use]
    pub fn meta(&self) -> Meta<'_> {
        Meta { dims: self.shape.dims(), dtype: self.dtype }
    }

    /// Whether the node holds a value.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(*self.state.lock(), State::Ready(_))
    }

    /// Whether the node waits for its inputs.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        matches!(*self.state.lock(), State::Pending(_))
    }

    /// The value, if the node is ready.
    #[must_use]
    pub fn value(&self) -> Option<Value> {
        match &*self.state.lock() {
            State::Ready(value) => Some(value.clone()),
            State::Pending(_) | State::Lent => None,
        }
    }

    /// The op that was recorded and its scalars, whether the node is pending or not; `None` for a leaf.
    #[must_use]
    pub fn recorded(&self) -> Option<(&Op, &[f64])> {
        self.recorded.as_ref().map(|(op, scalars)| (op, scalars.as_slice()))
    }

    /// What the node is now, in one look under the lock: a copy of the op and its inputs, the value, or lent out.
    #[must_use]
    pub fn look(&self) -> Look {
        match (&*self.state.lock(), &self.recorded) {
            (State::Pending(Waiting { inputs, custom }), Some((op, scalars))) => Look::Pending(Expr {
                op: op.clone(),
                scalars: scalars.clone(),
                inputs: inputs.clone(),
                custom: custom.clone(),
            }),
            (State::Ready(value), _) => Look::Ready(value.clone()),
            // what is pending was recorded
            (State::Lent, _) | (State::Pending(_), None) => Look::Lent,
        }
    }

    /// The op and the inputs of a node that is pending, or ready and traced; `None` of a leaf, and of what has dropped them.
    #[must_use]
    pub fn history(&self) -> Option<Expr> {
        let (op, scalars) = self.recorded.as_ref()?;
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
    /// neither must ask this node or another one for anything that a lock guards; `None` where the value is lent.
    #[inline]
    pub(crate) fn locked<R>(
        &self,
        pending: impl FnOnce(&[Arc<Node>], Option<&CustomOp>) -> R,
        ready: impl FnOnce(&Value) -> R,
    ) -> Option<R> {
        match &*self.state.lock() {
            State::Pending(Waiting { inputs, custom }) => Some(pending(inputs, custom.as_ref())),
            State::Ready(value) => Some(ready(value)),
            State::Lent => None,
        }
    }

    /// Calls `f` with the inputs while the node is locked; `None` unless it is pending. `f` must not ask this node for what the lock
    /// guards: its value, its inputs, whether it is ready.
    pub fn with_inputs<R>(&self, f: impl FnOnce(&[Arc<Node>]) -> R) -> Option<R> {
        match &*self.state.lock() {
            State::Pending(Waiting { inputs, .. }) => Some(f(inputs)),
            State::Ready(_) | State::Lent => None,
        }
    }

    /// The tensor of a ready node that holds one.
    #[must_use]
    pub fn tensor(&self) -> Option<Tensor> {
        match &*self.state.lock() {
            State::Ready(Value::Tensor(tensor)) => Some(tensor.clone()),
            State::Ready(_) | State::Pending(_) | State::Lent => None,
        }
    }

    /// Makes a pending node ready: the first to publish wins. Returns whether `value` was taken.
    ///
    /// The inputs are dropped here, outside the lock, but for those of a traced node.
    pub fn publish(&self, value: Value) -> bool {
        let old = {
            let mut state = self.state.lock();
            if !matches!(*state, State::Pending(_)) {
                return false;
            }
            let old = std::mem::replace(&mut *state, State::Ready(value));
            match old {
                // under the lock: whoever sees the value sees the history
                State::Pending(waiting) if self.traced && !self.is_variable() => {
                    // it is empty, since nothing becomes ready twice
                    self.history.set(Box::new(waiting)).err().map(|waiting| *waiting)
                }
                State::Pending(waiting) => Some(waiting),
                State::Ready(_) | State::Lent => None,
            }
        };
        self.pending.set(0, 0);
        drop_iteratively(old);
        true
    }

    /// Takes an engine value out of a ready node for an in-place update. [`Node::give_back`] returns it.
    #[must_use]
    pub fn lend(&self) -> Option<Arc<dyn EngineValue>> {
        let mut state = self.state.lock();
        if !matches!(*state, State::Ready(Value::Engine(_))) {
            return None;
        }
        match std::mem::replace(&mut *state, State::Lent) {
            State::Ready(Value::Engine(value)) => Some(value),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Returns a value taken by [`Node::lend`].
    pub fn give_back(&self, value: Arc<dyn EngineValue>) {
        let mut state = self.state.lock();
        if matches!(*state, State::Lent) {
            *state = State::Ready(Value::Engine(value));
        }
    }

    /// Makes a node whose value was taken by [`Node::lend`] ready again with `value`.
    pub fn settle(&self, value: Value) {
        let mut state = self.state.lock();
        if matches!(*state, State::Lent) {
            *state = State::Ready(value);
        }
    }

    /// Gives a ready node the same value in another form. Returns whether it was ready.
    pub fn replace(&self, value: Value) -> bool {
        let mut state = self.state.lock();
        let ready = matches!(*state, State::Ready(_));
        if ready {
            // the old value is dropped behind the lock: its tape may hold other nodes
            let old = std::mem::replace(&mut *state, State::Ready(value));
            drop(state);
            drop(old);
        }
        ready
    }

    /// Whether the value is lent to a running plan.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        matches!(*self.state.lock(), State::Lent)
    }

    /// The inputs, if the node is pending.
    #[must_use]
    pub fn inputs(&self) -> SmallVec<[Arc<Node>; 3]> {
        match &*self.state.lock() {
            State::Pending(waiting) => waiting.inputs.clone(),
            State::Ready(_) | State::Lent => SmallVec::new(),
        }
    }

    /// Upper estimates of the pending nodes and bytes at and above this node: exact for a graph that was recorded without another
    /// one between its nodes.
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
                bytes += (node.shape.elem_count() * node.dtype.size_in_bytes()) as u64;
                stack.extend(waiting.inputs.iter().filter(|n| seen.insert(n.id, ()).is_none()).cloned());
            }
        }
        self.pending.set(nodes, bytes);
        (nodes, bytes)
    }
}

/// Handles on the nodes: a few are written one by one, without a loop that makes room.
fn shared<N: Borrow<Arc<Node>>>(inputs: &[N]) -> SmallVec<[Arc<Node>; 3]> {
    let of = |n: &N| n.borrow().clone();
    match inputs {
        [a] => smallvec![of(a)],
        [a, b] => smallvec![of(a), of(b)],
        [a, b, c] => smallvec![of(a), of(b), of(c)],
        _ => inputs.iter().map(of).collect(),
    }
}

/// Drops a pending state without recursion: whoever holds the last reference to an input takes that input apart too.
fn drop_iteratively(waiting: Option<Waiting>) {
    let Some(waiting) = waiting else { return };
    let mut stack = waiting.inputs;
    while let Some(node) = stack.pop() {
        // `into_inner` gives the node to exactly one of the threads that drop it at the same time
        if let Some(mut node) = Arc::into_inner(node) {
            if let Some(waiting) = node.take_waiting() {
                stack.extend(waiting.inputs);
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        id::dropped();
        drop_iteratively(self.take_waiting());
    }
}

#[cfg(test)]
mod tests;
