//! After everything was dropped no node, plan or buffer is alive.
//!
//! A binary of its own: it counts what lives in the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_exec::buffer::{memory_stats, trim};
use candle_lazy_exec::plan::{cache_stats, clear_cache};
use candle_lazy_exec::{eval_all, materialize, LazyTensor};
use candle_lazy_graph::live_nodes;

const CPU: Device = Device::Cpu;

/// Everything that makes nodes, plans and buffers: results, values kept in the engine, failures, caches, abandoned graphs.
fn use_everything() {
    let x = LazyTensor::from(Tensor::randn(0f32, 1.0, (16, 32), &CPU).unwrap());
    let w = LazyTensor::from(Tensor::randn(0f32, 1.0, (32, 32), &CPU).unwrap());
    let mut cache = LazyTensor::zeros((1, 64, 32), DType::F32, &CPU).unwrap();
    for step in 0..20 {
        let h = x.matmul(&w).unwrap().gelu().unwrap().rms_norm(None, 1e-5).unwrap();
        let row = h.narrow(0, 0, 1).unwrap().reshape((1, 1, 32)).unwrap();
        cache = cache.slice_set_owned(&row, 1, step).unwrap();
        let sum = cache.narrow(1, 0, step + 1).unwrap().sum_all().unwrap();
        eval_all(&[&sum, &h]).unwrap();
        let kept = h.softmax(1).unwrap();
        materialize(&[&kept]).unwrap();
        let bad = kept.index_select(&LazyTensor::new(&[99u32], &CPU).unwrap(), 0).unwrap();
        assert!(bad.eval().is_err());
        let abandoned = bad.exp().unwrap();
        drop(abandoned);
        h.sum_keepdim(1).unwrap().eval_checked().unwrap();
        assert!(h.log().unwrap().first_nonfinite().unwrap().is_some());
    }
    let var = Var::from_tensor(&Tensor::ones(4, DType::F32, &CPU).unwrap()).unwrap();
    let loss = LazyTensor::from(var.as_tensor()).sqr().unwrap().sum_all().unwrap().eval().unwrap();
    assert!(loss.backward().unwrap().get(var.as_tensor()).is_some());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| cache.sum_all().unwrap().to_scalar::<f32>().unwrap());
        }
    });
    assert!(live_nodes() > 0 && memory_stats().active > 0 && cache_stats().alive > 0);
}

#[test]
fn nothing_is_alive_after_everything_was_dropped() {
    use_everything();
    assert_eq!(live_nodes(), 0, "nodes");
    assert_eq!(memory_stats().active, 0, "bytes in use");
    // what is kept on purpose goes when it is told to
    assert_eq!(cache_stats().alive, cache_stats().plans as u64, "plans beside those that the cache keeps");
    clear_cache();
    trim();
    assert_eq!((cache_stats().alive, memory_stats().cached), (0, 0));
}
