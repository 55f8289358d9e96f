//! Views, casts and copies that change nothing are removed, and chains of views become one.

use super::rewrite::{rewrite, Rewriter};
use super::Rewritten;
use crate::capture::{GNode, GOp, Graph};
use crate::op::{Op, OpClass};

pub(super) fn run(graph: Graph) -> Rewritten {
    let mut hits = 0;
    let (graph, _) = rewrite(graph, |r, node, origin| {
        let (Some(op), Some(&x)) = (node.op(), node.inputs.first()) else {
            return r.add(node, origin);
        };
        if changes_nothing(r, op, &node, x) {
            hits += 1;
            return x;
        }
        if let Some(shorter) = merged_with_input(r, op, &node, x) {
            hits += 1;
            return r.add(shorter, origin);
        }
        r.add(node, origin)
    });
    Rewritten { graph, hits }
}

fn changes_nothing(r: &Rewriter, op: &Op<crate::Sym>, node: &GNode, x: u32) -> bool {
    let input = r.node(x);
    match op {
        // a narrow to the full length begins at zero, in steps of one: inference checked where it ends
        Op::Reshape { .. } | Op::Broadcast { .. } | Op::Narrow { .. } | Op::Stride { .. } => input.dims == node.dims,
        Op::Permute { perm } => perm.iter().enumerate().all(|(i, &d)| i == usize::from(d)),
        Op::Cast(dtype) => input.dtype == *dtype,
        // a gradient is cut where it is recorded, not where it is computed
        Op::Detach => true,
        Op::Contiguous => match &behind_barriers(r, input).op {
            GOp::Leaf(key) => key.contiguous,
            // every op gives row-major results but a view, and a copy to another device, which keeps its strides
            GOp::Op(op) => op.class() != OpClass::View && *op != Op::ToDevice,
        },
        _ => false,
    }
}

/// What a barrier holds back: it has the same layout.
fn behind_barriers<'a>(r: &'a Rewriter, mut node: &'a GNode) -> &'a GNode {
    while let (Some(Op::Barrier), Some(&x)) = (node.op(), node.inputs.first()) {
        node = r.node(x);
    }
    node
}

/// A view of a view of the same kind as one view.
fn merged_with_input(r: &Rewriter, op: &Op<crate::Sym>, node: &GNode, x: u32) -> Option<GNode> {
    let input = r.node(x);
    let merged = match (op, input.op()?) {
        (Op::Reshape { shape }, Op::Reshape { .. }) => Op::Reshape { shape: shape.clone() },
        (Op::Broadcast { shape }, Op::Broadcast { .. }) => Op::Broadcast { shape: shape.clone() },
        (Op::Permute { perm: outer }, Op::Permute { perm: inner }) => {
            let perm = outer.iter().map(|&d| inner.get(usize::from(d)).copied()).collect::<Option<_>>()?;
            Op::Permute { perm }
        }
        _ => return None,
    };
    Some(GNode { op: GOp::Op(merged), inputs: input.inputs.clone(), ..node.clone() })
}
