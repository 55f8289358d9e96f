//! What the comparisons of lazy and eager share.
#![allow(dead_code)] // each test file uses its part

use candle_core::{Device, Tensor};
use candle_lazy_compat::graph::LazyTensor;

/// Values in ±scale without a pattern that a wrong layout would keep.
pub(crate) fn numbers(n: usize, seed: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|i| (((i * 7919 + seed * 104_729 + 13) % 2003) as f32 / 1001.0 - 1.0) * scale).collect()
}

/// The tensor of [`numbers`] in ±1.
pub(crate) fn tensor(shape: &[usize], seed: usize) -> Tensor {
    scaled(shape, seed, 1.0)
}

/// The tensor of [`numbers`] in ±scale.
pub(crate) fn scaled(shape: &[usize], seed: usize, scale: f32) -> Tensor {
    Tensor::from_vec(numbers(shape.iter().product(), seed, scale), shape, &Device::Cpu).unwrap()
}

/// The lazy handle of a tensor.
pub(crate) fn lazy(tensor: &Tensor) -> LazyTensor {
    LazyTensor::from_tensor(tensor.clone()).unwrap()
}

/// All values, in order.
pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The same shape, and no value further away than `bound`.
#[track_caller]
pub(crate) fn assert_close(got: &Tensor, want: &Tensor, bound: f32) {
    assert_eq!(got.dims(), want.dims());
    for (i, (g, w)) in values(got).iter().zip(values(want)).enumerate() {
        assert!((g - w).abs() <= bound, "{i}: {g} against {w}, {bound} allowed");
    }
}

/// No value further from the f64 reference than `bound`.
#[track_caller]
pub(crate) fn assert_near(got: &Tensor, want: &[f64], bound: f64) {
    let got = values(got);
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= bound, "{i}: {g} against {w}, {bound} allowed");
    }
}
