//! The decomposition of a composite, recorded op by op on lazy tensors; and the same with one op gone wrong.

use super::lazy_modes::evaluate;
use super::{Cell, Outcome, Subject};
use crate::compare::same_bits;
use crate::Result;
use candle_core::{DType, Device};
use candle_lazy_exec::{EvalOptions, LazyTensor};
use candle_lazy_graph::{decompose, BuildSite, Dims, Node, Op, OpClass, Recorder, ReduceOp, Scalars};
use candle_lazy_ops::fault;

/// What goes wrong with one recorded op.
#[derive(Debug, Clone, Copy)]
pub enum Wrong {
    /// It is left out: whoever reads it reads its first input.
    Dropped,
    /// Its inputs change places.
    Swapped,
    /// One of its scalars is this number.
    Scalar(usize, f64),
    /// It reduces otherwise.
    Reduces(ReduceOp),
    /// A causal mask loses its window.
    Unwindowed,
}

/// A fault of a decomposition: its name, the composite, and which recorded op (by name, counted from 0) goes wrong how.
pub type DecomposeFault = (&'static str, &'static str, &'static str, usize, Wrong);

/// Every fault of a decomposition.
pub const DECOMPOSE_FAULTS: &[DecomposeFault] = &[
    ("decompose.softmax.shift", "softmax", "sub", 0, Wrong::Dropped),
    ("decompose.softmax.exp", "softmax", "exp", 0, Wrong::Dropped),
    ("decompose.softmax.sum", "softmax", "sum", 0, Wrong::Reduces(ReduceOp::Max)),
    ("decompose.log_softmax.shift", "log_softmax", "sub", 0, Wrong::Dropped),
    ("decompose.log_softmax.log", "log_softmax", "log", 0, Wrong::Dropped),
    ("decompose.log_softmax.order", "log_softmax", "sub", 1, Wrong::Swapped),
    ("decompose.rms_norm.eps", "rms_norm", "affine", 0, Wrong::Scalar(1, 0.0)),
    ("decompose.rms_norm.root", "rms_norm", "sqrt", 0, Wrong::Dropped),
    ("decompose.rms_norm.weight", "rms_norm", "mul", 0, Wrong::Dropped),
    ("decompose.layer_norm.centre", "layer_norm", "sub", 0, Wrong::Dropped),
    ("decompose.layer_norm.mean", "layer_norm", "mean", 1, Wrong::Reduces(ReduceOp::Sum)),
    ("decompose.layer_norm.bias", "layer_norm", "add", 0, Wrong::Dropped),
    ("decompose.layer_norm.eps", "layer_norm", "affine", 0, Wrong::Scalar(1, 0.0)),
    ("decompose.linear.transpose", "linear", "permute", 0, Wrong::Dropped),
    ("decompose.linear.bias", "linear", "add", 0, Wrong::Dropped),
    ("decompose.lora.scale", "lora", "affine", 0, Wrong::Scalar(0, 1.0)),
    ("decompose.lora.base", "lora", "add", 0, Wrong::Dropped),
    ("decompose.lora_segments.scale", "lora_segments", "lora", 0, Wrong::Scalar(0, 1.0)),
    ("decompose.glu.activation", "glu", "silu", 0, Wrong::Dropped),
    ("decompose.rope.sign", "rope", "sub", 0, Wrong::Swapped),
    ("decompose.rope.halves", "rope", "cat", 0, Wrong::Swapped),
    ("decompose.rope.second", "rope", "mul", 3, Wrong::Dropped),
    ("decompose.attention.scale", "attention", "affine", 0, Wrong::Scalar(0, 1.0)),
    ("decompose.attention.softcap", "attention", "tanh", 0, Wrong::Dropped),
    ("decompose.attention.weights", "attention", "softmax", 0, Wrong::Dropped),
    ("decompose.attention.window", "attention", "causal_mask", 0, Wrong::Unwindowed),
    ("decompose.attention.mask", "attention", "add", 0, Wrong::Dropped),
    ("decompose.attention_backward.sum", "attention_backward", "sub", 0, Wrong::Dropped),
    ("decompose.attention_backward.weights", "attention_backward", "mul", 1, Wrong::Dropped),
    ("decompose.attention_backward.turn", "attention_backward", "permute", 3, Wrong::Dropped),
    ("decompose.embedding.rows", "embedding", "index_select", 0, Wrong::Dropped),
];

struct OnLazy {
    composite: &'static str,
    seen: Vec<&'static str>,
}

impl OnLazy {
    /// What goes wrong with the op that is recorded now, if a fault is active.
    fn wrong(&mut self, name: &'static str) -> Option<Wrong> {
        if !fault::any() {
            return None;
        }
        let count = self.seen.iter().filter(|n| **n == name).count();
        self.seen.push(name);
        let here = |f: &&DecomposeFault| f.1 == self.composite && f.2 == name && f.3 == count && fault::active(f.0);
        DECOMPOSE_FAULTS.iter().find(here).map(|f| f.4)
    }
}

impl Recorder for OnLazy {
    type Ref = LazyTensor;

    fn dims(&self, node: &LazyTensor) -> Dims {
        Dims::from_slice(node.dims())
    }

    fn dtype(&self, node: &LazyTensor) -> DType {
        node.dtype()
    }

    fn push(
        &mut self,
        mut op: Op,
        mut scalars: Scalars,
        inputs: &[LazyTensor],
    ) -> candle_lazy_graph::Result<LazyTensor> {
        let mut nodes: Vec<_> = inputs.iter().map(|t| t.node().clone()).collect();
        match (self.wrong(op.name()), &mut op) {
            (Some(Wrong::Dropped), _) if !inputs.is_empty() => return Ok(inputs[0].clone()),
            (Some(Wrong::Swapped), _) => nodes.reverse(),
            (Some(Wrong::Scalar(at, to)), _) => scalars.iter_mut().skip(at).take(1).for_each(|s| *s = to),
            (Some(Wrong::Reduces(to)), Op::Reduce { op, .. }) => *op = to,
            (Some(Wrong::Unwindowed), Op::CausalMask { window, .. }) => *window = None,
            _ => {}
        }
        let node = Node::record(op, &scalars, &nodes, Some(&Device::Cpu), BuildSite::here())?;
        Ok(LazyTensor::from_node(node))
    }
}

/// The decomposition as it is recorded: judged like the composite, and the bits of the composite decomposed by capture.
pub(super) fn check(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    if case.op.class() != OpClass::Composite {
        return Ok(None);
    }
    let leaves: Vec<LazyTensor> = subject.inputs.iter().map(LazyTensor::from).collect();
    let by_hand = || -> Result<LazyTensor> {
        let mut recorder = OnLazy { composite: case.op.name(), seen: Vec::new() };
        Ok(decompose(&case.op, &case.scalars, &leaves, &mut recorder)?)
    };
    let y = by_hand()?;
    let (got, report) = evaluate(&y, &EvalOptions { validate: true, ..EvalOptions::default() })?;
    let mut cell = subject.verdict("recorded", &got)?;
    cell.kernels = report.kernels;
    if cell.outcome != Outcome::Passed {
        return Ok(Some(cell));
    }
    let whole = crate::lazy::record(&case.op, &case.scalars, &leaves)?;
    let options = EvalOptions { decompose: true, validate: true, ..EvalOptions::default() };
    let (want, _) = evaluate(&whole, &options)?;
    // a decomposition may hold another composite (group norm a layer norm), whose kernel rounds less often than its parts
    let (got, _) = evaluate(&by_hand()?, &options)?;
    if let Err(text) = same_bits("recorded against decomposed by capture", &got, &want)? {
        cell.outcome = Outcome::Failed(text);
    }
    Ok(Some(cell))
}
