//! The order of the steps.
//!
//! Every input comes first; beyond that, steps come as close to the captured order as the memory allows: where all that still has to read
//! a value can run, it runs now, and the value is freed. Without that, the gradient of a weight would wait until the whole backward pass
//! is over, and with it what the pass had kept, or computed again, to make it. What makes views, scalars and vectors only comes before what makes
//! more: it costs little to hold, and it is often all that the reader of a large value waits for, such as the scalar that a gradient
//! begins with.

use super::units::Units;
use candle_lazy_graph::capture::GOp;
use candle_lazy_graph::{Graph, OpClass, Sym};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Who reads a value, beside the unit that makes it.
#[derive(Default, Clone)]
struct Readers {
    units: Vec<usize>,
    /// How many have not run.
    left: usize,
    /// How many of those could.
    ready: usize,
    /// Whether the caller keeps the value.
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

impl Units {
    /// The units in an order in which every input comes first.
    pub(super) fn in_order(&self, graph: &Graph) -> Vec<usize> {
        let n = self.units.len();
        let mut readers: Vec<Readers> = vec![Readers::default(); graph.nodes.len()];
        for &output in &graph.outputs {
            readers[output as usize].kept = true;
        }
        let mut inputs: Vec<Vec<u32>> = vec![Vec::new(); n];
        for (unit, inputs) in inputs.iter_mut().enumerate() {
            let read = self.members(unit).iter().flat_map(|&m| graph.nodes[m as usize].inputs.iter().copied());
            // leaves are there, and what a unit makes itself needs no waiting
            inputs.extend(read.filter(|&i| self.unit_of(i).is_some_and(|u| u != unit)));
            inputs.sort_unstable();
            inputs.dedup();
            for &input in inputs.iter() {
                readers[input as usize].units.push(unit);
                readers[input as usize].left += 1;
            }
        }
        let key = |unit: usize| self.members(unit).iter().copied().max().unwrap_or(0);
        let small = |member: u32| {
            let node = &graph.nodes[member as usize];
            let view = matches!(&node.op, GOp::Op(op) if op.class() == OpClass::View);
            view || node.dims.iter().filter(|&&dim| dim != Sym::ONE).count() <= 1
        };
        let read = |member: u32| readers[member as usize].kept || !readers[member as usize].units.is_empty();
        let rank = |unit: usize| match self.members(unit).iter().all(|&m| small(m) || !read(m)) {
            true => Rank::Small,
            false => Rank::Large,
        };
        let ranks: Vec<Rank> = (0..n).map(rank).collect();
        let mut waits_for: Vec<usize> = inputs.iter().map(Vec::len).collect();
        let first = (0..n).filter(|&u| self.units[u].is_some() && waits_for[u] == 0);
        let mut queue = Queue { heap: first.map(|u| Reverse((ranks[u], key(u), u))).collect(), done: vec![false; n] };
        let mut order = Vec::with_capacity(n);
        while let Some(unit) = queue.next() {
            order.push(unit);
            for &input in &inputs[unit] {
                readers[input as usize].left -= 1;
                readers[input as usize].ready -= 1;
            }
            for &made in self.members(unit) {
                for i in 0..readers[made as usize].units.len() {
                    let user = readers[made as usize].units[i];
                    waits_for[user] -= 1;
                    if waits_for[user] > 0 {
                        continue;
                    }
                    queue.heap.push(Reverse((ranks[user], key(user), user)));
                    for &input in &inputs[user] {
                        let of = &mut readers[input as usize];
                        of.ready += 1;
                        if of.ready == of.left && !of.kept {
                            queue.heap.extend(of.units.iter().map(|&u| Reverse((Rank::EndsAValue, key(u), u))));
                        }
                    }
                }
            }
        }
        order
    }
}
