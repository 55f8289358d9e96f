//! A pending budget of three nodes evaluates all the time; the gradient is the same, bit for bit. The budget is the process's, so this
//! test has one of its own.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use candle_core::{Device, Tensor};
use candle_lazy_exec::config::{budget_evaluations, set_pending_budget};
use candle_lazy_exec::{grad, AttentionOptions, LazyTensor, Result};

fn loss(x: &LazyTensor, w: &LazyTensor, v: &LazyTensor) -> Result<LazyTensor> {
    let h = x.matmul(w)?.gelu()?;
    let h = (&h + h.rms_norm(Some(v), 1e-5)?)?;
    let q = h.reshape((1, 2, 3, 2))?;
    let options = AttentionOptions { scale: 0.5, causal: true, softcap: None, window: None };
    let y = LazyTensor::attention(&q, &q, &q, None, &options)?.reshape((3, 4))?;
    let y = (y + h.max_keepdim(1)?.broadcast_mul(&h.softmax(1)?)?)?;
    y.log_softmax(1)?.mean_all()
}

#[test]
fn a_gradient_under_a_budget_of_three_nodes() {
    let leaf = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
    let leaves = [leaf(&[3, 5]), leaf(&[5, 4]), leaf(&[4])];
    let gradients = || {
        let [x, w, v] = leaves.each_ref().map(|t| LazyTensor::from(t).variable().unwrap());
        let found = grad(&loss(&x, &w, &v).unwrap(), &[&x, &w, &v]).unwrap();
        let bits = |g: LazyTensor| -> Vec<u32> {
            let flat: Vec<f32> = g.flatten_all().unwrap().to_vec1().unwrap();
            flat.into_iter().map(f32::to_bits).collect()
        };
        found.into_iter().map(bits).collect::<Vec<_>>()
    };
    let want = gradients();
    assert!(want.iter().flatten().any(|&bits| f32::from_bits(bits).abs() > 1e-3));
    let before = budget_evaluations();
    set_pending_budget(3, u64::MAX);
    assert_eq!(gradients(), want);
    assert!(budget_evaluations() >= before + 3);
}
