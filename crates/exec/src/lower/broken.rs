//! Passes that do what they must not, for checking the checker: the graph has no features, so its faults are data.
//!
//! Each is the pass itself, followed by a change to its result that a mistake in the pass could have made.

use candle_lazy_graph::capture::GOp;
use candle_lazy_graph::passes::{Pass, Rewritten, PASSES};
use candle_lazy_graph::{BinaryOp, GNode, Graph, Op, Sym};
use candle_lazy_ops::fault;

/// A fault of a pass: its name, the pass, and what it does to the result.
type Fault = (&'static str, &'static str, fn(Graph) -> Rewritten);

const FAULTS: &[Fault] = &[
    ("pass.split_bias.lost", "split_bias", |g| after("split_bias", g, bypass_bias)),
    ("pass.split_bias.subtracts", "split_bias", |g| after("split_bias", g, |g| change_bias(g, BinaryOp::Sub))),
    ("pass.split_bias.multiplies", "split_bias", |g| after("split_bias", g, |g| change_bias(g, BinaryOp::Mul))),
    ("pass.noop_views.permute", "noop_views", |g| after("noop_views", g, |g| bypass(g, is_square_permute))),
    ("pass.noop_views.narrow", "noop_views", |g| {
        after("noop_views", g, |g| bypass(g, is(|op| matches!(op, Op::Narrow { .. }))))
    }),
    ("pass.noop_views.cast", "noop_views", |g| after("noop_views", g, bypass_round_trip)),
    ("pass.noop_views.permutes", "noop_views", skip_inner_permute),
    ("pass.cse.scalars", "cse", |g| after("cse", g, |g| merge(g, |a, b| a.op == b.op && a.inputs == b.inputs))),
    ("pass.cse.attributes", "cse", |g| after("cse", g, |g| merge(g, same_but_attributes))),
    ("pass.cse.order", "cse", |g| after("cse", g, |g| merge(g, same_but_order))),
    ("pass.cse.leaves", "cse", |g| after("cse", g, |g| merge(g, |a, b| a.op() == b.op() && a.op().is_none()))),
    ("pass.dce.root", "dce", |g| after("dce", g, lose_root)),
    ("pass.dce.outputs", "dce", |g| after("dce", g, |g| g.outputs.reverse())),
    ("pass.dce.one_output", "dce", |g| after("dce", g, one_output)),
];

/// The pass, or the broken one whose fault is active.
pub(super) fn broken(pass: Pass) -> Pass {
    if !fault::any() {
        return pass;
    }
    match FAULTS.iter().find(|(name, of, _)| *of == pass.name && fault::active(name)) {
        Some(&(_, _, run)) => Pass { run, ..pass },
        None => pass,
    }
}

fn after(name: &str, graph: Graph, spoil: impl FnOnce(&mut Graph)) -> Rewritten {
    let run = |name: &str, graph: Graph| match PASSES.iter().find(|p| p.name == name) {
        Some(pass) => (pass.run)(graph),
        None => Rewritten { graph, hits: 0 },
    };
    let mut rewritten = run(name, graph);
    spoil(&mut rewritten.graph);
    // what nobody reads any more goes, so that a wrong result shows and not the remains
    Rewritten { graph: run("dce", rewritten.graph).graph, hits: rewritten.hits }
}

/// Everything that reads `from` reads `to`.
fn redirect(graph: &mut Graph, from: u32, to: u32) {
    let inputs = graph.nodes.iter_mut().flat_map(|n| n.inputs.iter_mut());
    for id in inputs.chain(graph.outputs.iter_mut()) {
        if *id == from {
            *id = to;
        }
    }
}

fn is(what: fn(&Op<Sym>) -> bool) -> impl Fn(&Graph, &GNode) -> bool {
    move |_, node| node.op().is_some_and(what)
}

fn is_square_permute(graph: &Graph, node: &GNode) -> bool {
    let input = node.inputs.first().map(|&i| &graph.nodes[i as usize]);
    matches!(node.op(), Some(Op::Permute { .. })) && input.is_some_and(|i| i.dims == node.dims)
}

/// Drops every node that `what` names: whoever reads it reads its first input.
fn bypass(graph: &mut Graph, what: impl Fn(&Graph, &GNode) -> bool) {
    for id in 0..graph.nodes.len() {
        let node = &graph.nodes[id];
        if let (true, Some(&x)) = (what(graph, node), node.inputs.first()) {
            redirect(graph, id as u32, x);
        }
    }
}

/// Drops a cast down and back up: whoever reads it reads what was cast.
fn bypass_round_trip(graph: &mut Graph) {
    for id in 0..graph.nodes.len() {
        let cast = |n: u32| match (graph.nodes[n as usize].op(), graph.nodes[n as usize].inputs.first()) {
            (Some(Op::Cast(_)), Some(&x)) => Some(x),
            _ => None,
        };
        if let Some(before) = cast(id as u32).and_then(cast) {
            if graph.nodes[before as usize].dtype == graph.nodes[id].dtype {
                redirect(graph, id as u32, before);
            }
        }
    }
}

/// Of two permutes behind one another the first is lost.
fn skip_inner_permute(mut graph: Graph) -> Rewritten {
    for id in 0..graph.nodes.len() {
        let permuted = |n: u32| match (graph.nodes[n as usize].op(), graph.nodes[n as usize].inputs.first()) {
            (Some(Op::Permute { .. }), Some(&x)) => Some(x),
            _ => None,
        };
        let inner = permuted(id as u32);
        if let (Some(inner), Some(x)) = (inner, inner.and_then(permuted)) {
            if graph.nodes[inner as usize].dims == graph.nodes[x as usize].dims {
                graph.nodes[id].inputs[0] = x;
            }
        }
    }
    after("noop_views", graph, |_| {})
}

fn is_bias_sum(graph: &Graph, node: &GNode) -> bool {
    let product = node.inputs.first().map(|&i| &graph.nodes[i as usize]);
    matches!(node.op(), Some(Op::Binary(BinaryOp::Add)))
        && product.is_some_and(|p| matches!(p.op(), Some(Op::Linear { .. })))
}

fn bypass_bias(graph: &mut Graph) {
    bypass(graph, is_bias_sum);
}

fn change_bias(graph: &mut Graph, to: BinaryOp) {
    for id in 0..graph.nodes.len() {
        if is_bias_sum(graph, &graph.nodes[id]) {
            graph.nodes[id].op = GOp::Op(Op::Binary(to));
        }
    }
}

/// Merges every later node into an earlier one that `same` takes for equal.
fn merge(graph: &mut Graph, same: fn(&GNode, &GNode) -> bool) {
    for later in 0..graph.nodes.len() {
        let alike = |a: &GNode, b: &GNode| a.dims == b.dims && a.dtype == b.dtype && same(a, b);
        if let Some(earlier) = (0..later).find(|&e| alike(&graph.nodes[e], &graph.nodes[later])) {
            redirect(graph, later as u32, earlier as u32);
        }
    }
}

fn same_but_attributes(a: &GNode, b: &GNode) -> bool {
    match (a.op(), b.op()) {
        (Some(x), Some(y)) => std::mem::discriminant(x) == std::mem::discriminant(y) && a.inputs == b.inputs,
        _ => false,
    }
}

fn same_but_order(a: &GNode, b: &GNode) -> bool {
    a.op().is_some() && a.op == b.op && a.params == b.params && a.inputs.iter().eq(b.inputs.iter().rev())
}

/// The first output is its own input, where that has its shape.
fn lose_root(graph: &mut Graph) {
    let Some(root) = graph.outputs.first().map(|&o| graph.nodes[o as usize].clone()) else {
        return;
    };
    let fits = |i: &&u32| graph.nodes[**i as usize].dims == root.dims && graph.nodes[**i as usize].dtype == root.dtype;
    if let Some(&x) = root.inputs.iter().find(fits) {
        graph.outputs[0] = x;
    }
}

/// Every output is the first one of its shape.
fn one_output(graph: &mut Graph) {
    for at in 1..graph.outputs.len() {
        let (a, b) = (&graph.nodes[graph.outputs[0] as usize], &graph.nodes[graph.outputs[at] as usize]);
        if a.dims == b.dims && a.dtype == b.dtype {
            graph.outputs[at] = graph.outputs[0];
        }
    }
}
