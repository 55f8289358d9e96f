//! Tests of the passes: each alone on a small graph, and all of them on random ones.
use super::*;
use crate::capture::{capture, CaptureOptions, Captured, Workspace};
use crate::dump::dump;
use crate::node::{Node, NodeRef};
use crate::op::{BinaryOp, CmpOp, Dims, Op, Scalars, UnaryOp};
use crate::site::BuildSite;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use smallvec::SmallVec;

fn leaf(dims: &[usize]) -> NodeRef {
    Node::leaf(Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap(), BuildSite::here())
}

fn rec(op: Op, scalars: &[f64], inputs: &[&NodeRef]) -> NodeRef {
    Node::record(op, scalars, inputs, None, BuildSite::here()).unwrap()
}

fn get(roots: Vec<NodeRef>) -> Captured {
    capture(&roots, &CaptureOptions { expand: &|_, _, _| false }).unwrap()
}

fn only(name: &str, captured: &Captured) -> (Graph, usize) {
    let (graph, hits) = run_passes(captured.graph.clone(), |p| p.name == name, Some(&captured.bindings)).unwrap();
    assert_eq!(hits.len(), 1);
    (graph, hits[0].1)
}

#[test]
fn split_bias_makes_an_addition() {
    let y = rec(Op::Linear { bias: true }, &[], &[&leaf(&[2, 3]), &leaf(&[4, 3]), &leaf(&[4])]);
    let (graph, hits) = only("split_bias", &get(vec![y]));
    assert_eq!(hits, 1);
    assert_eq!(
        dump(&graph, None),
        "%0 = leaf(tensor) : f32 [s0, s1]\n%1 = leaf(tensor) : f32 [s2, s1]\n%2 = leaf(tensor) : f32 [s2]\n\
         %3 = linear %0, %1 : f32 [s0, s2]\n%4 = add %3, %2 : f32 [s0, s2] -> out\n"
    );
}

#[test]
fn noop_views_go_and_chains_merge() {
    let x = leaf(&[2, 3]);
    let mut y = rec(Op::Reshape { shape: Dims::from_slice(&[2, 3]) }, &[], &[&x]);
    y = rec(Op::Narrow { dim: 1, start: 0, len: 3 }, &[], &[&y]);
    y = rec(Op::Permute { perm: SmallVec::from_slice(&[1, 0]) }, &[], &[&y]);
    y = rec(Op::Permute { perm: SmallVec::from_slice(&[1, 0]) }, &[], &[&y]);
    y = rec(Op::Cast(DType::F32), &[], &[&y]);
    y = rec(Op::Detach, &[], &[&y]);
    y = rec(Op::Contiguous, &[], &[&y]);
    y = rec(Op::Unary(UnaryOp::Exp), &[], &[&y]);
    let captured = get(vec![y]);
    let (graph, hits) = only("noop_views", &captured);
    assert!(hits >= 5, "{hits}\n{}", dump(&graph, None));
    // two permutations that cancel leave one permutation that the next run removes
    let again =
        run_passes(graph.clone(), |p| p.name == "noop_views" || p.name == "dce", Some(&captured.bindings)).unwrap();
    assert_eq!(dump(&again.0, None), "%0 = leaf(tensor) : f32 [s0, s1]\n%1 = exp %0 : f32 [s0, s1] -> out\n");
}

#[test]
fn a_narrow_that_shortens_stays() {
    let y = rec(Op::Narrow { dim: 1, start: 1, len: 2 }, &[], &[&leaf(&[2, 3])]);
    let (_, hits) = only("noop_views", &get(vec![y]));
    assert_eq!(hits, 0);
}

#[test]
fn contiguous_stays_on_a_strided_leaf_and_on_views() {
    let strided = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap().t().unwrap();
    let x = Node::leaf(strided, BuildSite::here());
    let y = rec(Op::Contiguous, &[], &[&x]);
    let z = rec(Op::Permute { perm: SmallVec::from_slice(&[1, 0]) }, &[], &[&leaf(&[2, 3])]);
    let z = rec(Op::Contiguous, &[], &[&z]);
    let (_, hits) = only("noop_views", &get(vec![y, z]));
    assert_eq!(hits, 0);
}

#[test]
fn cse_merges_what_a_rewrite_made_equal_and_never_two_scalars() {
    let x = leaf(&[2, 3]);
    let a = rec(Op::Unary(UnaryOp::Exp), &[], &[&x]);
    let same = rec(Op::Reshape { shape: Dims::from_slice(&[2, 3]) }, &[], &[&x]);
    let b = rec(Op::Unary(UnaryOp::Exp), &[], &[&same]);
    let c = rec(Op::Affine, &[1.0, 2.0], &[&a]);
    let d = rec(Op::Affine, &[1.0, 3.0], &[&b]);
    let captured = get(vec![rec(Op::Binary(BinaryOp::Add), &[], &[&c, &d])]);
    let (graph, hits) =
        run_passes(captured.graph.clone(), |p| p.name != "split_bias", Some(&captured.bindings)).unwrap();
    let names: Vec<_> = graph.nodes.iter().filter_map(|n| n.op()).map(|op| op.name()).collect();
    assert_eq!(names.iter().filter(|n| **n == "affine").count(), 2, "{hits:?} {names:?}");
    assert_eq!(names.iter().filter(|n| **n == "exp").count(), 1, "{hits:?} {names:?}");
}

#[test]
fn dce_keeps_leaves_and_outputs() {
    let x = leaf(&[2, 3]);
    let y = rec(Op::Unary(UnaryOp::Exp), &[], &[&x]);
    let mut captured = get(vec![y]);
    // an op that nothing uses
    let mut extra = captured.graph.nodes[1].clone();
    extra.op = crate::capture::GOp::Op(Op::Unary(UnaryOp::Neg));
    captured.graph.nodes.push(extra);
    captured.graph.origins.push(1);
    let (graph, hits) = only("dce", &captured);
    assert_eq!((graph.nodes.len(), hits), (2, 1));
}

#[test]
fn a_pass_that_breaks_the_graph_is_named() {
    let y = rec(Op::Unary(UnaryOp::Exp), &[], &[&leaf(&[2, 3])]);
    let mut captured = get(vec![y]);
    captured.graph.nodes[1].dims = captured.graph.nodes[1].dims.iter().rev().copied().collect();
    let error = run_passes(captured.graph.clone(), |p| p.name == "cse", Some(&captured.bindings)).unwrap_err();
    assert!(error.to_string().contains("pass cse"), "{error}");
}

/// Bytes that choose ops: every graph is valid, because an op that refuses its inputs is skipped.
fn random_graph(bytes: &[u8]) -> Vec<NodeRef> {
    let mut pool = vec![leaf(&[4, 3]), leaf(&[3, 4]), leaf(&[1, 3]), leaf(&[3]), leaf(&[4, 4])];
    for chunk in bytes.chunks_exact(4) {
        let pick = |b: u8| pool[usize::from(b) % pool.len()].clone();
        let (a, b) = (pick(chunk[1]), pick(chunk[2]));
        let k = chunk[3];
        let rank = a.shape().rank();
        let op = match chunk[0] % 12 {
            0 => Op::Unary(UnaryOp::ALL[usize::from(k) % UnaryOp::ALL.len()]),
            1 => Op::Binary(BinaryOp::ALL[usize::from(k) % BinaryOp::ALL.len()]),
            2 => Op::Affine,
            3 => Op::Matmul,
            4 => Op::Permute { perm: (0..rank as u8).rev().collect() },
            5 => Op::Narrow { dim: 0, start: usize::from(k % 3), len: 1 + usize::from(k % 2) },
            6 => Op::Reshape { shape: Dims::from_slice(&[a.elem_count()]) },
            7 => Op::Softmax { dim: k % 2 },
            8 => Op::Contiguous,
            9 => Op::Compare(CmpOp::Lt),
            10 => Op::Reduce { op: crate::op::ReduceOp::Sum, axes: 1, keepdim: k % 2 == 0 },
            _ => Op::Concat { dim: 0 },
        };
        let inputs = match op.arity() {
            Some(1) => vec![a],
            _ => vec![a, b],
        };
        let scalars: Scalars = (0..op.scalar_count()).map(|i| f64::from(k) + i as f64).collect();
        if let Ok(node) = Node::record(op, &scalars, &inputs, None, BuildSite::here()) {
            pool.push(node);
        }
    }
    pool
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn random_graphs_stay_valid_through_every_pass(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let captured = get(random_graph(&bytes));
        crate::validate::validate(&captured.graph, &captured.bindings).unwrap();
        let (graph, _) = run_passes(captured.graph.clone(), |_| true, Some(&captured.bindings)).unwrap();
        prop_assert_eq!(graph.outputs.len(), captured.graph.outputs.len());
        // the leaves are the interface of a plan: same number, same order
        let leaves = |g: &Graph| g.nodes.iter().filter(|n| n.op().is_none()).cloned().collect::<Vec<_>>();
        prop_assert_eq!(leaves(&graph), leaves(&captured.graph));
        // running them again changes nothing but what merging views exposed
        let (twice, _) = run_passes(graph.clone(), |_| true, Some(&captured.bindings)).unwrap();
        prop_assert!(twice.nodes.len() <= graph.nodes.len());
    }

    #[test]
    fn capture_is_deterministic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let pool = random_graph(&bytes);
        let a = get(pool.clone());
        let b = get(pool);
        prop_assert_eq!(dump(&a.graph, Some(&a.bindings)), dump(&b.graph, Some(&b.bindings)));
        prop_assert!(a.key == b.key);
    }

    #[test]
    fn keys_are_equal_exactly_where_graphs_are(
        bytes in prop::collection::vec(any::<u8>(), 1..60), at in any::<prop::sample::Index>(), other in any::<u8>(),
    ) {
        let mut changed = bytes.clone();
        *at.get_mut(&mut changed) = other;
        let (a, b) = (get(random_graph(&bytes)), get(random_graph(&changed)));
        prop_assert_eq!(a.graph == b.graph, a.key == b.key);
        let mut workspace = Workspace::default();
        for (captured, bytes) in [(&a, &bytes), (&b, &changed)] {
            let options = CaptureOptions { expand: &|_, _, _| false };
            let bindings = workspace.key(&random_graph(bytes), &options).unwrap();
            prop_assert!(workspace.words() == captured.key.words());
            prop_assert_eq!(&bindings.sizes, &captured.bindings.sizes);
            prop_assert_eq!(&bindings.params, &captured.bindings.params);
            prop_assert_eq!(&bindings.publish, &captured.bindings.publish);
            prop_assert_eq!(&bindings.recorded, &captured.bindings.recorded);
        }
    }
}
