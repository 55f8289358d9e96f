//! Checked mode on random graphs: what the matrix holds to be right raises no alarm.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::DType;
use candle_lazy_exec::{eval_all_checked, LazyTensor};
use candle_lazy_parity::random::generate;

#[test]
fn random_graphs_raise_no_alarm() {
    for seed in 0..300 {
        let dtype = if seed % 3 == 0 { DType::F64 } else { DType::F32 };
        let program = generate(seed, 10 + (seed as usize) % 50, dtype);
        let roots = program.record(&program.leaves().unwrap()).unwrap();
        let roots: Vec<&LazyTensor> = roots.iter().collect();
        if let Err(error) = eval_all_checked(&roots) {
            assert!(!error.to_string().contains("by the plan"), "{error}\n{program}");
        }
    }
}
