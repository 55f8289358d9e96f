//! The arena.

use super::Operation;
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_exec::{LazyTensor as Recorded, NodeId as RecordedId};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

/// The place of a node in its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub usize);

/// The value of a node.
#[derive(Debug, Clone)]
pub enum NodeData {
    /// Given as a tensor.
    Concrete(Tensor),
    /// Not computed, or nobody held it when something was.
    Lazy,
    /// Computed.
    Available(Tensor),
}

impl NodeData {
    /// Whether there is a value.
    #[must_use]
    pub fn is_available(&self) -> bool {
        matches!(self, Self::Concrete(_) | Self::Available(_))
    }

    /// The value.
    ///
    /// # Errors
    /// A text, where there is none.
    pub fn as_tensor(&self) -> Result<&Tensor, String> {
        match self {
            Self::Concrete(tensor) | Self::Available(tensor) => Ok(tensor),
            Self::Lazy => Err("Node data is not yet available".to_string()),
        }
    }

    /// The value.
    ///
    /// # Errors
    /// A text, where there is none.
    pub fn take_tensor(self) -> Result<Tensor, String> {
        match self {
            Self::Concrete(tensor) | Self::Available(tensor) => Ok(tensor),
            Self::Lazy => Err("Node data is not yet available".to_string()),
        }
    }
}

/// A node of the graph.
#[derive(Debug, Clone)]
pub struct GraphNode {
    /// Its place.
    pub id: NodeId,
    /// What it does.
    pub operation: Operation,
    /// What it does it to.
    pub inputs: Vec<NodeId>,
    /// The shape of its result.
    pub output_shape: Shape,
    /// The dtype of its result.
    pub output_dtype: DType,
    /// Its value.
    pub data: NodeData,
}

impl GraphNode {
    /// A node without a value.
    #[must_use]
    pub fn new(
        id: NodeId,
        operation: Operation,
        inputs: Vec<NodeId>,
        output_shape: Shape,
        output_dtype: DType,
    ) -> Self {
        Self { id, operation, inputs, output_shape, output_dtype, data: NodeData::Lazy }
    }

    /// An input.
    #[must_use]
    pub fn input(id: NodeId, tensor: Tensor) -> Self {
        let (output_shape, output_dtype) = (tensor.shape().clone(), tensor.dtype());
        let data = NodeData::Concrete(tensor);
        Self { id, operation: Operation::Input, inputs: Vec::new(), output_shape, output_dtype, data }
    }
}

/// What is known of the engine's node of one of the graph, which does not keep it alive.
#[derive(Clone, Default)]
struct Known {
    id: Option<RecordedId>,
    handle: Weak<Recorded>,
}

/// All nodes that were recorded together.
pub struct ComputationGraph {
    device: Device,
    nodes: Vec<GraphNode>,
    /// The engine's node of each, as long as a handle holds it, or what waits for it.
    recorded: Vec<Known>,
    /// Nodes that were handed out to be changed since what was recorded was last looked at.
    changed: Vec<NodeId>,
}

impl std::fmt::Debug for ComputationGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let device = self.device.location();
        f.debug_struct("ComputationGraph").field("device", &device).field("nodes", &self.nodes).finish()
    }
}

impl ComputationGraph {
    /// A graph without nodes.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self { device, nodes: Vec::new(), recorded: Vec::new(), changed: Vec::new() }
    }

    /// The device of its tensors.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A node.
    ///
    /// # Errors
    /// A text, where there is no such node.
    pub fn get_node(&self, id: NodeId) -> Result<&GraphNode, String> {
        self.nodes.get(id.0).ok_or_else(|| missing(id))
    }

    /// A node, to be changed. What was recorded of it and of nodes that need it is forgotten: the next evaluation reads the nodes. Values
    /// that are there stay.
    ///
    /// # Errors
    /// A text, where there is no such node.
    pub fn get_node_mut(&mut self, id: NodeId) -> Result<&mut GraphNode, String> {
        let node = self.nodes.get_mut(id.0).ok_or_else(|| missing(id))?;
        self.changed.push(id);
        Ok(node)
    }

    /// Forgets what was recorded of nodes that were changed, and of those that need them.
    fn forget_changed(&mut self) {
        if self.changed.is_empty() {
            return;
        }
        let mut stale = vec![false; self.nodes.len()];
        for id in self.changed.drain(..) {
            if let Some(stale) = stale.get_mut(id.0) {
                *stale = true;
            }
        }
        // an input may come after what needs it, where somebody changed it to that
        let mut more = true;
        while more {
            more = false;
            for (at, node) in self.nodes.iter().enumerate() {
                let of_stale = node.inputs.iter().any(|input| stale.get(input.0).is_some_and(|stale| *stale));
                if let Some(stale) = stale.get_mut(at).filter(|stale| of_stale && !**stale) {
                    (*stale, more) = (true, true);
                }
            }
        }
        for (recorded, _) in self.recorded.iter_mut().zip(stale).filter(|(_, stale)| *stale) {
            *recorded = Known::default();
        }
    }

    /// Whether `handle` is what was recorded of the node.
    pub(crate) fn holds(&self, id: NodeId, handle: &Recorded) -> bool {
        let known = self.recorded.get(id.0);
        self.changed.is_empty() && known.is_some_and(|known| known.id == Some(handle.id()))
    }

    /// The engine's handle of each node that one holds, or that waits below one.
    fn held(&self) -> Vec<Option<Arc<Recorded>>> {
        let mut held: Vec<_> = self.recorded.iter().map(|known| known.handle.upgrade()).collect();
        let lost = self.recorded.iter().zip(&held).filter(|(_, held)| held.is_none()).filter_map(|(known, _)| known.id);
        let roots: Vec<&Recorded> = held.iter().flatten().map(AsRef::as_ref).collect();
        let found: BTreeMap<_, _> =
            Recorded::find(&roots, lost).into_iter().map(|(id, found)| (id, Arc::new(found))).collect();
        for (held, known) in held.iter_mut().zip(&self.recorded).filter(|(held, _)| held.is_none()) {
            *held = known.id.and_then(|id| found.get(&id).cloned());
        }
        held
    }

    /// Adds an input.
    pub fn add_input(&mut self, tensor: Tensor) -> NodeId {
        let id = NodeId(self.nodes.len());
        self.push(GraphNode::input(id, tensor), Known::default())
    }

    /// Adds an operation on nodes that are there.
    ///
    /// # Errors
    /// A text, where an input is not there or the shapes do not fit.
    pub fn add_node(&mut self, operation: Operation, inputs: Vec<NodeId>) -> Result<NodeId, String> {
        let nodes = inputs.iter().map(|&id| self.get_node(id)).collect::<Result<Vec<_>, _>>()?;
        let shapes: Vec<&Shape> = nodes.iter().map(|node| &node.output_shape).collect();
        let dtypes: Vec<DType> = nodes.iter().map(|node| node.output_dtype).collect();
        let (shape, dtype) = (operation.output_shape(&shapes)?, operation.output_dtype(&dtypes));
        let id = NodeId(self.nodes.len());
        Ok(self.push(GraphNode::new(id, operation, inputs, shape, dtype), Known::default()))
    }

    fn push(&mut self, node: GraphNode, recorded: Known) -> NodeId {
        let id = node.id;
        self.nodes.push(node);
        self.recorded.push(recorded);
        id
    }

    /// `id` and all that it needs, inputs before what uses them.
    ///
    /// # Errors
    /// A text, where a node is not there or needs itself.
    pub fn topological_order(&self, id: NodeId) -> Result<Vec<NodeId>, String> {
        self.order(id, |_| false)
    }

    /// The order, where the inputs of a node that `given` knows are not looked at.
    fn order(&self, id: NodeId, given: impl Fn(usize) -> bool) -> Result<Vec<NodeId>, String> {
        // 0: not seen, 1: its inputs are being visited, 2: in the order
        let mut state = vec![0u8; self.nodes.len()];
        let (mut order, mut stack) = (Vec::new(), vec![(id, false)]);
        while let Some((id, inputs_done)) = stack.pop() {
            let node = self.get_node(id)?;
            let seen = state.get_mut(id.0).ok_or_else(|| missing(id))?;
            match (inputs_done, *seen) {
                (true, _) => {
                    *seen = 2;
                    order.push(id);
                }
                (false, 2) => {}
                (false, 1) => return Err(format!("Cycle in the graph at node {}", id.0)),
                (false, _) => {
                    *seen = 1;
                    stack.push((id, true));
                    if !given(id.0) {
                        // an input that waits on the stack already is visited from here, then found done there
                        stack.extend(node.inputs.iter().rev().map(|&input| (input, false)));
                    }
                }
            }
        }
        Ok(order)
    }

    /// Number of nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is no node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Copies `id` of `other` and all that it needs to the end of this graph, values included, and returns the copy's id. Each call
    /// copies again. Where `other` has no such node, nothing is copied and `id` comes back.
    pub fn merge_from(&mut self, other: &Self, id: NodeId) -> NodeId {
        let Ok(order) = other.topological_order(id) else {
            return id;
        };
        let mut copies = vec![None; other.nodes.len()];
        let mut last = id;
        for old in order {
            let (Some(node), Some(recorded)) = (other.nodes.get(old.0), other.recorded.get(old.0)) else {
                continue;
            };
            let copy_of = |id: NodeId| copies.get(id.0).copied().flatten().unwrap_or(id);
            let mut node = node.clone();
            node.inputs = node.inputs.iter().map(|&input| copy_of(input)).collect();
            #[cfg(feature = "custom-metal")]
            if let Operation::LoRA { a, b, .. } = &mut node.operation {
                (*a, *b) = (copy_of(*a), copy_of(*b));
            }
            node.id = NodeId(self.nodes.len());
            let recorded = if other.changed.is_empty() { recorded.clone() } else { Known::default() };
            last = self.push(node, recorded);
            if let Some(copy) = copies.get_mut(old.0) {
                *copy = Some(last);
            }
        }
        last
    }

    /// The part that `id` needs, as a graph of its own, and `id`'s place there.
    pub(crate) fn part(&self, id: NodeId) -> (Self, NodeId) {
        let mut part = Self::new(self.device.clone());
        let id = part.merge_from(self, id);
        (part, id)
    }

    /// The engine's handle of a node: the one that somebody holds, else one recorded anew from the arena.
    #[track_caller]
    pub(crate) fn handle(&mut self, id: NodeId) -> Result<Arc<Recorded>, String> {
        self.forget_changed();
        if let Some(handle) = self.recorded.get(id.0).and_then(|known| known.handle.upgrade()) {
            return Ok(handle);
        }
        let held = self.held();
        let known = |at: usize| held.get(at).cloned().flatten();
        if let Some(handle) = known(id.0) {
            self.remember(id, &handle);
            return Ok(handle);
        }
        let given = |at: usize| self.nodes.get(at).is_some_and(|n| n.data.is_available()) || known(at).is_some();
        let order = self.order(id, given)?;
        let mut handles: Vec<Option<Arc<Recorded>>> = vec![None; self.nodes.len()];
        for at in order {
            let node = self.get_node(at)?;
            let handle = match (known(at.0), &node.data) {
                (Some(handle), _) => handle,
                (None, NodeData::Concrete(tensor) | NodeData::Available(tensor)) => {
                    Arc::new(Recorded::from_tensor(tensor.clone()))
                }
                (None, NodeData::Lazy) => {
                    let input = |id: &NodeId| handles.get(id.0).cloned().flatten().ok_or_else(|| missing(*id));
                    let inputs = node.inputs.iter().map(input).collect::<Result<Vec<_>, _>>()?;
                    Arc::new(node.operation.record(&inputs).map_err(|error| error.to_string())?)
                }
            };
            if let Some(slot) = handles.get_mut(at.0) {
                *slot = Some(handle);
            }
        }
        let handle = handles.get(id.0).cloned().flatten().ok_or_else(|| missing(id))?;
        self.remember(id, &handle);
        Ok(handle)
    }

    /// Notes the engine's handle of a node, without keeping it alive.
    pub(crate) fn remember(&mut self, id: NodeId, handle: &Arc<Recorded>) {
        if let Some(recorded) = self.recorded.get_mut(id.0) {
            *recorded = Known { id: Some(handle.id()), handle: Arc::downgrade(handle) };
        }
    }

    /// Takes over the values that an evaluation made: of `id`, and of every node that somebody holds.
    pub(crate) fn fill(&mut self, id: NodeId, value: &Tensor) {
        self.forget_changed();
        let held = self.held();
        for (node, held) in self.nodes.iter_mut().zip(held) {
            if node.data.is_available() {
                continue;
            }
            // what the engine keeps in its own memory becomes a tensor when it is asked for
            let held = held.filter(|held| held.is_ready());
            if node.id == id {
                node.data = NodeData::Available(value.clone());
            } else if let Some(Ok(tensor)) = held.map(|held| held.eval()) {
                node.data = NodeData::Available(tensor);
            }
        }
    }
}

fn missing(id: NodeId) -> String {
    format!("Node {} not found in graph", id.0)
}
