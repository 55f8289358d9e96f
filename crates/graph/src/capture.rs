//! Capture: from the implicit graph to a flat, hash-consed arena in relative form.
//!
//! One iterative walk from all roots gives the arena in topological order, merges equal nodes, finds what else must be
//! kept, and separates what a plan may depend on ([`Graph`], the key) from what changes from run to run
//! ([`Bindings`]: sizes, scalars, leaves).
//!
//! **Relative form.** A size in the graph is a symbol: 0 and 1 are themselves, every other size is numbered by first
//! use, and equal dims share a number. Offsets (the start of a narrow) are never shared, because nothing compares them.
//! No pass sees a size, so a plan made at one length serves every other length of the same pattern.

mod relative;

use crate::custom::CustomOp;
use crate::decompose::{decompose, is_composite, Recorder};
use crate::error::{Error, ErrorKind, Result};
use crate::hash::{FastHasher, FastMap};
use crate::infer::{infer, Meta};
use crate::node::{Expr, Look, Node, NodeId, Value};
use crate::op::{Dims, Op, Scalars};
use candle_core::{DType, Device};
use smallvec::SmallVec;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

pub use relative::{GNode, GOp, Graph, LeafKey, LeafKind, Sym};

/// A leaf of a captured graph.
#[derive(Debug, Clone)]
pub struct LeafBinding {
    /// The index in the graph.
    pub index: u32,
    /// The node.
    pub node: Arc<Node>,
    /// Its value when it was captured.
    pub value: Value,
    /// Whether nothing but one op of this graph holds the node, so that the op may take its value.
    pub exclusive: bool,
}

/// What changes from run to run.
#[derive(Debug, Default)]
pub struct Bindings {
    /// The value of each symbol.
    pub sizes: Vec<usize>,
    /// The value of each scalar.
    pub params: Vec<f64>,
    /// The custom ops; the scalar of an [`Op::Custom`] is an index into them.
    pub customs: Vec<CustomOp>,
    /// The leaves.
    pub leaves: Vec<LeafBinding>,
    /// The devices, by index.
    pub devices: Vec<Device>,
    /// For each output, the nodes that become ready with its value.
    pub publish: Vec<SmallVec<[Arc<Node>; 1]>>,
    /// For each graph node, the recorded node it came from (the composite for the parts of a composite).
    pub recorded: Vec<Arc<Node>>,
    /// How many pending nodes were recorded.
    pub pending: usize,
}

impl Bindings {
    /// Concrete dims.
    #[must_use]
    pub fn dims(&self, dims: &[Sym]) -> Dims {
        dims.iter().map(|s| self.size(*s)).collect()
    }

    /// A concrete size.
    #[must_use]
    pub fn size(&self, sym: Sym) -> usize {
        self.sizes.get(sym.index()).copied().unwrap_or(0)
    }
}

/// A captured graph with its bindings.
#[derive(Debug)]
pub struct Captured {
    /// The key.
    pub graph: Graph,
    /// What changes from run to run.
    pub bindings: Bindings,
}

/// What capture asks its caller.
pub struct CaptureOptions<'a> {
    /// Whether a composite is replaced by its decomposition: called with the op, its result's dtype, whether it is
    /// tracked by Candle's autograd, and its device.
    pub expand: &'a dyn Fn(&Op, DType, bool, &Device) -> bool,
}

/// Why a capture did not finish.
#[derive(Debug)]
pub enum CaptureFailure {
    /// A leaf's value is being written in place by another run: wait for that run and capture again.
    Lent,
    /// A decomposition failed.
    Error(Error),
}

struct Visit {
    node: Arc<Node>,
    arena: u32,
    /// How many captured nodes have it as an input.
    edges: usize,
    /// How many references capture holds on the node, beside this one.
    own: usize,
}

/// A leaf's index in the graph and in the visits.
struct Leaf {
    index: u32,
    visit: usize,
    value: Value,
}

struct Frame {
    node: Arc<Node>,
    visit: usize,
    expr: Expr,
    inputs: SmallVec<[u32; 4]>,
}

const IN_PROGRESS: u32 = u32::MAX;

/// Nodes that room is made for at most: an estimate counts shared nodes more than once.
const EXPECTED: u64 = 2048;

/// Captures everything that the pending `roots` need.
///
/// Every root becomes an output, and so does every captured pending node that something outside still holds.
/// Roots that are ready are not captured.
///
/// # Errors
/// [`CaptureFailure`].
pub fn capture(roots: &[Arc<Node>], options: &CaptureOptions<'_>) -> std::result::Result<Captured, CaptureFailure> {
    // growing a table of some hundred nodes by doubling would take as long as filling it
    let expected = roots.iter().map(|r| r.pending_estimate().0).fold(0, u64::saturating_add).min(EXPECTED) as usize;
    let mut builder = Builder::new(options, expected);
    let mut visits: Vec<Visit> = Vec::with_capacity(expected);
    let mut seen: FastMap<NodeId, usize> = FastMap::with_capacity_and_hasher(expected, Default::default());
    let mut stack: Vec<Frame> = Vec::new();
    let mut leaves: Vec<Leaf> = Vec::new();

    for root in roots {
        if root.is_ready() || seen.contains_key(&root.id()) {
            continue;
        }
        enter(root, &mut seen, &mut visits, &mut stack, &mut leaves, &mut builder)?;
        while let Some(frame) = stack.last_mut() {
            let next = frame.inputs.len();
            if let Some(input) = frame.expr.inputs.get(next).cloned() {
                match seen.get(&input.id()) {
                    Some(&v) => {
                        visits[v].edges += 1;
                        frame.inputs.push(visits[v].arena);
                    }
                    None => enter(&input, &mut seen, &mut visits, &mut stack, &mut leaves, &mut builder)?,
                }
                continue;
            }
            let Some(Frame { node, visit, expr, inputs }) = stack.pop() else {
                break;
            };
            let known = builder.graph.nodes.len();
            let id = builder.op(&node, expr.op, expr.scalars, expr.custom, &inputs).map_err(CaptureFailure::Error)?;
            visits[visit].arena = id;
            visits[visit].own = builder.graph.nodes.len() - known;
        }
    }
    Ok(builder.finish(roots, &seen, visits, leaves))
}

/// First visit of a node: a leaf is done at once, a pending node becomes a frame.
fn enter(
    node: &Arc<Node>,
    seen: &mut FastMap<NodeId, usize>,
    visits: &mut Vec<Visit>,
    stack: &mut Vec<Frame>,
    leaves: &mut Vec<Leaf>,
    builder: &mut Builder<'_>,
) -> std::result::Result<(), CaptureFailure> {
    let mut own = 0;
    let arena = match node.look() {
        Look::Lent => return Err(CaptureFailure::Lent),
        Look::Ready(value) => {
            let known = builder.graph.nodes.len();
            let id = builder.leaf(node, &value);
            if id as usize == known {
                own = 1;
                leaves.push(Leaf { index: id, visit: visits.len(), value });
            }
            id
        }
        Look::Pending(expr) => {
            let inputs = SmallVec::with_capacity(expr.inputs.len());
            stack.push(Frame { node: node.clone(), visit: visits.len(), expr, inputs });
            IN_PROGRESS
        }
    };
    seen.insert(node.id(), visits.len());
    visits.push(Visit { node: node.clone(), arena, edges: 0, own });
    Ok(())
}

/// Builds the arena. Equal nodes get equal indices.
struct Builder<'a> {
    options: &'a CaptureOptions<'a>,
    graph: Graph,
    bindings: Bindings,
    /// Sizes of two and more, with their symbols; short, so a scan is quicker than a map.
    shared: Vec<(usize, Sym)>,
    cons: FastMap<u64, SmallVec<[u32; 1]>>,
    /// The identity of a leaf's data, to merge two handles on one tensor.
    leaf_ids: FastMap<u64, u32>,
    /// The recorded node whose ops are being added.
    current: Option<Arc<Node>>,
}

impl<'a> Builder<'a> {
    fn new(options: &'a CaptureOptions<'a>, expected: usize) -> Self {
        let recorded = Vec::with_capacity(expected);
        let bindings = Bindings { sizes: vec![0, 1], recorded, ..Bindings::default() };
        Self {
            options,
            graph: Graph { nodes: Vec::with_capacity(expected), ..Graph::default() },
            bindings,
            shared: Vec::new(),
            cons: FastMap::with_capacity_and_hasher(expected, Default::default()),
            leaf_ids: FastMap::default(),
            current: None,
        }
    }

    fn shared_sym(&mut self, size: usize) -> Sym {
        if size < 2 {
            return Sym(size as u32);
        }
        if let Some((_, sym)) = self.shared.iter().find(|(s, _)| *s == size) {
            return *sym;
        }
        let sym = self.free_sym(size);
        self.shared.push((size, sym));
        sym
    }

    fn free_sym(&mut self, size: usize) -> Sym {
        let sym = Sym(self.bindings.sizes.len() as u32);
        self.bindings.sizes.push(size);
        sym
    }

    fn symbolise(&mut self, op: &Op) -> Op<Sym> {
        match op {
            Op::Narrow { dim, start, len } => {
                Op::Narrow { dim: *dim, start: self.free_sym(*start), len: self.shared_sym(*len) }
            }
            Op::SliceAssign { dim, start } => Op::SliceAssign { dim: *dim, start: self.free_sym(*start) },
            Op::Stride { dim, start, len, step } => Op::Stride {
                dim: *dim,
                start: self.free_sym(*start),
                len: self.shared_sym(*len),
                step: self.free_sym(*step),
            },
            Op::GroupNorm { groups, weight, bias } => {
                Op::GroupNorm { groups: self.free_sym(*groups), weight: *weight, bias: *bias }
            }
            Op::Attention { mask, causal, softcap, window: Some(window) } => {
                Op::Attention { mask: *mask, causal: *causal, softcap: *softcap, window: Some(self.free_sym(*window)) }
            }
            Op::CausalMask { queries, keys, window: Some(window), dtype } => Op::CausalMask {
                queries: self.shared_sym(*queries),
                keys: self.shared_sym(*keys),
                window: Some(self.free_sym(*window)),
                dtype: *dtype,
            },
            other => other.map_sizes(|s| self.shared_sym(*s)),
        }
    }

    fn device(&mut self, device: &Device) -> u16 {
        if let Some(i) = self.bindings.devices.iter().position(|d| d.same_device(device)) {
            return i as u16;
        }
        self.bindings.devices.push(device.clone());
        self.graph.devices.push(device.location());
        (self.bindings.devices.len() - 1) as u16
    }

    fn leaf(&mut self, node: &Arc<Node>, value: &Value) -> u32 {
        let (identity, key) = match value {
            Value::Tensor(tensor) => {
                let mut hasher = FastHasher::default();
                tensor.id().hash(&mut hasher);
                (hasher.finish(), LeafKey { kind: LeafKind::Tensor, contiguous: tensor.is_contiguous() })
            }
            Value::Engine(engine) => {
                let address = Arc::as_ptr(engine).cast::<u8>() as usize as u64;
                (!address, LeafKey { kind: LeafKind::Engine, contiguous: engine.is_contiguous() })
            }
            Value::Quantized(weight) => {
                let address = Arc::as_ptr(weight).cast::<u8>() as usize as u64;
                (!address, LeafKey { kind: LeafKind::Quantized, contiguous: true })
            }
        };
        if let Some(&id) = self.leaf_ids.get(&identity) {
            if same_data(&self.bindings.recorded[id as usize], value) {
                return id;
            }
        }
        let dims: Dims<Sym> = node.shape().dims().iter().map(|&d| self.shared_sym(d)).collect();
        let device = self.device(node.device());
        let id = self.graph.nodes.len() as u32;
        self.graph.nodes.push(GNode {
            op: GOp::Leaf(key),
            inputs: SmallVec::new(),
            params: SmallVec::new(),
            dims,
            dtype: node.dtype(),
            device,
            tracked: node.tracked(),
        });
        self.bindings.recorded.push(node.clone());
        self.leaf_ids.insert(identity, id);
        id
    }

    /// Adds a recorded op, or its decomposition.
    fn op(
        &mut self,
        node: &Arc<Node>,
        op: Op,
        mut scalars: Scalars,
        custom: Option<CustomOp>,
        inputs: &[u32],
    ) -> Result<u32> {
        self.bindings.pending += 1;
        self.current = Some(node.clone());
        if let Some(custom) = custom {
            let known = self.bindings.customs.iter().position(|c| c.is(&custom));
            let number = known.unwrap_or_else(|| {
                self.bindings.customs.push(custom);
                self.bindings.customs.len() - 1
            });
            // equal scalars are one node: two nodes merge only if they run the same object
            scalars = Scalars::from_slice(&[number as f64]);
        }
        if is_composite(&op) && (self.options.expand)(&op, node.dtype(), node.tracked(), node.device()) {
            return decompose(&op, &scalars, inputs, self).map_err(|e| e.at(node.site()));
        }
        let dims = Dims::from_slice(node.shape().dims());
        Ok(self.intern(node, op, scalars, inputs, &dims, node.dtype(), node.tracked()))
    }

    #[allow(clippy::too_many_arguments)] // the parts of a node, once
    fn intern(
        &mut self,
        node: &Arc<Node>,
        op: Op,
        scalars: Scalars,
        inputs: &[u32],
        dims: &[usize],
        dtype: DType,
        tracked: bool,
    ) -> u32 {
        let mut hasher = FastHasher::default();
        op.hash(&mut hasher);
        inputs.hash(&mut hasher);
        for scalar in &scalars {
            hasher.write_u64(scalar.to_bits());
        }
        let device = match inputs.first() {
            Some(&first) if op != Op::ToDevice => self.graph.nodes[first as usize].device,
            _ => self.device(node.device()),
        };
        let hash = hasher.finish();
        if let Some(candidates) = self.cons.get(&hash) {
            for &id in candidates {
                let same_device = self.graph.nodes[id as usize].device == device;
                if same_device && self.is_same(id, &op, &scalars, inputs, dtype, tracked) {
                    return id;
                }
            }
        }
        let id = self.graph.nodes.len() as u32;
        let params = scalars
            .iter()
            .map(|&value| {
                self.bindings.params.push(value);
                (self.bindings.params.len() - 1) as u32
            })
            .collect();
        let dims = dims.iter().map(|&d| self.shared_sym(d)).collect();
        let op = GOp::Op(self.symbolise(&op));
        self.graph.nodes.push(GNode { op, inputs: inputs.into(), params, dims, dtype, device, tracked });
        self.bindings.recorded.push(node.clone());
        self.cons.entry(hash).or_default().push(id);
        id
    }

    fn is_same(&self, id: u32, op: &Op, scalars: &[f64], inputs: &[u32], dtype: DType, tracked: bool) -> bool {
        let node = &self.graph.nodes[id as usize];
        let GOp::Op(known) = &node.op else {
            return false;
        };
        node.inputs.as_slice() == inputs
            && node.dtype == dtype
            && node.tracked == tracked
            && node.params.len() == scalars.len()
            && node.params.iter().zip(scalars).all(|(&p, s)| self.bindings.params[p as usize].to_bits() == s.to_bits())
            && known.map_sizes(|s| self.bindings.sizes[s.index()]) == *op
    }

    fn finish(
        mut self,
        roots: &[Arc<Node>],
        seen: &FastMap<NodeId, usize>,
        visits: Vec<Visit>,
        leaves: Vec<Leaf>,
    ) -> Captured {
        self.current = None;
        let mut output_of: FastMap<u32, usize> = FastMap::default();
        let mut publish: Vec<SmallVec<[Arc<Node>; 1]>> = Vec::new();
        let mut add = |graph: &mut Graph, visit: &Visit| {
            let slot = *output_of.entry(visit.arena).or_insert_with(|| {
                graph.outputs.push(visit.arena);
                publish.push(SmallVec::new());
                publish.len() - 1
            });
            if !publish[slot].iter().any(|n| n.id() == visit.node.id()) {
                publish[slot].push(visit.node.clone());
            }
        };
        for root in roots {
            if let Some(&v) = seen.get(&root.id()) {
                add(&mut self.graph, &visits[v]);
            }
        }
        let mut exclusive = vec![false; visits.len()];
        for (visit, exclusive) in visits.iter().zip(&mut exclusive) {
            let outside = Arc::strong_count(&visit.node).saturating_sub(1 + visit.own + visit.edges);
            if visit.node.is_ready() {
                *exclusive = outside == 0 && visit.edges == 1;
            } else if outside > 0 {
                add(&mut self.graph, visit);
            }
        }
        self.bindings.publish = publish;
        self.bindings.leaves = leaves
            .into_iter()
            .filter_map(|Leaf { index, visit, value }| {
                let exclusive = exclusive.get(visit).copied().unwrap_or(false);
                visits.get(visit).map(|visit| LeafBinding { index, node: visit.node.clone(), value, exclusive })
            })
            .collect();
        self.graph.origins = (0..self.graph.nodes.len() as u32).collect();
        Captured { graph: self.graph, bindings: self.bindings }
    }
}

/// Whether `node` holds the very data of `value`.
fn same_data(node: &Arc<Node>, value: &Value) -> bool {
    match (node.value(), value) {
        (Some(Value::Tensor(a)), Value::Tensor(b)) => a.id() == b.id(),
        (Some(Value::Engine(a)), Value::Engine(b)) => Arc::ptr_eq(&a, b),
        (Some(Value::Quantized(a)), Value::Quantized(b)) => Arc::ptr_eq(&a, b),
        _ => false,
    }
}

impl Recorder for Builder<'_> {
    type Ref = u32;

    fn dims(&self, node: &u32) -> Dims {
        self.bindings.dims(&self.graph.nodes[*node as usize].dims)
    }

    fn dtype(&self, node: &u32) -> DType {
        self.graph.nodes[*node as usize].dtype
    }

    fn push(&mut self, op: Op, scalars: Scalars, inputs: &[u32]) -> Result<u32> {
        let Some(node) = self.current.clone() else {
            return Err(Error::new(op.name(), ErrorKind::Invalid("no recorded node".into())));
        };
        let dims: SmallVec<[Dims; 4]> = inputs.iter().map(|i| self.dims(i)).collect();
        let metas: SmallVec<[Meta<'_>; 4]> = dims
            .iter()
            .zip(inputs)
            .map(|(dims, i)| Meta { dims, dtype: self.graph.nodes[*i as usize].dtype })
            .collect();
        let meta = infer(&op, &metas)?;
        let tracked = meta.dtype.is_float() && inputs.iter().any(|&i| self.graph.nodes[i as usize].tracked);
        if is_composite(&op) && (self.options.expand)(&op, meta.dtype, tracked, node.device()) {
            return decompose(&op, &scalars, inputs, self);
        }
        Ok(self.intern(&node, op, scalars, inputs, &meta.dims, meta.dtype, tracked))
    }
}

#[cfg(test)]
mod tests;
