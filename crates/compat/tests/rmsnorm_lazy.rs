//! Lazy RMS norm against the formula in plain Candle ops and in f64.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too
#![cfg(all(feature = "graph", feature = "custom-metal"))]

mod common;

use candle_core::{Tensor, D};
use common::{assert_close, assert_near, lazy, numbers, tensor, values};

/// Results are below 2 for inputs in ±1: a few roundings of f32 (1e-7 each at that size) in mean, root and quotient.
const BOUND: f32 = 2e-6;

/// x/√(mean(x²) + eps) in Candle's own ops.
fn eager(x: &Tensor, eps: f64) -> Tensor {
    let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    x.broadcast_div(&mean.affine(1.0, eps).unwrap().sqrt().unwrap()).unwrap()
}

#[test]
fn basic() {
    let got = lazy(&tensor(&[16], 1)).rms_norm(1e-5).unwrap().eval().unwrap();
    let x: Vec<f64> = numbers(16, 1, 1.0).into_iter().map(f64::from).collect();
    let root = (x.iter().map(|v| v * v).sum::<f64>() / 16.0 + f64::from(1e-5f32)).sqrt();
    assert_near(&got, &x.iter().map(|v| v / root).collect::<Vec<_>>(), f64::from(BOUND));
}

#[test]
fn matrix() {
    let x = tensor(&[6, 32], 2);
    assert_close(&lazy(&x).rms_norm(1e-5).unwrap().eval().unwrap(), &eager(&x, 1e-5), BOUND);
}

#[test]
fn batched() {
    let x = tensor(&[2, 10, 128], 3);
    assert_close(&lazy(&x).rms_norm(1e-6).unwrap().eval().unwrap(), &eager(&x, 1e-6), BOUND);
}

#[test]
fn several_eps() {
    let x = tensor(&[4, 64], 4);
    for eps in [0.0f32, 1e-8, 1e-6, 1e-5, 1e-3, 1.0] {
        assert_close(&lazy(&x).rms_norm(eps).unwrap().eval().unwrap(), &eager(&x, f64::from(eps)), BOUND);
    }
}

#[test]
fn rows_have_an_rms_of_one() {
    let got = lazy(&tensor(&[5, 64], 5)).rms_norm(0.0).unwrap().eval().unwrap();
    for row in values(&got).chunks(64) {
        let rms = (row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 64.0).sqrt();
        assert!((rms - 1.0).abs() <= f64::from(BOUND), "{rms}");
    }
}

#[test]
fn chained() {
    let x = tensor(&[4, 32], 6);
    let chain = lazy(&x).rms_norm(1e-5).unwrap().mul_scalar(0.5).unwrap().rms_norm(1e-5).unwrap();
    let want = eager(&eager(&x, 1e-5).affine(0.5, 0.0).unwrap(), 1e-5);
    assert_close(&chain.eval().unwrap(), &want, BOUND);
}

#[test]
fn after_matmul() {
    let (x, w) = (tensor(&[4, 32], 7), tensor(&[32, 16], 8));
    let got = lazy(&x).matmul(&lazy(&w)).unwrap().rms_norm(1e-5).unwrap().eval().unwrap();
    // the product sums 32 terms below 1 in another order: 32 roundings of 6e-8 at most before the norm
    assert_close(&got, &eager(&x.matmul(&w).unwrap(), 1e-5), 4e-6);
}
