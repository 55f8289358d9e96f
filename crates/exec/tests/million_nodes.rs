//! A chain of a million nodes and a fan of ten thousand: built, evaluated and dropped on a stack of 512 KiB.
//!
//! A binary of its own: the pending budget belongs to the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::Device;
use candle_lazy_exec::config::set_pending_budget;
use candle_lazy_exec::{eval_all, EvalOptions, LazyTensor};

const CPU: Device = Device::Cpu;

fn chain(nodes: usize) -> LazyTensor {
    let mut x = LazyTensor::new(&[1f32, 3.0], &CPU).unwrap();
    for i in 0..nodes {
        x = (&x * if i % 2 == 0 { 2.0 } else { 0.5 }).unwrap();
    }
    x
}

fn long_and_wide() {
    // dropped without a value, and with one
    drop(chain(1_000_000));
    let x = chain(1_000_000);
    assert!(!x.is_ready(), "the budget is off");
    // the whole graph is one plan; the check of it after every pass is a debug option, and the graph is large
    let options = EvalOptions { validate: false, cache: false, ..EvalOptions::default() };
    let (values, report) = candle_lazy_exec::eval_all_with(&[&x], &options).unwrap();
    assert_eq!(report.nodes, 1_000_000);
    assert_eq!(values[0].to_vec1::<f32>().unwrap(), [1.0, 3.0]);
    drop(x);

    // one node with ten thousand readers, read together by one
    let root = LazyTensor::new(&[1f32], &CPU).unwrap().exp().unwrap();
    let fan: Vec<LazyTensor> = (0..10_000).map(|i| (&root * f64::from(i)).unwrap()).collect();
    let all = LazyTensor::cat(&fan, 0).unwrap();
    let sum = all.sum_all().unwrap();
    drop(fan);
    let want = std::f64::consts::E * (9_999.0 * 10_000.0 / 2.0);
    let got = f64::from(sum.to_scalar::<f32>().unwrap());
    assert!((got / want - 1.0).abs() < 1e-4, "{got} and {want}");

    // and held by the user, each a result of one plan
    let fan: Vec<LazyTensor> = (0..10_000).map(|i| (&root + f64::from(i)).unwrap()).collect();
    let values = eval_all(&fan.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(values.len(), 10_000);
    assert_eq!(values[9_999].to_vec1::<f32>().unwrap(), [1f32.exp() + 9_999.0]);
}

#[test]
fn a_million_nodes_need_no_stack() {
    set_pending_budget(u64::MAX, u64::MAX);
    std::thread::Builder::new().stack_size(512 * 1024).spawn(long_and_wide).unwrap().join().unwrap();
}
