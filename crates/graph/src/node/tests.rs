//! Tests of the implicit graph.
use super::*;
use crate::op::{BinaryOp, UnaryOp};

fn leaf() -> NodeRef {
    Node::leaf(Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap(), BuildSite::here())
}

fn unary(x: &NodeRef) -> NodeRef {
    Node::record(Op::Unary(UnaryOp::Neg), &[], &[x], None, BuildSite::here()).unwrap()
}

#[test]
fn recording_validates_and_names_the_line() {
    let a = leaf();
    let b = Node::leaf(Tensor::ones(4, DType::F32, &Device::Cpu).unwrap(), BuildSite::here());
    let line = line!() + 1;
    let site = BuildSite::here();
    let error = Node::record(Op::Binary(BinaryOp::Add), &[], &[a, b], None, site).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("add") && text.contains("[2, 3]") && text.contains("[4]"), "{text}");
    assert!(text.contains(&format!("tests.rs:{line}:")), "{text}");
}

#[test]
fn becoming_ready_drops_the_inputs() {
    let a = leaf();
    let b = unary(&a);
    assert_eq!(NodeRef::strong_count(&a), 2);
    let value = Value::Tensor(Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap());
    assert!(b.publish(value.clone()));
    assert!(b.is_ready());
    assert_eq!(NodeRef::strong_count(&a), 1);
    assert!(!b.publish(value), "the first to publish wins");
}

#[test]
fn long_chains_drop_on_a_small_stack() {
    let run = || {
        let mut x = leaf();
        for _ in 0..1_000_000 {
            x = unary(&x);
        }
        drop(x);
        // a chain whose tail becomes ready drops the rest through `publish`
        let mut x = leaf();
        for _ in 0..100_000 {
            x = unary(&x);
        }
        x.publish(Value::Tensor(Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap()));
    };
    std::thread::Builder::new().stack_size(512 * 1024).spawn(run).unwrap().join().unwrap();
}

#[test]
fn pending_estimates_are_upper_ones_until_counted_exactly() {
    let add = |a: &NodeRef, b: &NodeRef| {
        Node::record(Op::Binary(BinaryOp::Add), &[], &[a, b], None, BuildSite::here()).unwrap()
    };
    let (mut x, mut aside) = (leaf(), leaf());
    for _ in 0..10 {
        x = add(&x, &x);
        for _ in 0..30 {
            aside = add(&aside, &leaf());
        }
    }
    assert!(x.pending_estimate().0 >= 9 * 31, "{:?}", x.pending_estimate());
    assert_eq!(x.count_pending(), (10, 10 * 24));
    assert_eq!(x.pending_estimate(), (10, 240));
    // a sum of few nodes is near even if much was recorded since
    let y = add(&x, &leaf());
    assert_eq!(y.pending_estimate(), (11, 264));
    // what is ready counts no more
    y.publish(Value::Tensor(Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap()));
    assert_eq!(add(&y, &y).pending_estimate(), (1, 24));
}

#[test]
fn tracked_follows_floats_and_stops_at_detach() {
    let var = candle_core::Var::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
    let a = Node::leaf(var.as_tensor().clone(), BuildSite::here());
    assert!(unary(&a).tracked());
    let cut = Node::record(Op::Detach, &[], &[a], None, BuildSite::here()).unwrap();
    assert!(!cut.tracked());
    assert!(!unary(&leaf()).tracked());
}

#[test]
fn scalar_counts_are_checked() {
    let error = Node::record(Op::Affine, &[1.0], &[leaf()], None, BuildSite::here()).unwrap_err();
    assert!(error.to_string().contains("takes 2 scalars"), "{error}");
}

/// In a thread of its own, whose first memory of nodes is its own.
fn alone(f: impl FnOnce() + Send + 'static) {
    std::thread::spawn(f).join().unwrap();
}

#[test]
fn a_node_in_the_memory_of_another_has_nothing_of_it() {
    alone(|| {
        let module = crate::site::module_scope("first");
        let w = Node::variable(&leaf(), BuildSite::here()).unwrap();
        let x = unary(&w);
        x.publish(Value::Tensor(Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap()));
        assert!(x.traced() && x.history().is_some() && x.site().module().is_some());
        assert_eq!(x.shape().dims(), [2, 3]);
        let (at, first) = (NodeRef::as_ptr(&x), x.id());
        drop(module);
        Node::release(x);
        let y = Node::leaf(Tensor::ones(4, DType::F64, &Device::Cpu).unwrap(), BuildSite::here());
        assert_eq!(NodeRef::as_ptr(&y), at, "the memory is used again");
        assert!(y.id() > first && !y.traced() && !y.tracked() && !y.is_quantized() && !y.is_pending());
        assert!(y.history().is_none() && y.recorded().is_none() && y.site().module().is_none());
        assert_eq!((y.dims(), y.shape().dims(), y.dtype()), (&[4][..], &[4][..], DType::F64));
        assert_eq!((y.pending_estimate(), y.count_pending()), ((0, 0), (0, 0)));
        assert!(matches!(y.value(), Some(Value::Tensor(t)) if t.elem_count() == 4));
    });
}

#[test]
fn what_is_dropped_gives_its_value_up_at_once() {
    alone(|| {
        let op = std::sync::Arc::new(Box::new(Nothing) as Box<dyn candle_core::CustomOp1 + Send + Sync>);
        let x =
            Node::record_custom(CustomOp::One(op.clone()), &[2, 3], DType::F32, &[leaf()], BuildSite::here()).unwrap();
        let y = unary(&x);
        drop(x);
        assert_eq!(std::sync::Arc::strong_count(&op), 2);
        Node::release(y);
        assert_eq!(std::sync::Arc::strong_count(&op), 1, "it is kept with the memory");
    });
}

struct Nothing;

impl candle_core::CustomOp1 for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }
    fn cpu_fwd(
        &self,
        storage: &candle_core::CpuStorage,
        layout: &candle_core::Layout,
    ) -> candle_core::Result<(candle_core::CpuStorage, Shape)> {
        Ok((storage.clone(), layout.shape().clone()))
    }
}

#[test]
fn what_waits_is_found_by_its_number() {
    let (a, b) = (leaf(), leaf());
    let x = unary(&a);
    let y = Node::record(Op::Binary(BinaryOp::Add), &[], &[&x, &unary(&b)], None, BuildSite::here()).unwrap();
    let found = |wanted: &[NodeId]| -> Vec<NodeId> {
        let mut ids: Vec<_> = find([&y], wanted.iter().copied()).iter().map(|node| node.id()).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!(found(&[x.id(), a.id(), y.id()]), [a.id(), x.id(), y.id()]);
    assert_eq!(found(&[leaf().id(), b.id()]), [b.id()]);
    x.publish(Value::Tensor(Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap()));
    assert_eq!(found(&[x.id(), a.id()]), [x.id()], "what is ready waits for nothing");
}

#[test]
fn a_blank_keeps_nothing_of_the_module_that_records() {
    let _module = crate::site::module_scope("inside");
    // it is overwritten without being dropped
    assert!(Node::blank().site().module().is_none() && leaf().site().module().is_some());
}
