//! Which derivative each op has.
//!
//! Where a function has a kink or ties, the convention is that of Candle's autograd: relu and abs have slope 1 at 0, maximum and minimum
//! share equal elements by halves, and each of several equal extremes of a reduction gets the whole gradient.

use super::{composites, contractions, elementwise, movement, Call, Parts, R};
use crate::custom::CustomOp;
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use crate::op::Op;

/// The gradients of the inputs of a call, each of its input's shape and dtype.
pub(super) fn apply(call: &Call<'_>, r: &mut R<'_, '_>) -> Result<Parts> {
    match &call.expr.op {
        // nothing comes in, or nothing passes
        Op::Full { .. }
        | Op::CausalMask { .. }
        | Op::Arange { .. }
        | Op::Random { .. }
        | Op::Compare(_)
        | Op::CompareScalar(_)
        | Op::ArgReduce { .. }
        | Op::Barrier
        | Op::Detach => Ok(call.none()),
        Op::Checkpoint { .. } => {
            let mut parts = call.none();
            if let Some(last) = parts.last_mut() {
                *last = Some(call.g.clone());
            }
            Ok(parts)
        }
        Op::Unary(_)
        | Op::Binary(_)
        | Op::Affine
        | Op::Powf
        | Op::Elu
        | Op::Clamp
        | Op::Where
        | Op::Cast(_)
        | Op::Reduce { .. } => elementwise::apply(call, r),
        Op::Reshape { .. }
        | Op::Permute { .. }
        | Op::Narrow { .. }
        | Op::Stride { .. }
        | Op::Broadcast { .. }
        | Op::Contiguous
        | Op::ToDevice
        | Op::Concat { .. }
        | Op::IndexSelect { .. }
        | Op::Gather { .. }
        | Op::Scatter { .. }
        | Op::IndexAdd { .. }
        | Op::SliceAssign { .. }
        | Op::Embedding => movement::apply(call, r),
        Op::Matmul | Op::Linear { .. } | Op::Lora { .. } | Op::LoraSegments { .. } | Op::QMatmul => {
            contractions::apply(call, r)
        }
        Op::Softmax { .. }
        | Op::LogSoftmax { .. }
        | Op::RmsNorm { .. }
        | Op::LayerNorm { .. }
        | Op::Glu { .. }
        | Op::Rope { .. }
        | Op::Attention { .. }
        | Op::AttentionBackward { .. }
        | Op::GroupNorm { .. }
        | Op::CrossEntropy => composites::apply(call, r),
        Op::Custom { .. } => custom(call),
    }
}

/// Candle's own backward of a custom op, once per input.
fn custom(call: &Call<'_>) -> Result<Parts> {
    let mut parts = call.none();
    let Some(op) = &call.expr.custom else { return Ok(parts) };
    if let (CustomOp::Backward(..), true) = (op, (0..parts.len()).any(|i| call.needs(i))) {
        let detail = "the backward of a custom op is Candle's tensors alone, and has no derivative itself";
        return Err(Error::new(op.name(), ErrorKind::Unsupported(detail.into())).at(call.y.site()));
    }
    for (i, part) in parts.iter_mut().enumerate() {
        if call.needs(i) {
            let mut inputs = call.expr.inputs.clone();
            inputs.extend([call.y.clone(), call.g.clone()]);
            let backward = CustomOp::Backward(Box::new(op.clone()), i as u8);
            let (x, site) = (call.x(i), call.y.site().clone());
            *part = Some(Node::record_custom(backward, x.dims(), x.dtype(), &inputs, site)?);
        }
    }
    Ok(parts)
}
