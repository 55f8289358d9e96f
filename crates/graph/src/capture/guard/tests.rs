//! A guard says of nodes what a capture says of them, or nothing.
#![allow(clippy::unwrap_used)] // tests
use super::super::{capture, Captured};
use super::*;
use crate::node::EngineValue;
use crate::op::tests::one_of_each;
use crate::op::{BinaryOp, UnaryOp};
use crate::site::BuildSite;
use candle_core::Tensor;
use proptest::prelude::*;
use std::any::Any;

fn keep(_: &Op, _: DType, _: &Device) -> bool {
    false
}

const KEEP: super::super::CaptureOptions<'_> = super::super::CaptureOptions { expand: &keep };

fn rec(op: Op, scalars: &[f64], inputs: &[&NodeRef]) -> NodeRef {
    Node::record(op, scalars, inputs, None, BuildSite::here()).unwrap()
}

fn leaf(dims: &[usize]) -> NodeRef {
    Node::leaf(Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap(), BuildSite::here())
}

/// Memory of an engine that is none.
#[derive(Debug)]
struct Memory;

impl EngineValue for Memory {
    fn is_contiguous(&self) -> bool {
        true
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

fn held_by_engine(dims: &[usize], value: &Arc<dyn EngineValue>) -> NodeRef {
    let node = rec(Op::Contiguous, &[], &[&leaf(dims)]);
    assert!(node.publish(Value::Engine(value.clone())));
    node
}

/// A graph to be recorded, and how.
#[derive(Debug, Clone)]
struct Recipe {
    /// An op, and which of the nodes before it reads.
    ops: Vec<(u8, usize, usize)>,
    /// The sizes of the dims of the leaves.
    sizes: [usize; 3],
    /// Which nodes something else holds.
    held: Vec<bool>,
    /// What scalars are multiplied by.
    scale: f64,
}

impl Recipe {
    /// The root, and what else is held.
    fn record(&self) -> (NodeRef, Vec<NodeRef>) {
        let [n, m, k] = self.sizes;
        let tensor = leaf(&[n, m]);
        let again = Node::leaf(tensor.tensor().unwrap().into_owned(), BuildSite::here());
        let engine: Arc<dyn EngineValue> = Arc::new(Memory);
        let mut nodes = vec![tensor, leaf(&[m, k]), again, held_by_engine(&[n, m], &engine)];
        drop(engine);
        for &(op, a, b) in &self.ops {
            let (a, b) = (&nodes[a % nodes.len()], &nodes[b % nodes.len()]);
            let alike = a.dims() == b.dims();
            nodes.push(match op {
                0 => rec(Op::Unary(UnaryOp::Exp), &[], &[a]),
                1 | 2 => rec(Op::Affine, &[f64::from(op) * self.scale, 0.5 * self.scale], &[a]),
                3 if alike => rec(Op::Binary(BinaryOp::Add), &[], &[a, b]),
                4 if a.dims()[0] > 2 => rec(Op::Narrow { dim: 0, start: 1, len: a.dims()[0] - 2 }, &[], &[a]),
                5 => rec(Op::Permute { perm: [1, 0].into_iter().collect() }, &[], &[a]),
                6 => rec(Op::Concat { dim: 0 }, &[], &[a, a]),
                7 if alike => rec(Op::SliceAssign { dim: 0, start: 0 }, &[], &[a, b]),
                8 => rec(Op::Softmax { dim: 1 }, &[], &[a]),
                9 => rec(Op::Reshape { shape: [1, a.elem_count()].into_iter().collect() }, &[], &[a]).pipe_back(a),
                _ => rec(Op::Unary(UnaryOp::Neg), &[], &[a]),
            });
        }
        let root = nodes.pop().unwrap();
        let held = nodes.into_iter().enumerate().filter(|(i, _)| self.held[i % self.held.len()]).map(|(_, node)| node);
        (root, held.collect())
    }
}

trait PipeBack {
    fn pipe_back(self, to: &NodeRef) -> NodeRef;
}

impl PipeBack for NodeRef {
    /// Under the shape that it had.
    fn pipe_back(self, to: &NodeRef) -> NodeRef {
        rec(Op::Reshape { shape: to.dims().iter().copied().collect() }, &[], &[&self])
    }
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let ops = prop::collection::vec((0u8..11, 0usize..20, 0usize..20), 1..16);
    let sizes = prop::array::uniform3(prop::sample::select(vec![0usize, 1, 2, 3, 5, 8]));
    (ops, sizes, prop::collection::vec(any::<bool>(), 1..8)).prop_map(|(ops, sizes, held)| Recipe {
        ops,
        sizes,
        held,
        scale: 1.0,
    })
}

/// What bindings are, whatever their nodes' numbers.
fn content(bindings: &Bindings) -> impl PartialEq + std::fmt::Debug {
    let leaves: Vec<_> = bindings
        .leaves
        .iter()
        .map(|leaf| {
            let data = match &leaf.value {
                Value::Tensor(tensor) => format!("{:?}", tensor.id()),
                other => format!("{other:?}"),
            };
            (leaf.index, data, leaf.exclusive)
        })
        .collect();
    let publish: Vec<Vec<_>> = bindings.published().map(|all| all.map(|node| node.id()).collect()).collect();
    let recorded: Vec<_> = (0..bindings.graph_nodes()).map(|i| bindings.recorded(i as u32).unwrap().id()).collect();
    (bindings.sizes.clone(), bindings.params.clone(), leaves, publish, recorded, bindings.pending)
}

/// How many recorded nodes each node of the graph is published to.
fn held_of_each(bindings: &Bindings) -> Vec<usize> {
    bindings.publish.iter().map(|held| held.len()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn what_a_guard_binds_is_what_a_capture_binds(
        first in recipe(),
        sizes in prop::array::uniform3(prop::sample::select(vec![0usize, 1, 2, 3, 4, 6, 9])),
        change in prop::option::of((0usize..16, (0u8..11, 0usize..20, 0usize..20))),
        flip in prop::option::of(0usize..8),
    ) {
        let (root, held) = first.record();
        prop_assume!(root.is_pending());
        let roots = [root];
        let Captured { key, bindings, .. } = capture(&roots, &KEEP).unwrap();
        let (before, held_before) = (content(&bindings), held_of_each(&bindings));
        drop(bindings);
        let (guard, same) = Guard::of(&roots, &KEEP).unwrap();
        prop_assert_eq!(&key, &same);
        prop_assert_eq!(guard.bind(&roots).map(|b| content(&b)), Some(before), "the very nodes");
        drop((roots, held));

        // other nodes: of other sizes, with other scalars, held by others, or another op somewhere
        let mut second = Recipe { sizes, scale: 3.0, ..first.clone() };
        if let Some((at, op)) = change {
            let at = at % second.ops.len();
            second.ops[at] = op;
        }
        if let Some(at) = flip {
            let at = at % second.held.len();
            second.held[at] = !second.held[at];
        }
        let (root, _held) = second.record();
        let roots = [root];
        let captured = capture(&roots, &KEEP).unwrap();
        let (now, equal) = (content(&captured.bindings), captured.key == key);
        // a key says that one of the nodes that were merged is held, a guard which
        let alike = equal && held_of_each(&captured.bindings) == held_before;
        drop(captured);
        match guard.bind(&roots) {
            Some(bound) => {
                prop_assert!(equal, "it knows what is not the same");
                prop_assert_eq!(content(&bound), now);
            }
            None => prop_assert!(change.is_some() || !alike, "it does not know what is the same"),
        }
    }
}

#[test]
fn ops_that_have_sizes_fit_themselves_at_other_sizes_and_no_other_op() {
    let all: Vec<Op> = one_of_each().into_iter().filter(|op| op.has_sizes()).collect();
    assert!(all.len() > 10);
    for (i, op) in all.iter().enumerate() {
        let mut next = 1;
        let relative = op.map_sizes(|_| {
            next += 1;
            Sym(next)
        });
        let other = op.map_sizes(|size| size + 40);
        // a custom op stands for an object
        let known = !matches!(op, Op::Custom { .. });
        assert_eq!(Sizes::new(next as usize + 1).fit(&relative, &other), known, "{op}");
        let mut sizes = Sizes::new(next as usize + 1);
        assert!(!known || sizes.fit(&relative, op));
        assert!(!sizes.fit(&relative, &other), "{op}: its symbols have sizes");
        for (j, another) in all.iter().enumerate() {
            assert!(i == j || !Sizes::new(99).fit(&relative, another), "{op} is no {another}");
        }
    }
}

#[test]
fn a_node_that_is_two_where_one_was_merged_is_no_longer_known() {
    let x = leaf(&[4]);
    let graph = |a: f64, b: f64| {
        let (a, b) = (rec(Op::Affine, &[a, 0.0], &[&x]), rec(Op::Affine, &[b, 0.0], &[&x]));
        [rec(Op::Binary(BinaryOp::Add), &[], &[&a, &b])]
    };
    let (guard, _) = Guard::of(&graph(2.0, 2.0), &KEEP).unwrap();
    assert_eq!(guard.bind(&graph(7.0, 7.0)).unwrap().params, [7.0, 0.0]);
    assert!(guard.bind(&graph(7.0, 8.0)).is_none());
    assert!(guard.bind(&graph(0.0, -0.0)).is_none(), "zeros differ");
    // two that were two may have equal scalars
    let (guard, _) = Guard::of(&graph(2.0, 3.0), &KEEP).unwrap();
    assert_eq!(guard.bind(&graph(5.0, 5.0)).unwrap().params, [5.0, 0.0, 5.0, 0.0]);
}

#[test]
fn a_guard_knows_which_of_the_nodes_that_were_merged_is_held() {
    let x = leaf(&[4]);
    let graph = || {
        let (a, b) = (rec(Op::Unary(UnaryOp::Neg), &[], &[&x]), rec(Op::Unary(UnaryOp::Neg), &[], &[&x]));
        ([rec(Op::Binary(BinaryOp::Add), &[], &[&a, &b])], a, b)
    };
    let (roots, a, b) = graph();
    drop(b);
    let (guard, key) = Guard::of(&roots, &KEEP).unwrap();
    // one after the other: bindings hold nodes
    let captured = content(&capture(&roots, &KEEP).unwrap().bindings);
    assert_eq!(content(&guard.bind(&roots).unwrap()), captured);
    drop(a);
    // a miss, and no more: as many are held, but others
    let (roots, a, b) = graph();
    drop(a);
    assert!(capture(&roots, &KEEP).unwrap().key == key && guard.bind(&roots).is_none());
    drop(b);
    let (roots, _a, _b) = graph();
    assert!(capture(&roots, &KEEP).unwrap().key == key && guard.bind(&roots).is_none());
}

#[test]
fn leaves_are_known_by_kind_layout_and_identity() {
    let sum = |a: &NodeRef, b: &NodeRef| [rec(Op::Binary(BinaryOp::Add), &[], &[a, b])];
    let (x, y) = (leaf(&[3, 4]), leaf(&[3, 4]));
    let (twins, _) = Guard::of(&sum(&x, &x), &KEEP).unwrap();
    let (two, _) = Guard::of(&sum(&x, &y), &KEEP).unwrap();
    assert!(twins.bind(&sum(&y, &y)).is_some() && twins.bind(&sum(&x, &y)).is_none());
    assert!(two.bind(&sum(&y, &x)).is_some());
    let turned = leaf(&[4, 3]).tensor().unwrap().t().unwrap();
    let turned = Node::leaf(turned, BuildSite::here());
    assert!(two.bind(&sum(&x, &turned)).is_none(), "another layout");
    let engine: Arc<dyn EngineValue> = Arc::new(Memory);
    let (held, shared) = (held_by_engine(&[3, 4], &engine), held_by_engine(&[3, 4], &engine));
    drop(engine);
    assert!(two.bind(&sum(&x, &held)).is_none(), "another kind");
    // one memory under two nodes belongs to none of them
    let alone = sum(&held_by_engine(&[3, 4], &(Arc::new(Memory) as Arc<dyn EngineValue>)), &x);
    let (guard, _) = Guard::of(&alone, &KEEP).unwrap();
    let bound = guard.bind(&alone).unwrap();
    assert_eq!(bound.leaves.iter().map(|leaf| leaf.exclusive).collect::<Vec<_>>(), [true, false]);
    let both = [rec(Op::Binary(BinaryOp::Add), &[], &[&held, &x])];
    let bound = guard.bind(&both).unwrap();
    assert_eq!(bound.leaves.iter().map(|leaf| leaf.exclusive).collect::<Vec<_>>(), [false, false]);
    drop(shared);
    assert!(bound.leaves.len() == 2 && two.bind(&sum(&x, &leaf(&[3, 1]))).is_none());
}

#[test]
fn what_others_evaluated_or_lent_is_not_known() {
    let x = leaf(&[4]);
    let make = || {
        let inner = rec(Op::Unary(UnaryOp::Exp), &[], &[&x]);
        let root = rec(Op::Unary(UnaryOp::Neg), &[], &[&inner]);
        ([root], inner)
    };
    let (roots, inner) = make();
    let (guard, _) = Guard::of(&roots, &KEEP).unwrap();
    assert!(guard.bind(&roots).is_some());
    drop(inner);
    assert!(guard.bind(&roots).is_none(), "nobody holds the inner one any more");
    let (roots, inner) = make();
    assert!(inner.publish(Value::Tensor(x.tensor().unwrap().into_owned())));
    assert!(guard.bind(&roots).is_none(), "it has a value");
    assert!(guard.bind(&[]).is_none());
    // a lent value is waited for by a capture
    let engine = held_by_engine(&[4], &(Arc::new(Memory) as Arc<dyn EngineValue>));
    let roots = [rec(Op::Unary(UnaryOp::Exp), &[], &[&engine])];
    let (guard, _) = Guard::of(&roots, &KEEP).unwrap();
    let value = engine.lend().unwrap();
    assert!(guard.bind(&roots).is_none());
    engine.give_back(value);
    assert!(guard.bind(&roots).is_some());
}

#[test]
fn what_keeps_a_history_is_expanded_or_stands_for_an_object_has_no_guard() {
    let x = leaf(&[4]);
    let variable = Node::variable(&x, BuildSite::here()).unwrap();
    let traced = [rec(Op::Unary(UnaryOp::Exp), &[], &[&variable])];
    assert!(Guard::of(&traced, &KEEP).is_err());
    let plain = [rec(Op::Unary(UnaryOp::Exp), &[], &[&x])];
    let (guard, _) = Guard::of(&plain, &KEEP).unwrap();
    assert!(guard.bind(&traced).is_none(), "and is not known by another's");
    let softmax = [rec(Op::Softmax { dim: 0 }, &[], &[&x])];
    let expand = |_: &Op, _: DType, _: &Device| true;
    assert_eq!(Guard::of(&softmax, &super::super::CaptureOptions { expand: &expand }).err(), Some(Unguarded::Kind));
    assert!(Guard::of(&softmax, &KEEP).is_ok());
    let region = [rec(Op::Checkpoint { region: 0 }, &[], &[&plain[0]])];
    assert_eq!(Guard::of(&region, &KEEP).err(), Some(Unguarded::Kind));
}

#[test]
fn a_node_that_waits_is_no_leaf_on_the_data_of_another() {
    let (x, y) = (leaf(&[4]), leaf(&[4]));
    let exp = |x: &NodeRef| rec(Op::Unary(UnaryOp::Exp), &[], &[x]);
    let sum = |a: &NodeRef, b: &NodeRef| [rec(Op::Binary(BinaryOp::Add), &[], &[a, b])];
    let value = || Value::Tensor(x.tensor().unwrap().into_owned());
    let (a, b) = (exp(&x), exp(&x));
    assert!(a.publish(value()) && b.publish(value()));
    let (guard, _) = Guard::of(&sum(&a, &b), &KEEP).unwrap();
    assert!(guard.bind(&sum(&b, &a)).is_some());
    let waiting = exp(&y);
    assert!(guard.bind(&sum(&a, &waiting)).is_none());
    assert!(guard.bind(&sum(&waiting, &a)).is_none());
}

#[test]
fn one_node_is_never_two() {
    let memory = || held_by_engine(&[4], &(Arc::new(Memory) as Arc<dyn EngineValue>));
    let times = |x: &NodeRef, by: f64| rec(Op::Affine, &[by, 0.0], &[x]);
    let exclusive = |roots: &[NodeRef], guard: &Guard| -> Vec<bool> {
        let capture = capture(roots, &KEEP).unwrap().bindings;
        let found = capture.leaves.iter().map(|leaf| leaf.exclusive).collect::<Vec<_>>();
        drop(capture);
        let bound = guard.bind(roots);
        assert!(bound.is_none_or(|bound| bound.leaves.iter().map(|leaf| leaf.exclusive).eq(found.clone())));
        found
    };
    // two roots that read one memory
    let x = memory();
    let roots = [times(&x, 2.0), times(&x, 3.0)];
    drop(x);
    let (guard, _) = Guard::of(&roots, &KEEP).unwrap();
    assert_eq!(exclusive(&roots, &guard), [true]);
    assert!(guard.bind(&roots).is_some());
    // one root twice, which reads one that is held
    let y = memory();
    let once = times(&y, 5.0);
    let roots = [once.clone(), once];
    assert_eq!(exclusive(&roots, &guard), [false]);
    assert!(guard.bind(&roots).is_none());
    // two that are held below a root, and one of them twice
    let x = memory();
    let (p, q) = (times(&x, 2.0), times(&x, 3.0));
    drop(x);
    let sum = |a: &NodeRef, b: &NodeRef| [rec(Op::Binary(BinaryOp::Add), &[], &[a, b])];
    let (guard, _) = Guard::of(&sum(&p, &q), &KEEP).unwrap();
    assert!(guard.bind(&sum(&p, &q)).is_some() && guard.bind(&sum(&q, &p)).is_some());
    let once = times(&y, 2.0);
    assert!(guard.bind(&sum(&once, &once)).is_none());
    // equal ops that were merged
    let (guard, _) = Guard::of(&sum(&times(&y, 2.0), &times(&y, 2.0)), &KEEP).unwrap();
    assert!(guard.bind(&sum(&times(&y, 2.0), &times(&y, 2.0))).is_some());
    assert!(guard.bind(&sum(&once, &once)).is_none());
}
