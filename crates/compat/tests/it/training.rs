//! What the tests of training share.
#![allow(dead_code)] // each test file uses its part

use candle_core::{DType, Device, Tensor};
use candle_lazy_compat::training::TargetModule;

/// Every projection that an adapter can have.
pub(crate) const ALL: [TargetModule; 7] = [
    TargetModule::QProj,
    TargetModule::KProj,
    TargetModule::VProj,
    TargetModule::OProj,
    TargetModule::GateProj,
    TargetModule::UpProj,
    TargetModule::DownProj,
];

/// Values in ±1 without a pattern that a wrong layout would keep; each is one of f32.
pub(crate) fn numbers(n: usize, seed: usize) -> Vec<f64> {
    (0..n).map(|i| f64::from(((i * 7919 + seed * 104_729 + 13) % 2003) as f32 / 1001.0 - 1.0)).collect()
}

/// The f32 tensor of [`numbers`].
pub(crate) fn tensor(shape: &[usize], seed: usize) -> Tensor {
    let values: Vec<f32> = numbers(shape.iter().product(), seed).into_iter().map(|v| v as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// All values, in order.
pub(crate) fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// No value further from the f64 reference than `bound`.
#[track_caller]
pub(crate) fn assert_near(got: &Tensor, want: &[f64], bound: f64) {
    let got = wide(got);
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= bound, "{i}: {got} against {want}, {bound} allowed");
    }
}
