//! Gradients as a graph transform: the backward pass of recorded nodes, recorded as nodes.
//!
//! [`vjp`] walks from outputs back to variables (Baydin et al. 2018, arXiv:1502.05767, §3.2) and records for each op its
//! vector–Jacobian product (`rules.rs` says which). What comes out is a graph as any other, so it is captured, fused, planned and cached
//! together with the forward pass, and it is traced where its inputs are: gradients have gradients.
//!
//! What a checkpoint holds (`recompute.rs`) is read as it is recorded once more, from the region's inputs: the walk, the sums and the
//! rules are those of the same graph without checkpoints, so the bits are too.
//!
//! A traced node keeps its inputs when it becomes ready ([`Node::history`]), and the walk reads those, so that the same nodes are recorded
//! whatever has been evaluated before.

mod composites;
mod contractions;
mod elementwise;
mod movement;
mod recompute;
mod rules;

use crate::error::{Error, ErrorKind, Result};
use crate::hash::FastMap;
use crate::node::{Expr, Node, NodeId, NodeRef};
use crate::op::{BinaryOp, Dims, Op, Scalars};
use crate::recorder::{Rec, Recorder};
use crate::site::BuildSite;
use candle_core::{DType, Device};
use recompute::Regions;
use smallvec::{smallvec, SmallVec};

/// A recorded node.
type Ref = NodeRef;
/// For each input of an op its gradient, where one was asked for and there is one.
type Parts = SmallVec<[Option<Ref>; 4]>;

/// An op that a derivative is about to record.
#[derive(Debug)]
pub struct Recorded<'a> {
    /// The op whose derivative it is part of.
    pub of: &'a Op,
    /// How many ops of its name that derivative has recorded before.
    pub number: usize,
    /// What is recorded.
    pub op: &'a mut Op,
    /// Its scalars.
    pub scalars: &'a mut Scalars,
    /// Its inputs.
    pub inputs: &'a mut Vec<NodeRef>,
}

/// What checks the checker may do to an op of a derivative: change it, or (true) have it replaced by its first input.
pub type Change = dyn Fn(Recorded<'_>) -> bool;

/// Records on nodes, at the line that wrote the op whose derivative it is.
struct OnNodes<'a> {
    site: &'a BuildSite,
    device: Device,
    of: &'a Op,
    change: Option<&'a Change>,
    /// The names of what was recorded, where it may be changed.
    names: Vec<&'static str>,
}

impl Recorder for OnNodes<'_> {
    type Ref = Ref;

    fn dims(&self, node: &Ref) -> Dims {
        Dims::from_slice(node.dims())
    }

    fn dtype(&self, node: &Ref) -> DType {
        node.dtype()
    }

    fn push(&mut self, mut op: Op, mut scalars: Scalars, inputs: &[Ref]) -> Result<Ref> {
        let Some(change) = self.change else {
            return Node::record(op, &scalars, inputs, Some(&self.device), self.site.clone());
        };
        let name = op.name();
        let number = self.names.iter().filter(|known| **known == name).count();
        self.names.push(name);
        let mut inputs = inputs.to_vec();
        let drop_it = change(Recorded { of: self.of, number, op: &mut op, scalars: &mut scalars, inputs: &mut inputs });
        match inputs.first() {
            Some(first) if drop_it => Ok(first.clone()),
            _ => Node::record(op, &scalars, &inputs, Some(&self.device), self.site.clone()),
        }
    }
}

/// What derivatives are recorded with.
type R<'r, 'n> = Rec<'r, OnNodes<'n>>;

/// An op as its derivative sees it.
struct Call<'a> {
    expr: &'a Expr,
    /// Its result.
    y: &'a Ref,
    /// The gradient of that, of its shape and dtype.
    g: &'a Ref,
    /// Which inputs need one.
    needs: &'a [bool],
}

impl Call<'_> {
    fn x(&self, i: usize) -> &Ref {
        &self.expr.inputs[i]
    }

    fn needs(&self, i: usize) -> bool {
        self.needs.get(i).copied().unwrap_or(false)
    }

    /// No gradient for any input.
    fn none(&self) -> Parts {
        smallvec![None; self.expr.inputs.len()]
    }
}

/// What a node is to a walk.
struct Met {
    node: Ref,
    expr: Option<Expr>,
    /// Whether a variable that is asked for stands here or above.
    needed: bool,
}

/// The nodes above some outputs that a gradient passes, inputs first.
struct Walk {
    met: Vec<Met>,
    index: FastMap<NodeId, usize>,
}

impl Walk {
    /// `stop` ends the walk at the variables instead of looking for others above them.
    fn new(outputs: &[Ref], wrt: &[Ref], stop: bool) -> Self {
        let asked: FastMap<NodeId, ()> = wrt.iter().map(|n| (n.id(), ())).collect();
        let mut walk = Self { met: Vec::new(), index: FastMap::default() };
        // (node, its expression once it was opened, the next input)
        let mut stack: Vec<(Ref, Option<Expr>, usize)> = Vec::new();
        for output in outputs {
            stack.push((output.clone(), None, 0));
            while let Some((node, expr, next)) = stack.last_mut() {
                let here = asked.contains_key(&node.id());
                if *next == 0 {
                    if walk.index.contains_key(&node.id()) {
                        stack.pop();
                        continue;
                    }
                    let open = node.traced() && !node.is_variable() && !(stop && here);
                    *expr = if open { node.history() } else { None };
                }
                let input = expr.as_ref().and_then(|expr| expr.op.carrying(&expr.inputs).get(*next).cloned());
                *next += 1;
                if let Some(input) = input {
                    if input.traced() && !walk.index.contains_key(&input.id()) {
                        stack.push((input, None, 0));
                    }
                    continue;
                }
                if let Some((node, expr, _)) = stack.pop() {
                    let above = |expr: &Expr| expr.op.carrying(&expr.inputs).iter().any(|i| walk.needed(i.id()));
                    let needed = here || expr.as_ref().is_some_and(above);
                    walk.index.insert(node.id(), walk.met.len());
                    walk.met.push(Met { node, expr, needed });
                }
            }
        }
        walk
    }

    fn needed(&self, id: NodeId) -> bool {
        self.index.get(&id).is_some_and(|&i| self.met[i].needed)
    }

    /// The order in which nodes hand their gradients on: their readers come before them.
    fn order(&self, regions: bool) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.met.len()).rev().collect();
        if regions {
            // newest first: all that read a region from outside were recorded after it, so they come before any of it
            order.sort_by_key(|&at| std::cmp::Reverse(self.met[at].node.id()));
        }
        order
    }

    /// The gradients of all nodes that have one and are asked for, from those of the outputs.
    fn backward(
        &self,
        outputs: &[Ref],
        cotangents: &[Ref],
        wrt: &[Ref],
        change: Option<&Change>,
    ) -> Result<Vec<Option<Ref>>> {
        let mut sums = Sums { of: vec![SmallVec::new(); self.met.len()] };
        for (i, (output, cotangent)) in outputs.iter().zip(cotangents).enumerate() {
            if let Some(&at) = self.index.get(&output.id()) {
                sums.add(at, i, cotangent.clone(), output.site());
            }
        }
        let mut regions = Regions::of(self);
        for at in self.order(regions.is_some()) {
            let Met { node, expr, needed } = &self.met[at];
            let (Some(expr), true) = (expr, *needed) else { continue };
            debug_assert!(!wrt.iter().any(|n| n.id() == node.id()), "a walk ends at its variables");
            let Some(g) = sums.total(at)? else { continue };
            let needs: SmallVec<[bool; 4]> = expr.inputs.iter().map(|i| self.needed(i.id())).collect();
            let seen = match &mut regions {
                Some(regions) => regions.seen(self, at, expr, &g, &sums)?,
                None => None,
            };
            let (expr_seen, y) = seen.as_ref().map_or((expr, node), |(expr, y)| (expr, y));
            let (site, device) = (node.site(), node.device().clone());
            let mut on = OnNodes { site, device, of: &expr.op, change, names: Vec::new() };
            let call = Call { expr: expr_seen, y, g: &g, needs: &needs };
            let parts = rules::apply(&call, &mut Rec(&mut on)).map_err(|e| e.at(node.site()))?;
            // summed in the order of the walk, whatever the order of handing on
            let turn = outputs.len() + self.met.len() - at;
            for (input, part) in expr.inputs.iter().zip(parts) {
                if let (Some(part), Some(&to)) = (part, self.index.get(&input.id())) {
                    if self.met[to].needed {
                        sums.add(to, turn, part, node.site());
                    }
                }
            }
            // it is no variable, so nobody asks for it
            sums.of[at].clear();
        }
        wrt.iter().map(|n| self.index.get(&n.id()).map_or(Ok(None), |&at| sums.total(at))).collect()
    }
}

/// A part of a gradient: when it counts, what it is, and the line that it stems from.
type Part = (usize, Ref, BuildSite);

/// The gradients of the nodes of a walk, as far as they have come.
struct Sums {
    of: Vec<SmallVec<[Part; 1]>>,
}

impl Sums {
    fn add(&mut self, to: usize, turn: usize, part: Ref, site: &BuildSite) {
        self.of[to].push((turn, part, site.clone()));
    }

    /// The sum of all parts of a node, in their turns.
    fn total(&mut self, at: usize) -> Result<Option<Ref>> {
        let parts = &mut self.of[at];
        parts.sort_by_key(|&(turn, _, _)| turn);
        let mut all = std::mem::take(parts).into_iter();
        let Some(mut total) = all.next() else { return Ok(None) };
        for (turn, part, site) in all {
            let sum = Node::record(Op::Binary(BinaryOp::Add), &[], &[total.1, part], None, site.clone())?;
            total = (turn, sum, site);
        }
        let sum = total.1.clone();
        self.of[at].push(total);
        Ok(Some(sum))
    }
}

/// Records the gradients of `outputs` with respect to the variables `wrt`, each of its variable's shape and dtype, given the gradient of
/// each output (its cotangent): Σₖ cotangentₖ·∂outputₖ/∂variable. `None` for a variable that no gradient reaches; [`why_unreached`] says
/// why.
///
/// # Errors
/// When one of `wrt` is no variable, a cotangent does not have its output's shape and dtype, or an op on the way has no derivative: the
/// error names the op and its line.
pub fn vjp(outputs: &[Ref], cotangents: &[Ref], wrt: &[Ref]) -> Result<Vec<Option<Ref>>> {
    vjp_changed(outputs, cotangents, wrt, None)
}

/// [`vjp`] with `change` applied to every op that a derivative records: this crate has no features, so the faults that the checker must
/// catch are data of its callers.
///
/// # Errors
/// As [`vjp`], and where a change does not fit.
#[doc(hidden)]
pub fn vjp_changed(
    outputs: &[Ref],
    cotangents: &[Ref],
    wrt: &[Ref],
    change: Option<&Change>,
) -> Result<Vec<Option<Ref>>> {
    for (i, variable) in wrt.iter().enumerate() {
        if !variable.is_variable() {
            let detail = format!("number {i} is no variable: make it one before it is used, with variable()");
            return Err(Error::new("grad", ErrorKind::Unsupported(detail)).on(&[variable.meta()]).at(variable.site()));
        }
    }
    if outputs.len() != cotangents.len() {
        let detail = format!("{} outputs and {} cotangents", outputs.len(), cotangents.len());
        return Err(Error::new("grad", ErrorKind::Shape(detail)));
    }
    for (output, cotangent) in outputs.iter().zip(cotangents) {
        let metas = [output.meta(), cotangent.meta()];
        if output.shape() != cotangent.shape() {
            let detail = "a cotangent has the shape of its output".to_string();
            return Err(Error::new("grad", ErrorKind::Shape(detail)).on(&metas).at(output.site()));
        }
        if output.dtype() != cotangent.dtype() || !output.dtype().is_float() {
            let detail = "a cotangent has the dtype of its output, which is floating-point".to_string();
            return Err(Error::new("grad", ErrorKind::DType(detail)).on(&metas).at(output.site()));
        }
        if !output.device().same_device(cotangent.device()) {
            let detail = "a cotangent is on the device of its output".to_string();
            return Err(Error::new("grad", ErrorKind::Device(detail)).on(&metas).at(output.site()));
        }
    }
    Walk::new(outputs, wrt, false).backward(outputs, cotangents, wrt, change)
}

/// Why no gradient reaches `variable` from `outputs`: an error that names the op and the line that cut it off, where that can still be
/// seen.
#[must_use]
pub fn why_unreached(outputs: &[Ref], variable: &Ref) -> Error {
    let mut seen: FastMap<NodeId, ()> = FastMap::default();
    // each node with the cut that stands between it and the outputs
    let mut stack: Vec<(Ref, Option<Ref>)> = outputs.iter().map(|o| (o.clone(), None)).collect();
    let mut forgotten: Option<Ref> = None;
    while let Some((node, cut)) = stack.pop() {
        if node.id() == variable.id() {
            if let Some(cut) = cut {
                let op = cut.recorded().map_or("leaf", |(op, _)| op.name());
                let detail = format!(
                    "no gradient passes it, and the variable of {} {:?} is used behind it alone",
                    variable.dtype().as_str(),
                    variable.dims()
                );
                return Error::new(op, ErrorKind::Unsupported(detail)).at(cut.site());
            }
            continue;
        }
        if seen.insert(node.id(), ()).is_some() {
            continue;
        }
        match node.history() {
            Some(expr) => {
                let through = expr.op.is_differentiable() && node.dtype().is_float();
                let cut = if through { cut } else { cut.or_else(|| Some(node.clone())) };
                // an integer input is no way for a gradient either
                stack.extend(expr.op.carrying(&expr.inputs).iter().map(|i| (i.clone(), cut.clone())));
            }
            // evaluated, and not traced: what stood above it is gone
            None if node.recorded().is_some() && !node.is_variable() => forgotten = Some(node),
            None => {}
        }
    }
    let what = format!("variable of {} {:?}", variable.dtype().as_str(), variable.dims());
    let error = Error::new(
        "grad",
        ErrorKind::Unsupported(match &forgotten {
            Some(node) => format!(
                "the {what} is not reached; if it was used, it was cut off above the {} at {}, which was evaluated",
                node.recorded().map_or("leaf", |(op, _)| op.name()),
                node.site()
            ),
            None => format!("the result does not depend on the {what}"),
        }),
    );
    error.at(variable.site())
}
