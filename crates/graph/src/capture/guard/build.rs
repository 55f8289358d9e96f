//! How a guard is made: from a capture, whose nodes are numbered as the guard meets them.

use super::super::{Bindings, CaptureFailure, CaptureOptions, GOp, Graph, GraphKey, LeafKey, LeafKind, Sym, Workspace};
use super::{Expected, ExpectedOp, Function, Guard, Several, Way, Ways, What};
use crate::decompose::is_composite;
use crate::hash::FastMap;
use crate::node::{Node, NodeRef};
use crate::op::{Dims, Op};
use candle_core::Device;
use std::sync::Arc;

/// Of so many nodes at most: a guard takes some two hundred bytes for each.
const MOST: usize = 1 << 16;

/// Why there is no guard of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unguarded {
    /// There are none of its kind.
    Kind,
    /// Somebody else has changed it meanwhile, or is about to.
    Changed,
}

/// Whether each node stands for itself alone, on the CPU, and keeps no history.
fn can_be_known(workspace: &Workspace, bindings: &Bindings, options: &CaptureOptions<'_>) -> bool {
    let visits = &workspace.visits;
    visits.len() <= MOST
        && bindings.customs.is_empty()
        && bindings.devices.iter().all(|device| matches!(device, Device::Cpu))
        && visits.iter().zip(&bindings.nodes).filter(|(visit, _)| !visit.leaf).all(|(visit, node)| {
            let Some((op, _)) = node.recorded() else { return false };
            let expanded = is_composite(op) && (options.expand)(op, node.dtype(), node.device());
            let keeps = visit.published && node.traced() && !node.is_variable();
            !(expanded || keeps || matches!(op, Op::Checkpoint { .. } | Op::Custom { .. }))
        })
}

impl Guard {
    /// Captures `roots`, to know them again, and gives the key beside.
    ///
    /// # Errors
    /// [`Unguarded`].
    pub fn of(roots: &[NodeRef], options: &CaptureOptions<'_>) -> std::result::Result<(Self, GraphKey), Unguarded> {
        let mut workspace = Workspace::default();
        let (bindings, graph) = workspace.walk(roots, options, true).map_err(|failure| match failure {
            CaptureFailure::Lent => Unguarded::Changed,
            CaptureFailure::Error(_) => Unguarded::Kind,
        })?;
        if !can_be_known(&workspace, &bindings, options) {
            return Err(Unguarded::Kind);
        }
        let captured = Capture { workspace: &workspace, bindings: &bindings, graph: &graph.unwrap_or_default() };
        let guard = captured.guard(roots).ok_or(Unguarded::Changed)?;
        Ok((guard, GraphKey { hash: workspace.hash, words: workspace.key }))
    }
}

/// A capture, whose nodes wait still.
struct Capture<'a> {
    workspace: &'a Workspace,
    bindings: &'a Bindings,
    graph: &'a Graph,
}

/// The nodes of a capture in the order in which a guard compares them.
struct Numbers {
    /// The number of each visit.
    of: Vec<u32>,
    /// The visit of each number.
    visits: Vec<u32>,
    /// Where the inputs of each number begin among those of all, and how many there are.
    ranges: Vec<(u32, u32)>,
    /// The visits of the inputs of all.
    inputs: Vec<u32>,
    /// For each visit, one that reads it, and which of its inputs it is.
    readers: Vec<Option<(u32, u32)>>,
}

impl Numbers {
    fn get(&self, visit: u32) -> Option<u32> {
        self.of.get(visit as usize).copied().filter(|&number| number != u32::MAX)
    }

    /// The visits that a number reads.
    fn inputs(&self, number: usize) -> Option<&[u32]> {
        let (from, count) = *self.ranges.get(number)?;
        self.inputs.get(from as usize..)?.get(..count as usize)
    }
}

/// Different values, each once.
struct Distinct<T> {
    all: Vec<T>,
    indices: FastMap<T, u32>,
}

impl<T: Clone + Eq + std::hash::Hash> Distinct<T> {
    fn new() -> Self {
        Self { all: Vec::new(), indices: FastMap::default() }
    }

    fn index(&mut self, value: T) -> u32 {
        let all = &mut self.all;
        *self.indices.entry(value).or_insert_with_key(|value| {
            all.push(value.clone());
            all.len() as u32 - 1
        })
    }
}

impl Capture<'_> {
    fn visit_of(&self, node: &Node) -> Option<u32> {
        self.workspace.seen.find(node.id().get(), |_| true)
    }

    fn guard(&self, roots: &[NodeRef]) -> Option<Guard> {
        let Self { bindings, graph, .. } = *self;
        let numbers = self.numbers(roots)?;
        // one that was ready was visited only where others read it
        let roots: Vec<_> = roots.iter().map(|root| numbers.get(self.visit_of(root)?)).collect();
        let (mut functions, mut shapes) = (Distinct::new(), Distinct::new());
        let mut expected = self.expected(&numbers, &roots, &mut functions, &mut shapes)?;
        // a node that is merged with the first that is equal, and that first one
        let number_of_first = |visit: u32| numbers.get(self.first_of(visit)?);
        let first: Vec<u32> = numbers.visits.iter().map(|&visit| number_of_first(visit)).collect::<Option<_>>()?;
        let merged = || first.iter().enumerate().filter(|&(number, &first)| number as u32 != first);
        let several = several(&expected, &numbers)?;
        let mut asked: Vec<bool> = vec![false; expected.len()];
        let pairs = merged().flat_map(|(number, &first)| [number as u32, first]);
        let readers = several.iter().flat_map(|(_, readers)| readers.iter().copied());
        for number in pairs.chain(readers).chain(roots.iter().copied().flatten()) {
            *asked.get_mut(number as usize)? = true;
        }
        let mut kept = 0;
        for (one, asked) in expected.iter_mut().zip(asked) {
            let looked_at = match &one.what {
                What::Leaf(key, _) => key.kind != LeafKind::Tensor,
                What::Op(op) => op.held != Some(false),
            };
            if looked_at || asked || one.edges != 1 {
                one.kept = Some(kept);
                kept += 1;
            }
        }
        let place = |number: u32| expected.get(number as usize)?.kept;
        let places = |(number, &first): (usize, &u32)| Some((place(number as u32)?, place(first)?));
        let is_leaf =
            |&(number, _): &(usize, &u32)| expected.get(number).is_some_and(|one| matches!(one.what, What::Leaf(..)));
        let way = |(one, &visit): (&Expected, &u32)| match one.kept {
            Some(place) => Some(Way::Kept(place)),
            None => {
                let (reader, input) = (*numbers.readers.get(visit as usize)?)?;
                Some(Way::Below(numbers.get(reader)?, input))
            }
        };
        let ways = Ways {
            from: expected.iter().zip(&numbers.visits).map(way).collect::<Option<_>>()?,
            recorded: bindings.recorded.iter().map(|&visit| numbers.get(visit)).collect::<Option<_>>()?,
        };
        let mut order = Vec::with_capacity(kept as usize);
        for (one, &visit) in expected.iter().zip(&numbers.visits) {
            if let Some(place) = one.kept {
                order.push((bindings.nodes.get(visit as usize)?.id(), place));
            }
        }
        order.sort_unstable();
        let shared_memory = |(number, readers): &(u32, Vec<u32>)| {
            let one = expected.get(*number as usize)?;
            let What::Leaf(_, Some(leaf)) = one.what else { return None };
            let readers = readers.iter().map(|&reader| place(reader)).collect::<Option<_>>()?;
            Some(Several { leaf, node: one.kept?, edges: one.edges, readers })
        };
        let published = |visit: &u32| place(numbers.get(*visit)?);
        let mut shared: Vec<_> = graph.nodes.iter().flat_map(|node| node.dims.iter().copied()).collect();
        shared.retain(|sym| sym.index() > 1);
        shared.sort_unstable();
        shared.dedup();
        Some(Guard {
            kept: kept as usize,
            sizes: bindings.sizes.len(),
            scalars: bindings.params.len(),
            shared,
            leaves: bindings.leaves.iter().map(|leaf| leaf.index).collect(),
            several: several.iter().map(shared_memory).collect::<Option<_>>()?,
            merged_ops: merged().filter(|pair| !is_leaf(pair)).map(places).collect::<Option<_>>()?,
            merged_leaves: merged().filter(is_leaf).map(places).collect::<Option<_>>()?,
            order: order.into_iter().map(|(_, place)| place).collect(),
            publish: bindings.publish.iter().map(|all| all.iter().map(published).collect()).collect::<Option<_>>()?,
            ways: Arc::new(ways),
            pending: bindings.pending,
            inputs: numbers.inputs.iter().map(|&visit| numbers.get(visit)).collect::<Option<_>>()?,
            functions: functions.all,
            shapes: shapes.all,
            roots,
            expected,
        })
    }

    /// Numbers every node before what it reads, root by root.
    fn numbers(&self, roots: &[NodeRef]) -> Option<Numbers> {
        let count = self.workspace.visits.len();
        let mut numbers = Numbers {
            of: vec![u32::MAX; count],
            visits: Vec::with_capacity(count),
            ranges: Vec::with_capacity(count),
            inputs: Vec::new(),
            readers: vec![None; count],
        };
        let mut stack = Vec::new();
        for root in roots {
            stack.extend(self.visit_of(root));
            while let Some(visit) = stack.pop() {
                let number = numbers.of.get_mut(visit as usize)?;
                if *number != u32::MAX {
                    continue;
                }
                *number = numbers.visits.len() as u32;
                numbers.visits.push(visit);
                let from = numbers.inputs.len();
                if !self.workspace.visits.get(visit as usize)?.leaf {
                    self.bindings.nodes.get(visit as usize)?.with_inputs(|all| {
                        all.iter().try_for_each(|input| {
                            numbers.inputs.push(self.visit_of(input)?);
                            Some(())
                        })
                    })??;
                }
                let inputs = &numbers.inputs[from..];
                numbers.ranges.push((from as u32, inputs.len() as u32));
                for (i, &input) in inputs.iter().enumerate() {
                    *numbers.readers.get_mut(input as usize)? = Some((visit, i as u32));
                }
                stack.extend(inputs.iter().rev());
            }
        }
        Some(numbers)
    }

    /// The first visit that became the node of the graph which this one became.
    fn first_of(&self, visit: u32) -> Option<u32> {
        let arena = self.workspace.visits.get(visit as usize)?.arena;
        self.bindings.recorded.get(arena as usize).copied()
    }

    /// What is known of each node, but for whether it is kept.
    fn expected(
        &self,
        numbers: &Numbers,
        roots: &[Option<u32>],
        functions: &mut Distinct<Function>,
        shapes: &mut Distinct<Dims<Sym>>,
    ) -> Option<Vec<Expected>> {
        let visits = &self.workspace.visits;
        let mut is_root = vec![false; visits.len()];
        for number in roots.iter().flatten() {
            *is_root.get_mut(*number as usize)? = true;
        }
        // which of the leaves that are bound a visit is
        let mut leaf_of = vec![None; visits.len()];
        for (i, leaf) in self.bindings.leaves.iter().enumerate() {
            let visit = leaf.node? as usize;
            *leaf_of.get_mut(visit)? = Some((i as u32, LeafKey::of(self.bindings.nodes.get(visit)?, &leaf.value)));
        }
        let mut expected = Vec::with_capacity(numbers.visits.len());
        for ((&v, &(inputs, count)), is_root) in numbers.visits.iter().zip(&numbers.ranges).zip(is_root) {
            let (visit, node) = (visits.get(v as usize)?, self.bindings.nodes.get(v as usize)?);
            let original = self.graph.nodes.get(visit.arena as usize)?;
            let first = self.first_of(v)?;
            let what = match (node.recorded(), &original.op) {
                (_, GOp::Leaf(_)) if visit.leaf => {
                    let (place, key) = leaf_of.get(first as usize).copied()??;
                    What::Leaf(key, (first == v).then_some(place))
                }
                (Some((op, _)), GOp::Op(relative)) if !visit.leaf => What::Op(ExpectedOp {
                    function: functions.index(match op.has_sizes() {
                        true => Function::Sized(relative.clone()),
                        false => Function::Plain(op.clone()),
                    }),
                    inputs,
                    count,
                    scalars: (first == v).then(|| original.params.first().copied().unwrap_or(0)),
                    held: (!is_root).then_some(visit.published),
                }),
                _ => return None,
            };
            let (shape, dtype) = (shapes.index(original.dims.clone()), original.dtype);
            expected.push(Expected { what, kept: None, edges: visit.edges, shape, dtype });
        }
        Some(expected)
    }
}

/// The leaves on the engine's memory that several read, and who does: it may be written where nobody else holds it, as long as all of them
/// wait.
fn several(expected: &[Expected], numbers: &Numbers) -> Option<Vec<(u32, Vec<u32>)>> {
    let mut several: Vec<(u32, Vec<u32>)> = Vec::new();
    let mut place_of = vec![None; expected.len()];
    for ((number, one), place) in expected.iter().enumerate().zip(&mut place_of) {
        if one.edges > 1 && matches!(one.what, What::Leaf(LeafKey { kind: LeafKind::Engine, .. }, Some(_))) {
            *place = Some(several.len());
            several.push((number as u32, Vec::new()));
        }
    }
    for number in 0..expected.len() {
        for &input in numbers.inputs(number)? {
            let input = numbers.get(input)? as usize;
            if let Some((_, readers)) = place_of.get(input)?.and_then(|place| several.get_mut(place)) {
                readers.push(number as u32);
            }
        }
    }
    Some(several)
}
