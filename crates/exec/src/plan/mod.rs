//! The plan: immutable steps over slots, shared between runs and threads.
//!
//! A plan holds symbols, never sizes or numbers; [`crate::run`] binds them. A slot is a place for one value at a time:
//! slots are reused after the last use of what they hold.

mod boundary;
mod cache;
mod guards;
mod memory;

pub use boundary::Boundary;
pub(crate) use boundary::{MAX_INPUTS, MAX_MEMBERS};
pub use cache::{cache_stats, clear_cache, set_cache_capacity, CacheStats};
pub(crate) use cache::{find, guarded_hit, hit, is_of, keep, keep_guard, known, no_guard, wants_guard, Known};
pub(crate) use guards::Guarded;
pub(crate) use memory::{needs, Memory};

use candle_core::DType;
use candle_lazy_graph::{ArgOp, Dims, Distribution, Op, ScatterOp, Sym};
use candle_lazy_ops::row::RowProgram;
use smallvec::SmallVec;
use std::fmt;

/// A place for a value while a plan runs.
pub type Slot = u32;

/// A value that a step makes.
#[derive(Debug, Clone)]
pub struct Output {
    /// Where it goes.
    pub slot: Slot,
    /// Its shape.
    pub dims: Dims<Sym>,
    /// Its dtype.
    pub dtype: DType,
    /// The input of its step, a leaf that nothing reads behind it, whose memory it may be written to: it is, where the leaf's value was
    /// given away.
    pub in_place_of: Option<u8>,
}

/// Why a step runs Candle's own op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CandleReason {
    /// Candle's autograd tracks the value, or it is not on the CPU.
    Replay,
    /// No kernel of ours serves this op with these dtypes.
    Fallback,
}

/// Products that are made together.
#[derive(Debug, Clone)]
pub struct HeadStep {
    /// The shape of a product.
    pub dims: Dims<Sym>,
    /// Each right side: which input of the step, and whether it lies (out, in).
    pub rights: SmallVec<[(u32, bool); 2]>,
    /// What follows.
    pub epilogue: Option<EpilogueStep>,
}

/// An elementwise program that follows products.
#[derive(Debug, Clone)]
pub struct EpilogueStep {
    /// The program.
    pub program: Box<RowProgram>,
    /// What each of its inputs is.
    pub inputs: SmallVec<[SourceStep; 4]>,
    /// Which of the step's scalars are its own.
    pub params: std::ops::Range<usize>,
}

/// What an epilogue reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceStep {
    /// A product of its head.
    Product(u32),
    /// An input of the step.
    Input(u32),
}

/// What a step does.
#[derive(Debug, Clone)]
pub enum StepKind {
    /// Another look at the same data; a reshape that the strides cannot express copies.
    View(Op<Sym>),
    /// A fused row program.
    Row {
        /// The program.
        program: Box<RowProgram>,
        /// The shape it runs over.
        domain: Dims<Sym>,
        /// The reduced dims of that shape, as a bit mask.
        axes: u32,
    },
    /// Batched matrix product.
    Matmul,
    /// x·wᵀ.
    Linear,
    /// Products of the first input with weights, and what follows each of them element by element.
    Products {
        /// What is made, in the order of the outputs.
        heads: Vec<HeadStep>,
    },
    /// Two skinny products, scaled, onto a base if there is one.
    Lora,
    /// The same onto segments of rows, each with factors of its own.
    LoraSegments {
        /// For each segment a gap, rows of no segment that come before it, and its own rows.
        rows: Dims<Sym>,
    },
    /// Rotary position embedding.
    Rope {
        /// Neighbouring pairs.
        interleaved: bool,
    },
    /// Attention with online softmax.
    Attention {
        /// Whether the fourth input is a mask.
        mask: bool,
        /// Whether queries see only earlier keys.
        causal: bool,
        /// Whether the second scalar caps the scores.
        softcap: bool,
        /// The sliding window.
        window: Option<Sym>,
    },
    /// The gradients of attention with respect to q, k and v, behind one another.
    AttentionBackward {
        /// Whether the fifth input is a mask.
        mask: bool,
        /// Whether queries see only earlier keys.
        causal: bool,
        /// Whether the second scalar caps the scores.
        softcap: bool,
        /// The sliding window.
        window: Option<Sym>,
    },
    /// Slices by index.
    IndexSelect {
        /// The dim.
        dim: u8,
    },
    /// The place of an extreme element.
    ArgReduce {
        /// Which extreme.
        op: ArgOp,
        /// The dim.
        dim: u8,
    },
    /// Elements by index.
    Gather {
        /// The dim.
        dim: u8,
    },
    /// Elements written or added by index.
    Scatter {
        /// Written or added.
        op: ScatterOp,
        /// The dim.
        dim: u8,
    },
    /// Slices added by index.
    IndexAdd {
        /// The dim.
        dim: u8,
    },
    /// Evenly spaced numbers.
    Arange,
    /// Random numbers for a key.
    Random {
        /// The distribution.
        dist: Distribution,
    },
    /// A copy on another device.
    ToDevice,
    /// A custom op of Candle's.
    Custom(Op<Sym>),
    /// Parts behind one another.
    Concat {
        /// The dim.
        dim: u8,
    },
    /// A range overwritten, in place where the first input is held by nobody else.
    SliceAssign {
        /// The dim.
        dim: u8,
        /// The first index.
        start: Sym,
    },
    /// One number everywhere.
    Full,
    /// An additive causal mask.
    CausalMask {
        /// The sliding window.
        window: Option<Sym>,
    },
    /// Conversion between dtypes that row programs do not read or write.
    Cast,
    /// A row-major copy.
    Copy,
    /// Candle's own op.
    Candle {
        /// The op.
        op: Op<Sym>,
        /// Why.
        reason: CandleReason,
    },
}

impl StepKind {
    /// Whether it may fail although its operands have the shapes and dtypes it was planned for: what runs code of somebody else's, or meets
    /// indices that are none.
    pub(crate) fn may_fail(&self) -> bool {
        let safe = matches!(
            self,
            Self::View(_)
                | Self::Row { .. }
                | Self::Matmul
                | Self::Linear
                | Self::Products { .. }
                | Self::Lora
                | Self::LoraSegments { .. }
                | Self::Attention { .. }
                | Self::AttentionBackward { .. }
                | Self::Arange
                | Self::Concat { .. }
                | Self::Full
                | Self::Cast
                | Self::Copy
        );
        !safe
    }

    /// The kernel's name in reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::View(op) => op.name(),
            Self::Row { .. } => "row",
            Self::Matmul => "matmul",
            Self::Linear | Self::Products { .. } => "linear",
            Self::Lora => "lora",
            Self::LoraSegments { .. } => "lora_segments",
            Self::Rope { .. } => "rope",
            Self::Attention { .. } => "attention",
            Self::AttentionBackward { .. } => "attention_backward",
            Self::IndexSelect { .. } => "index_select",
            Self::ArgReduce { op, .. } => op.name(),
            Self::Gather { .. } => "gather",
            Self::Scatter { op, .. } => op.name(),
            Self::IndexAdd { .. } => "index_add",
            Self::Arange => "arange",
            Self::Random { dist } => dist.name(),
            Self::ToDevice => "to_device",
            Self::Custom(_) => "custom",
            Self::Concat { .. } => "cat",
            Self::SliceAssign { .. } => "slice_assign",
            Self::Full => "full",
            Self::CausalMask { .. } => "causal_mask",
            Self::Cast => "to_dtype",
            Self::Copy => "contiguous",
            Self::Candle { op, .. } => op.name(),
        }
    }
}

/// One step of a plan.
#[derive(Debug, Clone)]
pub struct Step {
    /// What it does.
    pub kind: StepKind,
    /// What it reads.
    pub inputs: SmallVec<[Slot; 4]>,
    /// What it makes.
    pub outputs: SmallVec<[Output; 2]>,
    /// Its scalars, as indices into the run's parameters.
    pub params: SmallVec<[u32; 4]>,
    /// For each input that another step makes, why the two are not one.
    pub boundaries: SmallVec<[(Slot, Boundary); 2]>,
    /// The slots whose values nobody needs after this step.
    pub free_after: SmallVec<[Slot; 4]>,
    /// The recorded node that an error names.
    pub origin: u32,
    /// The recorded ops that the step computes.
    pub ops: SmallVec<[&'static str; 4]>,
    /// For each of them, the recorded node that it stems from.
    pub origins: SmallVec<[u32; 4]>,
}

/// An immutable plan.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// How many slots a run needs.
    pub slots: u32,
    /// The slot of each leaf, in the order of capture; `None` where the plan does not read it.
    pub leaves: Vec<Option<Slot>>,
    /// Leaves that a step may write over: the target of a slice assignment that nothing else reads, and what an output is
    /// [in place of](Output::in_place_of).
    pub donatable: Vec<bool>,
    /// The slot of each output, in the order of capture.
    pub outputs: Vec<Slot>,
    /// What each pass rewrote when the plan was made.
    pub passes: Vec<(&'static str, usize)>,
    /// What the last run of it needed.
    pub(crate) memory: memory::LastMemory,
    pub(crate) _alive: cache::Alive,
}

impl Plan {
    /// How many steps do work: all but views.
    #[must_use]
    pub fn work_steps(&self) -> usize {
        self.steps.iter().filter(|s| !matches!(s.kind, StepKind::View(_))).count()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = |list: &[Slot]| list.iter().map(|s| format!("${s}")).collect::<Vec<_>>().join(", ");
        for step in &self.steps {
            let outputs: Vec<Slot> = step.outputs.iter().map(|o| o.slot).collect();
            let kind = match &step.kind {
                StepKind::View(_) => "view",
                StepKind::Candle { reason: CandleReason::Replay, .. } => "candle (replay)",
                StepKind::Candle { reason: CandleReason::Fallback, .. } => "candle (fallback)",
                kind => kind.name(),
            };
            write!(f, "{} = {kind} [{}] {}", slots(&outputs), step.ops.join(", "), slots(&step.inputs))?;
            for (output, place) in
                step.outputs.iter().filter_map(|o| Some((o.slot, step.inputs.get(o.in_place_of? as usize)?)))
            {
                write!(f, "  (${output} over ${place} if given)")?;
            }
            if !step.free_after.is_empty() {
                write!(f, "  then free {}", slots(&step.free_after))?;
            }
            writeln!(f)?;
            for (slot, why) in &step.boundaries {
                writeln!(f, "    not one with ${slot}: {why}")?;
            }
        }
        writeln!(f, "return {}", slots(&self.outputs))
    }
}
