//! What a program keeps from run to run: binding it to operands should cost less than a small row's arithmetic.

use super::program::{BinaryFn as B, Instr, Kind, Reg, RowProgram, UnaryFn as U};
use super::schedule::{Facts, Schedule};
use crate::fault;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, PoisonError, RwLock};

/// The register that each register stands for, and its kind.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    /// Register that holds a register's value: itself, except for a reduction over single elements.
    pub(crate) alias: Vec<usize>,
    /// Kind of each register as it is run.
    pub(crate) kinds: Vec<Kind>,
}

/// The schedule of each kind of input.
type Schedules = Vec<(Facts, Arc<Schedule>)>;

/// What follows from a program's code, so that two programs never differ by it.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    /// Over rows.
    rows: Resolved,
    /// Over single elements.
    elements: Resolved,
    /// What an element costs, roughly, in additions.
    pub(crate) cost: usize,
    /// The schedules that were needed so far, which clones of the program share.
    schedules: Arc<RwLock<Schedules>>,
}

impl Prepared {
    pub(crate) fn new(instrs: &[Instr], kinds: Vec<Kind>) -> Self {
        let alias: Vec<usize> = (0..instrs.len()).collect();
        let mut elements = Resolved { alias: alias.clone(), kinds: kinds.clone() };
        for (i, instr) in instrs.iter().enumerate() {
            if let Instr::Reduce(_, Reg(a)) = *instr {
                elements.alias[i] = elements.alias.get(usize::from(a)).copied().unwrap_or(i);
            }
            if elements.kinds[i] == Kind::Row {
                elements.kinds[i] = Kind::Vec;
            }
        }
        let cost = instrs.iter().map(cost).sum();
        Self { rows: Resolved { alias, kinds }, elements, cost, schedules: Arc::default() }
    }

    /// The registers' kinds.
    pub(crate) fn kinds(&self) -> &[Kind] {
        &self.rows.kinds
    }

    pub(crate) fn resolved(&self, elementwise: bool) -> &Resolved {
        match elementwise {
            true => &self.elements,
            false => &self.rows,
        }
    }
}

/// What an instruction costs an element, roughly, in additions.
pub(super) fn cost(instr: &Instr) -> usize {
    match instr {
        Instr::Param { .. } | Instr::RowLen | Instr::LoadRow { .. } => 0,
        // from beyond the second-level cache, more often than not
        Instr::Load { .. } => 3,
        Instr::Binary(B::Pow, ..) => 64,
        Instr::Unary(
            U::Exp | U::Log | U::Sin | U::Cos | U::Tanh | U::Erf | U::Gelu | U::GeluErf | U::Silu | U::Sigmoid,
            _,
        ) => 16,
        Instr::Binary(B::Div, ..) | Instr::Unary(U::Recip | U::Sqrt | U::Rsqrt, _) => 4,
        _ => 1,
    }
}

/// No program keeps more schedules than these; who runs one in more ways makes the others anew.
const MOST: usize = 16;

impl RowProgram {
    /// The schedule for such a run.
    pub(super) fn schedule(&self, facts: Facts) -> Arc<Schedule> {
        // a fault may be in the schedule itself
        if fault::any() {
            return Arc::new(Schedule::new(self, facts));
        }
        let kept = &self.prepared.schedules;
        let find = |all: &[(Facts, Arc<Schedule>)]| all.iter().find(|(f, _)| *f == facts).map(|(_, s)| s.clone());
        if let Some(schedule) = find(&kept.read().unwrap_or_else(PoisonError::into_inner)) {
            return schedule;
        }
        let schedule = Arc::new(Schedule::new(self, facts));
        let mut kept = kept.write().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < MOST && find(&kept).is_none() {
            kept.push((facts, schedule.clone()));
        }
        schedule
    }
}

impl PartialEq for Prepared {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Prepared {}

impl Hash for Prepared {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

#[cfg(test)]
mod tests {
    use super::super::program::Class;
    use super::super::programs;
    use super::super::schedule::Few;
    use candle_core::DType;

    #[test]
    fn a_schedule_is_made_once_for_each_kind_of_run() {
        use super::*;
        let program = programs::softmax(Class::F32, DType::F32).unwrap();
        let (none, mut first) = (Few::default(), Few::default());
        assert!(first.add(0));
        let facts =
            |borrowed, elementwise| Facts { elementwise, segmented: false, columns: false, borrowed, direct: none };
        let one = program.schedule(facts(first, false));
        assert!(Arc::ptr_eq(&one, &program.schedule(facts(first, false))));
        assert!(!Arc::ptr_eq(&one, &program.schedule(facts(none, false))));
        assert!(!Arc::ptr_eq(&one, &program.schedule(facts(first, true))));
        let same = programs::softmax(Class::F32, DType::F32).unwrap();
        assert_eq!(same, program, "what was kept is no difference");
        assert!(!first.add(64), "operands beyond a word are copied");
    }
}
