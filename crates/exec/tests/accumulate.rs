//! A metric added up in a loop that never evaluates does not grow the process.
//!
//! A binary of its own: it measures the memory of the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::Device;
use candle_lazy_exec::config::budget_evaluations;
use candle_lazy_exec::LazyTensor;

/// The resident memory in bytes, where the system says it.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[test]
fn a_hundred_thousand_additions_take_a_megabyte_at_most() {
    const ITERATIONS: u32 = 100_000;
    let loss = LazyTensor::new(&[0.5f32], &Device::Cpu).unwrap();
    let mut acc = LazyTensor::new(&[0f32], &Device::Cpu).unwrap();
    let mut after_a_tenth = None;
    for i in 1..=ITERATIONS {
        acc = (&acc + &loss).unwrap();
        // where the system says nothing, the bound on pending nodes is what there is
        assert!(acc.node().pending_estimate().0 <= 2_049, "iteration {i}");
        if i == ITERATIONS / 10 {
            after_a_tenth = resident();
        }
    }
    if let (Some(before), Some(after)) = (after_a_tenth, resident()) {
        let grown = after.saturating_sub(before);
        println!("grew by {grown} bytes");
        assert!(grown <= 1 << 20, "grew by {grown} bytes, from {before} to {after}");
    }
    assert!(budget_evaluations() > 0, "it evaluated by itself");
    assert_eq!(acc.to_vec1::<f32>().unwrap(), [ITERATIONS as f32 / 2.0]);
}
