//! Tests of capture: merging, relative form, what is kept.
use super::*;
use crate::node::NodeId;
use crate::op::{BinaryOp, UnaryOp};
use crate::site::BuildSite;
use crate::validate::validate;
use candle_core::Tensor;

fn keep(_: &Op, _: DType, _: &Device) -> bool {
    false
}

fn expand(_: &Op, _: DType, _: &Device) -> bool {
    true
}

fn leaf(dims: &[usize]) -> NodeRef {
    Node::leaf(Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap(), BuildSite::here())
}

fn rec(op: Op, scalars: &[f64], inputs: &[&NodeRef]) -> NodeRef {
    Node::record(op, scalars, inputs, None, BuildSite::here()).unwrap()
}

fn get(roots: &[NodeRef]) -> Captured {
    let mut workspace = Workspace::default();
    let Bindings { sizes, params, .. } = workspace.key(roots, &CaptureOptions { expand: &keep }).unwrap();
    let captured = capture(roots, &CaptureOptions { expand: &keep }).unwrap();
    assert!(workspace.hash() == captured.key.hash() && workspace.words() == captured.key.words());
    assert!(sizes == captured.bindings.sizes && params == captured.bindings.params);
    validate(&captured.graph, &captured.bindings).unwrap();
    captured
}

fn published(captured: &Captured, output: usize) -> NodeId {
    captured.bindings.published().nth(output).unwrap().next().unwrap().id()
}

#[test]
fn equal_nodes_are_merged_by_value() {
    let x = leaf(&[2, 3]);
    let a = rec(Op::Affine, &[2.0, 1.0], &[&x]);
    let b = rec(Op::Affine, &[2.0, 1.0], &[&x]);
    let c = rec(Op::Affine, &[2.0, 1.5], &[&x]);
    let ab = rec(Op::Binary(BinaryOp::Add), &[], &[&a, &b]);
    let abc = rec(Op::Binary(BinaryOp::Add), &[], &[&ab, &c]);
    drop((a, b, c, ab));
    let captured = get(&[abc]);
    // x, a (= b), a + b, c, the sum
    assert_eq!(captured.graph.nodes.len(), 5);
    assert_eq!(captured.bindings.params, [2.0, 1.0, 2.0, 1.5]);
}

#[test]
fn the_key_ignores_scalars_and_sizes_but_not_their_pattern() {
    let key = |rows: usize, cols: usize, mul: f64| {
        let x = leaf(&[rows, cols]);
        get(&[rec(Op::Affine, &[mul, 0.0], &[&x])]).key
    };
    assert_eq!(key(2, 3, 1.0), key(5, 7, 9.0));
    assert_eq!(key(2, 3, 1.0).hash(), key(5, 7, 9.0).hash());
    assert_ne!(key(2, 3, 1.0), key(4, 4, 1.0), "equal dims share a symbol");
    assert_ne!(key(2, 3, 1.0), key(2, 1, 1.0), "one is a class of its own");
    assert_ne!(key(2, 3, 1.0), key(2, 0, 1.0), "zero is a class of its own");
}

#[test]
fn offsets_do_not_share_symbols_with_dims() {
    let key = |start: usize| {
        let x = leaf(&[9, 4]);
        get(&[rec(Op::Narrow { dim: 0, start, len: 2 }, &[], &[&x])]).key
    };
    for start in 0..7 {
        assert_eq!(key(start), key(5), "{start}");
    }
}

#[test]
fn segments_share_a_key_at_any_lengths_and_none_with_other_numbers() {
    let key = |sizes: &[(usize, usize)], rank: usize| {
        let all = 2 + sizes.iter().map(|(gap, rows)| gap + rows).sum::<usize>();
        let lead = vec![3; rank - 2];
        let of = |width: usize| leaf(&[&lead[..], &[all, width]].concat());
        let (a, b) = (leaf(&[16, 4]), leaf(&[4, 12]));
        let mut inputs = vec![of(16), of(12)];
        inputs.extend(sizes.iter().flat_map(|_| [a.clone(), b.clone()]));
        let rows = sizes.iter().flat_map(|&(gap, rows)| [gap, rows]).collect();
        let scales: Vec<f64> = (0..sizes.len()).map(|i| i as f64).collect();
        get(&[rec(Op::LoraSegments { rows }, &scales, &inputs.iter().collect::<Vec<_>>())]).key
    };
    assert_eq!(key(&[(0, 7), (5, 9)], 3), key(&[(6, 20), (0, 31)], 3));
    let all: Vec<_> = (1..30).flat_map(|n| [2, 3, 4].map(|rank| key(&vec![(1, 50); n], rank))).collect();
    for (i, one) in all.iter().enumerate() {
        assert!(!all[..i].contains(one), "{i}");
    }
}

#[test]
fn what_is_held_outside_becomes_an_output() {
    let x = leaf(&[4]);
    let held = rec(Op::Unary(UnaryOp::Exp), &[], &[&x]);
    let gone = rec(Op::Unary(UnaryOp::Neg), &[], &[&held]);
    let root = rec(Op::Unary(UnaryOp::Abs), &[], &[&gone]);
    drop(gone);
    let captured = get(std::slice::from_ref(&root));
    assert_eq!(captured.graph.outputs.len(), 2);
    assert_eq!(published(&captured, 0), root.id());
    assert_eq!(published(&captured, 1), held.id());
    drop(captured);
    drop(held);
    assert_eq!(get(&[root]).graph.outputs.len(), 1);
}

#[test]
fn a_pending_sibling_outside_the_graph_keeps_what_it_needs() {
    let x = leaf(&[4]);
    let shared = rec(Op::Unary(UnaryOp::Exp), &[], &[&x]);
    let root = rec(Op::Unary(UnaryOp::Abs), &[], &[&shared]);
    let sibling = rec(Op::Unary(UnaryOp::Neg), &[], &[&shared]);
    drop(shared);
    assert_eq!(get(std::slice::from_ref(&root)).graph.outputs.len(), 2);
    assert_eq!(get(&[root, sibling]).graph.outputs.len(), 2, "inside the graph it is no output");
}

#[test]
fn exclusive_leaves_are_recognised() {
    let src = leaf(&[1, 3]);
    let cache = leaf(&[5, 3]);
    let write = rec(Op::SliceAssign { dim: 0, start: 2 }, &[], &[&cache, &src]);
    assert!(!get(std::slice::from_ref(&write)).bindings.leaves[0].exclusive, "the handle is still held");
    drop(cache);
    let captured = get(std::slice::from_ref(&write));
    assert!(captured.bindings.leaves[0].exclusive);
    assert!(!captured.bindings.leaves[1].exclusive);
    drop(captured);
    // two uses: the old value is still needed
    let cache = leaf(&[5, 3]);
    let write = rec(Op::SliceAssign { dim: 0, start: 2 }, &[], &[&cache, &src]);
    let old = rec(Op::Unary(UnaryOp::Neg), &[], &[&cache]);
    drop(cache);
    assert!(!get(&[write, old]).bindings.leaves[0].exclusive);
}

#[test]
fn two_handles_on_one_tensor_are_one_leaf() {
    let tensor = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    let a = Node::leaf(tensor.clone(), BuildSite::here());
    let b = Node::leaf(tensor, BuildSite::here());
    let sum = rec(Op::Binary(BinaryOp::Add), &[], &[&a, &b]);
    let captured = get(&[sum]);
    assert_eq!(captured.graph.nodes.len(), 2);
    assert_eq!(captured.bindings.leaves.len(), 1);
}

#[test]
fn composites_expand_when_asked() {
    let x = leaf(&[2, 3]);
    let y = rec(Op::Softmax { dim: 1 }, &[], &[&x]);
    assert_eq!(get(std::slice::from_ref(&y)).graph.nodes.len(), 2);
    let captured = capture(&[y], &CaptureOptions { expand: &expand }).unwrap();
    validate(&captured.graph, &captured.bindings).unwrap();
    let names: Vec<_> = captured.graph.nodes.iter().filter_map(|n| n.op()).map(|op| op.name()).collect();
    assert_eq!(names, ["max", "sub", "exp", "sum", "div"]);
}

#[test]
fn a_lent_leaf_stops_the_capture() {
    #[derive(Debug)]
    struct Fake;
    impl crate::node::EngineValue for Fake {
        fn is_contiguous(&self) -> bool {
            true
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
        fn into_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
            self
        }
    }
    let x = rec(Op::Unary(UnaryOp::Abs), &[], &[&leaf(&[2])]);
    x.publish(Value::Engine(Arc::new(Fake)));
    let y = rec(Op::Unary(UnaryOp::Abs), &[], &[&x]);
    let lent = x.lend().unwrap();
    let failure = capture(std::slice::from_ref(&y), &CaptureOptions { expand: &keep }).unwrap_err();
    assert!(matches!(failure, CaptureFailure::Lent));
    x.give_back(lent);
    assert_eq!(get(&[y]).graph.nodes.len(), 2);
}

#[test]
fn deep_and_wide_graphs_need_no_stack() {
    let run = || {
        let mut x = leaf(&[1]);
        for _ in 0..200_000 {
            x = rec(Op::Unary(UnaryOp::Neg), &[], &[&x]);
        }
        assert_eq!(get(&[x]).graph.nodes.len(), 200_001);
        let wide: Vec<_> = (0..10_000).map(|i| rec(Op::Affine, &[1.0, f64::from(i)], &[&leaf(&[1])])).collect();
        let cat = Node::record(Op::Concat { dim: 0 }, &[], &wide, None, BuildSite::here()).unwrap();
        assert_eq!(get(&[cat]).graph.nodes.len(), 20_001);
    };
    std::thread::Builder::new().stack_size(512 * 1024).spawn(run).unwrap().join().unwrap();
}
