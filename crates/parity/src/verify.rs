//! The matrix, run and counted.

use crate::case::Case;
use crate::cases::{cases, Extent};
use crate::compare::DRAWS;
use crate::modes::{Cell, Mode, Outcome, Subject};
use crate::random;
use crate::{Error, Result};
use candle_core::DType;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once};

/// What to check.
#[derive(Debug, Clone)]
pub struct Options {
    /// How much of the table.
    pub extent: Extent,
    /// Only ops with this name.
    pub op: Option<String>,
    /// Only these modes, separated by commas.
    pub mode: Option<String>,
    /// Only cases of this dtype.
    pub dtype: Option<DType>,
    /// The seed of inputs and random graphs.
    pub seed: u64,
    /// The number of random graphs per dtype.
    pub graphs: usize,
    /// The number of threads.
    pub threads: usize,
}

impl Options {
    /// Everything of an extent with the usual seed, on all cores.
    #[must_use]
    pub fn new(extent: Extent) -> Self {
        let graphs = match extent {
            Extent::Smoke => 20,
            Extent::Quick => 200,
            Extent::Full => 1000,
        };
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { extent, op: None, mode: None, dtype: None, seed: 1, graphs, threads }
    }
}

/// A cell that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The case in words.
    pub case: String,
    /// The op's name.
    pub op: String,
    /// The mode's name.
    pub mode: String,
    /// What is wrong.
    pub what: String,
}

/// The cells of one op.
#[derive(Debug, Clone, Default)]
pub struct OpRow {
    /// Cells checked or skipped.
    pub cases: usize,
    /// Cells that failed.
    pub failed: usize,
    /// Cells skipped.
    pub skipped: usize,
    /// The measured error, in units in the last place at the row's scale, that is nearest to its limit.
    pub worst_ulp: f64,
    /// That error as a share of its limit.
    pub worst_share: f64,
    /// The case and mode of that error.
    pub worst_case: String,
    /// The kernels that ran.
    pub kernels: BTreeMap<&'static str, usize>,
}

/// What came of a run.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Per op name.
    pub rows: BTreeMap<String, OpRow>,
    /// Every failed cell.
    pub failures: Vec<Failure>,
    /// Why cells were skipped, and how many.
    pub skips: BTreeMap<String, usize>,
    /// Why the gradients of cells were not checked, and of how many; their results were.
    pub without_gradient: BTreeMap<&'static str, usize>,
}

impl Summary {
    /// The number of cells.
    #[must_use]
    pub fn cases(&self) -> usize {
        self.rows.values().map(|r| r.cases).sum()
    }

    /// The number of failed cells.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.rows.values().map(|r| r.failed).sum()
    }

    /// The number of skipped cells.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.rows.values().map(|r| r.skipped).sum()
    }

    /// Counts a cell.
    pub fn count(&mut self, op: &str, case: &str, mode: &str, cell: &Cell) {
        let row = self.rows.entry(op.to_string()).or_default();
        row.cases += 1;
        for (name, count) in &cell.kernels {
            *row.kernels.entry(name).or_default() += count;
        }
        if cell.share > row.worst_share {
            row.worst_share = cell.share;
            row.worst_ulp = cell.ulp;
            row.worst_case = format!("{case}, {mode}");
        }
        if let Some(why) = cell.without_gradient {
            *self.without_gradient.entry(why).or_default() += 1;
        }
        match &cell.outcome {
            Outcome::Passed => {}
            Outcome::Failed(what) => {
                row.failed += 1;
                self.failures.push(Failure {
                    case: case.to_string(),
                    op: op.to_string(),
                    mode: mode.to_string(),
                    what: what.clone(),
                });
            }
            Outcome::Skipped(why) => {
                row.skipped += 1;
                *self.skips.entry(why.clone()).or_default() += 1;
            }
        }
    }

    /// Counts all cells of another run.
    pub fn merge(&mut self, other: Self) {
        for (op, theirs) in other.rows {
            let row = self.rows.entry(op).or_default();
            row.cases += theirs.cases;
            row.failed += theirs.failed;
            row.skipped += theirs.skipped;
            for (name, count) in theirs.kernels {
                *row.kernels.entry(name).or_default() += count;
            }
            if theirs.worst_share > row.worst_share {
                row.worst_share = theirs.worst_share;
                row.worst_ulp = theirs.worst_ulp;
                row.worst_case = theirs.worst_case;
            }
        }
        self.failures.extend(other.failures);
        for (why, count) in other.skips {
            *self.skips.entry(why).or_default() += count;
        }
        for (why, count) in other.without_gradient {
            *self.without_gradient.entry(why).or_default() += count;
        }
    }

    /// The table, the failures (at most `limit`), why cells were skipped, and the last line.
    #[must_use]
    pub fn text(&self, limit: usize) -> String {
        let mut out = String::new();
        // writing to a string cannot fail
        let _ = writeln!(
            out,
            "{:<14}{:>8}{:>8}{:>9}{:>11}{:>10}  kernels and worst case",
            "op", "cases", "failed", "skipped", "worst ulp", "of limit"
        );
        for (op, row) in &self.rows {
            let kernels: Vec<String> = row.kernels.iter().map(|(name, n)| format!("{name} {n}")).collect();
            let kernels = if kernels.is_empty() { "no kernel".to_string() } else { kernels.join(", ") };
            let _ = write!(
                out,
                "{op:<14}{:>8}{:>8}{:>9}{:>11.2}{:>9.0}%  {kernels}",
                row.cases,
                row.failed,
                row.skipped,
                row.worst_ulp,
                row.worst_share * 100.0
            );
            let _ = writeln!(
                out,
                "{}",
                if row.worst_case.is_empty() { String::new() } else { format!("; {}", row.worst_case) }
            );
        }
        for failure in self.failures.iter().take(limit) {
            let _ = writeln!(out, "FAILED {} [{}]: {}", failure.case, failure.mode, failure.what);
        }
        if self.failures.len() > limit {
            let _ = writeln!(out, "and {} more", self.failures.len() - limit);
        }
        for (why, count) in &self.skips {
            let _ = writeln!(out, "skipped {count}: {why}");
        }
        for (why, count) in &self.without_gradient {
            let _ = writeln!(out, "checked without gradient {count}: {why}");
        }
        let _ = write!(out, "{}", self.last_line());
        out
    }

    /// `verify: N cases, M failed, K skipped`.
    #[must_use]
    pub fn last_line(&self) -> String {
        format!("verify: {} cases, {} failed, {} skipped", self.cases(), self.failed(), self.skipped())
    }
}

/// The first line of an error: Candle's go on with a backtrace where one is asked for.
fn first_line(e: &Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_string()
}

pub(crate) fn message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_string()))
        .unwrap_or_else(|| "no message".into())
}

/// The cell of a check: an error or a panic is a failure.
pub(crate) fn caught(check: impl FnOnce() -> Result<Option<Cell>>) -> Option<Cell> {
    match catch_unwind(AssertUnwindSafe(check)) {
        Ok(Ok(cell)) => cell,
        Ok(Err(e)) => Some(Cell::of(Outcome::Failed(format!("error: {}", first_line(&e))))),
        Err(p) => Some(Cell::of(Outcome::Failed(format!("panicked: {}", message(p.as_ref()))))),
    }
}

/// The cell of one draw of a case in a mode.
fn check_draw(subject: &mut Subject, mode: Mode) -> Option<Cell> {
    caught(|| match subject.check(mode) {
        Err(error) => match subject.candle_refuses(mode) {
            Some(why) => Ok(Some(Cell::of(Outcome::Skipped(why.into())))),
            None => Err(error),
        },
        other => other,
    })
}

/// The cell of a case in a mode; `None` where the mode says nothing about the case. One that is over its limit is drawn
/// again ([`DRAWS`]); whatever else goes wrong in any draw fails it.
pub(crate) fn check_cell(subject: &mut Subject, mode: Mode) -> Option<Cell> {
    let mut cell = check_draw(subject, mode)?;
    let Some(first) = cell.only_over_its_limit().cloned() else {
        return Some(cell);
    };
    let mut draws = vec![first];
    for draw in 1..DRAWS {
        let seed = subject.seed.wrapping_add(draw.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let again = match catch_unwind(AssertUnwindSafe(|| Subject::new(subject.case.clone(), seed))) {
            Ok(Ok(mut again)) => check_draw(&mut again, mode),
            _ => None,
        };
        match again {
            // more than an error somewhat beyond a limit; what is beyond one counts among the draws
            Some(Cell { outcome: Outcome::Failed(what), verdict, .. })
                if !verdict.as_ref().is_some_and(|v| v.ours.ulp > v.limit && v.ours.ulp.is_finite()) =>
            {
                cell.outcome = Outcome::Failed(format!("drawn again: {what}"));
                return Some(cell);
            }
            // of the same thing: the result, or the gradient of the same input
            Some(again) => draws.extend(again.measured.into_iter().find(|v| v.gradient == draws[0].gradient)),
            None => {}
        }
    }
    let all = crate::compare::over_all_draws(&draws);
    (cell.ulp, cell.share) = (all.ours.ulp, all.share());
    cell.outcome = match (all.wrong, cell.outcome) {
        (None, _) => Outcome::Passed,
        (Some(all), Outcome::Failed(what)) => Outcome::Failed(format!("{what}; {all}")),
        (Some(all), _) => Outcome::Failed(all),
    };
    Some(cell)
}

/// Runs `f` with panics of this thread saying nothing.
pub(crate) fn silenced<R>(f: impl FnOnce() -> R) -> R {
    silence();
    let before = SILENT.replace(true);
    let result = f();
    SILENT.set(before);
    result
}

/// Runs all modes of a case.
fn run_case(case: &Case, modes: &[Mode], seed: u64, summary: &mut Summary) {
    let (op, name) = (case.op.name(), case.name());
    let made = catch_unwind(AssertUnwindSafe(|| Subject::new(case.clone(), seed)));
    let mut subject = match made {
        Ok(Ok(subject)) => subject,
        Ok(Err(e)) => return summary.count(op, &name, "inputs", &Cell::of(Outcome::Failed(first_line(&e)))),
        Err(p) => {
            let text = format!("panicked: {}", message(p.as_ref()));
            return summary.count(op, &name, "inputs", &Cell::of(Outcome::Failed(text)));
        }
    };
    for &mode in modes {
        let Some(cell) = check_cell(&mut subject, mode) else {
            continue;
        };
        summary.count(op, &name, &mode.name(), &cell);
    }
}

/// Runs the named graphs in every mode that they have.
fn run_programs(options: &Options, modes: &[Mode], summary: &mut Summary) -> Result<()> {
    for dtype in crate::cases::FLOATS.into_iter().filter(|d| options.dtype.is_none_or(|only| only == *d)) {
        for named in crate::programs::programs(dtype)? {
            let name = format!("{}, {}", named.name, dtype.as_str());
            for &mode in modes {
                if let Some(cell) = caught(|| crate::programs::check(&named, mode)) {
                    summary.count("program", &name, &mode.name(), &cell);
                }
            }
        }
    }
    Ok(())
}

/// One family of random graphs: a single cell per dtype, whatever the number of seeds.
fn run_graphs(options: &Options, dtype: DType, size: usize) -> Cell {
    let judge = |program: &random::Program| -> Option<String> {
        // gradients of the smaller graphs: a long chain of them says more about rounding than about code
        let check = || match random::check(program)? {
            None if size <= 60 && program.differentiates() => random::check_gradients(program),
            wrong => Ok(wrong),
        };
        match catch_unwind(AssertUnwindSafe(check)) {
            Ok(Ok(wrong)) => wrong,
            Ok(Err(e)) => Some(format!("error: {}", first_line(&e))),
            Err(p) => Some(format!("panicked: {}", message(p.as_ref()))),
        }
    };
    for i in 0..options.graphs as u64 {
        let program = random::generate(options.seed.wrapping_mul(1_000_003) + i, size, dtype);
        if let Some(what) = judge(&program) {
            let small = random::minimise(&program, |p| judge(p).is_some());
            let what = judge(&small).unwrap_or(what);
            return Cell::of(Outcome::Failed(format!("{what}\n{small}")));
        }
    }
    Cell::of(Outcome::Passed)
}

/// The modes that `names` means, separated by commas; all for `None`.
fn modes_named(names: Option<&str>) -> Result<Vec<Mode>> {
    let all = Mode::all();
    let Some(names) = names else { return Ok(all) };
    let mut some = Vec::new();
    for name in names.split(',') {
        let Some(&mode) = all.iter().find(|m| m.name() == name) else {
            let names: Vec<String> = all.iter().map(|m| m.name()).collect();
            return Err(Error::Option(format!("no mode {name}; there are {}", names.join(", "))));
        };
        some.push(mode);
    }
    Ok(some)
}

thread_local! {
    /// Whether a panic on this thread is a failed cell, whose message goes into the report and not to the terminal.
    static SILENT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Lets panics of silent threads say nothing; those of other threads are as loud as before.
fn silence() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !SILENT.get() {
                loud(info);
            }
        }));
    });
}

/// Runs the matrix.
///
/// # Errors
/// When a filter names nothing.
pub fn run(options: &Options) -> Result<Summary> {
    candle_lazy_ops::fault::spoil_memory();
    let modes = modes_named(options.mode.as_deref())?;
    let table: Vec<Case> = cases(options.extent)
        .into_iter()
        .filter(|c| options.op.as_deref().is_none_or(|op| c.op.name() == op))
        .filter(|c| options.dtype.is_none_or(|d| c.dtype() == d))
        .collect();
    let graphs = options.op.as_deref().is_none_or(|op| op == "random") && options.mode.is_none();
    let programs = options.op.as_deref().is_none_or(|op| op == "program");
    let blocks = options.op.as_deref().is_none_or(|op| op == "block");
    if let (Some("random"), Some(mode)) = (options.op.as_deref(), &options.mode) {
        return Err(Error::Option(format!(
            "random graphs have no mode {mode}: each is evaluated in several ways at once"
        )));
    }
    let all = cases(Extent::Full);
    let names: Vec<&str> =
        all.iter().map(|c| c.op.name()).chain(["random", "program", "block", "method", "v1"]).collect();
    if let Some(op) = options.op.as_deref().filter(|op| !names.contains(op)) {
        return Err(Error::Option(format!(
            "no op {op}; docs/ops.md names them, beside random, program, block, method and v1"
        )));
    }
    let next = AtomicUsize::new(0);
    let parts = Mutex::new(Vec::new());
    silence();
    std::thread::scope(|scope| {
        for _ in 0..options.threads.max(1) {
            scope.spawn(|| loop {
                SILENT.set(true);
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(case) = table.get(at) else { return };
                let mut summary = Summary::default();
                run_case(case, &modes, options.seed, &mut summary);
                parts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((at, summary));
            });
        }
    });
    let mut parts = parts.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    parts.sort_by_key(|(at, _)| *at);
    let mut summary = Summary::default();
    for (_, part) in parts {
        summary.merge(part);
    }
    if programs {
        silenced(|| run_programs(options, &modes, &mut summary))?;
    }
    if blocks {
        silenced(|| crate::modes::blocks::run(options, &modes, &mut summary));
    }
    if options.op.as_deref().is_none_or(|op| op == "method") {
        silenced(|| crate::modes::methods::run(options, &modes, &mut summary));
    }
    if options.op.as_deref().is_none_or(|op| op == "v1") {
        silenced(|| crate::modes::compat::run(options, &modes, &mut summary));
    }
    SILENT.set(true);
    if graphs && options.graphs > 0 {
        let dtypes = crate::cases::FLOATS.into_iter().filter(|d| options.dtype.is_none_or(|only| only == *d));
        let families: Vec<(DType, usize)> = dtypes.flat_map(|d| random::SIZES.map(|size| (d, size))).collect();
        let next = AtomicUsize::new(0);
        let cells = Mutex::new(vec![None; families.len()]);
        std::thread::scope(|scope| {
            for _ in 0..options.threads.max(1) {
                scope.spawn(|| loop {
                    SILENT.set(true);
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&(dtype, size)) = families.get(at) else { return };
                    let cell = run_graphs(options, dtype, size);
                    let mut cells = cells.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    if let Some(place) = cells.get_mut(at) {
                        *place = Some(cell);
                    }
                });
            }
        });
        let cells = cells.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        for ((dtype, size), cell) in families.iter().zip(cells) {
            let case = format!("{} graphs of {size} nodes, {}, seed {}", options.graphs, dtype.as_str(), options.seed);
            summary.count("random", &case, "all", &cell.unwrap_or_else(|| Cell::of(Outcome::Failed("not run".into()))));
        }
    }
    SILENT.set(false);
    if summary.cases() == 0 {
        let said = |what: &str, name: Option<&str>| name.map(|n| format!(" and {what} {n}")).unwrap_or_default();
        let op = said("op", options.op.as_deref());
        let (dtype, mode) = (said("dtype", options.dtype.map(|d| d.as_str())), said("mode", options.mode.as_deref()));
        let filters = format!("{op}{dtype}{mode}");
        return Err(Error::Option(format!("no cell has {} in this extent", filters.trim_start_matches(" and "))));
    }
    Ok(summary)
}
