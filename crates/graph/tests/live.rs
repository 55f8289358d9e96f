//! Live nodes are counted whoever drops them. Alone in its process: the count is the process's.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use candle_core::{DType, Device, Tensor};
use candle_lazy_graph::{live_nodes, BuildSite, Node, NodeRef, Op, UnaryOp};
use std::cell::RefCell;

fn chain(len: usize) -> NodeRef {
    let leaf = Node::leaf(Tensor::ones(2, DType::F32, &Device::Cpu).unwrap(), BuildSite::here());
    (0..len).fold(leaf, |x, _| Node::record(Op::Unary(UnaryOp::Neg), &[], &[&x], None, BuildSite::here()).unwrap())
}

thread_local! {
    /// Dropped when its thread ends.
    static KEPT: RefCell<Vec<NodeRef>> = const { RefCell::new(Vec::new()) };
}

#[test]
fn nodes_that_other_threads_and_ending_threads_drop_are_counted() {
    let held = chain(3);
    assert_eq!(live_nodes(), 4);
    for first in [true, false] {
        let (a, b) = (chain(2000), chain(10));
        std::thread::spawn(move || {
            // what is touched first is dropped last, or the other way round: before and after the thread's own count is gone
            if first {
                KEPT.with(|kept| kept.borrow_mut().push(b));
                Node::release(a);
            } else {
                Node::release(a);
                KEPT.with(|kept| kept.borrow_mut().push(b));
            }
            KEPT.with(|kept| kept.borrow_mut().push(chain(20)));
            drop(chain(5));
        })
        .join()
        .unwrap();
        assert_eq!(live_nodes(), 4);
    }
    drop(held);
    assert_eq!(live_nodes(), 0);
}
