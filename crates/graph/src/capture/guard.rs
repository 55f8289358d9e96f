//! Guards: whether recorded nodes have the graph of an earlier capture, without building it or its key again.
//!
//! A loop records the same graph again and again. A guard keeps what one capture of it saw, node by node, and compares what it meets with
//! that (as the guards of TorchDynamo do: Ansel et al., PyTorch 2, ASPLOS 2024, §3.3): no table is asked, nothing is hashed, and what
//! changes from run to run goes straight to where it is bound. Where anything differs there is no answer, and the graph is captured.
//!
//! Of graphs that stand for themselves alone: on the CPU, without custom ops, checkpoints, composites that are expanded, and
//! results that keep a history.

mod build;
mod sizes;

use super::builder::same_data;
use super::{Bindings, LeafBinding, LeafKey, Sym};
use crate::hash::FastHasher;
use crate::node::{Node, NodeRef, Value};
use crate::op::{Dims, Op};
pub use build::Unguarded;
use candle_core::{DType, Device};
use sizes::Sizes;
use smallvec::SmallVec;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// What a capture saw.
#[derive(Debug)]
pub struct Guard {
    /// The number of each root; `None` for one that was ready.
    roots: Vec<Option<u32>>,
    /// What is known of the nodes, by their numbers: each comes before what it reads, in the order in which they are compared.
    expected: Vec<Expected>,
    /// The different ops and dims among them: few.
    functions: Vec<Function>,
    shapes: Vec<Dims<Sym>>,
    /// The numbers of all nodes' inputs.
    inputs: Vec<u32>,
    /// How many nodes are held while they are compared and bound.
    kept: usize,
    /// How many symbols and scalars there are.
    sizes: usize,
    scalars: usize,
    /// The symbols that equal dims share.
    shared: Vec<Sym>,
    /// The indices of the leaves in the graph.
    leaves: Vec<u32>,
    several: Vec<Several>,
    /// Ops, and leaves, by their places among those that are held, that are equal to an earlier one.
    merged_ops: Vec<(u32, u32)>,
    merged_leaves: Vec<(u32, u32)>,
    /// The places of those that are held in the order in which they were recorded.
    order: Vec<u32>,
    publish: Vec<SmallVec<[u32; 1]>>,
    ways: Arc<Ways>,
    pending: usize,
}

/// A leaf on the engine's memory that several read.
#[derive(Debug)]
struct Several {
    /// Its place among the leaves, and among the nodes that are held.
    leaf: u32,
    node: u32,
    edges: u32,
    /// The places of those that read it.
    readers: Vec<u32>,
}

#[derive(Debug)]
struct Expected {
    what: What,
    /// Its place among those that are held: what others hold, what several read, and what a run may write. Others are reached through
    /// the one node that reads them, whose lock keeps them meanwhile.
    kept: Option<u32>,
    /// How many captured nodes have it as an input.
    edges: u32,
    /// Its dims, as an index into [`Guard::shapes`].
    shape: u32,
    dtype: DType,
}

#[derive(Debug)]
enum What {
    /// Its place among the leaves; `None` for one on the same data as another.
    Leaf(LeafKey, Option<u32>),
    Op(ExpectedOp),
}

#[derive(Debug)]
struct ExpectedOp {
    /// An index into [`Guard::functions`].
    function: u32,
    /// Where its inputs begin, and how many there are.
    inputs: u32,
    count: u32,
    /// Where its scalars go; none of a node that is equal to an earlier one.
    scalars: Option<u32>,
    /// Whether something else holds it; not asked of a root.
    held: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Function {
    Plain(Op),
    Sized(Op<Sym>),
}

/// The ways from the nodes that are held to all others.
#[derive(Debug, Default)]
pub(super) struct Ways {
    /// The place among those that are held, or the node that reads it and which of its inputs it is.
    from: Vec<Way>,
    /// The number of the recorded node that each node of the graph came from.
    recorded: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Kept(u32),
    Below(u32, u32),
}

impl Ways {
    /// How many nodes the graph has.
    pub(super) fn len(&self) -> usize {
        self.recorded.len()
    }

    /// The recorded node that a node of the graph came from, if all above it still wait.
    pub(super) fn find(&self, index: u32, kept: &[NodeRef]) -> Option<NodeRef> {
        let (mut number, mut turns) = (*self.recorded.get(index as usize)?, Vec::new());
        let top = loop {
            match *self.from.get(number as usize)? {
                Way::Kept(place) => break kept.get(place as usize)?,
                Way::Below(reader, input) => {
                    turns.push(input);
                    number = reader;
                }
            }
        };
        let down = |node: NodeRef, input: u32| node.with_inputs(|inputs| inputs.get(input as usize).cloned())?;
        turns.into_iter().rev().try_fold(top.clone(), down)
    }
}

impl Guard {
    /// What the roots look like at a glance: equal graphs have equal hints.
    #[must_use]
    pub fn hint(roots: &[NodeRef]) -> u64 {
        let mut hasher = FastHasher::default();
        roots.len().hash(&mut hasher);
        for root in [roots.first(), roots.last()].into_iter().flatten() {
            root.recorded().map(|(op, _)| std::mem::discriminant(op)).hash(&mut hasher);
            (root.dims().len(), root.dtype()).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// What to bind to a plan of the captured graph, if `roots` have that graph: as a capture finds it, but that scalars, offsets or data
    /// which happen to be equal do not make two nodes one which were two, and that of nodes which were one the same are held.
    #[must_use]
    pub fn bind(&self, roots: &[NodeRef]) -> Option<Bindings> {
        if roots.len() != self.roots.len() {
            return None;
        }
        let mut walk = Walk {
            guard: self,
            sizes: Sizes::new(self.sizes),
            params: vec![0.0; self.scalars],
            kept: vec![None; self.kept],
            leaves: Vec::new(),
            later: Vec::new(),
        };
        walk.leaves.resize_with(self.leaves.len(), || None);
        for (root, &number) in roots.iter().zip(&self.roots) {
            let same = match number {
                None => root.is_ready(),
                Some(number) => walk.meet(number, root, 0),
            };
            if !same {
                return None;
            }
        }
        while let Some((number, node)) = walk.later.pop() {
            if !walk.inside(number, &node, 0, 1) {
                return None;
            }
        }
        let Walk { sizes, params, kept, leaves, .. } = walk;
        let nodes = kept.into_iter().collect::<Option<Vec<_>>>()?;
        let mut leaves = leaves.into_iter().collect::<Option<Vec<_>>>()?;
        for several in &self.several {
            leaves.get_mut(several.leaf as usize)?.exclusive = several.is_exclusive(&nodes)?;
        }
        let merged = self.merged_ops.iter().all(|&pair| same(&nodes, pair, are_equal))
            && self.merged_leaves.iter().all(|&pair| same(&nodes, pair, are_on_the_same_data));
        if !merged || !sizes.distinct(&self.shared) || !self.are_different(&nodes) {
            return None;
        }
        Some(Bindings {
            sizes: sizes.into_vec(),
            params,
            customs: Vec::new(),
            nodes,
            leaves,
            devices: vec![Device::Cpu],
            publish: self.publish.clone(),
            recorded: Vec::new(),
            ways: Some(self.ways.clone()),
            pending: self.pending,
        })
    }

    /// Whether no node has two numbers. One that nobody holds and one node reads cannot: the other one's edge would count as a handle.
    fn are_different(&self, nodes: &[NodeRef]) -> bool {
        let ids = || self.order.iter().filter_map(|&place| nodes.get(place as usize)).map(|node| node.id());
        // a program mostly records in the same order
        if ids().zip(ids().skip(1)).all(|(a, b)| a < b) {
            return true;
        }
        let mut ids: Vec<_> = ids().collect();
        ids.sort_unstable();
        ids.windows(2).all(|pair| pair[0] < pair[1])
    }
}

/// So many nodes are compared one inside another; what lies deeper waits for its turn.
const DEEP: usize = 32;

/// A comparison on its way.
struct Walk<'a> {
    guard: &'a Guard,
    sizes: Sizes,
    params: Vec<f64>,
    kept: Vec<Option<NodeRef>>,
    leaves: Vec<Option<LeafBinding>>,
    later: Vec<(u32, NodeRef)>,
}

impl Walk<'_> {
    /// Whether a node is the one with this number, or may be where it is met for the first time.
    fn meet(&mut self, number: u32, node: &NodeRef, depth: usize) -> bool {
        let Some(expected) = self.guard.expected.get(number as usize) else { return false };
        if let Some(place) = expected.kept {
            match self.kept.get_mut(place as usize) {
                Some(Some(known)) => return NodeRef::ptr_eq(known, node),
                Some(new) => *new = Some(node.clone()),
                None => return false,
            }
        }
        let Some(dims) = self.guard.shapes.get(expected.shape as usize) else { return false };
        let alike = node.dtype() == expected.dtype && self.sizes.are(dims, node.dims());
        alike
            && matches!(node.device(), Device::Cpu)
            && match &expected.what {
                What::Leaf(key, place) => self.leaf(expected, *key, *place, node),
                What::Op(_) if depth == DEEP => {
                    self.later.push((number, node.clone()));
                    true
                }
                What::Op(_) => self.inside(number, node, depth, 0),
            }
    }

    /// Whether a leaf is of this kind; a run gets its value.
    fn leaf(&mut self, expected: &Expected, key: LeafKey, place: Option<u32>, node: &NodeRef) -> bool {
        let value = node.locked(|_, _| None, |value| (LeafKey::of(node, value) == key).then(|| value.clone()));
        let Some(Some(value)) = value else { return false };
        // one on the same data as another is compared with that one
        let Some(place) = place else { return true };
        // the one that reads it is locked and waits, so one of these references is its own
        let ours = usize::from(expected.kept.is_some());
        let exclusive = expected.edges == 1 && NodeRef::strong_count(node) == 1 + ours && is_alone(&value, 0);
        let index = self.guard.leaves.get(place as usize).copied();
        match (self.leaves.get_mut(place as usize), index) {
            (Some(leaf), Some(index)) => *leaf = Some(LeafBinding { index, node: expected.kept, value, exclusive }),
            _ => return false,
        }
        true
    }

    /// Whether an op and all that it reads are those with this number. `besides` handles on it are ours, beside one where it is kept.
    fn inside(&mut self, number: u32, node: &NodeRef, depth: usize, besides: usize) -> bool {
        let guard = self.guard;
        let Some(expected) = guard.expected.get(number as usize) else { return false };
        let (What::Op(known), Some((op, scalars))) = (&expected.what, node.recorded()) else { return false };
        let same = match guard.functions.get(known.function as usize) {
            Some(Function::Plain(plain)) => plain == op,
            Some(Function::Sized(relative)) => self.sizes.fit(relative, op),
            None => false,
        };
        let place = known.scalars.map(|at| at as usize).filter(|_| !scalars.is_empty());
        let params = place.and_then(|at| self.params.get_mut(at..at + scalars.len()));
        if let Some(params) = params {
            // few: written one by one
            for (param, scalar) in params.iter_mut().zip(scalars) {
                *param = *scalar;
            }
        }
        // where another thread has published a node meanwhile, its edges are gone: as in a capture
        let ours = usize::from(expected.kept.is_some()) + besides;
        let held = || NodeRef::strong_count(node) > ours + expected.edges as usize;
        let keeps = known.held.unwrap_or(true) && node.traced() && !node.is_variable();
        if !same || keeps || known.held.is_some_and(|expected| expected != held()) {
            return false;
        }
        let from = known.inputs as usize;
        let Some(numbers) = guard.inputs.get(from..from + known.count as usize) else { return false };
        let waits = node.locked(
            |inputs, custom| {
                custom.is_none()
                    && inputs.len() == numbers.len()
                    && inputs.iter().zip(numbers).all(|(input, &number)| self.meet(number, input, depth + 1))
            },
            |_| false,
        );
        waits == Some(true)
    }
}

impl Several {
    /// Whether nobody but those that read the leaf holds it.
    fn is_exclusive(&self, nodes: &[NodeRef]) -> Option<bool> {
        let node = nodes.get(self.node as usize)?;
        // in this order: one that still waits held its edges when the count was taken
        let alone = NodeRef::strong_count(node) == 1 + self.edges as usize;
        let mut readers = self.readers.iter().filter_map(|&reader| nodes.get(reader as usize));
        Some(
            alone && readers.all(|reader| reader.is_pending()) && node.value().is_some_and(|value| is_alone(&value, 1)),
        )
    }
}

/// Whether no other node holds the memory of a value: its handles are that of its node, this one, and `bound` more in bindings.
fn is_alone(value: &Value, bound: usize) -> bool {
    !matches!(value, Value::Engine(engine) if Arc::strong_count(engine) > 2 + bound)
}

/// Whether `same` holds of the nodes at two places.
fn same(nodes: &[NodeRef], (a, b): (u32, u32), same: impl Fn(&Node, &Node) -> bool) -> bool {
    matches!((nodes.get(a as usize), nodes.get(b as usize)), (Some(a), Some(b)) if same(a, b))
}

/// Whether two ops are one, apart from their inputs, which have one number.
fn are_equal(a: &Node, b: &Node) -> bool {
    let (Some((op, x)), Some((other, y))) = (a.recorded(), b.recorded()) else { return false };
    op == other && a.dims() == b.dims() && x.iter().map(|x| x.to_bits()).eq(y.iter().map(|y| y.to_bits()))
}

fn are_on_the_same_data(a: &Node, b: &Node) -> bool {
    b.value().is_some_and(|value| same_data(a, &value))
}

#[cfg(test)]
mod tests;
