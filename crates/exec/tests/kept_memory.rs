//! What the results of a batch give back stays in the process for the next ones.
//!
//! A binary of its own: it counts the page faults of the process.
#![cfg(all(target_os = "linux", target_env = "gnu"))]
// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::batch::BatchExecutor;
use candle_lazy_exec::LazyTensor;

/// The page faults of this process so far that needed no disk.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // the name is in parentheses and may hold spaces; the fields count from the third on
    let rest = &stat[stat.rfind(')').unwrap() + 2..];
    rest.split(' ').nth(7).unwrap().parse().unwrap()
}

#[test]
fn a_second_batch_finds_the_memory_of_the_first() {
    // a threshold of one's own is left alone, so there would be nothing to see
    if ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"]
        .iter()
        .any(|n| std::env::var_os(n).is_some())
    {
        return;
    }
    const REQUESTS: usize = 64;
    let executor = BatchExecutor::new().unwrap();
    let x = LazyTensor::from(Tensor::ones((128, 512), DType::F32, &Device::Cpu).unwrap());
    let batch = || {
        let asked: Vec<_> =
            (0..REQUESTS).map(|i| executor.submit(&x.affine(2.0, i as f64).unwrap()).unwrap()).collect();
        let kept: Vec<Tensor> = asked.into_iter().map(|one| one.wait().unwrap()).collect();
        assert!(kept.iter().enumerate().all(|(i, t)| t
            .flatten_all()
            .unwrap()
            .get(7)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            == 2.0 + i as f32));
    };
    // threads have heaps of their own, which fill up first
    (0..6).for_each(|_| batch());
    let before = faults();
    (0..6).for_each(|_| batch());
    let pages = 6 * REQUESTS * 128 * 512 * 4 / 4096;
    let new = (faults() - before) as usize;
    assert!(new < pages / 4, "{new} faults for {pages} pages of results");
}
