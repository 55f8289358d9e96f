//! The batching executor within a memory budget, which is the process's: alone in its process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor};
use candle_lazy_exec::batch::{BatchExecutor, BatchOptions, MaxWait, Window};
use candle_lazy_exec::config::set_memory_budget;
use candle_lazy_exec::run::peak_bytes;
use candle_lazy_exec::{EvalOptions, LazyTensor};
use std::time::Duration;

fn lazy(dims: &[usize], seed: usize) -> LazyTensor {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i * 31 + seed) % 97) as f32 / 97.0).collect();
    LazyTensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_budget_refuses_one_and_serves_the_others() {
    let window = Window { max_batch: 6, max_wait: MaxWait::Fixed(Duration::from_secs(30)) };
    let options = BatchOptions { window, ..BatchOptions::default() };
    let executor = BatchExecutor::with_options(&options).unwrap();
    let graph = |rows: usize| lazy(&[rows, 64], rows).exp().unwrap().linear(&lazy(&[64, 64], 9), None).unwrap();
    let asked: Vec<_> = [1, 2, 2000, 3, 1, 2].map(|rows| (rows, graph(rows))).into_iter().collect();
    let budget = peak_bytes(&[&graph(3)], &EvalOptions::default()).unwrap();
    set_memory_budget(Some(budget));
    let running: Vec<_> = asked.iter().map(|(_, x)| executor.submit(x).unwrap()).collect();
    let results: Vec<_> = running.into_iter().map(|one| one.wait()).collect();
    set_memory_budget(None);
    for ((rows, _), result) in asked.iter().zip(results) {
        match rows {
            2000 => assert!(result.unwrap_err().to_string().contains("budget"), "{rows}"),
            _ => assert_eq!(bits(&result.unwrap()), bits(&graph(*rows).eval().unwrap())),
        }
    }
}
