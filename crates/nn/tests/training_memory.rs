//! Ten thousand training steps do not grow the process.
//!
//! A binary of its own: it measures the memory of the process.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::{eval_all, no_grad, LazyTensor};
use candle_lazy_nn::optim::{Optimizer, OptimizerOptions, ParamsAdamW, Rule};
use candle_lazy_nn::params::Params;

/// The resident memory in bytes, where the system says it.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

fn loss(params: &Params, x: &LazyTensor, y: &LazyTensor) -> LazyTensor {
    let value = |name: &str| params.get(name).unwrap().value();
    let h = x.matmul(&value("a")).unwrap().broadcast_add(&value("b")).unwrap().tanh().unwrap();
    (h.matmul(&value("c")).unwrap() - y).unwrap().sqr().unwrap().mean_all().unwrap()
}

#[test]
fn ten_thousand_steps_take_a_megabyte_at_most() {
    const STEPS: usize = 10_000;
    let device = Device::Cpu;
    let mut params = Params::new();
    for (name, dims) in [("a", &[4, 8][..]), ("b", &[8]), ("c", &[8, 1])] {
        let count: usize = dims.iter().product();
        let values: Vec<f32> = (0..count).map(|i| ((i * 37 % 19) as f32 - 9.0) / 20.0).collect();
        params.insert(name, Tensor::from_vec(values, dims, &device).unwrap()).unwrap();
    }
    let rule = Rule::AdamW(ParamsAdamW { lr: 1e-3, ..ParamsAdamW::default() });
    let mut optimizer = Optimizer::new(&params, rule, OptimizerOptions::default()).unwrap();
    let x = LazyTensor::from(Tensor::arange(0f32, 24.0, &device).unwrap().reshape((6, 4)).unwrap());
    let x = (x / 24.0).unwrap();
    let y = x.sin().unwrap().sum_keepdim(1).unwrap().to_dtype(DType::F32).unwrap();
    eval_all(&[&x, &y]).unwrap();
    let (mut first, mut last, mut after_a_tenth) = (f32::NAN, f32::NAN, None);
    for step in 1..=STEPS {
        let (value, gradients) = {
            let loss = loss(&params, &x, &y);
            (loss.detach(), params.grad(&loss).unwrap())
        };
        optimizer.step(gradients, &[&value]).unwrap();
        last = value.to_scalar::<f32>().unwrap();
        if step == 1 {
            first = last;
        }
        // what is only looked at leaves nothing behind either
        if step % 10 == 0 {
            assert!(no_grad(|| loss(&params, &x, &y)).to_scalar::<f32>().unwrap().is_finite());
        }
        if step == STEPS / 10 {
            after_a_tenth = resident();
        }
    }
    assert!(last < 0.1 * first, "it learns: {first} to {last}");
    // where the system does not say, the learning is what there is to see
    if let (Some(before), Some(after)) = (after_a_tenth, resident()) {
        let grown = after.saturating_sub(before);
        println!("grew by {grown} bytes");
        assert!(grown <= 1 << 20, "grew by {grown} bytes, from {before} to {after}");
    }
}
