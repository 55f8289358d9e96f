//! Which kernel serves an op: decided by what is known before running, never by trying.

use super::{has_kernels, REPLAY};
use crate::config::EvalOptions;
use crate::plan::CandleReason;
use candle_core::{DType, Device};
use candle_lazy_graph::{GNode, Graph, Op, OpClass, ReduceOp, Sym};
use candle_lazy_ops::fault;
use candle_lazy_ops::row::Class;

/// What serves an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Nothing runs: the node is a leaf.
    Leaf,
    /// A row program, possibly with neighbours.
    Row,
    /// A kernel of its own, or a view.
    Kernel,
    /// Candle's own op.
    Candle(CandleReason),
}

/// Whether capture replaces a composite by its decomposition: where the device has no kernels of ours, or where the caller wants to see
/// the parts.
#[must_use]
pub fn expands(op: &Op, device: &Device, options: &EvalOptions) -> bool {
    // these two have no kernel of their own: their parts fuse
    matches!(op, Op::GroupNorm { .. } | Op::CrossEntropy)
        || options.decompose
        || options.replay
        || !has_kernels(device.location())
}

pub(super) fn choose(graph: &Graph, node: &GNode, options: &EvalOptions) -> Choice {
    let Some(op) = node.op() else {
        return Choice::Leaf;
    };
    if let Op::Custom { .. } = op {
        return Choice::Kernel;
    }
    let device = graph.devices.get(usize::from(node.device)).copied();
    if options.replay || !device.is_some_and(has_kernels) {
        return REPLAY;
    }
    if matches!(op, Op::Matmul) && fault::active("choose.replays_matmul") {
        return REPLAY;
    }
    if is_row(graph, node, op) && !fault::active("choose.falls_back") {
        return Choice::Row;
    }
    match op {
        Op::Unary(_)
        | Op::Elu
        | Op::Clamp
        | Op::QMatmul
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::CompareScalar(_)
        | Op::Affine
        | Op::Powf
        | Op::Where
        | Op::Reduce { .. } => Choice::Candle(CandleReason::Fallback),
        _ => Choice::Kernel,
    }
}

/// The class of arithmetic of a row program that computes `node`, if one can.
pub(super) fn row_class(graph: &Graph, node: &GNode) -> Option<Class> {
    let op = node.op()?;
    let of = |i: usize| graph.nodes.get(*node.inputs.get(i)? as usize).map(|n| n.dtype);
    // the dtype that the arithmetic is about: a comparison's and a choice's result or condition is u8
    let dtype = match op {
        Op::Compare(_) | Op::CompareScalar(_) => of(0)?,
        Op::Cast(to) => return cast_class(of(0)?, *to),
        _ => node.dtype,
    };
    let class = Class::of(dtype)?;
    let readable = node.inputs.iter().all(|&i| class.reads(graph.nodes[i as usize].dtype));
    (readable && class.writes(node.dtype)).then_some(class)
}

/// Casts among the narrow floats, and from u8, are loads and stores of a row program; the rest is a kernel of its own.
fn cast_class(from: DType, to: DType) -> Option<Class> {
    let narrow = |d: DType| matches!(d, DType::F32 | DType::F16 | DType::BF16);
    match (from, to) {
        (a, b) if narrow(a) && narrow(b) => Some(Class::F32),
        (DType::U8, b) if narrow(b) => Some(Class::F32),
        (DType::U8, DType::F64) => Some(Class::F64),
        _ => None,
    }
}

fn is_row(graph: &Graph, node: &GNode, op: &Op<Sym>) -> bool {
    let eligible = match op {
        Op::Reduce { op, .. } => {
            // exhaustive, so that a new reduction is decided here
            let served = match op {
                ReduceOp::Sum | ReduceOp::Mean | ReduceOp::Max | ReduceOp::Min => true,
                ReduceOp::Var | ReduceOp::LogSumExp => true,
            };
            served && node.dtype.is_float()
        }
        Op::Where => graph.nodes[node.inputs[0] as usize].dtype == DType::U8 && node.dtype.is_float(),
        Op::Compare(_) | Op::CompareScalar(_) => true,
        Op::Unary(_) | Op::Binary(_) | Op::Affine | Op::Powf | Op::Elu | Op::Clamp => node.dtype.is_float(),
        Op::Softmax { .. }
        | Op::LogSoftmax { .. }
        | Op::RmsNorm { .. }
        | Op::LayerNorm { .. }
        | Op::Glu { .. }
        | Op::Cast(_) => true,
        _ => {
            debug_assert!(op.class() != OpClass::Elementwise, "{} is elementwise", op.name());
            false
        }
    };
    eligible && row_class(graph, node).is_some()
}
