//! A captured graph: sizes are symbols, scalars are numbers of parameters.

use crate::node::{Node, Value};
use crate::op::{Dims, Op};
use candle_core::{DType, DeviceLocation};
use smallvec::SmallVec;

/// A size in relative form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sym(pub(super) u32);

impl Sym {
    /// The size zero.
    pub const ZERO: Self = Self(0);
    /// The size one.
    pub const ONE: Self = Self(1);

    /// The index into [`Bindings::sizes`](super::Bindings::sizes).
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl std::fmt::Display for Sym {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 | 1 => write!(f, "{}", self.0),
            n => write!(f, "s{}", n - 2),
        }
    }
}

/// What a leaf holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LeafKind {
    /// A Candle tensor.
    Tensor,
    /// A buffer of the executor.
    Engine,
    /// A quantised weight.
    Quantized,
}

/// What a plan may know of a leaf besides its dims and dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeafKey {
    /// What holds the data.
    pub kind: LeafKind,
    /// Whether the elements lie in row-major order.
    pub contiguous: bool,
}

impl LeafKey {
    /// Of a node that holds `value`.
    pub(super) fn of(node: &Node, value: &Value) -> Self {
        let kind = match value {
            Value::Tensor(_) => LeafKind::Tensor,
            Value::Engine(_) => LeafKind::Engine,
            Value::Quantized(_) => LeafKind::Quantized,
        };
        Self { kind, contiguous: node.is_contiguous_leaf().unwrap_or_else(|| value.is_contiguous()) }
    }
}

/// The content of a graph node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GOp {
    /// An input of the graph.
    Leaf(LeafKey),
    /// An operation.
    Op(Op<Sym>),
}

/// A node of a captured graph.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GNode {
    /// Leaf or operation.
    pub op: GOp,
    /// Indices of earlier nodes.
    pub inputs: SmallVec<[u32; 4]>,
    /// Indices into [`Bindings::params`](super::Bindings::params).
    pub params: SmallVec<[u32; 2]>,
    /// The shape.
    pub dims: Dims<Sym>,
    /// The dtype.
    pub dtype: DType,
    /// Index into [`Bindings::devices`](super::Bindings::devices).
    pub device: u16,
}

impl GNode {
    /// The operation, or `None` for a leaf.
    #[must_use]
    pub fn op(&self) -> Option<&Op<Sym>> {
        match &self.op {
            GOp::Op(op) => Some(op),
            GOp::Leaf(_) => None,
        }
    }
}

/// A captured graph in relative form: immutable, in topological order. Equal graphs have equal plans.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    /// The nodes; inputs come before users.
    pub nodes: Vec<GNode>,
    /// The nodes whose values are wanted.
    pub outputs: Vec<u32>,
    /// Where the devices are, by index.
    pub devices: Vec<DeviceLocation>,
    /// For each node, the captured node that it stems from: for error messages, no part of what is compared.
    pub origins: Vec<u32>,
}

impl PartialEq for Graph {
    fn eq(&self, other: &Self) -> bool {
        self.nodes == other.nodes && self.outputs == other.outputs && self.devices == other.devices
    }
}
impl Eq for Graph {}

impl Graph {
    /// How often each node is used, by other nodes and as an output.
    #[must_use]
    pub fn use_counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.nodes.len()];
        let uses = self.nodes.iter().flat_map(|n| n.inputs.iter()).chain(&self.outputs);
        for &id in uses {
            counts[id as usize] += 1;
        }
        counts
    }
}
