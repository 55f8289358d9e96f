//! Units of execution: groups of ops that become one row program, and single ops.
//!
//! A group has one *domain* (the shape it runs over) and at most one set of reduced dims. An op joins the group of an
//! input when its own domain is the same, or when it works on the group's per-row values, and when no path leaves the
//! group and comes back. Rounding happens at every recorded op, so what a group holds never changes a bit of a result.

use super::choose::{row_class, Choice};
use super::heads::Products;
use crate::plan::{Boundary, MAX_INPUTS, MAX_MEMBERS};
use candle_lazy_graph::{Dims, FastMap, GNode, Graph, Op, OpClass, Sym};
use candle_lazy_ops::fault;
use candle_lazy_ops::row::Class;

/// Whether a value has one element per element of the domain or one per row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PerRow {
    No,
    /// With the reduced dims kept as dims of size one.
    Kept,
    /// With the reduced dims gone: nothing in the group can read it.
    Gone,
}

/// Ops that become one row program.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) members: Vec<u32>,
    pub(super) class: Class,
    pub(super) domain: Dims<Sym>,
    /// The reduced dims; `None` while no member reduces.
    pub(super) axes: Option<u32>,
}

impl Group {
    fn row_dims(&self) -> Option<Dims<Sym>> {
        let axes = self.axes?;
        let one = |(d, s): (usize, &Sym)| if axes & (1 << d) != 0 { Sym::ONE } else { *s };
        Some(self.domain.iter().enumerate().map(one).collect())
    }
}

#[derive(Debug)]
pub(super) enum Unit {
    Row(Group),
    Products(Products),
    Single(u32),
}

#[derive(Debug)]
pub(super) struct Units {
    pub(super) units: Vec<Option<Unit>>,
    pub(super) of: Vec<Option<usize>>,
    pub(super) per_row: Vec<PerRow>,
    /// Nodes that something outside their unit reads.
    needed: Vec<bool>,
    /// Marks of the last walks over units, so that no walk has to clear a list.
    marks: Vec<u32>,
    walk: u32,
    /// For each node the first member of the earliest unit that has members both before it and from it on: what lies before
    /// the node may depend on it through such a unit only.
    reach: Vec<u32>,
    /// Why a reader did not join, or take in, the group of what it reads.
    pub(super) refused: FastMap<(u32, u32), Boundary>,
}

/// What an op needs of the group it is in.
struct Need {
    domain: Dims<Sym>,
    axes: Option<u32>,
    result: PerRow,
}

/// The reduced dims and the shape that an op runs over.
fn need(graph: &Graph, node: &GNode) -> Need {
    let input_dims =
        || node.inputs.first().map_or_else(|| node.dims.clone(), |&i| graph.nodes[i as usize].dims.clone());
    let last = || Some(1u32 << (node.dims.len().saturating_sub(1)));
    let (domain, axes, result) = match node.op() {
        Some(Op::Reduce { axes: 0, .. }) | None => (node.dims.clone(), None, PerRow::No),
        Some(Op::Reduce { axes, keepdim, .. }) => {
            (input_dims(), Some(*axes), if *keepdim { PerRow::Kept } else { PerRow::Gone })
        }
        Some(Op::Softmax { dim } | Op::LogSoftmax { dim }) => (node.dims.clone(), Some(1 << dim), PerRow::No),
        Some(Op::RmsNorm { .. } | Op::LayerNorm { .. }) => (node.dims.clone(), last(), PerRow::No),
        Some(_) => (node.dims.clone(), None, PerRow::No),
    };
    Need { domain, axes, result }
}

pub(super) fn form(graph: &Graph, choices: &[Choice], fuse: bool) -> Units {
    let mut units = Units {
        units: Vec::new(),
        of: vec![None; graph.nodes.len()],
        per_row: vec![PerRow::No; graph.nodes.len()],
        needed: vec![false; graph.nodes.len()],
        marks: Vec::new(),
        walk: 0,
        reach: (0..graph.nodes.len() as u32).collect(),
        refused: FastMap::default(),
    };
    for (id, choice) in choices.iter().enumerate() {
        let id = id as u32;
        match choice {
            Choice::Leaf => {}
            Choice::Kernel | Choice::Candle(_) => units.push(Unit::Single(id), &[id]),
            Choice::Row => {
                if !(fuse && units.join(graph, choices, id)) {
                    units.start(graph, id);
                }
            }
        }
    }
    if fuse {
        units.join_products(graph, choices);
    }
    for (user, node) in graph.nodes.iter().enumerate() {
        for &input in &node.inputs {
            if units.of[input as usize] != units.of[user] {
                units.needed[input as usize] = true;
            }
        }
    }
    for &output in &graph.outputs {
        units.needed[output as usize] |= !fault::active("units.needed");
    }
    units
}

impl Units {
    /// Whether something outside its unit reads a node.
    pub(super) fn is_needed(&self, node: u32) -> bool {
        self.needed[node as usize]
    }

    pub(super) fn get(&self, unit: usize) -> &Unit {
        static EMPTY: Unit = Unit::Single(u32::MAX);
        self.units.get(unit).and_then(Option::as_ref).unwrap_or(&EMPTY)
    }

    pub(super) fn unit_of(&self, node: u32) -> Option<usize> {
        self.of[node as usize]
    }

    fn push(&mut self, unit: Unit, members: &[u32]) {
        for &m in members {
            self.of[m as usize] = Some(self.units.len());
        }
        self.units.push(Some(unit));
    }

    fn start(&mut self, graph: &Graph, id: u32) {
        let node = &graph.nodes[id as usize];
        let need = need(graph, node);
        self.per_row[id as usize] = need.result;
        // `choose` only says Row where there is a class
        let class = row_class(graph, node).unwrap_or(Class::F32);
        self.push(Unit::Row(Group { members: vec![id], class, domain: need.domain, axes: need.axes }), &[id]);
    }

    fn group(&self, unit: usize) -> Option<&Group> {
        match self.units.get(unit)?.as_ref()? {
            Unit::Row(group) => Some(group),
            Unit::Single(_) | Unit::Products(_) => None,
        }
    }

    /// Joins the groups of `id`'s inputs as far as they fit; false where none does.
    fn join(&mut self, graph: &Graph, choices: &[Choice], id: u32) -> bool {
        let node = &graph.nodes[id as usize];
        let mut candidates: Vec<usize> = node
            .inputs
            .iter()
            .filter(|&&i| choices[i as usize] == Choice::Row)
            .filter_map(|&i| self.of[i as usize])
            .collect();
        candidates.sort_unstable();
        candidates.dedup();
        let mut joined: Option<usize> = None;
        // the youngest group first: it is the likeliest to hold what the op continues
        for &unit in candidates.iter().rev() {
            match joined {
                None => match self.fits(graph, unit, id) {
                    Ok(result) => {
                        self.per_row[id as usize] = result;
                        self.add(graph, unit, id);
                        joined = Some(unit);
                    }
                    Err(why) => self.refuse(graph, unit, id, why),
                },
                Some(into) => {
                    if let Err(why) = self.merge(graph, unit, into, id) {
                        self.refuse(graph, unit, id, why);
                    }
                }
            }
        }
        joined.is_some()
    }

    /// Notes why `id` and the members of `unit` that it reads are not one.
    fn refuse(&mut self, graph: &Graph, unit: usize, id: u32, why: Boundary) {
        for &input in &graph.nodes[id as usize].inputs {
            if self.of[input as usize] == Some(unit) {
                self.refused.insert((input, id), why);
            }
        }
    }

    /// Why `reader`, which reads `node`, is in another unit.
    pub(super) fn boundary(&self, graph: &Graph, choices: &[Choice], node: u32, reader: u32) -> Boundary {
        if let Some(&why) = self.refused.get(&(node, reader)) {
            return why;
        }
        for id in [reader, node] {
            let Some(op) = graph.nodes[id as usize].op() else { continue };
            match choices[id as usize] {
                Choice::Kernel if op.class() == OpClass::View => return Boundary::View(op.name()),
                Choice::Kernel => return Boundary::Kernel(op.name()),
                Choice::Candle(_) => return Boundary::Candle(op.name()),
                Choice::Leaf | Choice::Row => {}
            }
        }
        // no group was asked for where fusion is off
        Boundary::Off
    }

    fn add(&mut self, graph: &Graph, unit: usize, id: u32) {
        let axes = need(graph, &graph.nodes[id as usize]).axes;
        if let Some(Some(Unit::Row(group))) = self.units.get_mut(unit) {
            let ends = (group.members.first().copied(), group.members.last().copied());
            group.members.push(id);
            group.axes = group.axes.or(axes);
            if let (Some(first), Some(last)) = ends {
                self.spans(first, last + 1, id);
            }
        }
        self.of[id as usize] = Some(unit);
    }

    /// Whether `id` can be a member of `unit`, and as what.
    fn fits(&mut self, graph: &Graph, unit: usize, id: u32) -> Result<PerRow, Boundary> {
        // candidates are units of row ops
        let group = self.group(unit).ok_or(Boundary::Kernel("step"))?;
        let node = &graph.nodes[id as usize];
        if group.members.len() >= MAX_MEMBERS {
            return Err(Boundary::Full);
        }
        if row_class(graph, node) != Some(group.class) {
            return Err(Boundary::Classes);
        }
        let need = need(graph, node);
        let inside: Vec<u32> = node.inputs.iter().copied().filter(|&i| self.of[i as usize] == Some(unit)).collect();
        if inside.iter().any(|&i| self.per_row[i as usize] == PerRow::Gone) && !fault::active("units.gone") {
            return Err(Boundary::Gone);
        }
        let axes_agree = match (group.axes, need.axes) {
            (Some(a), Some(b)) => a == b || fault::active("units.axes"),
            _ => true,
        };
        // a reduction needs one value per element: over dims of size one, what looks like one may be a value per row
        let all_one = |axes: u32| (0..group.domain.len()).all(|d| axes & (1 << d) == 0 || group.domain[d] == Sym::ONE);
        let reduces_rows = need.axes.is_some()
            && (group.axes.is_some_and(all_one) || inside.iter().any(|&i| self.per_row[i as usize] != PerRow::No));
        let reduces_rows = reduces_rows && !fault::active("units.reduces_rows");
        let same =
            need.domain == group.domain || need.domain.len() == group.domain.len() && fault::active("units.domain");
        let result = if same && axes_agree && !reduces_rows {
            need.result
        } else if need.axes.is_none()
            && group.row_dims().is_some_and(|rows| rows == need.domain)
            && inside.iter().all(|&i| self.per_row[i as usize] == PerRow::Kept)
        {
            PerRow::Kept
        } else if same && !axes_agree {
            return Err(Boundary::OtherRows);
        } else if same {
            return Err(Boundary::Again);
        } else {
            return Err(Boundary::OtherShape);
        };
        let mut members = group.members.clone();
        members.push(id);
        // the borrow of the group ends here
        self.closed(graph, &members, &[unit], id).map(|()| result)
    }

    /// Moves the members of `from` into `into` if they can be one program.
    fn merge(&mut self, graph: &Graph, from: usize, into: usize, id: u32) -> Result<(), Boundary> {
        let (Some(a), Some(b)) = (self.group(from), self.group(into)) else {
            return Err(Boundary::Kernel("step"));
        };
        let axes_agree = match (a.axes, b.axes) {
            (Some(x), Some(y)) => x == y || fault::active("units.merged_axes"),
            _ => true,
        };
        let refusals = [
            (a.class != b.class, Boundary::Classes),
            (a.domain != b.domain, Boundary::OtherShape),
            (!axes_agree, Boundary::OtherRows),
            (a.members.len() + b.members.len() > MAX_MEMBERS, Boundary::Full),
        ];
        if let Some((_, why)) = refusals.into_iter().find(|(refused, _)| *refused) {
            return Err(why);
        }
        // the reader of both must be able to read what it now finds inside; and if one group reads the other, its members
        // were refused there one by one
        let reads =
            |n: u32, unit: usize| graph.nodes[n as usize].inputs.iter().any(|&i| self.of[i as usize] == Some(unit));
        let gone = graph.nodes[id as usize]
            .inputs
            .iter()
            .any(|&i| self.of[i as usize] == Some(from) && self.per_row[i as usize] == PerRow::Gone);
        let of_a = a.members.iter().filter(|&&m| reads(m, into));
        let mut readers = of_a.chain(b.members.iter().filter(|&&m| m != id && reads(m, from)));
        // what a member of one was told when it asked to join the other
        let told = readers.next().map(|&m| {
            let inputs = &graph.nodes[m as usize].inputs;
            inputs.iter().find_map(|&i| self.refused.get(&(i, m)).copied()).unwrap_or(Boundary::Between)
        });
        let mut members: Vec<u32> = a.members.iter().chain(&b.members).copied().collect();
        members.sort_unstable();
        let axes = a.axes.or(b.axes);
        let why = told.or(gone.then_some(Boundary::Gone)).filter(|_| !fault::active("units.merged_gone"));
        if let Some(why) = why {
            return Err(why);
        }
        self.closed(graph, &members, &[from, into], id)?;
        for &m in &members {
            self.of[m as usize] = Some(into);
        }
        if let (Some(&first), Some(&last)) = (members.first(), members.last()) {
            self.spans(first, first + 1, last);
        }
        if let Some(Some(Unit::Row(group))) = self.units.get_mut(into) {
            group.members = members;
            group.axes = axes;
        }
        self.units[from] = None;
        Ok(())
    }

    /// Whether `members` (of the units in `own`, and `id`) can run as one: not too many inputs, and none that depends on
    /// the members themselves.
    pub(super) fn closed(&mut self, graph: &Graph, members: &[u32], own: &[usize], id: u32) -> Result<(), Boundary> {
        let mut outside: Vec<u32> = Vec::new();
        for &m in members {
            for &input in &graph.nodes[m as usize].inputs {
                let inside = input == id || self.of[input as usize].is_some_and(|u| own.contains(&u));
                if !inside && !outside.contains(&input) {
                    outside.push(input);
                }
            }
            if outside.len() > MAX_INPUTS {
                return Err(Boundary::Inputs);
            }
        }
        let first = self.independent_before(members.iter().copied().min().unwrap_or(0));
        self.walk += 1;
        self.marks.resize(self.units.len(), 0);
        let mut stack: Vec<usize> = outside.iter().filter_map(|&n| self.of[n as usize]).collect();
        while let Some(unit) = stack.pop() {
            if own.contains(&unit) {
                if fault::active("units.cycle") {
                    continue;
                }
                return Err(Boundary::Between);
            }
            if std::mem::replace(&mut self.marks[unit], self.walk) == self.walk {
                continue;
            }
            for &m in self.members(unit) {
                // nothing before it can depend on a member
                if m >= first {
                    stack.extend(graph.nodes[m as usize].inputs.iter().filter_map(|&i| self.of[i as usize]));
                }
            }
        }
        Ok(())
    }

    /// A unit whose first member is `first` has members before and after each of the nodes `from..=to`.
    pub(super) fn spans(&mut self, first: u32, from: u32, to: u32) {
        for reach in self.reach.iter_mut().take(to as usize + 1).skip(from as usize) {
            *reach = (*reach).min(first);
        }
    }

    /// A node before which nothing depends on `node` or what comes after it: `node` itself, unless units reach across it.
    fn independent_before(&self, node: u32) -> u32 {
        let mut bound = node;
        if fault::active("units.reach") {
            return bound;
        }
        while let Some(&earlier) = self.reach.get(bound as usize).filter(|&&earlier| earlier < bound) {
            bound = earlier;
        }
        bound
    }

    pub(super) fn members(&self, unit: usize) -> &[u32] {
        match self.units.get(unit).and_then(Option::as_ref) {
            Some(Unit::Row(group)) => &group.members,
            Some(Unit::Products(products)) => &products.members,
            Some(Unit::Single(node)) => std::slice::from_ref(node),
            None => &[],
        }
    }
}
