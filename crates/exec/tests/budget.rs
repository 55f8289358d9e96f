//! A memory budget is known to be too small before anything runs, and the error says where.
//!
//! A binary of its own: one test sets the budget of the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::config::{memory_budget, set_memory_budget};
use candle_lazy_exec::run::peak_bytes;
use candle_lazy_exec::{eval_all_with, Error, EvalOptions, LazyTensor};

#[test]
fn what_needs_more_than_its_budget_does_not_run() {
    let x = LazyTensor::from(Tensor::ones((100, 100), DType::F32, &Device::Cpu).unwrap());
    let sum = {
        // shows 2 MB, and takes nothing
        let wide = x.broadcast_as((50, 100, 100)).unwrap();
        wide.exp().unwrap().sum(0).unwrap()
    };
    let line = line!() - 2;
    let options = |memory_budget| EvalOptions { memory_budget, ..EvalOptions::default() };
    let needed = peak_bytes(&[&sum], &options(None)).unwrap();
    assert!(needed >= 40_000, "{needed}");
    assert!(!sum.is_ready(), "asking runs nothing");

    let error = eval_all_with(&[&sum], &options(Some(needed - 1))).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("needs {needed} bytes")) && text.contains(&(needed - 1).to_string()), "{text}");
    assert!(text.starts_with("sum") && text.contains(&format!("budget.rs:{line}:")), "{text}");
    assert!(matches!(&error, Error::Run { source, .. } if source.downcast_ref::<Error>().is_some_and(
        |e| matches!(e, Error::Budget { needed: n, budget } if (*n, *budget) == (needed, needed - 1))
    )));
    assert!(!sum.is_ready(), "a retry is possible");

    // the process's budget holds for what has none of its own, one op without a plan included
    set_memory_budget(Some(needed - 1));
    assert_eq!(memory_budget(), Some(needed - 1));
    assert!(sum.eval().is_err() && x.broadcast_as((50, 100, 100)).unwrap().exp().unwrap().eval().is_err());
    let wide = LazyTensor::from(Tensor::ones(needed as usize, DType::F32, &Device::Cpu).unwrap());
    assert!(wide.exp().unwrap().eval().is_err());
    let (values, report) = eval_all_with(&[&sum], &options(Some(needed))).unwrap();
    assert_eq!(report.peak_bytes, needed);
    set_memory_budget(None);
    assert_eq!(memory_budget(), None);
    let want = 50.0 * 1f32.exp();
    assert!(values[0].to_vec2::<f32>().unwrap().iter().flatten().all(|v| (v - want).abs() < 1e-4));
    assert!(wide.exp().unwrap().eval().is_ok());
}
