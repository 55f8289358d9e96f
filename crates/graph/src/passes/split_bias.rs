//! `linear` with a bias becomes `linear` and an addition, so that the bias fuses with what follows.
//!
//! Exact: a biased linear is defined as the product, rounded to the dtype, plus the bias.

use super::rewrite::rewrite;
use super::Rewritten;
use crate::capture::{GNode, GOp, Graph};
use crate::op::{BinaryOp, Op};
use smallvec::{smallvec, SmallVec};

pub(super) fn run(graph: Graph) -> Rewritten {
    let mut hits = 0;
    let (graph, _) = rewrite(graph, |r, node, origin| {
        let (Some(Op::Linear { bias: true }), [x, w, b]) = (node.op(), node.inputs.as_slice()) else {
            return r.add(node, origin);
        };
        hits += 1;
        let (x, w, b) = (*x, *w, *b);
        let product = GNode {
            op: GOp::Op(Op::Linear { bias: false }),
            inputs: smallvec![x, w],
            params: SmallVec::new(),
            ..node.clone()
        };
        let product = r.add(product, origin);
        let sum = GNode { op: GOp::Op(Op::Binary(BinaryOp::Add)), inputs: smallvec![product, b], ..node };
        r.add(sum, origin)
    });
    Rewritten { graph, hits }
}
