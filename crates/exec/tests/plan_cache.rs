//! The plan cache stays within its bound, whatever it is fed.
//!
//! A binary of its own: the cache belongs to the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::Device;
use candle_lazy_exec::plan::{cache_stats, clear_cache, set_cache_capacity};
use candle_lazy_exec::{EvalOptions, LazyTensor};

/// A graph of its own for every number: its digits in base 7 choose the ops.
fn graph(mut number: usize) -> LazyTensor {
    let mut x = LazyTensor::new(&[0.5f32, 0.25], &Device::Cpu).unwrap();
    while number > 0 {
        x = match number % 7 {
            0 => x.neg(),
            1 => x.abs(),
            2 => x.sqr(),
            3 => x.tanh(),
            4 => x.relu(),
            5 => x.exp(),
            _ => x.floor(),
        }
        .unwrap();
        number /= 7;
    }
    x
}

#[test]
fn ten_thousand_graphs_stay_within_the_bound() {
    const GRAPHS: usize = 10_000;
    const CAPACITY: usize = 256;
    clear_cache();
    set_cache_capacity(CAPACITY);
    let before = cache_stats();
    for number in 1..=GRAPHS {
        let (_, report) = candle_lazy_exec::eval_all_with(
            &[&graph(number)],
            &EvalOptions { validate: false, ..EvalOptions::default() },
        )
        .unwrap();
        assert!(!report.cache_hit, "graph {number} is like no other");
        let now = cache_stats();
        assert!(now.plans <= CAPACITY && now.alive <= CAPACITY as u64, "{now:?} after {number}");
    }
    let after = cache_stats();
    assert_eq!(after.misses - before.misses, GRAPHS as u64);
    assert_eq!(after.evicted - before.evicted, (GRAPHS - CAPACITY) as u64);
    // the last ones are there, the first ones are not
    assert!(graph(GRAPHS).eval_with_report().unwrap().1.cache_hit);
    assert!(!graph(1).eval_with_report().unwrap().1.cache_hit);
}
