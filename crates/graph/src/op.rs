//! The operations and what is true of each, said once.

use candle_core::DType;
use smallvec::SmallVec;

/// Dimensions of a shape: inline up to rank 4.
pub type Dims<S = usize> = SmallVec<[S; 4]>;

/// Run-time scalars of a node (a factor, an epsilon). They are parameters of a plan, never part of its key.
pub type Scalars = SmallVec<[f64; 2]>;

mod display;
mod table;

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
        /// a to the power of b.
        Pow => "pow",
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
        /// The unbiased variance: Σ(x − mean)²/(n − 1).
        Var => "var",
        /// log Σ exp(x), with the largest element taken out first.
        LogSumExp => "log_sum_exp",
    }
}

named_enum! {
    /// Where along a dim an extreme element stands.
    ArgOp {
        /// The first largest element.
        Max => "argmax",
        /// The first smallest element.
        Min => "argmin",
    }
}

named_enum! {
    /// Distributions of random numbers.
    Distribution {
        /// Evenly spread over lo ≤ x < up.
        Uniform => "rand",
        /// Normal with a mean and a standard deviation.
        Normal => "randn",
    }
}

named_enum! {
    /// What a scatter does with the element that it meets.
    ScatterOp {
        /// Replaces it; of several sources for one place the last one counts.
        Set => "scatter",
        /// Adds to it.
        Add => "scatter_add",
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
    /// start + i·step for i = 0…n−1. No inputs; scalars: start, step.
    Arange {
        /// The number of elements.
        len: S,
        /// The dtype.
        dtype: DType,
    },
    /// Random numbers, a function of the key and of each element's place alone. Inputs: key (an integer tensor of one
    /// element); scalars: lo and up, or mean and standard deviation.
    Random {
        /// The distribution.
        dist: Distribution,
        /// The shape.
        shape: Dims<S>,
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
    /// x where it is not negative, else alpha·(eˣ − 1) (Clevert et al., arXiv:1511.07289, eq. 15). Inputs: x; scalars: alpha.
    Elu,
    /// min(max(x, low), high). Inputs: x; scalars: low, high.
    Clamp,
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
    /// The place of an extreme element along one dim, as u32. Inputs: x.
    ArgReduce {
        /// Which extreme.
        op: ArgOp,
        /// The dim.
        dim: u8,
        /// Whether the dim stays as a dim of size one.
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
    /// Every `step`-th index of one dim. Inputs: x.
    Stride {
        /// The dim.
        dim: u8,
        /// The first index.
        start: S,
        /// The number of indices.
        len: S,
        /// The distance of neighbours, at least 1.
        step: S,
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
    /// The same tensor, not before the other inputs are there, and merged with nothing that is computed from x itself (XLA's
    /// `optimization_barrier`). No gradient passes it. Inputs: x, then any others.
    Barrier,
    /// The same tensor, where a region ends whose inner values the backward pass computes again. Inputs: x; or a recomputed x and the x
    /// that it stands for, which then gets the gradient. Capture sees through it.
    Checkpoint {
        /// A number from when the region began: what the region recorded has a larger one ([`crate::NodeId::mark`]).
        region: u64,
    },
    /// The same tensor on the node's device. Inputs: x.
    ToDevice,
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
    /// Elements of one dim chosen one by one. Inputs: x, ids (x's rank; outside `dim` no larger than x; u8, u32 or i64).
    Gather {
        /// The dim.
        dim: u8,
    },
    /// `x` with elements of `src` written or added where `ids` says. Inputs: x, ids, src (the shape of ids; outside `dim` x's).
    Scatter {
        /// Written or added.
        op: ScatterOp,
        /// The dim.
        dim: u8,
    },
    /// `x` with the slices of `src` added to its slices that `ids` names. Inputs: x, ids (one dim), src.
    IndexAdd {
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
    /// base, and on segments of its rows (x·A·B)·scale with an A, a B and a scale of each segment's own (the segmented products of Punica,
    /// Chen et al., arXiv:2310.18547, §4). Inputs: x (…, n, in), base (…, n, out), then A (in, r) and B (r, out) of each segment, whose r
    /// may differ; scalars: the segments' scales. Composite.
    LoraSegments {
        /// For each segment a gap, rows of no segment that come before it, and its own rows.
        rows: Dims<S>,
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
    /// The gradients of attention without a matrix of scores (Dao 2023, arXiv:2307.08691, §3.1.2). Inputs: q, k, v as those of attention,
    /// the gradient of its result (b, h, s, dv), mask if `mask`; attributes and scalars are attention's. The result is one row: dq
    /// (b, h, s, d), dk (b, hk, t, d) and dv (b, hk, t, dv) behind one another. Composite.
    AttentionBackward {
        /// Whether a mask follows.
        mask: bool,
        /// As attention's.
        causal: bool,
        /// As attention's.
        softcap: bool,
        /// As attention's.
        window: Option<S>,
    },
    /// Rows of a table chosen by ids of any rank. Inputs: table (n, h), ids (u8, u32 or i64). Composite.
    Embedding,
    /// Layer norm over groups of channels (Wu and He, arXiv:1803.08494, eq. 7). Inputs: x (b, c, …), w (c) if `weight`, b (c) if
    /// `bias`; scalars: eps. Composite.
    GroupNorm {
        /// The number of groups, which divides c.
        groups: S,
        /// Whether a weight follows.
        weight: bool,
        /// Whether a bias follows.
        bias: bool,
    },
    /// The mean over n of −log softmax(logits)\[target\]. Inputs: logits (n, c), targets (n; u8, u32 or i64). Composite.
    CrossEntropy,
    /// x·wᵀ with a quantised weight. Inputs: x (…, in), w (out, in), a quantised leaf.
    QMatmul,
    /// A custom op of Candle's, opaque here. The node says which; the captured scalar is its number in
    /// [`crate::Bindings::customs`].
    Custom {
        /// Its name.
        name: &'static str,
        /// How many inputs it takes: one to three.
        arity: u8,
        /// The shape of its result, as the caller states it.
        shape: Dims<S>,
        /// The dtype of its result, as the caller states it.
        dtype: DType,
    },
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
    /// A custom op: nothing is known of it but its result's shape and dtype.
    Opaque,
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

#[cfg(test)]
pub(crate) mod tests;
