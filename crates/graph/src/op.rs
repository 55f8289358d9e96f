//! The operations and what is true of each, said once.

use candle_core::DType;
use smallvec::SmallVec;
use std::fmt;

/// Dimensions of a shape: inline up to rank 6.
pub type Dims<S = usize> = SmallVec<[S; 6]>;

/// Run-time scalars of a node (a factor, an epsilon). They are parameters of a plan, never part of its key.
pub type Scalars = SmallVec<[f64; 2]>;

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident => $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }
        impl $name {
            /// Every variant, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
            /// The name in dumps, errors and reports.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

named_enum! {
    /// Elementwise functions of one floating-point tensor.
    UnaryOp {
        /// −x
        Neg => "neg",
        /// |x|
        Abs => "abs",
        /// 1/x
        Recip => "recip",
        /// x²
        Sqr => "sqr",
        /// √x
        Sqrt => "sqrt",
        /// 1/√x
        Rsqrt => "rsqrt",
        /// eˣ
        Exp => "exp",
        /// The natural logarithm.
        Log => "log",
        /// Sine, radians.
        Sin => "sin",
        /// Cosine, radians.
        Cos => "cos",
        /// Hyperbolic tangent.
        Tanh => "tanh",
        /// The error function.
        Erf => "erf",
        /// x/2·(1 + tanh(√(2/π)(x + 0.044715x³))): the tanh form (Hendrycks and Gimpel, arXiv:1606.08415, §2).
        Gelu => "gelu",
        /// x/2·(1 + erf(x/√2)): the exact form (Hendrycks and Gimpel, arXiv:1606.08415, §2).
        GeluErf => "gelu_erf",
        /// max(x, 0)
        Relu => "relu",
        /// x/(1 + e⁻ˣ)
        Silu => "silu",
        /// 1/(1 + e⁻ˣ)
        Sigmoid => "sigmoid",
        /// The largest integer not above x.
        Floor => "floor",
        /// The smallest integer not below x.
        Ceil => "ceil",
        /// The nearest integer, halves away from zero.
        Round => "round",
        /// −1, 0 or 1.
        Sign => "sign",
    }
}

named_enum! {
    /// Elementwise functions of two tensors of one dtype, with broadcasting.
    BinaryOp {
        /// a + b
        Add => "add",
        /// a − b
        Sub => "sub",
        /// a·b
        Mul => "mul",
        /// a/b
        Div => "div",
        /// The larger one.
        Maximum => "maximum",
        /// The smaller one.
        Minimum => "minimum",
    }
}

named_enum! {
    /// Elementwise comparisons of two tensors of one dtype, with broadcasting; the result is u8, 1 or 0.
    CmpOp {
        /// a = b
        Eq => "eq",
        /// a ≠ b
        Ne => "ne",
        /// a < b
        Lt => "lt",
        /// a ≤ b
        Le => "le",
        /// a > b
        Gt => "gt",
        /// a ≥ b
        Ge => "ge",
    }
}

named_enum! {
    /// Reductions over a set of dims.
    ReduceOp {
        /// The sum; 0 over nothing.
        Sum => "sum",
        /// The sum times 1/n.
        Mean => "mean",
        /// The largest element.
        Max => "max",
        /// The smallest element.
        Min => "min",
    }
}

/// An operation with its attributes. Tensors are inputs of the node, numbers that change from step to step are its
/// [`Scalars`]; sizes are of type `S`: `usize` when recorded, a symbol ([`crate::Sym`]) in a captured graph.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op<S = usize> {
    /// A tensor filled with one scalar. No inputs; scalars: the value.
    Full {
        /// The shape.
        shape: Dims<S>,
        /// The dtype.
        dtype: DType,
    },
    /// An additive causal mask: 0 where query i sees key j (j ≤ keys − queries + i, and within the window), −∞ elsewhere.
    /// No inputs.
    CausalMask {
        /// Rows.
        queries: S,
        /// Columns; at least `queries`.
        keys: S,
        /// At most this many keys are seen, the query's own included.
        window: Option<S>,
        /// A floating-point dtype.
        dtype: DType,
    },
    /// An elementwise function. Inputs: x.
    Unary(UnaryOp),
    /// An elementwise function of two tensors. Inputs: a, b.
    Binary(BinaryOp),
    /// A comparison. Inputs: a, b.
    Compare(CmpOp),
    /// x·mul + add. Inputs: x; scalars: mul, add.
    Affine,
    /// xᵉ. Inputs: x; scalars: e.
    Powf,
    /// A comparison with a scalar. Inputs: x; scalars: the right-hand side.
    CompareScalar(CmpOp),
    /// Elementwise choice. Inputs: condition (u8, u32 or i64, non-zero is true), a, b.
    Where,
    /// Conversion to another dtype. Inputs: x.
    Cast(DType),
    /// A reduction over the dims in the bit mask. Inputs: x.
    Reduce {
        /// Which reduction.
        op: ReduceOp,
        /// Bit d is set when dim d is reduced.
        axes: u32,
        /// Whether reduced dims stay as dims of size one.
        keepdim: bool,
    },
    /// Matrix product with broadcast batch dims. Inputs: a (…, m, k), b (…, k, n).
    Matmul,
    /// The same elements under another shape. Inputs: x.
    Reshape {
        /// The new shape.
        shape: Dims<S>,
    },
    /// Reordered dims. Inputs: x.
    Permute {
        /// The source dim of each result dim.
        perm: SmallVec<[u8; 8]>,
    },
    /// A range of one dim. Inputs: x.
    Narrow {
        /// The dim.
        dim: u8,
        /// The first index.
        start: S,
        /// The number of indices.
        len: S,
    },
    /// Broadcast to a shape (numpy's rule). Inputs: x.
    Broadcast {
        /// The shape.
        shape: Dims<S>,
    },
    /// The same tensor in row-major order. Inputs: x.
    Contiguous,
    /// The same tensor, cut from Candle's tape. Inputs: x.
    Detach,
    /// Tensors behind one another along a dim. Inputs: all parts.
    Concat {
        /// The dim.
        dim: u8,
    },
    /// Slices of one dim chosen by index. Inputs: x, ids (u8, u32 or i64, one-dimensional).
    IndexSelect {
        /// The dim.
        dim: u8,
    },
    /// `x` with `src` written over the range that begins at `start` of `dim`. Inputs: x, src.
    SliceAssign {
        /// The dim.
        dim: u8,
        /// The first index written.
        start: S,
    },
    /// exp(x − max)/sum over one dim. Inputs: x. Composite.
    Softmax {
        /// The dim.
        dim: u8,
    },
    /// x − max − log(sum(exp(x − max))) over one dim. Inputs: x. Composite.
    LogSoftmax {
        /// The dim.
        dim: u8,
    },
    /// x/√(mean(x²) + eps)·w over the last dim (Zhang and Sennrich, arXiv:1910.07467, eq. 4). Inputs: x, w if `weight`;
    /// scalars: eps. Composite.
    RmsNorm {
        /// Whether a weight follows.
        weight: bool,
    },
    /// (x − mean)/√(var + eps)·w + b over the last dim, biased variance (Ba et al., arXiv:1607.06450, eq. 4).
    /// Inputs: x, w if `weight`, b if `bias`; scalars: eps. Composite.
    LayerNorm {
        /// Whether a weight follows.
        weight: bool,
        /// Whether a bias follows.
        bias: bool,
    },
    /// x·wᵀ (+ b). Inputs: x (…, in), w (out, in), b (out) if `bias`. Composite.
    Linear {
        /// Whether a bias follows.
        bias: bool,
    },
    /// (x·A·B)·scale (+ base) (Hu et al., arXiv:2106.09685, §4.1). Inputs: x (…, in), A (in, r), B (r, out), base (…, out) if
    /// `base`; scalars: scale. Composite.
    Lora {
        /// Whether a base to add to follows.
        base: bool,
    },
    /// act(gate)·up: SwiGLU and GeGLU (Shazeer, arXiv:2002.05202, §2). Inputs: gate, up. Composite.
    Glu {
        /// The activation of the gate.
        act: UnaryOp,
    },
    /// Rotary position embedding (Su et al., arXiv:2104.09864, eq. 34). Inputs: x (b, h, s, d), cos and sin (s, d/2) or
    /// (b, s, d/2). Composite.
    Rope {
        /// Pairs are neighbours (2i, 2i+1) instead of (i, i + d/2).
        interleaved: bool,
    },
    /// softmax(softcap(q·kᵀ·scale) + mask)·v (Vaswani et al., arXiv:1706.03762, eq. 1). Inputs: q (b, h, s, d), k (b, hk, t, d),
    /// v (b, hk, t, dv), mask if `mask` (additive, broadcast to (b, h, s, t)); h is a multiple of hk. Scalars: scale, softcap if
    /// `softcap`. Composite.
    Attention {
        /// Whether a mask follows.
        mask: bool,
        /// Query i sees keys 0..=t−s+i.
        causal: bool,
        /// Scores pass through cap·tanh(score/cap).
        softcap: bool,
        /// With `causal`, a query sees at most this many keys, itself included.
        window: Option<S>,
    },
    /// Rows of a table chosen by ids of any rank. Inputs: table (n, h), ids (u8, u32 or i64). Composite.
    Embedding,
}

/// How an op touches its data; what the passes and the lowering ask instead of matching on the enum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OpClass {
    /// Makes data from nothing.
    Source,
    /// One result element from the elements at the same (broadcast) place.
    Elementwise,
    /// One result per row of the reduced dims.
    Reduction,
    /// No data moves.
    View,
    /// Data moves, no arithmetic.
    Movement,
    /// Sums of products.
    Contraction,
    /// A semantic composite; it decomposes into the others.
    Composite,
}

/// Whether the kernels of candle-lazy for this op may round differently than Candle's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Exactness {
    /// Bit for bit what eager Candle gives, in every dtype it supports.
    Exact,
    /// Bit for bit in f32 and f64; f16 and bf16 round once where Candle rounds after every inner step.
    ExactWide,
    /// Another order of summation or another approximation; the error against f64 is bounded instead.
    Rounds,
}

impl<S> Op<S> {
    /// The name in dumps, errors, reports and `docs/ops.md`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            Self::CausalMask { .. } => "causal_mask",
            Self::Unary(op) => op.name(),
            Self::Binary(op) => op.name(),
            Self::Compare(op) | Self::CompareScalar(op) => op.name(),
            Self::Affine => "affine",
            Self::Powf => "powf",
            Self::Where => "where_cond",
            Self::Cast(_) => "to_dtype",
            Self::Reduce { op, .. } => op.name(),
            Self::Matmul => "matmul",
            Self::Reshape { .. } => "reshape",
            Self::Permute { .. } => "permute",
            Self::Narrow { .. } => "narrow",
            Self::Broadcast { .. } => "broadcast_as",
            Self::Contiguous => "contiguous",
            Self::Detach => "detach",
            Self::Concat { .. } => "cat",
            Self::IndexSelect { .. } => "index_select",
            Self::SliceAssign { .. } => "slice_assign",
            Self::Softmax { .. } => "softmax",
            Self::LogSoftmax { .. } => "log_softmax",
            Self::RmsNorm { .. } => "rms_norm",
            Self::LayerNorm { .. } => "layer_norm",
            Self::Linear { .. } => "linear",
            Self::Lora { .. } => "lora",
            Self::Glu { .. } => "glu",
            Self::Rope { .. } => "rope",
            Self::Attention { .. } => "attention",
            Self::Embedding => "embedding",
        }
    }

    /// The class of the op.
    #[must_use]
    pub fn class(&self) -> OpClass {
        match self {
            Self::Full { .. } | Self::CausalMask { .. } => OpClass::Source,
            Self::Unary(_)
            | Self::Binary(_)
            | Self::Compare(_)
            | Self::CompareScalar(_)
            | Self::Affine
            | Self::Powf
            | Self::Where
            | Self::Cast(_) => OpClass::Elementwise,
            Self::Reduce { .. } => OpClass::Reduction,
            Self::Reshape { .. }
            | Self::Permute { .. }
            | Self::Narrow { .. }
            | Self::Broadcast { .. }
            | Self::Detach => OpClass::View,
            Self::Contiguous | Self::Concat { .. } | Self::IndexSelect { .. } | Self::SliceAssign { .. } => {
                OpClass::Movement
            }
            Self::Matmul => OpClass::Contraction,
            Self::Softmax { .. }
            | Self::LogSoftmax { .. }
            | Self::RmsNorm { .. }
            | Self::LayerNorm { .. }
            | Self::Linear { .. }
            | Self::Lora { .. }
            | Self::Glu { .. }
            | Self::Rope { .. }
            | Self::Attention { .. }
            | Self::Embedding => OpClass::Composite,
        }
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
            | Self::Binary(_)
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
            | Self::Concat { .. }
            | Self::IndexSelect { .. }
            | Self::SliceAssign { .. }
            | Self::Embedding
            | Self::Reduce { op: ReduceOp::Max | ReduceOp::Min, .. } => Exactness::Exact,
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
            Self::Unary(_)
            | Self::Powf
            | Self::Reduce { .. }
            | Self::Matmul
            | Self::Softmax { .. }
            | Self::LogSoftmax { .. }
            | Self::RmsNorm { .. }
            | Self::LayerNorm { .. }
            | Self::Linear { .. }
            | Self::Lora { .. }
            | Self::Glu { .. }
            | Self::Rope { .. }
            | Self::Attention { .. } => Exactness::Rounds,
        }
    }

    /// The same op with every size mapped: from recorded sizes to symbols and back.
    pub fn map_sizes<T>(&self, mut f: impl FnMut(&S) -> T) -> Op<T> {
        match self {
            Self::Full { shape, dtype } => Op::Full { shape: shape.iter().map(f).collect(), dtype: *dtype },
            Self::CausalMask { queries, keys, window, dtype } => {
                Op::CausalMask { queries: f(queries), keys: f(keys), window: window.as_ref().map(f), dtype: *dtype }
            }
            Self::Unary(op) => Op::Unary(*op),
            Self::Binary(op) => Op::Binary(*op),
            Self::Compare(op) => Op::Compare(*op),
            Self::CompareScalar(op) => Op::CompareScalar(*op),
            Self::Affine => Op::Affine,
            Self::Powf => Op::Powf,
            Self::Where => Op::Where,
            Self::Cast(dtype) => Op::Cast(*dtype),
            Self::Reduce { op, axes, keepdim } => Op::Reduce { op: *op, axes: *axes, keepdim: *keepdim },
            Self::Matmul => Op::Matmul,
            Self::Reshape { shape } => Op::Reshape { shape: shape.iter().map(f).collect() },
            Self::Permute { perm } => Op::Permute { perm: perm.clone() },
            Self::Narrow { dim, start, len } => Op::Narrow { dim: *dim, start: f(start), len: f(len) },
            Self::Broadcast { shape } => Op::Broadcast { shape: shape.iter().map(f).collect() },
            Self::Contiguous => Op::Contiguous,
            Self::Detach => Op::Detach,
            Self::Concat { dim } => Op::Concat { dim: *dim },
            Self::IndexSelect { dim } => Op::IndexSelect { dim: *dim },
            Self::SliceAssign { dim, start } => Op::SliceAssign { dim: *dim, start: f(start) },
            Self::Softmax { dim } => Op::Softmax { dim: *dim },
            Self::LogSoftmax { dim } => Op::LogSoftmax { dim: *dim },
            Self::RmsNorm { weight } => Op::RmsNorm { weight: *weight },
            Self::LayerNorm { weight, bias } => Op::LayerNorm { weight: *weight, bias: *bias },
            Self::Linear { bias } => Op::Linear { bias: *bias },
            Self::Lora { base } => Op::Lora { base: *base },
            Self::Glu { act } => Op::Glu { act: *act },
            Self::Rope { interleaved } => Op::Rope { interleaved: *interleaved },
            Self::Attention { mask, causal, softcap, window } => {
                Op::Attention { mask: *mask, causal: *causal, softcap: *softcap, window: window.as_ref().map(f) }
            }
            Self::Embedding => Op::Embedding,
        }
    }

    /// The number of inputs, or `None` where it varies (concat).
    #[must_use]
    pub fn arity(&self) -> Option<usize> {
        Some(match self {
            Self::Full { .. } | Self::CausalMask { .. } => 0,
            Self::Binary(_) | Self::Compare(_) | Self::Matmul => 2,
            Self::IndexSelect { .. } | Self::SliceAssign { .. } | Self::Glu { .. } | Self::Embedding => 2,
            Self::Where | Self::Rope { .. } => 3,
            Self::Concat { .. } => return None,
            Self::RmsNorm { weight } => 1 + usize::from(*weight),
            Self::LayerNorm { weight, bias } => 1 + usize::from(*weight) + usize::from(*bias),
            Self::Linear { bias } => 2 + usize::from(*bias),
            Self::Lora { base } => 3 + usize::from(*base),
            Self::Attention { mask, .. } => 3 + usize::from(*mask),
            _ => 1,
        })
    }

    /// The number of run-time scalars.
    #[must_use]
    pub fn scalar_count(&self) -> usize {
        match self {
            Self::Affine => 2,
            Self::Full { .. }
            | Self::Powf
            | Self::CompareScalar(_)
            | Self::RmsNorm { .. }
            | Self::LayerNorm { .. }
            | Self::Lora { .. } => 1,
            Self::Attention { softcap, .. } => 1 + usize::from(*softcap),
            _ => 0,
        }
    }
}

impl<S: fmt::Display> fmt::Display for Op<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |dims: &[S]| dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::Full { shape, dtype } => write!(f, "full([{}], {})", list(shape), dtype.as_str()),
            Self::CausalMask { queries, keys, window, dtype } => match window {
                Some(w) => write!(f, "causal_mask({queries}, {keys}, window {w}, {})", dtype.as_str()),
                None => write!(f, "causal_mask({queries}, {keys}, {})", dtype.as_str()),
            },
            Self::Cast(dtype) => write!(f, "to_dtype({})", dtype.as_str()),
            Self::CompareScalar(op) => write!(f, "{}_scalar", op.name()),
            Self::Reduce { op, axes, keepdim } => {
                let dims: Vec<u32> = (0..32).filter(|d| axes & (1 << d) != 0).collect();
                write!(f, "{}({dims:?}{})", op.name(), if *keepdim { ", keepdim" } else { "" })
            }
            Self::Reshape { shape } => write!(f, "reshape([{}])", list(shape)),
            Self::Permute { perm } => write!(f, "permute({:?})", perm.as_slice()),
            Self::Narrow { dim, start, len } => write!(f, "narrow({dim}, {start}, {len})"),
            Self::Broadcast { shape } => write!(f, "broadcast_as([{}])", list(shape)),
            Self::Concat { dim } => write!(f, "cat({dim})"),
            Self::IndexSelect { dim } => write!(f, "index_select({dim})"),
            Self::SliceAssign { dim, start } => write!(f, "slice_assign({dim}, {start})"),
            Self::Softmax { dim } => write!(f, "softmax({dim})"),
            Self::LogSoftmax { dim } => write!(f, "log_softmax({dim})"),
            Self::Glu { act } => write!(f, "glu({})", act.name()),
            Self::Rope { interleaved } => {
                write!(f, "rope({})", if *interleaved { "interleaved" } else { "half-split" })
            }
            Self::Attention { mask, causal, softcap, window } => {
                let mut parts = Vec::new();
                if *causal {
                    parts.push("causal".to_string());
                }
                if *mask {
                    parts.push("mask".to_string());
                }
                if *softcap {
                    parts.push("softcap".to_string());
                }
                if let Some(window) = window {
                    parts.push(format!("window {window}"));
                }
                write!(f, "attention({})", parts.join(", "))
            }
            other => f.write_str(other.name()),
        }
    }
}

#[cfg(test)]
mod tests;
