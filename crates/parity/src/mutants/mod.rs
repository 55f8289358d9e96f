//! The checker checked: faults over every kernel, pass, plan step and backward, each of which the matrix must catch.
//!
//! The faults are hooks in the code itself (`candle_lazy_ops::fault`, behind the feature `testing`). A mutant names one of them,
//! and the cells of the matrix that should fail under it: the same cases, modes and rules that `verify` runs. Each of these
//! cells is first shown to pass without the fault. A mutant that no cell catches, or whose place is never reached, survives.

mod table;

pub use table::{mutants, Mutant};

use crate::case::Case;
use crate::cases::{cases, Extent};
use crate::modes::{Cell, Mode, Outcome, Subject};
use crate::programs::{self, Named};
use crate::verify::{caught, check_cell, silenced};
use crate::{Error, Result};
use candle_core::DType;
use candle_lazy_exec::plan::clear_cache;
use candle_lazy_ops::fault;
use std::collections::BTreeMap;

/// What became of a mutant.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// The mutant.
    pub mutant: Mutant,
    /// The cell that failed: case, mode, and what it said. `None`: the mutant survived.
    pub caught: Option<(String, String, String)>,
    /// How many cells were tried.
    pub cells: usize,
    /// Whether the faulty place was reached at all.
    pub reached: bool,
}

impl Verdict {
    /// One line: the mutant, where it is, and what caught it.
    #[must_use]
    pub fn line(&self) -> String {
        let Mutant { name, what, .. } = &self.mutant;
        match &self.caught {
            Some((case, mode, said)) => {
                let said = said.lines().next().unwrap_or_default();
                format!("{name:<32} {what}: caught by {case} [{mode}], cell {}: {said}", self.cells)
            }
            None if self.reached => format!("{name:<32} {what}: SURVIVED {} cells", self.cells),
            None => format!("{name:<32} {what}: SURVIVED, never reached in {} cells", self.cells),
        }
    }
}

/// `mutants: N, survived M`.
#[must_use]
pub fn last_line(verdicts: &[Verdict]) -> String {
    let survived = verdicts.iter().filter(|v| v.caught.is_none()).count();
    format!("mutants: {}, survived {survived}", verdicts.len())
}

/// Something that a mutant runs.
enum Item {
    Case(Case),
    Program(Named),
}

impl Item {
    fn op(&self) -> &str {
        match self {
            Self::Case(case) => case.op.name(),
            Self::Program(_) => "program",
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Case(case) => case.name(),
            Self::Program(named) => format!("{}, {}", named.name, named.program.dtype.as_str()),
        }
    }
}

/// The cells, with what is known of them.
struct Bench {
    items: Vec<Item>,
    subjects: BTreeMap<usize, Subject>,
    clean: BTreeMap<(usize, Mode), bool>,
    seed: u64,
}

impl Bench {
    fn new(seed: u64) -> Result<Self> {
        let mut items: Vec<Item> = cases(Extent::Quick).into_iter().map(Item::Case).collect();
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            items.extend(programs::programs(dtype)?.into_iter().map(Item::Program));
        }
        Ok(Self { items, subjects: BTreeMap::new(), clean: BTreeMap::new(), seed })
    }

    /// The cell of an item in a mode; `None` where there is none.
    fn cell(&mut self, at: usize, mode: Mode) -> Result<Option<Cell>> {
        match &self.items[at] {
            Item::Program(named) => Ok(caught(|| programs::check(named, mode))),
            Item::Case(case) => {
                if !self.subjects.contains_key(&at) {
                    self.subjects.insert(at, Subject::new(case.clone(), self.seed)?);
                }
                // a copy: what a run remembers must not outlive its fault
                Ok(self.subjects.get(&at).cloned().and_then(|mut subject| check_cell(&mut subject, mode)))
            }
        }
    }

    /// Whether the cell exists and passes without a fault.
    fn passes(&mut self, at: usize, mode: Mode) -> Result<bool> {
        if let Some(&known) = self.clean.get(&(at, mode)) {
            return Ok(known);
        }
        let passes = match self.cell(at, mode)? {
            None => false,
            Some(Cell { outcome: Outcome::Passed, .. }) => true,
            Some(Cell { outcome: Outcome::Skipped(_), .. }) => false,
            Some(Cell { outcome: Outcome::Failed(what), .. }) => {
                let (name, mode) = (self.items[at].name(), mode.name());
                return Err(Error::Option(format!("{name} [{mode}] fails without a fault: {what}")));
            }
        };
        self.clean.insert((at, mode), passes);
        Ok(passes)
    }

    fn judge(&mut self, mutant: Mutant) -> Result<Verdict> {
        let all = Mode::all();
        let mut modes = Vec::new();
        for name in mutant.modes.split(' ') {
            match all.iter().find(|m| m.name() == name) {
                Some(mode) => modes.push(*mode),
                None => return Err(Error::Option(format!("mutant {}: no mode {name}", mutant.name))),
            }
        }
        let ops: Vec<String> = mutant.ops.split(' ').map(str::to_string).collect();
        let items: Vec<usize> =
            (0..self.items.len()).filter(|&at| ops.iter().any(|op| op == self.items[at].op())).collect();
        let mut verdict = Verdict { mutant, caught: None, cells: 0, reached: false };
        for &at in &items {
            for &mode in &modes {
                // plans made under a fault must not outlive it; what mistakes one plan for another needs several
                let alone = !verdict.mutant.name.starts_with("cache.any");
                if alone {
                    clear_cache();
                }
                if !self.passes(at, mode)? {
                    continue;
                }
                if alone {
                    clear_cache();
                }
                let injected = fault::inject(&verdict.mutant.name);
                let cell = self.cell(at, mode);
                verdict.reached |= injected.reached() > 0;
                drop(injected);
                verdict.cells += 1;
                if let Some(Cell { outcome: Outcome::Failed(what), .. }) = cell? {
                    verdict.caught = Some((self.items[at].name(), mode.name(), what));
                    clear_cache();
                    return Ok(verdict);
                }
            }
        }
        clear_cache();
        Ok(verdict)
    }
}

/// Judges the mutants whose name begins with `filter` and of which a cell is in one of `modes` (all for `None`), and shows each verdict as it
/// falls.
///
/// # Errors
/// When a cell fails without any fault, or the table names what does not exist.
pub fn run(
    filter: Option<&str>,
    modes: Option<&[&str]>,
    seed: u64,
    mut show: impl FnMut(&Verdict),
) -> Result<Vec<Verdict>> {
    fault::spoil_memory();
    let named = |m: &Mutant| filter.is_none_or(|f| m.name.starts_with(f));
    let of_modes = |m: &Mutant| modes.is_none_or(|modes| m.modes.split(' ').any(|mode| modes.contains(&mode)));
    let wanted: Vec<Mutant> = mutants().into_iter().filter(|m| named(m) && of_modes(m)).collect();
    if wanted.is_empty() {
        return Err(Error::Option(format!("no mutant begins with {}", filter.unwrap_or_default())));
    }
    silenced(|| {
        let mut bench = Bench::new(seed)?;
        let mut verdicts = Vec::with_capacity(wanted.len());
        for mutant in wanted {
            let verdict = bench.judge(mutant)?;
            show(&verdict);
            verdicts.push(verdict);
        }
        Ok(verdicts)
    })
}
