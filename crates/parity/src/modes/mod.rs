//! The ways in which a case is computed, and what each must equal.

pub(crate) mod blocks;
mod company;
pub(crate) mod compat;
mod differences;
mod functions;
mod gradient;
mod lazy_modes;
mod magnitude;
pub(crate) mod methods;
mod module;
mod recorded;

use crate::case::{Case, Domain};
use crate::compare::{rounding, same_bits, Verdict, LUCK};
use crate::referee::{judge, Judged};
use crate::unsupported;
use crate::value::to_arr;
use crate::{eager, opaque, Error, Result};
use candle_core::{DType, Tensor};
use candle_lazy_graph::passes::PASSES;
use candle_lazy_graph::Exactness;
use std::collections::BTreeMap;

pub use company::together;
pub use gradient::{gradients, judge_gradients, Fold, Gradients};
pub use lazy_modes::{evaluate, expected_kernels};
pub use recorded::{DecomposeFault, Wrong, DECOMPOSE_FAULTS};

/// A way of computing a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Eager Candle: its twin has the inferred shape and dtype, and is finite where the reference is.
    Eager,
    /// The function of `ops` on plain tensors.
    Ops,
    /// The same on tracked tensors: result and gradients.
    OpsTracked,
    /// Lazy, one step per recorded op.
    NoPasses,
    /// Lazy, one pass alone (or `fuse`).
    OnlyPass(&'static str),
    /// Lazy, as users get it.
    AllPasses,
    /// Lazy, by `eval()`: one elementwise op on a small tensor needs no plan.
    Eval,
    /// Lazy, every composite decomposed.
    Decomposed,
    /// Lazy, the plan cache neither asked nor filled.
    Cold,
    /// Lazy, the plan from the cache.
    Warm,
    /// Lazy, the plan of other sizes from the cache.
    OtherSizes,
    /// Lazy, the plan of other scalars from the cache.
    OtherScalars,
    /// A composite's decomposition recorded op by op.
    Recorded,
    /// The module of `nn`, against candle-nn's.
    NnModule,
    /// The call of the façade, against v1's formula.
    Compat,
    /// Lazy, in f16 or bf16: the bits of the same op in f32, rounded once.
    RoundsOnce,
    /// Lazy, on values of the engine's that were given away: an elementwise op writes over one.
    InPlace,
    /// Lazy, behind the caller's back.
    Async,
    /// Lazy, in one batch with others: the same again, the same at other sizes, and something else.
    Batched,
    /// Lazy, every op Candle's own.
    Replay,
    /// Lazy on tracked leaves: result and gradients.
    Tracked,
    /// Lazy on variables: the gradients that the graph transform records.
    Grad,
    /// Lazy, between an elementwise op and an elementwise op with a reduction.
    Chain,
}

impl Mode {
    /// Every mode, in the order of the report.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut modes = vec![Self::Eager, Self::Ops, Self::OpsTracked, Self::NoPasses];
        modes.extend(PASSES.iter().map(|p| Self::OnlyPass(p.name)));
        modes.push(Self::OnlyPass("fuse"));
        modes.extend([Self::AllPasses, Self::Eval, Self::Decomposed, Self::Recorded, Self::Cold, Self::Warm]);
        modes.extend([
            Self::OtherSizes,
            Self::OtherScalars,
            Self::RoundsOnce,
            Self::InPlace,
            Self::Async,
            Self::Batched,
            Self::Replay,
            Self::Tracked,
            Self::Grad,
            Self::Chain,
            Self::NnModule,
            Self::Compat,
        ]);
        modes
    }

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Eager => "eager".into(),
            Self::RoundsOnce => "rounds-once".into(),
            Self::OtherScalars => "other-scalars".into(),
            Self::Recorded => "recorded".into(),
            Self::NnModule => "nn-module".into(),
            Self::Compat => "compat".into(),
            Self::Ops => "ops".into(),
            Self::OpsTracked => "ops-tracked".into(),
            Self::NoPasses => "no-passes".into(),
            Self::OnlyPass(name) => format!("only-{}", name.replace('_', "-")),
            Self::AllPasses => "all-passes".into(),
            Self::Eval => "eval".into(),
            Self::Decomposed => "decomposed".into(),
            Self::Cold => "cold".into(),
            Self::Warm => "warm".into(),
            Self::OtherSizes => "other-sizes".into(),
            Self::InPlace => "in-place".into(),
            Self::Async => "async".into(),
            Self::Batched => "batched".into(),
            Self::Replay => "replay".into(),
            Self::Tracked => "tracked".into(),
            Self::Grad => "grad".into(),
            Self::Chain => "chain".into(),
        }
    }
}

/// What came of a cell of the matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Passed,
    /// Wrong, and how.
    Failed(String),
    /// Not checked, and why.
    Skipped(String),
}

/// A cell of the matrix.
#[derive(Debug, Clone)]
pub struct Cell {
    /// What came of it.
    pub outcome: Outcome,
    /// The largest error in units in the last place at the row's scale, where it was measured.
    pub ulp: f64,
    /// That error as a share of what is allowed.
    pub share: f64,
    /// The kernels that ran, and how often.
    pub kernels: BTreeMap<&'static str, usize>,
    /// What the rounding rule measured, where it was applied last.
    pub verdict: Option<Verdict>,
    /// All that it measured: the result's error, and that of every input's gradient.
    pub measured: Vec<Verdict>,
    /// Why no gradient was checked, where one should have been.
    pub without_gradient: Option<&'static str>,
}

impl Cell {
    /// A cell without kernels.
    #[must_use]
    pub fn of(outcome: Outcome) -> Self {
        Self {
            outcome,
            ulp: 0.0,
            share: 0.0,
            kernels: BTreeMap::new(),
            verdict: None,
            measured: Vec::new(),
            without_gradient: None,
        }
    }

    /// Takes the rounding rule's verdict for the cell's.
    pub(crate) fn judged_by(&mut self, verdict: Verdict) {
        self.ulp = verdict.ours.ulp;
        self.share = verdict.share();
        if let Some(text) = &verdict.wrong {
            self.outcome = Outcome::Failed(text.clone());
        }
        self.measured.push(verdict.clone());
        self.verdict = Some(verdict);
    }

    /// Takes what a second check of the same cell found, where this one found nothing.
    pub(crate) fn and(&mut self, other: Self) {
        self.outcome = other.outcome;
        self.without_gradient = other.without_gradient;
        self.measured.extend(other.measured);
        if other.share >= self.share || matches!(self.outcome, Outcome::Failed(_)) {
            (self.ulp, self.share, self.verdict) = (other.ulp, other.share, other.verdict);
        }
    }

    /// The verdict, where nothing but an error somewhat beyond its limit is wrong with the cell.
    pub(crate) fn only_over_its_limit(&self) -> Option<&Verdict> {
        let over = |v: &&Verdict| v.ours.ulp > v.limit && v.ours.ulp <= LUCK * v.limit;
        self.verdict.as_ref().filter(|_| matches!(self.outcome, Outcome::Failed(_))).filter(over)
    }
}

/// A case with its inputs, its eager result and its reference.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The case.
    pub case: Case,
    /// The seed of its inputs.
    pub seed: u64,
    /// Its inputs.
    pub inputs: Vec<Tensor>,
    /// What eager Candle gives, where it gives anything.
    pub eager: Option<Tensor>,
    /// What the reference gives.
    pub judged: Judged,
    /// What lazy evaluation without passes gives, once computed.
    baseline: Option<Tensor>,
}

impl Subject {
    /// Makes inputs, eager result and reference.
    ///
    /// # Errors
    /// When an input cannot be made or the reference refuses.
    pub fn new(case: Case, seed: u64) -> Result<Self> {
        let inputs = case.inputs(seed)?;
        let dtype = case.infer()?.dtype;
        let arrays = opaque::arrays(&case, &inputs)?;
        let judged = judge(&case.op, &case.held_scalars()?, &arrays.iter().collect::<Vec<_>>(), dtype)?;
        let eager = match unsupported::eager_is_wrong(&case) {
            Some(_) => None,
            None if unsupported::no_twin(&case.op).is_some() => None,
            None => match (contained(|| eager::run_case(&case, &inputs)), unsupported::eager_refuses(&case)) {
                (Ok(eager), None) => Some(eager),
                (Err(_), Some(_)) => None,
                (Ok(_), Some(why)) => return Err(Error::NoTwin(format!("eager does what the table says not: {why}"))),
                (Err(e), None) => {
                    return Err(Error::NoTwin(format!("eager refuses, and the table has no reason: {e}")))
                }
            },
        };
        Ok(Self { case, seed, inputs, eager, judged, baseline: None })
    }

    /// Whether a result must have eager's bits. An op without an eager twin is judged by the reference.
    fn exact(&self, dtype: DType) -> bool {
        match self.case.op.exactness() {
            Exactness::Exact => true,
            Exactness::ExactWide => !matches!(dtype, DType::F16 | DType::BF16),
            // `Rounds`, and whatever a later version adds
            _ => false,
        }
    }

    /// Judges a result against eager and the reference, by the op's declared exactness.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn verdict(&self, what: &str, got: &Tensor) -> Result<Cell> {
        let mut cell = Cell::of(Outcome::Passed);
        if let (true, Some(eager)) = (self.exact(got.dtype()), &self.eager) {
            if let Err(text) = same_bits(&format!("{what} against eager"), got, eager)? {
                cell.outcome = Outcome::Failed(text);
                return Ok(cell);
            }
            // what an exact op does with NaN and infinities is Candle's to say, not the reference's
            if self.case.is_special() {
                return Ok(cell);
            }
        }
        let mut verdict = rounding(what, got, self.eager.as_ref(), &self.judged, 1.0)?;
        // where NaN and infinities go is the question here; how far numbers are off, that of cases whose every number is one
        if self.case.inputs.iter().any(|i| i.domain == Domain::Rare) && verdict.ours.ulp.is_finite() {
            verdict.wrong = None;
            verdict.limit = verdict.limit.max(verdict.ours.ulp);
        }
        cell.judged_by(verdict);
        Ok(cell)
    }

    /// Why an error in this mode is Candle's, if it is: its own op runs, and the table says that it refuses the same inputs
    /// eagerly.
    #[must_use]
    pub fn candle_refuses(&self, mode: Mode) -> Option<&'static str> {
        let candles = matches!(mode, Mode::Replay) || unsupported::candle_runs(&self.case).is_some();
        unsupported::eager_refuses(&self.case).filter(|_| candles)
    }

    /// The twin against inference and the reference: a twin or a reference that means something else shows here.
    fn check_eager(&self) -> Result<Option<Cell>> {
        let Some(eager) = &self.eager else {
            let why = unsupported::without_eager(&self.case);
            return Ok(Some(why.map_or_else(
                || Cell::of(Outcome::Failed("no result of eager, and no reason".into())),
                |why| Cell::of(Outcome::Skipped(why.into())),
            )));
        };
        let meta = self.case.infer()?;
        let mut cell = Cell::of(Outcome::Passed);
        if eager.dims() != meta.dims.as_slice() || eager.dtype() != meta.dtype {
            let (dims, dtype) = (eager.dims(), eager.dtype());
            cell.outcome = Outcome::Failed(format!("eager gives {dtype:?} {dims:?}, inference says {meta:?}"));
        } else if !self.case.is_special() {
            let arr = to_arr(eager)?;
            let worst = crate::compare::worst_error(&arr, &self.judged, eager.dtype(), None);
            cell.ulp = if worst.ulp.is_finite() { worst.ulp } else { 0.0 };
            let masked = self.judged.value.data.iter().any(|x| x.is_nan());
            if !worst.ulp.is_finite() && !masked {
                cell.outcome = Outcome::Failed(format!("eager and the reference differ in kind at {}", worst.at));
            }
        }
        Ok(Some(cell))
    }

    /// Computes the case in a mode and judges it. `None` where the mode says nothing about the case.
    ///
    /// # Errors
    /// When something fails that should not.
    pub fn check(&mut self, mode: Mode) -> Result<Option<Cell>> {
        if let (Mode::Replay, Some(why)) = (mode, unsupported::replay_is_wrong(&self.case)) {
            return Ok(Some(Cell::of(Outcome::Skipped(why.into()))));
        }
        match mode {
            Mode::Eager => self.check_eager(),
            Mode::Recorded => recorded::check(self),
            Mode::NnModule => module::check(self),
            // no case of an op's table: calls have tables of their own
            Mode::Compat => Ok(None),
            Mode::Ops => functions::check(self),
            Mode::OpsTracked => functions::check_tracked(self),
            Mode::Tracked => gradient::check(self),
            Mode::Grad => gradient::check_recorded(self),
            Mode::Async | Mode::Batched => company::check(self, mode),
            _ => lazy_modes::check(self, mode),
        }
    }
}

/// The result, a panic being an error too: what eager Candle may do, but nothing of ours.
fn contained<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f))
        .unwrap_or_else(|panic| Err(Error::NoTwin(format!("a panic: {}", crate::verify::message(panic.as_ref())))))
}
