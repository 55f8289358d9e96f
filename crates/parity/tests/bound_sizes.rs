//! Random graphs planned at one set of sizes and bound at another give the bits of a fresh plan at those.
//!
//! A binary of its own: the plan cache belongs to the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Tensor};
use candle_lazy_exec::plan::clear_cache;
use candle_lazy_exec::run::eval_all_with;
use candle_lazy_exec::{EvalOptions, EvalReport, LazyTensor};
use candle_lazy_parity::compare::same_bits;
use candle_lazy_parity::random::{generate_from, Program, SHAPES};

/// [`SHAPES`] with every size but 1 exchanged for another, the same one for the same one.
const OTHER: [&[usize]; 9] =
    [&[5, 7, 12], &[7, 12], &[12], &[5, 1, 12], &[12, 12], &[5, 5, 7, 12], &[5, 5, 7, 12], &[7, 10], &[]];

fn run(program: &Program, options: &EvalOptions) -> (Vec<Tensor>, EvalReport) {
    let leaves = program.leaves().unwrap();
    let roots = program.record(&leaves).unwrap();
    let roots: Vec<&LazyTensor> = roots.iter().collect();
    eval_all_with(&roots, options).unwrap()
}

#[test]
fn a_plan_bound_at_other_sizes_is_a_fresh_plan() {
    assert_eq!(SHAPES.len(), OTHER.len());
    let (cached, fresh) = (EvalOptions::default(), EvalOptions { cache: false, ..EvalOptions::default() });
    let (mut bound, mut nodes) = (0, 0);
    for seed in 0..2000 {
        let dtype = [DType::F32, DType::F64, DType::F16, DType::BF16][seed as usize % 4];
        let size = 4 + (seed as usize * 7) % 40;
        let (a, b) = (generate_from(seed, size, dtype, &SHAPES), generate_from(seed, size, dtype, &OTHER));
        clear_cache();
        assert!(!run(&a, &cached).1.cache_hit);
        let (got, report) = run(&b, &cached);
        if !report.cache_hit {
            // a choice of the generator hung on a size: another program
            continue;
        }
        bound += 1;
        nodes += report.nodes;
        let (want, _) = run(&b, &fresh);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let verdict = same_bits(&format!("seed {seed}, root {i}"), got, want).unwrap();
            assert_eq!(verdict, Ok(()), "{b}");
        }
    }
    println!("{bound} graphs of {nodes} nodes were bound at other sizes");
    assert!(bound >= 400 && nodes >= 3000, "{bound} graphs of {nodes} nodes");
}
