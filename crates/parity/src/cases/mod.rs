//! The table of cases: every op of the enum over shapes, layouts and dtypes.

mod composite;
mod contraction;
mod elementwise;
mod movement;
mod opaque;
mod placed;

use crate::case::{Case, Domain, InputSpec, Layout};
use candle_core::DType;
use candle_lazy_graph::Op;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// How much of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// One or two shapes per op: for `cargo test`.
    Smoke,
    /// Under two minutes.
    Quick,
    /// Everything.
    Full,
}

/// The floating-point dtypes.
pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Integer dtypes.
pub const INTEGERS: [DType; 3] = [DType::U8, DType::U32, DType::I64];

/// Every case, in a fixed order.
#[must_use]
pub fn cases(extent: Extent) -> Vec<Case> {
    let mut table = Table { extent, cases: Vec::new(), known: HashMap::new() };
    elementwise::add(&mut table);
    movement::add(&mut table);
    contraction::add(&mut table);
    composite::add(&mut table);
    placed::add(&mut table);
    opaque::add(&mut table);
    table.cases
}

/// The cases as they are collected.
pub(crate) struct Table {
    pub(crate) extent: Extent,
    cases: Vec<Case>,
    /// The cases of each hash of op and inputs: there are tens of thousands, and each is there once.
    known: HashMap<u64, Vec<usize>>,
}

impl Table {
    /// Which of `all` this extent takes: the full table everything, smaller ones the first few.
    pub(crate) fn some<'a, T>(&self, all: &'a [T], smoke: usize, quick: usize) -> &'a [T] {
        let n = match self.extent {
            Extent::Smoke => smoke,
            Extent::Quick => quick,
            Extent::Full => all.len(),
        };
        &all[..n.min(all.len())]
    }

    /// The layouts of this extent.
    pub(crate) fn layouts(&self) -> &'static [Layout] {
        match self.extent {
            Extent::Smoke => &[Layout::Contiguous, Layout::Narrowed],
            _ => &Layout::ALL,
        }
    }

    /// Adds the case if it is legal and its layouts say something at these dims.
    pub(crate) fn push(&mut self, case: Case) {
        let applies = case.inputs.iter().all(InputSpec::layout_applies);
        if !applies || case.infer().is_err() {
            return;
        }
        let mut hasher = DefaultHasher::new();
        case.op.hash(&mut hasher);
        for input in &case.inputs {
            (&input.dims, input.dtype, input.layout).hash(&mut hasher);
        }
        let alike = self.known.entry(hasher.finish()).or_default();
        if !alike.iter().any(|&i| self.cases[i] == case) {
            alike.push(self.cases.len());
            self.cases.push(case);
        }
    }

    /// Adds the case in every layout: all inputs alike where a layout applies to them, then each input alone.
    pub(crate) fn laid_out(&mut self, op: &Op, scalars: &[f64], inputs: &[(&[usize], DType, Domain)]) {
        let build = |choose: &dyn Fn(usize) -> Layout| {
            let specs = inputs
                .iter()
                .enumerate()
                .map(|(i, (dims, dtype, domain))| {
                    let spec = InputSpec::new(dims, *dtype, choose(i), *domain);
                    if spec.layout_applies() {
                        spec
                    } else {
                        InputSpec { layout: Layout::Contiguous, ..spec }
                    }
                })
                .collect();
            Case::new(op.clone(), scalars, specs)
        };
        for &layout in self.layouts() {
            self.push(build(&|_| layout));
            if self.extent == Extent::Full && inputs.len() > 1 {
                for alone in 0..inputs.len() {
                    self.push(build(&|i| {
                        if i == alone {
                            layout
                        } else {
                            Layout::Contiguous
                        }
                    }));
                }
            }
        }
    }
}
