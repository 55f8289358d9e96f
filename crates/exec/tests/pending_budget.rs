//! A graph of more bytes than the pending budget is evaluated part by part, and nothing of it twice. The budget is the process's, so
//! these tests have a binary of their own, and are one.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use candle_lazy_exec::config::{budget_evaluations, set_pending_budget, without_pending_budget};
use candle_lazy_exec::{eval_all, grad, LazyTensor, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Doubles, and counts how often.
struct Counted(Arc<AtomicUsize>);

impl CustomOp1 for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let values = storage.as_slice::<f32>()?.iter().map(|x| x * 2.0).collect();
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }
}

const BYTES: u64 = 64 * 64 * 4;

fn x() -> LazyTensor {
    LazyTensor::from(Tensor::randn(0f32, 1.0, (64, 64), &Device::Cpu).unwrap())
}

/// Several results that need the same expensive value, reached through a view by some.
fn fan(x: &LazyTensor, runs: &Arc<AtomicUsize>) -> Result<Vec<LazyTensor>> {
    let h = x.exp()?.custom_op1(Counted(runs.clone()), (64, 64), DType::F32)?;
    let turned = h.t()?;
    drop(h);
    let mut results = Vec::new();
    for i in 0..4 {
        results.push(turned.affine(1.0, f64::from(i))?.tanh()?.sqr()?);
    }
    Ok(results)
}

fn bits(tensors: &[LazyTensor]) -> Vec<Vec<u32>> {
    let all = eval_all(&tensors.iter().collect::<Vec<_>>()).unwrap();
    let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    all.iter().map(bits).collect()
}

#[test]
fn a_graph_over_the_budget_is_evaluated_once() {
    let x = x();
    let runs = Arc::new(AtomicUsize::new(0));
    let want = bits(&fan(&x, &runs).unwrap());
    assert_eq!((runs.swap(0, Ordering::SeqCst), budget_evaluations()), (1, 0));

    // three results are over it, as many as every part of the fan has
    set_pending_budget(u64::MAX, 2 * BYTES);
    let results = fan(&x, &runs).unwrap();
    assert!(budget_evaluations() >= 4, "{}", budget_evaluations());
    assert_eq!(bits(&results), want);
    assert_eq!(runs.swap(0, Ordering::SeqCst), 1);

    // what is evaluated as a whole soon is left alone
    let before = budget_evaluations();
    let unbounded = without_pending_budget();
    let results = fan(&x, &runs).unwrap();
    drop(unbounded);
    assert_eq!((runs.load(Ordering::SeqCst), budget_evaluations()), (0, before));
    assert_eq!(bits(&results), want);

    // and so is what keeps its history anyway, with its gradient
    let before = budget_evaluations();
    let x = x.variable().unwrap();
    let loss = || (0..20).try_fold(x.clone(), |y, _| y.tanh()).unwrap().sum_all().unwrap();
    let y = loss();
    let gradient = grad(&y, &[&x]).unwrap().remove(0);
    assert_eq!(budget_evaluations(), before);
    assert!(!y.is_ready() && !gradient.is_ready());
    let got = bits(&[gradient]);
    set_pending_budget(u64::MAX, u64::MAX);
    assert_eq!(bits(&grad(&loss(), &[&x]).unwrap()), got);
}
