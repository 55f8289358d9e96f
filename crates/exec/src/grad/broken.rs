//! Derivatives that are wrong, for checking the checker: the graph has no features, so its faults are data.

use candle_lazy_graph::grad::{Change, Recorded};
use candle_lazy_graph::{Op, ReduceOp};
use candle_lazy_ops::fault;

/// What goes wrong with one recorded op.
#[derive(Clone, Copy)]
enum Wrong {
    /// It is left out: whoever reads it reads its first input.
    Dropped,
    /// Its inputs change places.
    Swapped,
    /// Those behind the first do.
    OthersSwapped,
    /// One of its scalars is this number.
    Scalar(usize, f64),
    /// It reduces otherwise.
    Reduces(ReduceOp),
}

use Wrong::{Dropped, OthersSwapped, Reduces, Scalar, Swapped};

/// A fault: its name, the op whose derivative it is in, and which op of that derivative (by name, counted from 0) goes wrong how.
type Fault = (&'static str, &'static str, &'static str, usize, Wrong);

const FAULTS: &[Fault] = &[
    ("vjp.sub.sign", "sub", "affine", 0, Dropped),
    ("vjp.mul.factor", "mul", "mul", 0, Dropped),
    ("vjp.exp.chain", "exp", "mul", 0, Dropped),
    ("vjp.sqr.two", "sqr", "affine", 0, Scalar(0, 1.0)),
    ("vjp.log.recip", "log", "recip", 0, Dropped),
    ("vjp.affine.factor", "affine", "affine", 0, Scalar(0, 1.0)),
    ("vjp.powf.exponent", "powf", "affine", 0, Scalar(0, 1.0)),
    ("vjp.where_cond.other", "where_cond", "where_cond", 0, OthersSwapped),
    ("vjp.add.broadcast", "add", "sum", 0, Reduces(ReduceOp::Max)),
    ("vjp.mean.count", "mean", "affine", 0, Scalar(0, 1.0)),
    ("vjp.max.mask", "max", "eq", 0, Dropped),
    ("vjp.permute.inverse", "permute", "permute", 0, Dropped),
    ("vjp.narrow.place", "narrow", "slice_assign", 0, Dropped),
    ("vjp.broadcast_as.sum", "broadcast_as", "sum", 0, Reduces(ReduceOp::Mean)),
    ("vjp.cat.part", "cat", "narrow", 0, Dropped),
    ("vjp.matmul.transpose", "matmul", "permute", 0, Dropped),
    ("vjp.linear.outer", "linear", "matmul", 1, Swapped),
    ("vjp.lora.scale", "lora", "affine", 0, Scalar(0, 1.0)),
    ("vjp.rms_norm.along", "rms_norm", "sub", 0, Dropped),
    ("vjp.rms_norm.eps", "rms_norm", "affine", 0, Scalar(1, 0.5)),
    ("vjp.layer_norm.mean", "layer_norm", "mean", 3, Reduces(ReduceOp::Sum)),
    ("vjp.softmax.sum", "softmax", "sub", 0, Dropped),
    ("vjp.log_softmax.exp", "log_softmax", "exp", 0, Dropped),
    ("vjp.glu.gate", "glu", "mul", 1, Dropped),
    ("vjp.embedding.rows", "embedding", "index_add", 0, Dropped),
    ("vjp.cross_entropy.target", "cross_entropy", "scatter_add", 0, Dropped),
    ("vjp.cross_entropy.mean", "cross_entropy", "affine", 0, Scalar(0, 1.0)),
    ("vjp.index_select.places", "index_select", "index_add", 0, Dropped),
    ("vjp.gather.places", "gather", "scatter_add", 0, Dropped),
    ("vjp.scatter.replaced", "scatter", "scatter", 0, Dropped),
    ("vjp.index_add.source", "index_add", "index_select", 0, Dropped),
    ("vjp.slice_assign.replaced", "slice_assign", "slice_assign", 0, Dropped),
];

/// The change that the active fault makes, if one is.
pub(super) fn change() -> Option<&'static Change> {
    fault::any().then_some(&apply as &Change)
}

fn apply(recorded: Recorded<'_>) -> bool {
    let Recorded { of, number, op, scalars, inputs } = recorded;
    let here = |f: &&Fault| f.1 == of.name() && f.2 == op.name() && f.3 == number && fault::active(f.0);
    let Some((.., wrong)) = FAULTS.iter().find(here) else { return false };
    match (wrong, op) {
        (Dropped, _) => return true,
        (Swapped, _) => inputs.reverse(),
        (OthersSwapped, _) => inputs.get_mut(1..).unwrap_or_default().reverse(),
        (Scalar(at, to), _) => scalars.iter_mut().skip(*at).take(1).for_each(|s| *s = *to),
        (Reduces(to), Op::Reduce { op, .. }) => *op = *to,
        (Reduces(_), _) => {}
    }
    false
}
