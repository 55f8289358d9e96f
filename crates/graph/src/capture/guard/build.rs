//! How a guard is made: from a capture, whose nodes are numbered as the guard meets them.

use super::super::{Bindings, CaptureFailure, CaptureOptions, GOp, Graph, GraphKey, LeafKey, LeafKind, Workspace};
use super::{key_of, Expected, ExpectedOp, Function, Guard, Several, Way, Ways, What};
use crate::decompose::is_composite;
use crate::node::Node;
use crate::op::Op;
use candle_core::Device;
use std::sync::Arc;

/// Of so many nodes at most: a guard takes some two hundred bytes for each.
const MOST: usize = 1 << 16;

/// The numbers of visits, in the order in which they are met.
struct Met {
    numbers: Vec<u32>,
    order: Vec<u32>,
}

impl Met {
    fn meet(&mut self, visit: u32) -> Option<u32> {
        let number = self.numbers.get_mut(visit as usize)?;
        if *number == u32::MAX {
            *number = self.order.len() as u32;
            self.order.push(visit);
        }
        Some(*number)
    }

    fn number(&self, visit: u32) -> Option<u32> {
        self.numbers.get(visit as usize).copied().filter(|&number| number != u32::MAX)
    }
}

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
    pub fn of(roots: &[Arc<Node>], options: &CaptureOptions<'_>) -> std::result::Result<(Self, GraphKey), Unguarded> {
        let mut workspace = Workspace::default();
        let (bindings, graph) = workspace.walk(roots, options, true).map_err(|failure| match failure {
            CaptureFailure::Lent => Unguarded::Changed,
            CaptureFailure::Error(_) => Unguarded::Kind,
        })?;
        if !can_be_known(&workspace, &bindings, options) {
            return Err(Unguarded::Kind);
        }
        let guard = Self::build(roots, &workspace, &bindings, &graph.unwrap_or_default()).ok_or(Unguarded::Changed)?;
        Ok((guard, GraphKey { hash: workspace.hash, words: workspace.key }))
    }

    fn build(roots: &[Arc<Node>], workspace: &Workspace, bindings: &Bindings, graph: &Graph) -> Option<Self> {
        let visits = &workspace.visits;
        let visit_of = |node: &Node| workspace.seen.find(node.id().get(), |_| true);
        let mut met = Met { numbers: vec![u32::MAX; visits.len()], order: Vec::with_capacity(visits.len()) };
        // one that was ready was visited only where others read it
        let roots: Vec<_> = roots.iter().map(|root| met.meet(visit_of(root)?)).collect();
        // the roots were met first
        let first_inner = met.order.len() as u32;
        // which of the leaves that are bound a visit is
        let mut leaf_of = vec![None; visits.len()];
        for (i, leaf) in bindings.leaves.iter().enumerate() {
            let visit = leaf.node? as usize;
            *leaf_of.get_mut(visit)? = Some((i as u32, key_of(&leaf.value)));
        }
        let (mut expected, mut inputs, mut merged) = (Vec::with_capacity(visits.len()), Vec::new(), Vec::new());
        let (mut kept, mut from) = (0, vec![None; visits.len()]);
        while let Some(&v) = met.order.get(expected.len()) {
            let number = expected.len() as u32;
            let (visit, node) = (visits.get(v as usize)?, bindings.nodes.get(v as usize)?);
            let first = *bindings.recorded.get(visit.arena as usize)?;
            let original = graph.nodes.get(visit.arena as usize)?;
            let leaf = leaf_of.get(first as usize).copied().flatten();
            // an op is merged with the first that is equal, a leaf with the first of the same data: a look at both tells
            if first != v {
                merged.push((v, first));
            }
            let what = match (node.recorded(), &original.op, leaf) {
                (_, GOp::Leaf(_), Some((place, key))) if visit.leaf => What::Leaf(key, (first == v).then_some(place)),
                (Some((op, _)), GOp::Op(relative), _) if !visit.leaf => {
                    let begin = inputs.len() as u32;
                    node.with_inputs(|all| {
                        all.iter().enumerate().try_for_each(|(i, input)| {
                            let input = met.meet(visit_of(input)?)?;
                            *from.get_mut(input as usize)? = Some(Way::Below(number, i as u32));
                            inputs.push(input);
                            Some(())
                        })
                    })??;
                    What::Op(ExpectedOp {
                        op: match op.has_sizes() {
                            true => Function::Sized(relative.clone()),
                            false => Function::Plain(op.clone()),
                        },
                        inputs: begin,
                        count: inputs.len() as u32 - begin,
                        scalars: (first == v).then(|| original.params.first().copied().unwrap_or(0)),
                        held: (number >= first_inner).then_some(visit.published),
                    })
                }
                _ => return None,
            };
            expected.push(Expected {
                what,
                kept: None,
                edges: visit.edges,
                dims: original.dims.clone(),
                dtype: original.dtype,
            });
        }
        let number = |&v: &u32| met.number(v);
        let merged: Vec<_> =
            merged.iter().map(|(v, first)| Some((number(v)?, number(first)?))).collect::<Option<_>>()?;
        let mut compared = vec![false; expected.len()];
        for number in merged.iter().flat_map(|&(v, first)| [v, first]).chain(roots.iter().copied().flatten()) {
            *compared.get_mut(number as usize)? = true;
        }
        // memory that several read may be written where nobody else holds it, as long as all of them wait
        let mut several: Vec<(u32, Vec<u32>)> = Vec::new();
        let mut place_of = vec![None; expected.len()];
        for ((number, one), place) in expected.iter().enumerate().zip(&mut place_of) {
            if one.edges > 1 && matches!(one.what, What::Leaf(LeafKey { kind: LeafKind::Engine, .. }, Some(_))) {
                *place = Some(several.len());
                several.push((number as u32, Vec::new()));
            }
        }
        for (number, one) in expected.iter().enumerate() {
            let What::Op(op) = &one.what else { continue };
            for &input in inputs.get(op.inputs as usize..)?.get(..op.count as usize)? {
                if let Some((_, readers)) = place_of.get(input as usize)?.and_then(|place| several.get_mut(place)) {
                    readers.push(number as u32);
                }
            }
        }
        for &number in several.iter().flat_map(|(_, readers)| readers) {
            *compared.get_mut(number as usize)? = true;
        }
        for (one, compared) in expected.iter_mut().zip(compared) {
            let looked_at = match &one.what {
                What::Leaf(key, _) => key.kind != LeafKind::Tensor,
                What::Op(op) => op.held != Some(false),
            };
            if looked_at || compared || one.edges != 1 {
                one.kept = Some(kept);
                kept += 1;
            }
        }
        let place = |number: u32| expected.get(number as usize)?.kept;
        let way = |(i, from): (usize, &Option<Way>)| place(i as u32).map(Way::Kept).or(*from);
        let ways = Ways {
            from: from.iter().enumerate().take(expected.len()).map(way).collect::<Option<_>>()?,
            recorded: bindings.recorded.iter().map(number).collect::<Option<_>>()?,
        };
        let places = |&(v, first): &(u32, u32)| Some((place(v)?, place(first)?));
        let is_leaf =
            |&(v, _): &(u32, u32)| matches!(expected.get(v as usize), Some(Expected { what: What::Leaf(..), .. }));
        let (merged_leaves, merged_ops): (Vec<_>, Vec<_>) = merged.into_iter().partition(is_leaf);
        let mut order = Vec::with_capacity(kept as usize);
        for (one, &v) in expected.iter().zip(&met.order) {
            if let Some(place) = one.kept {
                order.push((bindings.nodes.get(v as usize)?.id(), place));
            }
        }
        order.sort_unstable();
        let published = |v: &u32| place(number(v)?);
        let shared_memory = |(number, readers): &(u32, Vec<u32>)| {
            let one = expected.get(*number as usize)?;
            let What::Leaf(_, Some(leaf)) = one.what else { return None };
            let readers = readers.iter().map(|&reader| place(reader)).collect::<Option<_>>()?;
            Some(Several { leaf, node: one.kept?, edges: one.edges, readers })
        };
        let mut shared: Vec<_> = graph.nodes.iter().flat_map(|node| node.dims.iter().copied()).collect();
        shared.retain(|sym| sym.index() > 1);
        shared.sort_unstable();
        shared.dedup();
        Some(Self {
            kept: kept as usize,
            sizes: bindings.sizes.len(),
            scalars: bindings.params.len(),
            shared,
            leaves: bindings.leaves.iter().map(|leaf| leaf.index).collect(),
            several: several.iter().map(shared_memory).collect::<Option<_>>()?,
            merged_ops: merged_ops.iter().map(places).collect::<Option<_>>()?,
            merged_leaves: merged_leaves.iter().map(places).collect::<Option<_>>()?,
            order: order.into_iter().map(|(_, place)| place).collect(),
            publish: bindings.publish.iter().map(|all| all.iter().map(published).collect()).collect::<Option<_>>()?,
            ways: Arc::new(ways),
            pending: bindings.pending,
            roots,
            expected,
            inputs,
        })
    }
}
