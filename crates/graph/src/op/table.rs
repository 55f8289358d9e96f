//! What is true of each op, said once: names, classes, exactness, sizes, arity.

use super::{BinaryOp, CmpOp, Exactness, Op, OpClass, ReduceOp, ScatterOp, UnaryOp};

impl<S> Op<S> {
    /// The name in dumps, errors, reports and `docs/ops.md`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            Self::CausalMask { .. } => "causal_mask",
            Self::Arange { .. } => "arange",
            Self::Random { dist, .. } => dist.name(),
            Self::Unary(op) => op.name(),
            Self::Elu => "elu",
            Self::Clamp => "clamp",
            Self::Binary(op) => op.name(),
            Self::Compare(op) | Self::CompareScalar(op) => op.name(),
            Self::Affine => "affine",
            Self::Powf => "powf",
            Self::Where => "where_cond",
            Self::Cast(_) => "to_dtype",
            Self::Reduce { op, .. } => op.name(),
            Self::ArgReduce { op, .. } => op.name(),
            Self::Matmul => "matmul",
            Self::Reshape { .. } => "reshape",
            Self::Permute { .. } => "permute",
            Self::Narrow { .. } => "narrow",
            Self::Stride { .. } => "stride",
            Self::Broadcast { .. } => "broadcast_as",
            Self::Contiguous => "contiguous",
            Self::Detach => "detach",
            Self::Barrier => "barrier",
            Self::Checkpoint { .. } => "checkpoint",
            Self::ToDevice => "to_device",
            Self::Concat { .. } => "cat",
            Self::IndexSelect { .. } => "index_select",
            Self::Gather { .. } => "gather",
            Self::Scatter { op, .. } => op.name(),
            Self::IndexAdd { .. } => "index_add",
            Self::SliceAssign { .. } => "slice_assign",
            Self::Softmax { .. } => "softmax",
            Self::LogSoftmax { .. } => "log_softmax",
            Self::RmsNorm { .. } => "rms_norm",
            Self::LayerNorm { .. } => "layer_norm",
            Self::Linear { .. } => "linear",
            Self::Lora { .. } => "lora",
            Self::LoraSegments { .. } => "lora_segments",
            Self::Glu { .. } => "glu",
            Self::Rope { .. } => "rope",
            Self::Attention { .. } => "attention",
            Self::AttentionBackward { .. } => "attention_backward",
            Self::Embedding => "embedding",
            Self::GroupNorm { .. } => "group_norm",
            Self::CrossEntropy => "cross_entropy",
            Self::QMatmul => "qmatmul",
            Self::Custom { name, .. } => name,
        }
    }

    /// The class of the op.
    #[must_use]
    pub fn class(&self) -> OpClass {
        match self {
            Self::Full { .. } | Self::CausalMask { .. } | Self::Arange { .. } | Self::Random { .. } => OpClass::Source,
            Self::Unary(_)
            | Self::Elu
            | Self::Clamp
            | Self::Binary(_)
            | Self::Compare(_)
            | Self::CompareScalar(_)
            | Self::Affine
            | Self::Powf
            | Self::Where
            | Self::Cast(_) => OpClass::Elementwise,
            Self::Reduce { .. } | Self::ArgReduce { .. } => OpClass::Reduction,
            Self::Reshape { .. }
            | Self::Permute { .. }
            | Self::Narrow { .. }
            | Self::Stride { .. }
            | Self::Broadcast { .. }
            | Self::Barrier
            | Self::Checkpoint { .. }
            | Self::Detach => OpClass::View,
            Self::Contiguous
            | Self::ToDevice
            | Self::Concat { .. }
            | Self::IndexSelect { .. }
            | Self::Gather { .. }
            | Self::Scatter { .. }
            | Self::IndexAdd { .. }
            | Self::SliceAssign { .. } => OpClass::Movement,
            Self::Matmul | Self::QMatmul => OpClass::Contraction,
            Self::Custom { .. } => OpClass::Opaque,
            Self::Softmax { .. }
            | Self::LogSoftmax { .. }
            | Self::RmsNorm { .. }
            | Self::LayerNorm { .. }
            | Self::Linear { .. }
            | Self::Lora { .. }
            | Self::LoraSegments { .. }
            | Self::Glu { .. }
            | Self::Rope { .. }
            | Self::Attention { .. }
            | Self::AttentionBackward { .. }
            | Self::GroupNorm { .. }
            | Self::CrossEntropy
            | Self::Embedding => OpClass::Composite,
        }
    }

    /// The inputs that a gradient can pass to: all of most ops, of a checkpoint the last.
    #[must_use]
    pub fn carrying<'a, T>(&self, inputs: &'a [T]) -> &'a [T] {
        match self {
            Self::Checkpoint { .. } => inputs.get(inputs.len().saturating_sub(1)..).unwrap_or_default(),
            _ => inputs,
        }
    }

    /// Whether a gradient can pass the op: the rest is cut (detach) or has none (comparisons, indices, random numbers).
    #[must_use]
    pub fn is_differentiable(&self) -> bool {
        !matches!(
            self,
            Self::Detach
                | Self::Barrier
                | Self::Compare(_)
                | Self::CompareScalar(_)
                | Self::Random { .. }
                | Self::ArgReduce { .. }
        )
    }

    /// Whether swapping the two inputs gives the same result.
    #[must_use]
    pub fn is_commutative(&self) -> bool {
        matches!(self, Self::Binary(BinaryOp::Add | BinaryOp::Mul) | Self::Compare(CmpOp::Eq | CmpOp::Ne))
    }

    /// How our kernel for this op relates to Candle's own, on the CPU.
    #[must_use]
    pub fn exactness(&self) -> Exactness {
        match self {
            Self::Full { .. }
            | Self::CausalMask { .. }
            | Self::Clamp
            | Self::Compare(_)
            | Self::CompareScalar(_)
            | Self::Where
            | Self::Cast(_)
            | Self::Reshape { .. }
            | Self::Permute { .. }
            | Self::Narrow { .. }
            | Self::Broadcast { .. }
            | Self::Contiguous
            | Self::Detach
            | Self::Barrier
            | Self::Checkpoint { .. }
            | Self::Concat { .. }
            | Self::IndexSelect { .. }
            | Self::SliceAssign { .. }
            | Self::Stride { .. }
            | Self::ToDevice
            | Self::Gather { .. }
            | Self::Scatter { op: ScatterOp::Set, .. }
            | Self::ArgReduce { .. }
            | Self::QMatmul
            | Self::Custom { .. }
            | Self::Embedding
            | Self::Reduce { op: ReduceOp::Max | ReduceOp::Min, .. } => Exactness::Exact,
            Self::Binary(
                BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div | BinaryOp::Maximum | BinaryOp::Minimum,
            ) => Exactness::Exact,
            Self::Unary(
                UnaryOp::Neg
                | UnaryOp::Abs
                | UnaryOp::Sqr
                | UnaryOp::Sqrt
                | UnaryOp::Floor
                | UnaryOp::Ceil
                | UnaryOp::Round
                | UnaryOp::Sign,
            ) => Exactness::Exact,
            // relu of −0 is +0 here and in Candle's f32 and f64, −0 in Candle's f16 and bf16
            Self::Unary(UnaryOp::Recip | UnaryOp::Rsqrt | UnaryOp::Relu) | Self::Affine => Exactness::ExactWide,
            // f16 and bf16 add in f32 and round once, Candle after every addition
            Self::Scatter { op: ScatterOp::Add, .. } | Self::IndexAdd { .. } => Exactness::ExactWide,
            Self::Unary(_)
            | Self::Binary(BinaryOp::Pow)
            | Self::Arange { .. }
            | Self::Random { .. }
            | Self::Elu
            | Self::GroupNorm { .. }
            | Self::CrossEntropy
            | Self::Powf
            | Self::Reduce { .. }
            | Self::Matmul
            | Self::Softmax { .. }
            | Self::LogSoftmax { .. }
            | Self::RmsNorm { .. }
            | Self::LayerNorm { .. }
            | Self::Linear { .. }
            | Self::Lora { .. }
            | Self::LoraSegments { .. }
            | Self::Glu { .. }
            | Self::Rope { .. }
            | Self::Attention { .. }
            | Self::AttentionBackward { .. } => Exactness::Rounds,
        }
    }

    /// Whether the op has an attribute that is a size, which [`Op::map_sizes`] would map.
    #[must_use]
    pub fn has_sizes(&self) -> bool {
        match self {
            Self::Full { .. }
            | Self::CausalMask { .. }
            | Self::Arange { .. }
            | Self::Random { .. }
            | Self::Reshape { .. }
            | Self::Narrow { .. }
            | Self::Stride { .. }
            | Self::Broadcast { .. }
            | Self::SliceAssign { .. }
            | Self::GroupNorm { .. }
            | Self::LoraSegments { .. }
            | Self::Custom { .. } => true,
            Self::Attention { window, .. } | Self::AttentionBackward { window, .. } => window.is_some(),
            _ => false,
        }
    }

    /// The same op with every size mapped: from recorded sizes to symbols and back.
    pub fn map_sizes<T>(&self, mut f: impl FnMut(&S) -> T) -> Op<T> {
        match self {
            Self::Full { shape, dtype } => Op::Full { shape: shape.iter().map(f).collect(), dtype: *dtype },
            Self::CausalMask { queries, keys, window, dtype } => {
                Op::CausalMask { queries: f(queries), keys: f(keys), window: window.as_ref().map(f), dtype: *dtype }
            }
            Self::Arange { len, dtype } => Op::Arange { len: f(len), dtype: *dtype },
            Self::Random { dist, shape, dtype } => {
                Op::Random { dist: *dist, shape: shape.iter().map(f).collect(), dtype: *dtype }
            }
            Self::Unary(op) => Op::Unary(*op),
            Self::Elu => Op::Elu,
            Self::Clamp => Op::Clamp,
            Self::Binary(op) => Op::Binary(*op),
            Self::Compare(op) => Op::Compare(*op),
            Self::CompareScalar(op) => Op::CompareScalar(*op),
            Self::Affine => Op::Affine,
            Self::Powf => Op::Powf,
            Self::Where => Op::Where,
            Self::Cast(dtype) => Op::Cast(*dtype),
            Self::Reduce { op, axes, keepdim } => Op::Reduce { op: *op, axes: *axes, keepdim: *keepdim },
            Self::ArgReduce { op, dim, keepdim } => Op::ArgReduce { op: *op, dim: *dim, keepdim: *keepdim },
            Self::Matmul => Op::Matmul,
            Self::Reshape { shape } => Op::Reshape { shape: shape.iter().map(f).collect() },
            Self::Permute { perm } => Op::Permute { perm: perm.clone() },
            Self::Narrow { dim, start, len } => Op::Narrow { dim: *dim, start: f(start), len: f(len) },
            Self::Stride { dim, start, len, step } => {
                Op::Stride { dim: *dim, start: f(start), len: f(len), step: f(step) }
            }
            Self::Broadcast { shape } => Op::Broadcast { shape: shape.iter().map(f).collect() },
            Self::Contiguous => Op::Contiguous,
            Self::Detach => Op::Detach,
            Self::Barrier => Op::Barrier,
            Self::Checkpoint { region } => Op::Checkpoint { region: *region },
            Self::ToDevice => Op::ToDevice,
            Self::Concat { dim } => Op::Concat { dim: *dim },
            Self::IndexSelect { dim } => Op::IndexSelect { dim: *dim },
            Self::Gather { dim } => Op::Gather { dim: *dim },
            Self::Scatter { op, dim } => Op::Scatter { op: *op, dim: *dim },
            Self::IndexAdd { dim } => Op::IndexAdd { dim: *dim },
            Self::SliceAssign { dim, start } => Op::SliceAssign { dim: *dim, start: f(start) },
            Self::Softmax { dim } => Op::Softmax { dim: *dim },
            Self::LogSoftmax { dim } => Op::LogSoftmax { dim: *dim },
            Self::RmsNorm { weight } => Op::RmsNorm { weight: *weight },
            Self::LayerNorm { weight, bias } => Op::LayerNorm { weight: *weight, bias: *bias },
            Self::Linear { bias } => Op::Linear { bias: *bias },
            Self::Lora { base } => Op::Lora { base: *base },
            Self::LoraSegments { rows } => Op::LoraSegments { rows: rows.iter().map(f).collect() },
            Self::Glu { act } => Op::Glu { act: *act },
            Self::Rope { interleaved } => Op::Rope { interleaved: *interleaved },
            Self::Attention { mask, causal, softcap, window } => {
                Op::Attention { mask: *mask, causal: *causal, softcap: *softcap, window: window.as_ref().map(f) }
            }
            Self::AttentionBackward { mask, causal, softcap, window } => Op::AttentionBackward {
                mask: *mask,
                causal: *causal,
                softcap: *softcap,
                window: window.as_ref().map(f),
            },
            Self::Embedding => Op::Embedding,
            Self::GroupNorm { groups, weight, bias } => {
                Op::GroupNorm { groups: f(groups), weight: *weight, bias: *bias }
            }
            Self::CrossEntropy => Op::CrossEntropy,
            Self::QMatmul => Op::QMatmul,
            Self::Custom { name, arity, shape, dtype } => {
                Op::Custom { name, arity: *arity, shape: shape.iter().map(f).collect(), dtype: *dtype }
            }
        }
    }

    /// The number of inputs, or `None` where it varies (concat, barrier, checkpoint).
    #[must_use]
    pub fn arity(&self) -> Option<usize> {
        Some(match self {
            Self::Full { .. } | Self::CausalMask { .. } | Self::Arange { .. } => 0,
            Self::Binary(_) | Self::Compare(_) | Self::Matmul | Self::QMatmul | Self::CrossEntropy => 2,
            Self::IndexSelect { .. } | Self::SliceAssign { .. } | Self::Glu { .. } | Self::Embedding => 2,
            Self::Gather { .. } => 2,
            Self::Where | Self::Rope { .. } | Self::Scatter { .. } | Self::IndexAdd { .. } => 3,
            Self::Custom { arity, .. } => usize::from(*arity),
            Self::Concat { .. } | Self::Barrier | Self::Checkpoint { .. } => return None,
            Self::RmsNorm { weight } => 1 + usize::from(*weight),
            Self::LayerNorm { weight, bias } | Self::GroupNorm { weight, bias, .. } => {
                1 + usize::from(*weight) + usize::from(*bias)
            }
            Self::Linear { bias } => 2 + usize::from(*bias),
            Self::Lora { base } => 3 + usize::from(*base),
            Self::LoraSegments { rows } => 2 + rows.len(),
            Self::Attention { mask, .. } => 3 + usize::from(*mask),
            Self::AttentionBackward { mask, .. } => 4 + usize::from(*mask),
            _ => 1,
        })
    }

    /// The number of run-time scalars.
    #[must_use]
    pub fn scalar_count(&self) -> usize {
        match self {
            Self::Affine | Self::Clamp | Self::Arange { .. } | Self::Random { .. } => 2,
            Self::Full { .. }
            | Self::Elu
            | Self::GroupNorm { .. }
            | Self::Custom { .. }
            | Self::Powf
            | Self::CompareScalar(_)
            | Self::RmsNorm { .. }
            | Self::LayerNorm { .. }
            | Self::Lora { .. } => 1,
            Self::Attention { softcap, .. } | Self::AttentionBackward { softcap, .. } => 1 + usize::from(*softcap),
            Self::LoraSegments { rows } => rows.len() / 2,
            _ => 0,
        }
    }
}
