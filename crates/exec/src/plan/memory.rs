//! How much memory a run needs, known before it begins, and which results follow one another in the same piece of it.
//!
//! Every result that a plan makes lives in a piece of memory. A piece is as large as the largest result that ever lives in it, and the
//! next result of the same dtype moves in when the one before has been freed: the smallest free piece that is large enough, or else the
//! largest one, which grows. The pool gives buffers of exactly a piece's size, so that a run holds the pieces and no more.
//! What a caller gets to keep lies in a piece of exactly its size, the last to do so; and so does what lives long, such as what a backward
//! pass reads again.

use super::{Output, Plan, SourceStep, Step, StepKind};
use crate::buffer::{BufferValue, ASK_FROM};
use candle_core::DType;
use candle_lazy_graph::{Bindings, Dims, Op, OpClass, Value};
use candle_lazy_ops::kernels::extra::{self, Extra, HeadNeeds, Operand};
use smallvec::SmallVec;
use std::sync::atomic::AtomicU64;
use std::sync::Arc;

/// What a run needs.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// How many elements the piece of each result has, by step and output; 0 where the run takes none for it.
    pieces: Vec<usize>,
    /// Where the results of each step begin among them.
    first: Vec<u32>,
    /// The most bytes that the run holds at once: all pieces, and what the neediest step takes beside its result. Leaves and what plans
    /// and nodes themselves are made of do not count.
    pub(crate) peak: u64,
    /// The step with the largest result.
    pub(crate) largest: usize,
    /// The first step behind which none asks the system for so much memory that it may be refused.
    pub(crate) settled: usize,
    /// How long the last run took, in nanoseconds; 0 before the first.
    pub(crate) took: AtomicU64,
}

impl Memory {
    /// How many elements the piece of a result has; 0 where the run takes none for it.
    pub(crate) fn piece(&self, step: usize, output: usize) -> usize {
        let first = self.first.get(step).map_or(usize::MAX, |&f| f as usize);
        self.pieces.get(first.saturating_add(output)).copied().unwrap_or(0)
    }
}

/// The memory that running `plan` at the sizes of `bindings` needs; the last answer is kept.
pub(crate) fn needs(plan: &Plan, bindings: &Bindings) -> Arc<Memory> {
    let threads = candle_lazy_ops::kernels::threads();
    let leaves = bindings.leaves.iter().zip(&plan.donatable).map(|(leaf, donatable)| match &leaf.value {
        Value::Tensor(tensor) => LeafFacts { dense: tensor.is_contiguous(), given: false, ours: false },
        Value::Quantized(_) => LeafFacts { dense: true, given: false, ours: false },
        Value::Engine(value) => {
            // written in place if it is a whole buffer that only its node holds, and this binding of it
            let own =
                |v: &BufferValue| v.is_whole() && Arc::strong_count(&v.buffer) == 1 && Arc::strong_count(value) <= 2;
            let own = value.as_any().downcast_ref::<BufferValue>().is_some_and(own);
            LeafFacts { dense: value.is_contiguous(), given: *donatable && leaf.exclusive && own, ours: true }
        }
    });
    let leaves: SmallVec<[LeafFacts; 8]> = leaves.collect();
    let mut kept = plan.memory.0.lock();
    if let Some(kept) = &*kept {
        if kept.threads == threads && kept.sizes == bindings.sizes && kept.leaves == leaves {
            return kept.memory.clone();
        }
    }
    let memory = Arc::new(Planner::plan(plan, bindings, &leaves));
    *kept = Some(Box::new(Kept { threads, sizes: bindings.sizes.clone(), leaves, memory: memory.clone() }));
    memory
}

/// What a run's memory depends on of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LeafFacts {
    dense: bool,
    /// Whether its memory becomes the run's.
    given: bool,
    /// Whether the engine made it.
    ours: bool,
}

/// An answer, and to what.
#[derive(Debug)]
struct Kept {
    /// How many threads kernels may use.
    threads: usize,
    sizes: Vec<usize>,
    leaves: SmallVec<[LeafFacts; 8]>,
    memory: Arc<Memory>,
}

/// The memory of a plan's last run. A copy of a plan begins without it.
#[derive(Debug, Default)]
pub(crate) struct LastMemory(parking_lot::Mutex<Option<Box<Kept>>>);

impl Clone for LastMemory {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// Who holds a piece: Candle gives its memory back to the system, the pool keeps what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Pool(DType),
    Candle,
}

/// A piece of memory.
struct Piece {
    holder: Holder,
    /// In elements, of Candle in bytes.
    size: usize,
    bytes: u64,
}

/// A result, or a leaf that was given away: its piece, and how many slots look at it.
struct Result {
    piece: Option<usize>,
    slots: u32,
    /// The steps that made it and that let it go.
    born: usize,
    ended: usize,
}

/// A result that lives for more steps than these gets a piece of its own size: in a larger one it would keep the rest from the steps
/// in between.
const LONG: usize = 24;

/// What a slot holds.
#[derive(Clone, Default)]
struct Held {
    /// The results whose memory it may look at: those of the run and given leaves.
    results: SmallVec<[u32; 2]>,
    /// Whether the elements lie in row-major order without gaps.
    dense: bool,
    /// Whether it is a whole buffer of the engine, or what has no memory of the run's.
    whole: bool,
    /// Whether the engine holds the elements, not Candle.
    ours: bool,
    dims: Dims,
    dtype: Option<DType>,
}

/// As [`Memory::settled`].
fn settled(plan: &Plan, bindings: &Bindings) -> usize {
    let much = |o: &Output| bytes_of(&bindings.dims(&o.dims), o.dtype) >= ASK_FROM as u64;
    // a view that is handed out is copied behind the last step
    let handed_out = |step: &Step| step.outputs.iter().any(|o| plan.outputs.contains(&o.slot) && much(o));
    if plan.steps.iter().any(|step| matches!(step.kind, StepKind::View(_)) && handed_out(step)) {
        return plan.steps.len();
    }
    plan.steps.iter().rposition(|step| step.outputs.iter().any(much)).unwrap_or(0)
}

struct Planner<'a> {
    plan: &'a Plan,
    bindings: &'a Bindings,
    slots: Vec<Held>,
    results: Vec<Result>,
    /// Which results are never freed, or late, from a first pass.
    stays: Option<Vec<bool>>,
    pieces: Vec<Piece>,
    free: Vec<usize>,
    /// The piece of each result of each step.
    of_step: Vec<Option<usize>>,
    first: Vec<u32>,
    /// How many bytes each step takes for its results.
    taken: Vec<u64>,
    /// As [`Memory::settled`].
    settled: usize,
    /// Copies that live until the end.
    copies: u64,
    /// The most that a step takes beside its results: what threads keep for the next, and what they do not.
    beside: Extra,
}

impl<'a> Planner<'a> {
    fn plan(plan: &'a Plan, bindings: &'a Bindings, leaves: &[LeafFacts]) -> Memory {
        let mut first = Self::new(plan, bindings, leaves, None);
        first.steps();
        let stays = first.results.iter().map(|r| r.slots > 0 || r.ended.saturating_sub(r.born) > LONG).collect();
        let mut planner = Self::new(plan, bindings, leaves, Some(stays));
        planner.steps();
        planner.outputs();
        let pieces = |p: &Option<usize>| p.map_or(0, |p| planner.pieces[p].size);
        let held: u64 = planner.pieces.iter().map(|p| p.bytes).fold(0, u64::saturating_add);
        // of those that take memory; the first of equal ones
        let largest = (0..plan.steps.len()).max_by_key(|&s| (planner.taken[s], std::cmp::Reverse(s)));
        Memory {
            pieces: planner.of_step.iter().map(pieces).collect(),
            first: planner.first,
            peak: held.saturating_add(planner.copies).saturating_add(planner.beside.bytes()),
            largest: largest.unwrap_or(0),
            settled: planner.settled,
            took: AtomicU64::new(0),
        }
    }

    fn new(plan: &'a Plan, bindings: &'a Bindings, leaves: &[LeafFacts], stays: Option<Vec<bool>>) -> Self {
        let mut slots = vec![Held::default(); plan.slots as usize];
        let mut results = Vec::new();
        for (i, facts) in leaves.iter().enumerate() {
            let (Some(&Some(slot)), Some(leaf)) = (plan.leaves.get(i), bindings.leaves.get(i)) else {
                continue;
            };
            let Some(held) = slots.get_mut(slot as usize) else { continue };
            let node = leaf.node.and_then(|node| bindings.nodes.get(node as usize));
            (held.dims, held.dtype) = match (&leaf.value, node) {
                (Value::Tensor(tensor), _) => (tensor.dims().into(), Some(tensor.dtype())),
                (_, Some(node)) => (node.dims().into(), Some(node.dtype())),
                (_, None) => Default::default(),
            };
            (held.dense, held.whole, held.ours) = (facts.dense, true, facts.ours);
            if facts.given {
                held.results.push(results.len() as u32);
                results.push(Result { piece: None, slots: 1, born: 0, ended: 0 });
            }
        }
        Self {
            plan,
            bindings,
            slots,
            results,
            stays,
            pieces: Vec::new(),
            free: Vec::new(),
            of_step: Vec::new(),
            first: Vec::with_capacity(plan.steps.len()),
            taken: Vec::with_capacity(plan.steps.len()),
            settled: settled(plan, bindings),
            copies: 0,
            beside: Extra::default(),
        }
    }

    fn steps(&mut self) {
        let plan = self.plan;
        for step in &plan.steps {
            self.first.push(self.of_step.len() as u32);
            self.taken.push(0);
            // the first pass asks only what stays
            if self.stays.is_some() {
                self.beside = self.beside.max(self.beside(step));
            }
            if matches!(step.kind, StepKind::Linear) && step.inputs.len() > 2 {
                // a product that a bias is added to is a buffer of its own, which the pool keeps
                self.copies = self.copies.saturating_add(self.result_bytes(step));
            }
            for output in &step.outputs {
                let dims = self.bindings.dims(&output.dims);
                let mut held = Held { dense: true, whole: true, ours: true, ..Held::default() };
                let (piece, shared) = match &step.kind {
                    StepKind::View(op) => {
                        let source = self.source(step).cloned().unwrap_or_default();
                        let copies = may_copy(op, &source);
                        held = Held {
                            dense: stays_dense(op, &source),
                            whole: same_elements(op) && source.whole,
                            ..source
                        };
                        (copies.then_some(Holder::Pool(output.dtype)), std::mem::take(&mut held.results))
                    }
                    StepKind::Row { .. } => match self.place_of(step, output) {
                        Some(source) => (None, source.results.clone()),
                        None => (Some(Holder::Pool(output.dtype)), SmallVec::new()),
                    },
                    StepKind::SliceAssign { .. } if self.writes_in_place(step) => {
                        (None, self.source(step).map(|source| source.results.clone()).unwrap_or_default())
                    }
                    StepKind::Candle { .. } | StepKind::Custom(_) | StepKind::ToDevice => {
                        self.convert_inputs(step);
                        held.ours = false;
                        // Candle's views have strides, and a custom op's result may
                        held.dense = matches!(&step.kind, StepKind::Candle { op, .. } if op.class() != OpClass::View);
                        (Some(Holder::Candle), SmallVec::new())
                    }
                    _ => (Some(Holder::Pool(output.dtype)), SmallVec::new()),
                };
                held.results = shared;
                let len = dims.iter().fold(1usize, |n, &d| n.saturating_mul(d));
                let piece = piece.map(|holder| {
                    if let Some(taken) = self.taken.last_mut() {
                        *taken = taken.saturating_add(bytes_of(&dims, output.dtype));
                    }
                    let at = self.take(holder, len, output.dtype);
                    held.results.push(self.results.len() as u32);
                    self.results.push(Result { piece: Some(at), slots: 0, born: self.first.len(), ended: 0 });
                    at
                });
                // a piece of Candle's is not the pool's to give
                self.of_step.push(piece.filter(|&p| self.pieces[p].holder != Holder::Candle));
                for &result in &held.results {
                    self.results[result as usize].slots += 1;
                }
                (held.dims, held.dtype) = (dims, Some(output.dtype));
                if let Some(slot) = self.slots.get_mut(output.slot as usize) {
                    *slot = held;
                }
            }
            for &slot in &step.free_after {
                let held = self.slots.get_mut(slot as usize).map(std::mem::take).unwrap_or_default();
                for result in held.results {
                    self.release(result);
                }
            }
        }
    }

    fn release(&mut self, result: u32) {
        let result = &mut self.results[result as usize];
        result.slots = result.slots.saturating_sub(1);
        result.ended = self.first.len();
        if let (0, Some(piece)) = (result.slots, result.piece) {
            self.free.push(piece);
        }
    }

    /// A piece for a result.
    fn take(&mut self, holder: Holder, len: usize, dtype: DType) -> usize {
        let number = self.results.len();
        let stays = self.stays.as_ref().is_some_and(|s| s.get(number).copied().unwrap_or(true));
        let width = dtype.size_in_bytes();
        let size = if holder == Holder::Candle { len.saturating_mul(width) } else { len };
        let bytes = (len as u64).saturating_mul(width as u64);
        // what stays must not lie in a piece that is larger than itself
        let fits = |p: &Piece| p.holder == holder && (!stays || p.size == size);
        let fitting = self.free.iter().enumerate().filter(|(_, &p)| fits(&self.pieces[p]));
        // the smallest that is large enough comes before all that are not, of which the largest comes first
        let best = fitting.min_by_key(|(_, &p)| {
            let has = self.pieces[p].size;
            (has < size, size.abs_diff(has))
        });
        match best {
            Some((i, _)) => {
                let at = self.free.swap_remove(i);
                let piece = &mut self.pieces[at];
                if piece.size < size {
                    (piece.size, piece.bytes) = (size, bytes);
                }
                at
            }
            None => {
                self.pieces.push(Piece { holder, size, bytes });
                self.pieces.len() - 1
            }
        }
    }

    /// What a step's first input holds.
    fn source(&self, step: &Step) -> Option<&Held> {
        self.slots.get(*step.inputs.first()? as usize)
    }

    /// Whether a slot alone holds a whole buffer of the run's, which may then be written or become a tensor.
    fn owns(&self, held: &Held) -> bool {
        held.whole && matches!(held.results.as_slice(), [only] if self.results[*only as usize].slots == 1)
    }

    /// What an output will be written over, where that is the run's own, whole, and at its end.
    fn place_of(&self, step: &Step, output: &Output) -> Option<&Held> {
        if self.first.len() <= self.settled {
            return None;
        }
        let slot = step.inputs.get(usize::from(output.in_place_of?))?;
        let held = self.slots.get(*slot as usize)?;
        (step.free_after.contains(slot) && held.ours && held.dense && self.owns(held)).then_some(held)
    }

    /// Whether a slice assignment will find its target whole, its own and at its end.
    fn writes_in_place(&self, step: &Step) -> bool {
        let ends = step.inputs.first().is_some_and(|slot| step.free_after.contains(slot));
        let own = self.source(step).is_some_and(|target| target.ours && self.owns(target));
        ends && own && step.inputs.first() != step.inputs.get(1)
    }

    /// The bytes of the copy that a slot needs to become a tensor of Candle's: none where its buffer can move.
    fn tensor_copy(&self, slot: u32) -> u64 {
        match self.slots.get(slot as usize) {
            Some(held) if held.ours && !self.owns(held) => held.dtype.map_or(0, |dtype| bytes_of(&held.dims, dtype)),
            _ => 0,
        }
    }

    /// The bytes of a step's first result.
    fn result_bytes(&self, step: &Step) -> u64 {
        step.outputs.first().map_or(0, |o| bytes_of(&self.bindings.dims(&o.dims), o.dtype))
    }

    /// Candle's ops take tensors: a buffer that is shared or not whole is copied into one, which its slot then holds.
    fn convert_inputs(&mut self, step: &Step) {
        for &slot in &step.inputs {
            let copies = self.slots.get(slot as usize).is_some_and(|held| held.ours && !self.owns(held));
            self.copies = self.copies.saturating_add(self.tensor_copy(slot));
            let Some(held) = self.slots.get_mut(slot as usize) else { continue };
            if copies {
                (held.whole, held.dense) = (true, true);
            }
            held.ours = false;
        }
    }

    /// Results that are views of others, or are shared, are copied into tensors.
    fn outputs(&mut self) {
        let copies = self.plan.outputs.iter().map(|&slot| self.tensor_copy(slot));
        self.copies = copies.fold(self.copies, u64::saturating_add);
    }

    /// What a step takes beside its results.
    fn beside(&self, step: &Step) -> Extra {
        let operand = |i: usize| {
            let held = step.inputs.get(i).and_then(|&slot| self.slots.get(slot as usize))?;
            Some(Operand { dims: &held.dims, dtype: held.dtype?, dense: held.dense })
        };
        let of = |i: usize, j: usize| Some((operand(i)?, operand(j)?));
        let bytes = match &step.kind {
            StepKind::Row { program, domain, axes } => {
                Some(Extra::kept(program.scratch_bytes(&self.bindings.dims(domain), *axes)))
            }
            StepKind::Matmul => of(0, 1).map(|(a, b)| extra::matmul(&a, &b)),
            StepKind::Linear => of(0, 1).map(|(x, w)| extra::linear(&x, &w)),
            StepKind::Products { heads } => operand(0).map(|x| {
                let needs = heads.iter().map(|head| HeadNeeds {
                    cols: head.dims.last().map_or(1, |&n| self.bindings.size(n)),
                    rights: head.rights.iter().filter_map(|&(w, _)| operand(w as usize)).collect(),
                    epilogue: head.epilogue.as_ref().map(|e| {
                        let read = e.inputs.iter().filter_map(|source| match source {
                            SourceStep::Product(_) => None,
                            SourceStep::Input(i) => operand(*i as usize),
                        });
                        (&*e.program, read.collect())
                    }),
                });
                extra::products(&x, &needs.collect::<Vec<_>>())
            }),
            StepKind::Lora => of(0, 1).and_then(|(x, a)| Some(extra::lora(&x, &a, &operand(2)?, operand(3).as_ref()))),
            StepKind::LoraSegments { rows } => of(0, 1).map(|(x, base)| {
                let factors = step.inputs.get(2..).unwrap_or_default().chunks_exact(2).enumerate();
                let segments = factors.filter_map(|(i, _)| {
                    let rows = rows.get(2 * i + 1).map_or(0, |&n| self.bindings.size(n));
                    Some((operand(2 + 2 * i)?, operand(3 + 2 * i)?, rows))
                });
                extra::lora_segments(&x, &base, segments)
            }),
            StepKind::Attention { .. } => of(0, 2).map(|(q, v)| extra::attention(&q, &v)),
            StepKind::AttentionBackward { softcap, .. } => {
                of(0, 1).and_then(|(q, k)| Some(extra::attention_backward(&q, &k, &operand(2)?, *softcap)))
            }
            StepKind::Rope { .. } => of(0, 1).map(|(x, cos)| extra::rope(&x, &cos)),
            StepKind::IndexSelect { dim } => of(0, 1).map(|(x, ids)| {
                let left = x.dims.iter().take(usize::from(*dim)).fold(1usize, |n, &d| n.saturating_mul(d));
                Extra::passing(extra::indices(&ids).saturating_add(left.saturating_mul(24)))
            }),
            StepKind::Gather { .. } => operand(1).map(|ids| Extra::passing(extra::indices(&ids))),
            StepKind::Scatter { .. } | StepKind::IndexAdd { .. } => {
                of(0, 1).and_then(|(x, ids)| Some(extra::scatter(&x, &ids, &operand(2)?)))
            }
            StepKind::CausalMask { .. } => {
                let dims = step.outputs.first().map(|o| self.bindings.dims(&o.dims)).unwrap_or_default();
                Some(Extra::passing(bytes_of(&dims, DType::F32) as usize))
            }
            // what Candle's ops take is not known; a copy of each operand is the least that some do
            StepKind::Candle { .. } | StepKind::Custom(_) | StepKind::ToDevice => {
                let operands = (0..step.inputs.len()).filter_map(&operand);
                let copies = operands.map(|o| bytes_of(o.dims, o.dtype)).fold(0, u64::saturating_add);
                Some(Extra::passing(copies.saturating_add(self.result_bytes(step)) as usize))
            }
            StepKind::View(_)
            | StepKind::ArgReduce { .. }
            | StepKind::Arange
            | StepKind::Random { .. }
            | StepKind::Concat { .. }
            | StepKind::SliceAssign { .. }
            | StepKind::Full
            | StepKind::Cast
            | StepKind::Copy => None,
        };
        bytes.unwrap_or_default()
    }
}

/// Whether a view of this value may have to be a copy instead.
fn may_copy<S>(op: &Op<S>, source: &Held) -> bool {
    match op {
        Op::Reshape { .. } => !source.dense,
        // Candle's tensors have no steps
        Op::Stride { .. } => !source.ours,
        _ => false,
    }
}

/// Whether a view of a dense value is dense for sure.
fn stays_dense<S>(op: &Op<S>, source: &Held) -> bool {
    match op {
        op if same_elements(op) => source.dense,
        Op::Narrow { dim, .. } => source.dense && source.dims.iter().take(usize::from(*dim)).all(|&d| d == 1),
        _ => false,
    }
}

/// Whether a view shows all elements in their order.
fn same_elements<S>(op: &Op<S>) -> bool {
    matches!(op, Op::Reshape { .. } | Op::Detach | Op::Barrier | Op::Checkpoint { .. })
}

fn bytes_of(dims: &[usize], dtype: DType) -> u64 {
    let count = dims.iter().fold(1u64, |n, &d| n.saturating_mul(d as u64));
    count.saturating_mul(dtype.size_in_bytes() as u64)
}
