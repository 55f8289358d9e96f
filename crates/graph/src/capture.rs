//! Capture: from the implicit graph to a flat, hash-consed arena in relative form.
//!
//! One iterative walk from all roots gives the arena in topological order, merges equal nodes, finds what else must be
//! kept, and separates what a plan may depend on (the [`Graph`], and its [`GraphKey`]) from what changes from run to run
//! ([`Bindings`]: sizes, scalars, leaves).
//!
//! **Relative form.** A size in the graph is a symbol: 0 and 1 are themselves, every other size is numbered by first
//! use, and equal dims share a number. Offsets (the start of a narrow) are never shared, because nothing compares them.
//! No pass sees a size, so a plan made at one length serves every other length of the same pattern.
//!
//! **Keys.** Most evaluations find their plan in a cache, and need the key and the bindings alone: [`Workspace::key`] walks without
//! building a [`Graph`], in memory that it keeps. [`capture()`] gives both. A [`Guard`] knows a graph that was captured before by its
//! nodes, without a key.

mod builder;
mod guard;
mod key;
mod relative;
mod table;

use crate::custom::CustomOp;
use crate::error::{Error, Result};
use crate::node::{Node, NodeRef, Value};
use crate::op::{Dims, Op};
use builder::Builder;
use candle_core::{DType, Device};
use smallvec::SmallVec;
use std::sync::Arc;
use table::Table;

pub use guard::{Guard, Unguarded};
pub use key::GraphKey;
pub use relative::{GNode, GOp, Graph, LeafKey, LeafKind, Sym};

/// A leaf of a captured graph.
#[derive(Debug, Clone)]
pub struct LeafBinding {
    /// The index in the graph.
    pub index: u32,
    /// The node, as an index into [`Bindings::nodes`], if it is there.
    pub node: Option<u32>,
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
    /// The nodes that were captured; by a guard, those alone that others hold, several nodes read, or a run may write.
    pub nodes: Vec<NodeRef>,
    /// The leaves.
    pub leaves: Vec<LeafBinding>,
    /// The devices, by index.
    pub devices: Vec<Device>,
    /// For each output, the nodes that become ready with its value, as indices into [`Bindings::nodes`].
    pub publish: Vec<SmallVec<[u32; 1]>>,
    /// For each graph node, the recorded node it came from (the composite for the parts of a composite), likewise; empty where a guard
    /// knows it.
    pub(crate) recorded: Vec<u32>,
    ways: Option<Arc<guard::Ways>>,
    /// How many pending nodes were recorded.
    pub pending: usize,
}

impl Bindings {
    /// The same with other leaves.
    #[must_use]
    pub fn with_leaves(&self, leaves: Vec<LeafBinding>) -> Self {
        Self {
            sizes: self.sizes.clone(),
            params: self.params.clone(),
            customs: self.customs.clone(),
            nodes: self.nodes.clone(),
            leaves,
            devices: self.devices.clone(),
            publish: self.publish.clone(),
            recorded: self.recorded.clone(),
            ways: self.ways.clone(),
            pending: self.pending,
        }
    }

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

    /// The recorded node that a node of the graph came from. Where a guard bound it, `None` if somebody else has evaluated what is above
    /// it meanwhile.
    #[must_use]
    pub fn recorded(&self, index: u32) -> Option<NodeRef> {
        match &self.ways {
            Some(ways) => ways.find(index, &self.nodes),
            None => self.nodes.get(*self.recorded.get(index as usize)? as usize).cloned(),
        }
    }

    /// How many nodes the graph has.
    #[must_use]
    pub fn graph_nodes(&self) -> usize {
        self.ways.as_ref().map_or(self.recorded.len(), |ways| ways.len())
    }

    /// The device of the recorded node that a node of the graph came from.
    #[must_use]
    pub fn device(&self, index: u32) -> Device {
        match &self.ways {
            // of others there are no guards
            Some(_) => Device::Cpu,
            None => self.recorded(index).map_or(Device::Cpu, |node| node.device().clone()),
        }
    }

    /// For each output, the nodes that become ready with its value.
    pub fn published(&self) -> impl Iterator<Item = impl Iterator<Item = &NodeRef>> {
        self.publish.iter().map(|nodes| nodes.iter().filter_map(|&n| self.nodes.get(n as usize)))
    }
}

/// A captured graph with its key and its bindings.
#[derive(Debug)]
pub struct Captured {
    /// What a plan may depend on.
    pub graph: Graph,
    /// The same as a key.
    pub key: GraphKey,
    /// What changes from run to run.
    pub bindings: Bindings,
}

/// What capture asks its caller.
pub struct CaptureOptions<'a> {
    /// Whether a composite is replaced by its decomposition: called with the op, its result's dtype and its device.
    pub expand: &'a dyn Fn(&Op, DType, &Device) -> bool,
}

/// Why a capture did not finish.
#[derive(Debug)]
pub enum CaptureFailure {
    /// A leaf's value is being written in place by another run: wait for that run and capture again.
    Lent,
    /// A decomposition failed.
    Error(Error),
}

/// Captures everything that the pending `roots` need.
///
/// Every root becomes an output, and so does every captured pending node that something outside still holds.
/// Roots that are ready are not captured.
///
/// # Errors
/// [`CaptureFailure`].
pub fn capture(roots: &[NodeRef], options: &CaptureOptions<'_>) -> std::result::Result<Captured, CaptureFailure> {
    let mut workspace = Workspace::default();
    let (bindings, graph) = workspace.walk(roots, options, true)?;
    let key = GraphKey { hash: workspace.hash, words: workspace.key };
    Ok(Captured { graph: graph.unwrap_or_default(), key, bindings })
}

/// How a node that was met stands.
#[derive(Debug)]
struct Visit {
    /// Its index in the arena, once it is there.
    arena: u32,
    /// How many captured nodes have it as an input, and the last of them.
    edges: u32,
    reader: u32,
    leaf: bool,
    published: bool,
}

/// A leaf's index in the graph and in the visits.
#[derive(Debug)]
struct Leaf {
    index: u32,
    visit: u32,
    value: Value,
}

/// A pending node some of whose inputs are still to be visited.
#[derive(Debug, Clone, Copy)]
struct Frame {
    visit: u32,
    /// Where its inputs begin among those of all frames.
    inputs: u32,
    count: u32,
    /// How many inputs of other frames were done before: those done since are its own.
    done: u32,
}

/// What an arena node is, as far as nodes above have to know.
#[derive(Debug, Clone, Copy)]
struct Info {
    /// Where its words lie, sizes and scalars included; none for a leaf.
    words: (u32, u32),
    /// Where its dims lie, and how many there are.
    dims: u32,
    rank: u16,
    device: u16,
    dtype: DType,
}

/// The memory of a capture, for the next one.
#[derive(Debug, Default)]
pub struct Workspace {
    key: Vec<u64>,
    hash: u64,
    /// From a node's number to its visit.
    seen: Table,
    visits: Vec<Visit>,
    frames: Vec<Frame>,
    /// The inputs that are still to be visited.
    todo: Vec<Option<NodeRef>>,
    /// The arena indices of those that are done.
    done: Vec<u32>,
    leaves: Vec<Leaf>,
    /// The custom ops of pending nodes.
    customs: Vec<(u32, CustomOp)>,
    arena: Arena,
}

/// The arena without its graph.
#[derive(Debug, Default)]
struct Arena {
    infos: Vec<Info>,
    dims: Vec<usize>,
    words: Vec<u64>,
    /// From a hash of a node's words to its index.
    equal: Table,
    /// From the identity of a leaf's data to its index: two handles on one tensor are one leaf.
    same: Table,
}

/// An estimate counts shared nodes more than once: room is made for so many nodes at most.
const EXPECTED: u64 = 2048;
/// A workspace whose lists had to grow for more than these does not keep them.
const KEPT: usize = 1 << 18;

impl Workspace {
    /// The bindings of `roots`, and nothing but the key of their graph, which [`Workspace::words`] then are. As [`capture()`].
    ///
    /// # Errors
    /// [`CaptureFailure`].
    pub fn key(
        &mut self,
        roots: &[NodeRef],
        options: &CaptureOptions<'_>,
    ) -> std::result::Result<Bindings, CaptureFailure> {
        let walked = self.walk(roots, options, false);
        let arena = &self.arena;
        let lists = [self.seen.capacity(), arena.equal.capacity(), self.todo.capacity(), arena.words.capacity()];
        if lists.into_iter().any(|capacity| capacity > KEPT) {
            *self = Self { key: std::mem::take(&mut self.key), hash: self.hash, ..Self::default() };
        }
        walked.map(|(bindings, _)| bindings)
    }

    /// The hash of the key of the last capture.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The words of the key of the last capture.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.key
    }

    fn reset(&mut self, expected: usize) {
        let Self { key, hash: _, seen, visits, frames, todo, done, leaves, customs, arena } = self;
        seen.reset(expected);
        arena.equal.reset(expected);
        arena.same.reset(expected / 2);
        // what the caller of the last capture looked at
        if key.capacity() > KEPT {
            *key = Vec::new();
        }
        key.clear();
        visits.clear();
        frames.clear();
        todo.clear();
        done.clear();
        leaves.clear();
        customs.clear();
        arena.infos.clear();
        arena.dims.clear();
        arena.words.clear();
    }

    fn walk(
        &mut self,
        roots: &[NodeRef],
        options: &CaptureOptions<'_>,
        whole: bool,
    ) -> std::result::Result<(Bindings, Option<Graph>), CaptureFailure> {
        // growing a table of some hundred nodes by doubling would take as long as filling it
        let expected = roots.iter().map(|r| r.pending_estimate().0).fold(0, u64::saturating_add).min(EXPECTED) as usize;
        self.reset(expected);
        let recorded = Vec::with_capacity(expected);
        let bindings = Bindings { sizes: vec![0, 1], recorded, ..Bindings::default() };
        let walked = Walk {
            seen: &mut self.seen,
            visits: &mut self.visits,
            frames: &mut self.frames,
            todo: &mut self.todo,
            done: &mut self.done,
            leaves: &mut self.leaves,
            customs: &mut self.customs,
            nodes: Vec::with_capacity(expected),
            builder: Builder::new(options, &mut self.arena, &mut self.key, bindings, whole),
        }
        .run(roots);
        if walked.is_err() {
            // nothing of a capture that failed stays alive
            self.reset(0);
        }
        self.hash = key::hash(&self.key);
        walked
    }
}

/// A walk over the recorded nodes.
struct Walk<'a, 'o> {
    seen: &'a mut Table,
    visits: &'a mut Vec<Visit>,
    frames: &'a mut Vec<Frame>,
    todo: &'a mut Vec<Option<NodeRef>>,
    done: &'a mut Vec<u32>,
    leaves: &'a mut Vec<Leaf>,
    customs: &'a mut Vec<(u32, CustomOp)>,
    /// The node of each visit.
    nodes: Vec<NodeRef>,
    builder: Builder<'a, 'o>,
}

impl Walk<'_, '_> {
    fn visit_of(&self, node: &Node) -> Option<u32> {
        self.seen.find(node.id().get(), |_| true)
    }

    fn run(mut self, roots: &[NodeRef]) -> std::result::Result<(Bindings, Option<Graph>), CaptureFailure> {
        for root in roots {
            if root.is_ready() || self.visit_of(root).is_some() {
                continue;
            }
            self.enter(root.clone(), None)?;
            while let Some(&frame) = self.frames.last() {
                let Frame { visit: reader, inputs, count, done } = frame;
                let next = self.done.len() as u32 - done;
                let input = self.todo.get_mut((inputs + next) as usize).filter(|_| next < count).and_then(Option::take);
                let Some(input) = input else {
                    self.frames.pop();
                    self.leave(frame).map_err(CaptureFailure::Error)?;
                    continue;
                };
                match self.visit_of(&input) {
                    Some(known) => {
                        let visit = &mut self.visits[known as usize];
                        visit.edges += 1;
                        visit.reader = reader;
                        self.done.push(visit.arena);
                    }
                    None => self.enter(input, Some(reader))?,
                }
            }
        }
        Ok(self.finish(roots))
    }

    /// First visit of a node: a leaf is done at once, a pending node becomes a frame.
    fn enter(&mut self, node: NodeRef, reader: Option<u32>) -> std::result::Result<(), CaptureFailure> {
        let visit = self.nodes.len() as u32;
        let from = self.todo.len();
        let (todo, customs) = (&mut *self.todo, &mut *self.customs);
        let pending = |inputs: &[NodeRef], custom: Option<&CustomOp>| {
            inputs.iter().for_each(|input| todo.push(Some(input.clone())));
            customs.extend(custom.map(|custom| (visit, custom.clone())));
            None
        };
        let (arena, leaf) = match node.locked(pending, |value| Some(value.clone())) {
            None => return Err(CaptureFailure::Lent),
            Some(Some(value)) => {
                let (index, new) = self.builder.leaf(visit, &node, &value, &self.nodes);
                if new {
                    self.leaves.push(Leaf { index, visit, value });
                }
                self.done.push(index);
                (index, true)
            }
            Some(None) => {
                let count = (self.todo.len() - from) as u32;
                self.frames.push(Frame { visit, inputs: from as u32, count, done: self.done.len() as u32 });
                (u32::MAX, false)
            }
        };
        self.seen.insert(node.id().get(), visit);
        self.nodes.push(node);
        let (edges, reader) = (u32::from(reader.is_some()), reader.unwrap_or(u32::MAX));
        self.visits.push(Visit { arena, edges, reader, leaf, published: false });
        Ok(())
    }

    /// All inputs of a frame are done: its node goes to the arena.
    fn leave(&mut self, Frame { visit, inputs: from, done, .. }: Frame) -> Result<()> {
        let custom = self.customs.pop_if(|(of, _)| *of == visit).map(|(_, custom)| custom);
        let (done, node) = (done as usize, &self.nodes[visit as usize]);
        let id = self.builder.op(visit, node, custom, &self.done[done..])?;
        self.done.truncate(done);
        self.done.push(id);
        self.todo.truncate(from as usize);
        self.visits[visit as usize].arena = id;
        Ok(())
    }

    fn finish(self, roots: &[NodeRef]) -> (Bindings, Option<Graph>) {
        let Self { seen, visits, leaves, nodes, mut builder, .. } = self;
        let mut outputs = Outputs { of: vec![u32::MAX; builder.len()], arena: Vec::new(), publish: Vec::new() };
        for root in roots {
            if let Some(v) = seen.find(root.id().get(), |_| true) {
                outputs.add(v, &mut visits[v as usize]);
            }
        }
        // where another thread has published a node meanwhile, its edges are gone, and what is held looks as if it was not: it will be
        // computed again when it is asked for
        for (v, (visit, node)) in visits.iter_mut().zip(&nodes).enumerate() {
            if !visit.leaf && NodeRef::strong_count(node) > 1 + visit.edges as usize {
                outputs.add(v as u32, visit);
            }
        }
        builder.outputs(&outputs.arena);
        let history = history(seen, visits, &nodes);
        let alone = alone(seen, visits, leaves, &nodes);
        let bindings = &mut builder.bindings;
        bindings.publish = outputs.publish;
        bindings.leaves = leaves
            .drain(..)
            .map(|Leaf { index, visit, value }| {
                let alone = alone.get(visit as usize).copied().unwrap_or(false);
                let exclusive = alone && !history.get(visit as usize).copied().unwrap_or(false);
                LeafBinding { index, node: Some(visit), value, exclusive }
            })
            .collect();
        bindings.nodes = nodes;
        builder.finish()
    }
}

/// Which leaves nobody holds but captured nodes that still wait: one for each visit, or nothing where there is no such leaf. A tensor of Candle's
/// with several readers is not asked after: it is never written.
fn alone(seen: &Table, visits: &[Visit], leaves: &[Leaf], nodes: &[NodeRef]) -> Vec<bool> {
    let mut alone = Vec::new();
    let mut several = false;
    for Leaf { visit, value, .. } in leaves {
        let (of, node) = (&visits[*visit as usize], &nodes[*visit as usize]);
        let asked = of.edges == 1 || matches!(value, Value::Engine(_));
        if !asked || NodeRef::strong_count(node) > 1 + of.edges as usize {
            continue;
        }
        if alone.is_empty() {
            alone.resize(visits.len(), false);
        }
        // a reader that still waits held its edge when the count was taken: the other references are these edges
        alone[*visit as usize] = match of.edges {
            1 => nodes.get(of.reader as usize).is_some_and(|reader| reader.is_pending()),
            _ => true,
        };
        several |= of.edges > 1;
    }
    if several {
        let mut waiting = vec![0; visits.len()];
        for node in nodes {
            node.with_inputs(|inputs| {
                for visit in inputs.iter().filter_map(|input| seen.find(input.id().get(), |_| true)) {
                    waiting[visit as usize] += 1;
                }
            });
        }
        for (alone, (of, waiting)) in alone.iter_mut().zip(visits.iter().zip(waiting)) {
            *alone = *alone && of.edges == waiting;
        }
    }
    alone
}

/// Which visits stay reachable from a traced node that becomes ready, by what it keeps for its gradient; nothing where there is none.
fn history(seen: &Table, visits: &[Visit], nodes: &[NodeRef]) -> Vec<bool> {
    let keeps = |v: usize| nodes[v].traced() && !nodes[v].is_variable();
    let mut todo: Vec<usize> = (0..visits.len()).filter(|&v| visits[v].published && keeps(v)).collect();
    if todo.is_empty() {
        return Vec::new();
    }
    let mut reached = vec![false; visits.len()];
    while let Some(v) = todo.pop() {
        // what is not traced drops its inputs when it becomes ready
        if std::mem::replace(&mut reached[v], true) || visits[v].published && !keeps(v) {
            continue;
        }
        nodes[v].with_inputs(|inputs| {
            let visits = inputs.iter().filter_map(|input| seen.find(input.id().get(), |_| true));
            todo.extend(visits.map(|visit| visit as usize));
        });
    }
    reached
}

/// The outputs of a graph, in order.
struct Outputs {
    /// For each arena node, its number among the outputs, if it is one.
    of: Vec<u32>,
    arena: Vec<u32>,
    publish: Vec<SmallVec<[u32; 1]>>,
}

impl Outputs {
    fn add(&mut self, v: u32, visit: &mut Visit) {
        if std::mem::replace(&mut visit.published, true) {
            return;
        }
        let of = &mut self.of[visit.arena as usize];
        if *of == u32::MAX {
            *of = self.arena.len() as u32;
            self.arena.push(visit.arena);
            self.publish.push(SmallVec::new());
        }
        self.publish[*of as usize].push(v);
    }
}

#[cfg(test)]
mod tests;
