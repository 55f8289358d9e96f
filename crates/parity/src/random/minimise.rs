//! The smallest part of a random graph that still fails.

use super::{Program, Step};
use crate::case::{Domain, InputSpec, Layout};

/// How many smaller graphs are tried.
const ATTEMPTS: usize = 600;

/// Drops roots, then turns ops into leaves, as long as `fails` still holds.
#[must_use]
pub fn minimise(program: &Program, fails: impl Fn(&Program) -> bool) -> Program {
    let mut best = program.clone();
    let mut attempts = 0;
    loop {
        let mut smaller = None;
        for candidate in candidates(&best) {
            attempts += 1;
            if attempts > ATTEMPTS {
                return best;
            }
            if fails(&candidate) {
                smaller = Some(candidate);
                break;
            }
        }
        match smaller {
            Some(candidate) => best = candidate,
            None => return best,
        }
    }
}

/// Smaller graphs, the most different first.
fn candidates(program: &Program) -> Vec<Program> {
    let mut out = Vec::new();
    if program.roots.len() > 1 {
        for &root in &program.roots {
            out.push(without_dead(&Program { roots: vec![root], ..program.clone() }));
        }
        for drop in 0..program.roots.len() {
            let mut roots = program.roots.clone();
            roots.remove(drop);
            out.push(without_dead(&Program { roots, ..program.clone() }));
        }
    }
    // an op that a root reads becomes the root
    for (at, &root) in program.roots.iter().enumerate() {
        if let Step::Op { inputs, .. } = &program.steps[root] {
            for &i in inputs.iter().filter(|&&i| matches!(program.steps[i], Step::Op { .. })) {
                let mut roots = program.roots.clone();
                roots[at] = i;
                out.push(without_dead(&Program { roots, ..program.clone() }));
            }
        }
    }
    for (i, step) in program.steps.iter().enumerate() {
        if matches!(step, Step::Op { .. }) && !program.roots.contains(&i) {
            let mut cut = program.clone();
            let known = &program.known[i];
            cut.steps[i] = Step::Leaf(InputSpec::new(&known.dims, known.dtype, Layout::Contiguous, Domain::Any));
            cut.known[i].exact = true;
            out.push(without_dead(&cut));
        }
    }
    out
}

/// The program without steps that no root needs.
fn without_dead(program: &Program) -> Program {
    let mut needed = vec![false; program.steps.len()];
    for &r in &program.roots {
        needed[r] = true;
    }
    for i in (0..program.steps.len()).rev() {
        if let (true, Step::Op { inputs, .. }) = (needed[i], &program.steps[i]) {
            for &input in inputs {
                needed[input] = true;
            }
        }
    }
    let mut at = vec![0; program.steps.len()];
    let mut out = Program { steps: Vec::new(), known: Vec::new(), roots: Vec::new(), ..program.clone() };
    for (i, step) in program.steps.iter().enumerate().filter(|(i, _)| needed[*i]) {
        at[i] = out.steps.len();
        out.known.push(program.known[i].clone());
        out.steps.push(match step {
            Step::Leaf(spec) => Step::Leaf(spec.clone()),
            Step::Op { op, scalars, inputs } => Step::Op {
                op: op.clone(),
                scalars: scalars.clone(),
                inputs: inputs.iter().map(|&input| at[input]).collect(),
            },
        });
    }
    out.roots = program.roots.iter().map(|&r| at[r]).collect();
    out
}

#[cfg(test)]
mod tests {
    use super::super::generate;
    use super::*;
    use candle_core::DType;
    use candle_lazy_graph::{Op, UnaryOp};

    #[test]
    fn a_graph_shrinks_to_the_op_that_fails() {
        let is_tanh = |s: &Step| matches!(s, Step::Op { op: Op::Unary(UnaryOp::Tanh), .. });
        let program = (0..200)
            .map(|seed| generate(seed, 60, DType::F32))
            .find(|p| p.roots.iter().any(|&r| r > 10) && without_dead(p).steps.iter().any(is_tanh))
            .expect("some random graph has a tanh");
        let small = minimise(&program, |p| p.steps.iter().any(is_tanh));
        assert!(small.steps.len() <= 2, "{small}");
        assert!(small.steps.iter().any(is_tanh), "{small}");
    }
}
