//! The order of the steps.
//!
//! Every input comes first; beyond that, steps come as close to the captured order as the memory allows: where all that still has to read
//! a value can run, it runs now, and the value is freed. Without that, the gradient of a weight would wait until the whole backward pass
//! is over, and with it what the pass had kept, or computed again, to make it. What makes views, scalars and vectors as long as a matrix's
//! side only comes before what makes more: it costs little to hold, and it is often all that the reader of a large value waits for, such as
//! the scalar that a gradient begins with.

use super::units::Units;
use candle_lazy_graph::capture::GOp;
use candle_lazy_graph::{FastMap, GNode, Graph, Op, OpClass, Sym};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Who reads what a value holds, itself or through views.
#[derive(Default, Clone)]
struct Holding {
    units: Vec<usize>,
    /// How many have not run.
    left: usize,
    /// How many of those could.
    ready: usize,
    /// Whether nothing would be freed by the last of them: the caller keeps the value, it was there before, or it is small.
    kept: bool,
}

/// The units that may run: those that end a value first, then those of views, scalars and vectors, then by their last member.
struct Queue {
    heap: BinaryHeap<Reverse<(Rank, u32, usize)>>,
    done: Vec<bool>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Rank {
    EndsAValue,
    Small,
    Large,
}

impl Queue {
    fn next(&mut self) -> Option<usize> {
        while let Some(Reverse((_, _, unit))) = self.heap.pop() {
            if !std::mem::replace(&mut self.done[unit], true) {
                return Some(unit);
            }
        }
        None
    }
}

/// For each value whether it is a view: of another shape on the same memory. A reshape of what need not be dense may be a copy.
fn views(nodes: &[GNode]) -> Vec<bool> {
    let is_of_views = |node: &GNode| matches!(&node.op, GOp::Op(op) if op.class() == OpClass::View);
    let may_copy = |node: &GNode| {
        let reshape = matches!(node.op, GOp::Op(Op::Reshape { .. }));
        reshape && node.inputs.first().is_some_and(|&of| is_of_views(&nodes[of as usize]))
    };
    nodes.iter().map(|node| is_of_views(node) && !may_copy(node)).collect()
}

/// The sizes that are larger than one.
fn long(node: &GNode) -> impl Iterator<Item = Sym> + '_ {
    node.dims.iter().copied().filter(|&dim| dim != Sym::ONE)
}

/// For each value whether it is a view, a scalar, or a vector as long as a side of a matrix of the same graph.
fn small(nodes: &[GNode], views: &[bool]) -> Vec<bool> {
    let mut sides: FastMap<u32, ()> = FastMap::default();
    for node in nodes.iter().filter(|node| long(node).count() > 1) {
        sides.extend(long(node).map(|dim| (dim.index() as u32, ())));
    }
    let side = |dim: Sym| sides.contains_key(&(dim.index() as u32));
    let is_small = |(node, view): (&GNode, &bool)| *view || long(node).count() <= 1 && long(node).all(side);
    nodes.iter().zip(views).map(is_small).collect()
}

impl Units {
    /// The units in an order in which every input comes first.
    pub(super) fn in_order(&self, graph: &Graph) -> Vec<usize> {
        let n = self.units.len();
        let nodes = &graph.nodes;
        let views = views(nodes);
        let small = small(nodes, &views);
        // what a value is a view of
        let mut base: Vec<u32> = (0..nodes.len() as u32).collect();
        for (i, node) in nodes.iter().enumerate() {
            if let (true, Some(&of)) = (views[i], node.inputs.first()) {
                base[i] = base[of as usize];
            }
        }
        // who waits for a value, beside the unit that makes it
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
        let holding = |i: usize| Holding { kept: self.unit_of(i as u32).is_none() || small[i], ..Holding::default() };
        let mut holding: Vec<Holding> = (0..nodes.len()).map(holding).collect();
        for &output in &graph.outputs {
            holding[base[output as usize] as usize].kept = true;
        }
        let mut waits_for: Vec<usize> = vec![0; n];
        // of each unit but views: the values that it reads, through views or not
        let mut reads: Vec<Vec<u32>> = vec![Vec::new(); n];
        for unit in (0..n).filter(|&u| self.units[u].is_some()) {
            let inputs = self.members(unit).iter().flat_map(|&m| nodes[m as usize].inputs.iter().copied());
            // leaves are there, and what a unit makes itself needs no waiting
            let mut inputs: Vec<u32> = inputs.filter(|&i| self.unit_of(i).is_some_and(|u| u != unit)).collect();
            inputs.sort_unstable();
            inputs.dedup();
            waits_for[unit] = inputs.len();
            for &input in &inputs {
                readers[input as usize].push(unit);
            }
            if self.members(unit).iter().all(|&m| views[m as usize]) {
                continue;
            }
            inputs.iter_mut().for_each(|input| *input = base[*input as usize]);
            inputs.sort_unstable();
            inputs.dedup();
            for &input in &inputs {
                holding[input as usize].units.push(unit);
                holding[input as usize].left += 1;
            }
            reads[unit] = inputs;
        }
        let key = |unit: usize| self.members(unit).iter().copied().max().unwrap_or(0);
        let is_output: Vec<bool> = {
            let mut is_output = vec![false; nodes.len()];
            graph.outputs.iter().for_each(|&output| is_output[output as usize] = true);
            is_output
        };
        let made = |m: u32| is_output[m as usize] || !readers[m as usize].is_empty();
        let rank = |unit: usize| match self.members(unit).iter().all(|&m| small[m as usize] || !made(m)) {
            true => Rank::Small,
            false => Rank::Large,
        };
        let ranks: Vec<Rank> = (0..n).map(rank).collect();
        let mut queue = Queue { heap: BinaryHeap::new(), done: vec![false; n] };
        let may_run = |unit: usize, queue: &mut Queue, holding: &mut [Holding]| {
            queue.heap.push(Reverse((ranks[unit], key(unit), unit)));
            for &input in &reads[unit] {
                let of = &mut holding[input as usize];
                of.ready += 1;
                if of.ready == of.left && !of.kept {
                    queue.heap.extend(of.units.iter().map(|&u| Reverse((Rank::EndsAValue, key(u), u))));
                }
            }
        };
        for unit in (0..n).filter(|&u| self.units[u].is_some() && waits_for[u] == 0) {
            may_run(unit, &mut queue, &mut holding);
        }
        let mut order = Vec::with_capacity(n);
        while let Some(unit) = queue.next() {
            order.push(unit);
            for &input in &reads[unit] {
                holding[input as usize].left -= 1;
                holding[input as usize].ready -= 1;
            }
            for &made in self.members(unit) {
                for &user in &readers[made as usize] {
                    waits_for[user] -= 1;
                    if waits_for[user] == 0 {
                        may_run(user, &mut queue, &mut holding);
                    }
                }
            }
        }
        order
    }
}
