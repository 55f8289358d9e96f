//! Regions whose inner values are not kept for the backward pass but computed again there (Chen et al. 2016, arXiv:1604.06174, §3).
//!
//! A region is what was recorded between a mark and the [`Op::Checkpoint`]s that bear its number. When the walk comes to its first node,
//! the gradients of all its results are known, since the walk goes from the newest node to the oldest. The region's nodes are then
//! recorded again, on [`Op::Barrier`]s of what it read: these wait for the gradients, so that nothing is computed again before it is
//! needed, and they keep the second computation from being merged with the first. The rules read the recomputed nodes, each behind a
//! checkpoint whose gradient goes to the node that it stands for: a second derivative sees the graph that was recorded.
//!
//! Regions nest: a node is recomputed from the recomputed nodes of the region around its own.

use super::{Ref, Sums, Walk};
use crate::error::Result;
use crate::hash::FastMap;
use crate::node::{Expr, Node, NodeId};
use crate::op::Op;
use smallvec::SmallVec;

/// The regions that a node is in, outermost first.
type Chain = SmallVec<[u64; 2]>;

/// A region of a walk.
#[derive(Default)]
struct Region {
    /// The results whose gradients the walk passes.
    ends: Vec<Ref>,
    /// What the walk meets of it.
    met: Vec<usize>,
    /// Its nodes and what they read, recorded again; `None` before the walk comes to it.
    again: Option<FastMap<NodeId, Ref>>,
}

pub(super) struct Regions {
    /// For each node of the walk.
    chains: Vec<Chain>,
    regions: FastMap<u64, Region>,
    /// The recomputed nodes as rules see them, by region and node.
    seen: FastMap<(u64, NodeId), Ref>,
}

impl Regions {
    /// The regions of a walk; `None` where it passes no checkpoint.
    pub(super) fn of(walk: &Walk) -> Option<Self> {
        let is_end = |expr: &Option<Expr>| expr.as_ref().is_some_and(|e| matches!(e.op, Op::Checkpoint { .. }));
        if !walk.met.iter().any(|met| met.needed && is_end(&met.expr)) {
            return None;
        }
        let mut chains: Vec<Chain> = vec![Chain::new(); walk.met.len()];
        let mut regions: FastMap<u64, Region> = FastMap::default();
        for at in walk.order(true) {
            let (Some(expr), true) = (&walk.met[at].expr, walk.met[at].needed) else { continue };
            let chain = chains[at].clone();
            for &number in &chain {
                regions.entry(number).or_default().met.push(at);
            }
            for input in expr.op.carrying(&expr.inputs) {
                let Some(&to) = walk.index.get(&input.id()) else { continue };
                let mut enter = |number: u64| {
                    // what a region read is older than it
                    if number < input.id().get() && !chains[to].contains(&number) {
                        chains[to].push(number);
                        chains[to].sort_unstable();
                    }
                };
                chain.iter().for_each(|&number| enter(number));
                if let Op::Checkpoint { region } = expr.op {
                    enter(region);
                    regions.entry(region).or_default().ends.push(input.clone());
                }
            }
        }
        Some(Self { chains, regions, seen: FastMap::default() })
    }

    /// A node of a region as its rule reads it: its expression and its result, recomputed; `None` outside of regions.
    pub(super) fn seen(
        &mut self,
        walk: &Walk,
        at: usize,
        expr: &Expr,
        g: &Ref,
        sums: &Sums,
    ) -> Result<Option<(Expr, Ref)>> {
        let chain = self.chains[at].clone();
        if chain.is_empty() || matches!(expr.op, Op::Checkpoint { .. }) {
            return Ok(None);
        }
        for depth in 0..chain.len() {
            self.enter(&chain[..=depth], g, sums)?;
        }
        let mut expr = expr.clone();
        for input in &mut expr.inputs {
            *input = self.standing_for(&chain, input)?;
        }
        let y = self.standing_for(&chain, &walk.met[at].node)?;
        Ok(Some((expr, y)))
    }

    /// What a rule within the regions of `chain` reads for `node`.
    fn standing_for(&mut self, chain: &[u64], node: &Ref) -> Result<Ref> {
        let again = |number: &u64| self.regions.get(number).and_then(|r| r.again.as_ref()?.get(&node.id()));
        let Some((&region, again)) = chain.iter().rev().find_map(|number| Some((number, again(number)?))) else {
            return Ok(node.clone());
        };
        if !node.traced() || again.id() == node.id() {
            return Ok(again.clone());
        }
        if let Some(known) = self.seen.get(&(region, node.id())) {
            return Ok(known.clone());
        }
        let pair = [again.clone(), node.clone()];
        let wrapped = Node::record(Op::Checkpoint { region }, &[], &pair, None, node.site().clone())?;
        self.seen.insert((region, node.id()), wrapped.clone());
        Ok(wrapped)
    }

    /// Records the innermost region of `chain` again, if that has not been done; those around it have been.
    fn enter(&mut self, chain: &[u64], g: &Ref, sums: &Sums) -> Result<()> {
        let Some((number, around)) = chain.split_last() else { return Ok(()) };
        let Some(region) = self.regions.get(number).filter(|region| region.again.is_none()) else { return Ok(()) };
        // the gradients that have come to the region, all of them from outside
        let mut waited_for: SmallVec<[Ref; 4]> = SmallVec::from_iter([g.clone()]);
        for part in region.met.iter().flat_map(|&at| &sums.of[at]).map(|(_, part, _)| part) {
            if !waited_for.iter().any(|known| known.id() == part.id()) {
                waited_for.push(part.clone());
            }
        }
        let mut again: FastMap<NodeId, Ref> = FastMap::default();
        for (node, expr) in recorded_in(*number, &region.ends) {
            let Some(expr) = expr else {
                let outer = around.iter().rev().find_map(|n| self.regions.get(n)?.again.as_ref()?.get(&node.id()));
                let held_back = held_back(outer.unwrap_or(&node), &waited_for)?;
                again.insert(node.id(), held_back);
                continue;
            };
            let mapped: SmallVec<[Ref; 4]> =
                expr.inputs.iter().map(|i| again.get(&i.id()).unwrap_or(i).clone()).collect();
            let same = mapped.iter().zip(&expr.inputs).all(|(a, b)| a.id() == b.id());
            let new = match (&expr.op, mapped.first()) {
                // the value of the first
                (Op::Checkpoint { .. }, Some(x)) => x.clone(),
                _ if same => node.clone(),
                _ => record_again(&node, &expr, &mapped)?,
            };
            again.insert(node.id(), new);
        }
        if let Some(region) = self.regions.get_mut(number) {
            region.again = Some(again);
        }
        Ok(())
    }
}

/// The nodes above `ends` in the order of recording: those of the region with their expressions, what they read without.
fn recorded_in(number: u64, ends: &[Ref]) -> Vec<(Ref, Option<Expr>)> {
    let mut found: Vec<(Ref, Option<Expr>)> = Vec::new();
    let mut known: FastMap<NodeId, ()> = FastMap::default();
    let mut stack: Vec<Ref> = ends.to_vec();
    while let Some(node) = stack.pop() {
        if known.insert(node.id(), ()).is_some() {
            continue;
        }
        let inner = node.id().get() > number && !node.is_variable();
        let expr = if inner { node.history() } else { None };
        if let Some(expr) = &expr {
            let values = if matches!(expr.op, Op::Checkpoint { .. }) { 1 } else { expr.inputs.len() };
            stack.extend(expr.inputs.iter().take(values).cloned());
        }
        found.push((node, expr));
    }
    found.sort_by_key(|(node, _)| node.id());
    found
}

/// `x` behind a barrier that waits for gradients on its device; `x` itself where there are none, or where no op may hold it.
fn held_back(x: &Ref, gradients: &[Ref]) -> Result<Ref> {
    let mut inputs: SmallVec<[Ref; 4]> = SmallVec::from_iter([x.clone()]);
    inputs.extend(gradients.iter().filter(|g| g.device().same_device(x.device())).cloned());
    if inputs.len() == 1 || x.is_quantized() {
        return Ok(x.clone());
    }
    Node::record(Op::Barrier, &[], &inputs, None, x.site().clone())
}

fn record_again(node: &Ref, expr: &Expr, inputs: &[Ref]) -> Result<Ref> {
    let site = node.site().clone();
    match &expr.custom {
        Some(custom) => Node::record_custom(custom.clone(), node.dims(), node.dtype(), inputs, site),
        None => Node::record(expr.op.clone(), &expr.scalars, inputs, Some(node.device()), site),
    }
}
