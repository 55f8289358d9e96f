//! Tests of the implicit graph.
use super::*;
use crate::op::{BinaryOp, UnaryOp};

fn leaf() -> Arc<Node> {
    Node::leaf(Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap(), BuildSite::here())
}

fn unary(x: &Arc<Node>) -> Arc<Node> {
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
    assert_eq!(Arc::strong_count(&a), 2);
    let value = Value::Tensor(Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap());
    assert!(b.publish(value.clone()));
    assert!(b.is_ready());
    assert_eq!(Arc::strong_count(&a), 1);
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
    let add = |a: &Arc<Node>, b: &Arc<Node>| {
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
