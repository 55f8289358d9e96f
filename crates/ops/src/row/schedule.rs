//! Which instructions run when, and which tile buffer each value lives in.

use super::fuse::{fuse, Fused};
use super::prepared::Resolved;
use super::program::{Instr, Kind, Reg, RowProgram};
use super::whole::Whole;
use crate::fault;

/// Stands for "no buffer".
pub(crate) const NO_SLOT: usize = usize::MAX;

/// One sweep over the columns of a tile of rows.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// Row values that are complete before the sweep.
    pub(crate) before: Vec<usize>,
    /// Instructions to run per segment of columns, in program order.
    pub(crate) body: Vec<usize>,
    /// Outputs of `Kind::Vec` to store per segment.
    pub(crate) stores: Vec<usize>,
    /// Buffer of each register during this pass.
    pub(crate) slots: Vec<usize>,
    /// What is done in the place of each instruction, where it is not the instruction.
    pub(crate) fused: Vec<Option<Fused>>,
}

/// The sweeps of a run, and how many buffers they need.
#[derive(Debug)]
pub(crate) struct Schedule {
    pub(crate) passes: Vec<Pass>,
    /// Scratch buffers of one tile each.
    pub(crate) buffers: usize,
    /// What the sweeps come to, where dense rows may be run without them.
    pub(crate) whole: Option<Whole>,
}

/// Facts about one run that a schedule depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Facts {
    /// No row axes: every row value is an element value, and a reduction is its argument.
    pub(crate) elementwise: bool,
    /// The columns do not fit one tile: recompute element values in each pass.
    pub(crate) segmented: bool,
    /// Whether tiles lie column by column: no loop takes numbers per row then.
    pub(crate) columns: bool,
    /// Inputs that are read in place.
    pub(crate) borrowed: Few,
    /// Outputs that are computed in place; such an output `i` lives in slot `buffers + i`.
    pub(crate) direct: Few,
}

/// A set of operands, numbered from 0; those from 64 on are never in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Few(u64);

impl Few {
    /// Adds an operand, and says whether it is in the set now.
    pub(crate) fn add(&mut self, i: usize) -> bool {
        if i < 64 {
            self.0 |= 1 << i;
        }
        self.has(i)
    }

    pub(crate) fn has(self, i: usize) -> bool {
        i < 64 && self.0 >> i & 1 == 1
    }
}

impl Schedule {
    pub(crate) fn new(program: &RowProgram, facts: Facts) -> Self {
        let Resolved { alias, kinds } = program.prepared.resolved(facts.elementwise);
        let n = program.instrs.len();
        let arg = |r: Reg| alias.get(usize::from(r.0)).copied().unwrap_or(0);
        let roots: Vec<usize> = program.outputs.iter().map(|&(r, _)| arg(r)).collect();

        // What no output depends on is not run.
        let mut needed = vec![false; n];
        for &r in &roots {
            needed[r] = true;
        }
        for i in (0..n).rev() {
            if needed[i] && alias[i] == i {
                program.instrs[i].each_arg(|r| needed[arg(r)] = true);
            }
        }
        let live = |i: usize| needed[i] && alias[i] == i && kinds[i] != Kind::Const;
        let is_reduce = |i: usize| matches!(program.instrs[i], Instr::Reduce(..)) && !facts.elementwise;

        let mut passes = Vec::new();
        if facts.segmented {
            // Reductions that must be complete before a value can be computed.
            let mut level = vec![0usize; n];
            for i in 0..n {
                let mut l = 0;
                program.instrs[i].each_arg(|r| l = l.max(level[arg(r)]));
                level[i] = l + usize::from(is_reduce(i));
            }
            let last = (0..n).filter(|&i| live(i)).map(|i| level[i]).max();
            for p in 0..=last.unwrap_or(0) {
                let mut pass = Pass {
                    before: (0..n)
                        .filter(|&i| live(i) && kinds[i] == Kind::Row && !is_reduce(i) && level[i] == p)
                        .collect(),
                    stores: (0..roots.len())
                        .filter(|&o| {
                            kinds[roots[o]] == Kind::Vec && level[roots[o]] == p + fault::one_if("row.segmented_store")
                        })
                        .collect(),
                    ..Pass::default()
                };
                let mut wanted = vec![false; n];
                for &o in &pass.stores {
                    wanted[roots[o]] = true;
                }
                for i in (0..n).rev() {
                    let reduces_here = live(i) && is_reduce(i) && level[i] == p + 1;
                    if reduces_here {
                        wanted[i] = true;
                    }
                    if wanted[i] {
                        program.instrs[i].each_arg(|r| {
                            if kinds[arg(r)] == Kind::Vec {
                                wanted[arg(r)] = true;
                            }
                        });
                    }
                }
                pass.body = (0..n).filter(|&i| wanted[i]).collect();
                passes.push(pass);
            }
        } else {
            passes.push(Pass {
                before: Vec::new(),
                body: (0..n).filter(|&i| live(i)).collect(),
                stores: (0..roots.len()).filter(|&o| kinds[roots[o]] == Kind::Vec).collect(),
                ..Pass::default()
            });
        }

        let mut buffers = 0;
        for pass in &mut passes {
            let by_rows = !facts.columns && !facts.elementwise;
            pass.fused = fuse(program, kinds, alias, &pass.body, pass.stores.iter().map(|&o| roots[o]), by_rows);
            pass.body.retain(|&i| pass.fused[i] != Some(Fused::Absorbed));
            buffers = buffers.max(assign(pass, program, kinds, alias, &roots, facts));
        }
        for pass in &mut passes {
            for slot in &mut pass.slots {
                // Direct outputs were numbered from the top; now the number of buffers is known.
                if *slot != NO_SLOT && *slot >= DIRECT {
                    *slot = *slot - DIRECT + buffers;
                }
            }
        }
        let whole = match passes.as_slice() {
            [pass] => Whole::find(program, program.prepared.resolved(facts.elementwise), pass, &roots, facts),
            _ => None,
        };
        Schedule { passes, buffers, whole }
    }
}

/// Provisional numbering of direct outputs.
const DIRECT: usize = usize::MAX / 2;

/// The registers that are read in the place of instruction `i`.
fn each_arg(program: &RowProgram, pass: &Pass, i: usize, f: impl FnMut(Reg)) {
    match &pass.fused[i] {
        Some(fused) => fused.each_arg(f),
        None => program.instrs[i].each_arg(f),
    }
}

/// Gives each element value of a pass a buffer, reusing buffers after their last use. Returns how many there are.
fn assign(
    pass: &mut Pass,
    program: &RowProgram,
    kinds: &[Kind],
    alias: &[usize],
    roots: &[usize],
    facts: Facts,
) -> usize {
    let n = program.instrs.len();
    let mut last_use = vec![0usize; n];
    for (at, &i) in pass.body.iter().enumerate() {
        each_arg(program, pass, i, |r| {
            if let Some(&a) = alias.get(usize::from(r.0)) {
                last_use[a] = at;
            }
        });
    }
    for &o in &pass.stores {
        last_use[roots[o]] = usize::MAX;
    }
    pass.slots = vec![NO_SLOT; n];
    let mut free: Vec<usize> = Vec::new();
    let mut count = 0;
    for (at, &i) in pass.body.iter().enumerate() {
        if kinds[i] == Kind::Vec {
            let in_place = match program.instrs[i] {
                Instr::Load { input } | Instr::LoadRow { input } => facts.borrowed.has(usize::from(input)),
                _ => false,
            };
            // Only in the pass that stores it: an earlier or later one recomputes it into a buffer.
            let direct =
                pass.stores.iter().copied().find(|&o| roots[o] == i).filter(|&o| facts.direct.has(o) && !in_place);
            pass.slots[i] = match direct {
                _ if in_place => NO_SLOT,
                Some(o) => DIRECT + o,
                None => free.pop().unwrap_or_else(|| {
                    count += 1;
                    count - 1
                }),
            };
        }
        // Arguments whose last use this was give their buffer back (after the destination was chosen: no loop
        // reads the buffer it writes).
        let mut freed: smallvec::SmallVec<[usize; 3]> = smallvec::SmallVec::new();
        // the fault: given back although a later instruction reads it
        let early = fault::active("row.buffer_freed_early");
        each_arg(program, pass, i, |r| {
            if let Some(&a) = alias.get(usize::from(r.0)) {
                let slot = pass.slots[a];
                if (last_use[a] == at || early && last_use[a] < usize::MAX) && slot < DIRECT && !freed.contains(&slot) {
                    freed.push(slot);
                }
            }
        });
        free.extend(freed);
    }
    count
}
