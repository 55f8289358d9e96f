//! Knobs: how a graph is evaluated, and when it evaluates by itself.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::LocalKey;

/// The target of this crate's spans and events: what a subscriber's filter names.
pub(crate) const TARGET: &str = "candle_lazy";

/// How a graph is evaluated. The default is what users want; the rest exists for tests, `verify` and bisection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvalOptions {
    /// The names of passes that do not run.
    pub skip_passes: Vec<&'static str>,
    /// Whether row programs may hold more than one recorded op.
    pub fuse: bool,
    /// Whether every composite is replaced by its decomposition.
    pub decompose: bool,
    /// Whether every op runs as Candle's own.
    pub replay: bool,
    /// Whether the plan cache is asked and filled.
    pub cache: bool,
    /// The most bytes that the run may need at once beside its inputs, as [`peak_bytes`](crate::run::peak_bytes) counts them: one that
    /// needs more is an error before anything runs. `None` is the process's budget ([`set_memory_budget`]).
    pub memory_budget: Option<u64>,
    /// Whether the graph is validated after capture and after every pass.
    pub validate: bool,
}

/// The options that change plans.
pub(crate) type OptionsKey = (Vec<&'static str>, bool, bool, bool);

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            skip_passes: Vec::new(),
            fuse: true,
            decompose: false,
            replay: false,
            cache: true,
            memory_budget: None,
            validate: cfg!(debug_assertions),
        }
    }
}

impl EvalOptions {
    /// No pass and no fusion: one step per recorded op.
    #[must_use]
    pub fn no_passes() -> Self {
        let skip_passes = candle_lazy_graph::passes::PASSES.iter().map(|p| p.name).collect();
        Self { skip_passes, fuse: false, ..Self::default() }
    }

    /// Only the pass `name`; fusion only if the name is `fuse`.
    #[must_use]
    pub fn only_pass(name: &str) -> Self {
        let skip_passes = candle_lazy_graph::passes::PASSES.iter().map(|p| p.name).filter(|n| *n != name).collect();
        Self { skip_passes, fuse: name == "fuse", ..Self::default() }
    }

    /// Everything that changes the plan, for its key.
    pub(crate) fn key(&self) -> OptionsKey {
        (self.skip_passes.clone(), self.fuse, self.decompose, self.replay)
    }
}

static PENDING_NODES: AtomicU64 = AtomicU64::new(50_000);
static PENDING_BYTES: AtomicU64 = AtomicU64::new(1 << 30);
/// `u64::MAX` is none.
static MEMORY: AtomicU64 = AtomicU64::new(u64::MAX);
static BUDGET_EVALUATIONS: AtomicU64 = AtomicU64::new(0);

/// Many pending nodes with less than this many bytes each are bookkeeping, such as a metric that a loop adds up.
const SMALL_NODES: u64 = 2_048;
const SMALL_BYTES: u64 = 256;

/// Past `nodes` pending nodes or `bytes` pending result bytes above a newly recorded tensor, that tensor is evaluated at
/// once, so that a loop that never evaluates does not grow without limit. The default is 50,000 nodes or 1 GiB;
/// `u64::MAX` turns a limit off. Where the pending results have less than 256 bytes each, a node costs more memory than its
/// result and 2,048 nodes are the limit, unless `nodes` is lower or off.
///
/// For a tensor that gradients can be taken through only `nodes` counts: it keeps its history when it is evaluated, so that nothing would
/// be freed, and its gradient would compute the inner values again. What is recorded from it without a gradient (a metric) counts whole:
/// take the gradient first. [`without_pending_budget`] is for what is evaluated as a whole soon.
pub fn set_pending_budget(nodes: u64, bytes: u64) {
    PENDING_NODES.store(nodes, Ordering::Relaxed);
    PENDING_BYTES.store(bytes, Ordering::Relaxed);
}

/// The most bytes that an evaluation of this process may need at once beside its inputs, unless its options say otherwise; `None` (the
/// default) sets no limit. An evaluation that needs more is an error that names its largest result, before anything runs.
pub fn set_memory_budget(bytes: Option<u64>) {
    MEMORY.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The process's memory budget.
#[must_use]
pub fn memory_budget() -> Option<u64> {
    Some(MEMORY.load(Ordering::Relaxed)).filter(|&bytes| bytes != u64::MAX)
}

/// The pending budget: nodes and bytes.
#[must_use]
pub fn pending_budget() -> (u64, u64) {
    (PENDING_NODES.load(Ordering::Relaxed), PENDING_BYTES.load(Ordering::Relaxed))
}

/// Whether so much is pending that it is evaluated now.
pub(crate) fn over_budget(nodes: u64, bytes: u64, traced: bool) -> bool {
    let (max_nodes, max_bytes) = pending_budget();
    let small = max_nodes != u64::MAX && nodes > SMALL_NODES && bytes / nodes.max(1) < SMALL_BYTES;
    nodes > max_nodes || !traced && (bytes > max_bytes || small)
}

/// While it lives, what its thread records is not evaluated for its size.
#[derive(Debug)]
pub struct WithoutPendingBudget {
    _flag: Flag,
    /// It belongs to the thread that made it.
    _here: PhantomData<*const ()>,
}

/// Until the result is dropped, what this thread records is not evaluated for its size, as a step of training, which is evaluated as one
/// plan at its end. Scopes nest.
#[must_use]
pub fn without_pending_budget() -> WithoutPendingBudget {
    WithoutPendingBudget { _flag: Flag::set(&UNBOUNDED), _here: PhantomData }
}

/// How often this process evaluated because of the pending budget.
#[must_use]
pub fn budget_evaluations() -> u64 {
    BUDGET_EVALUATIONS.load(Ordering::Relaxed)
}

pub(crate) fn count_budget_evaluation() {
    BUDGET_EVALUATIONS.fetch_add(1, Ordering::Relaxed);
}

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(false) };
    static UNBOUNDED: Cell<bool> = const { Cell::new(false) };
}

/// A thread's flag that is set; dropped, it is what it was, also where the scope is left by a panic.
#[derive(Debug)]
pub(crate) struct Flag(&'static LocalKey<Cell<bool>>, bool);

impl Flag {
    pub(crate) fn set(flag: &'static LocalKey<Cell<bool>>) -> Self {
        Self(flag, flag.replace(true))
    }
}

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

/// While it lives, nothing is evaluated on this thread.
pub(crate) struct Recording(#[allow(dead_code)] Flag); // it acts when it is dropped

impl Recording {
    pub(crate) fn begin() -> Self {
        Self(Flag::set(&RECORDING))
    }
}

/// Whether a compiled function is being recorded on this thread.
pub(crate) fn is_recording() -> bool {
    RECORDING.get()
}

/// Whether what is recorded on this thread is not evaluated for its size.
pub(crate) fn is_unbounded() -> bool {
    RECORDING.get() || UNBOUNDED.get()
}
