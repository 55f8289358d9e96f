//! Products that run with what follows them, and with other products of the same left side.
//!
//! After the groups of row programs are formed, an elementwise group becomes the *epilogue* of the products that only it reads: it
//! then passes over them while they are in the cache. What is made of products with the same left side is a *head*; heads become one step where no
//! path leads from one to the other, so that they share the left side and the threads.

use super::choose::Choice;
use super::units::{Group, Unit, Units};
use crate::plan::{Boundary, MAX_MEMBERS};
use candle_core::DType;
use candle_lazy_graph::{FastMap, Graph, Op};
use candle_lazy_ops::fault;
use candle_lazy_ops::row::Class;
use smallvec::SmallVec;

/// Heads are one step, and an epilogue follows its products, only within so many nodes of the captured graph: further apart, what is made early
/// would wait in memory.
const WINDOW: u32 = 32;
/// The most heads of a step.
const MAX_HEADS: usize = 8;

/// Products that run as one step.
#[derive(Debug)]
pub(super) struct Products {
    /// All products, and the ops of all epilogues.
    pub(super) members: Vec<u32>,
    pub(super) heads: Vec<Head>,
}

/// Products with one left side, and the group that reads them; without it, one product.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) products: SmallVec<[u32; 2]>,
    pub(super) epilogue: Option<Group>,
}

/// The left side of a product that can have an epilogue.
fn left(graph: &Graph, choices: &[Choice], id: u32) -> Option<u32> {
    let node = &graph.nodes[id as usize];
    let (Choice::Kernel, Some(op), [x, w]) = (choices[id as usize], node.op(), node.inputs.as_slice()) else {
        return None;
    };
    let fits = match op {
        Op::Linear { bias: false } => true,
        // a right side without batches
        Op::Matmul => graph.nodes[*w as usize].dims.len() == 2,
        _ => false,
    };
    (fits && matches!(node.dtype, DType::F32 | DType::F16 | DType::BF16)).then_some(*x)
}

impl Units {
    /// Makes products, their readers and other products of the same left side one where that changes no order.
    pub(super) fn join_products(&mut self, graph: &Graph, choices: &[Choice]) {
        let lefts: Vec<Option<u32>> = (0..graph.nodes.len() as u32).map(|id| left(graph, choices, id)).collect();
        if lefts.iter().all(Option::is_none) {
            return;
        }
        let only = self.only_readers(graph);
        for unit in 0..self.units.len() {
            if let Some(Some(Unit::Row(_))) = self.units.get(unit) {
                self.follow(graph, &lefts, &only, unit);
            }
        }
        self.join_heads(graph, &lefts);
    }

    /// For each node the one unit that reads it; `None` where several do, none does, or the caller wants it.
    fn only_readers(&self, graph: &Graph) -> Vec<Option<usize>> {
        let mut only: Vec<Option<usize>> = vec![None; graph.nodes.len()];
        let mut several = vec![false; graph.nodes.len()];
        for &output in &graph.outputs {
            several[output as usize] = true;
        }
        for (user, node) in graph.nodes.iter().enumerate() {
            for &input in &node.inputs {
                let reader = self.of[user];
                let known = &mut only[input as usize];
                several[input as usize] |= known.is_some() && *known != reader;
                *known = reader;
            }
        }
        if fault::active("heads.shared") {
            return only;
        }
        only.iter().zip(several).map(|(reader, several)| reader.filter(|_| !several)).collect()
    }

    /// Makes an elementwise group the epilogue of the products that it reads.
    fn follow(&mut self, graph: &Graph, lefts: &[Option<u32>], only: &[Option<usize>], unit: usize) {
        let Some(Some(Unit::Row(group))) = self.units.get(unit) else { return };
        let mut reads: SmallVec<[(u32, u32); 4]> = SmallVec::new();
        for &member in &group.members {
            for &input in &graph.nodes[member as usize].inputs {
                if lefts[input as usize].is_some() {
                    reads.push((input, member));
                }
            }
        }
        let begins = group.members.iter().copied().min().unwrap_or(0);
        let alone = |product: u32| {
            if group.axes.is_some() && !fault::active("heads.reduces") {
                Err(Boundary::Reduces)
            } else if group.class != Class::F32 {
                Err(Boundary::Classes)
            } else if graph.nodes[product as usize].dims != group.domain {
                Err(Boundary::OtherShape)
            } else if only[product as usize] != Some(unit) {
                Err(Boundary::Shared)
            } else if begins.saturating_sub(product) > WINDOW {
                Err(Boundary::Far)
            } else {
                Ok(())
            }
        };
        // the left side of the last product that may be one with the group is the step's
        let last = reads.iter().map(|&(product, _)| product).filter(|&p| alone(p).is_ok()).max();
        let (mut products, mut refused) = (SmallVec::<[u32; 2]>::new(), Vec::new());
        for &(product, reader) in &reads {
            let of_left = last.is_some_and(|last| lefts[product as usize] == lefts[last as usize]);
            match alone(product) {
                Err(why) => refused.push(((product, reader), why)),
                Ok(()) if !of_left && !fault::active("heads.left") => {
                    refused.push(((product, reader), Boundary::OtherLeft));
                }
                Ok(()) if !products.contains(&product) => products.push(product),
                Ok(()) => {}
            }
        }
        self.refused.extend(refused);
        if products.is_empty() {
            return;
        }
        products.sort_unstable();
        let Some(Unit::Row(group)) = self.units[unit].take() else { return };
        let mut members: Vec<u32> = products.iter().chain(&group.members).copied().collect();
        members.sort_unstable();
        for &product in &products {
            if let Some(single) = self.of[product as usize].replace(unit) {
                self.units[single] = None;
            }
        }
        self.stretch(&members);
        let heads = vec![Head { products, epilogue: Some(group) }];
        self.units[unit] = Some(Unit::Products(Products { members, heads }));
    }

    /// Notes where a unit has members.
    fn stretch(&mut self, members: &[u32]) {
        if let (Some(&first), Some(&last)) = (members.first(), members.last()) {
            self.spans(first, first + 1, last);
        }
    }

    /// Makes heads of one left side one step.
    fn join_heads(&mut self, graph: &Graph, lefts: &[Option<u32>]) {
        // the unit that the last product of each left side became part of
        let mut before: FastMap<u32, usize> = FastMap::default();
        for (id, x) in lefts.iter().enumerate() {
            let (Some(x), Some(unit)) = (*x, self.of[id]) else { continue };
            let into = before.insert(x, unit);
            if let Some(into) = into.filter(|&into| into != unit) {
                if self.join_two(graph, unit, into) {
                    before.insert(x, into);
                }
            }
        }
    }

    /// Moves the heads of one unit to another.
    fn join_two(&mut self, graph: &Graph, from: usize, into: usize) -> bool {
        let of_one = |unit: usize, other: usize| {
            self.members(unit)
                .iter()
                .any(|&m| graph.nodes[m as usize].inputs.iter().any(|&i| self.of[i as usize] == Some(other)))
        };
        let depends = (of_one(from, into) || of_one(into, from)) && !fault::active("heads.depends");
        let mut members: Vec<u32> = self.members(from).iter().chain(self.members(into)).copied().collect();
        members.sort_unstable();
        let near = match (self.members(into).first(), self.members(from).first()) {
            (Some(a), Some(b)) => a.abs_diff(*b) <= WINDOW,
            _ => false,
        };
        let heads = self.heads(from).zip(self.heads(into)).map(|(a, b)| a + b);
        let fits = members.len() <= MAX_MEMBERS && heads.is_some_and(|heads| heads <= MAX_HEADS);
        if depends || !near || !fits {
            return false;
        }
        if self.closed(graph, &members, &[from, into], u32::MAX).is_err() {
            return false;
        }
        let (mut heads, later) = (self.take_heads(into), self.take_heads(from));
        heads.extend(later);
        for &m in &members {
            self.of[m as usize] = Some(into);
        }
        self.stretch(&members);
        self.units[into] = Some(Unit::Products(Products { members, heads }));
        true
    }

    /// How many heads a unit of products has, or would have.
    fn heads(&self, unit: usize) -> Option<usize> {
        match self.units.get(unit)?.as_ref()? {
            Unit::Products(products) => Some(products.heads.len()),
            Unit::Single(_) => Some(1),
            Unit::Row(_) => None,
        }
    }

    fn take_heads(&mut self, unit: usize) -> Vec<Head> {
        match self.units.get_mut(unit).and_then(Option::take) {
            Some(Unit::Products(products)) => products.heads,
            Some(Unit::Single(product)) => vec![Head { products: SmallVec::from_slice(&[product]), epilogue: None }],
            Some(Unit::Row(_)) | None => Vec::new(),
        }
    }
}
