//! Lazy softmax against the formula in plain Candle ops and in f64.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too
#![cfg(all(feature = "graph", feature = "custom-metal"))]

mod common;

use candle_core::Tensor;
use common::{assert_close, assert_near, lazy, numbers, scaled, tensor, values};

/// Results are at most 1: a few roundings of f32 (6e-8 each) in the exponential, the sum and the quotient.
const BOUND: f32 = 1e-6;

/// exp(x − max)/Σ in Candle's own ops.
fn eager(x: &Tensor, dim: usize) -> Tensor {
    let shifted = x.broadcast_sub(&x.max_keepdim(dim).unwrap()).unwrap().exp().unwrap();
    shifted.broadcast_div(&shifted.sum_keepdim(dim).unwrap()).unwrap()
}

#[test]
fn basic() {
    let got = lazy(&tensor(&[8], 1)).softmax(0).unwrap().eval().unwrap();
    let x: Vec<f64> = numbers(8, 1, 1.0).into_iter().map(f64::from).collect();
    let sum: f64 = x.iter().map(|v| v.exp()).sum();
    assert_near(&got, &x.iter().map(|v| v.exp() / sum).collect::<Vec<_>>(), f64::from(BOUND));
}

#[test]
fn rows_of_a_matrix_sum_to_one() {
    let x = tensor(&[6, 32], 2);
    let got = lazy(&x).softmax(1).unwrap().eval().unwrap();
    assert_close(&got, &eager(&x, 1), BOUND);
    for row in values(&got).chunks(32) {
        let sum: f64 = row.iter().map(|&v| f64::from(v)).sum();
        assert!((sum - 1.0).abs() <= f64::from(BOUND), "{sum}");
    }
}

#[test]
fn batched() {
    let x = tensor(&[2, 10, 64], 3);
    assert_close(&lazy(&x).softmax(2).unwrap().eval().unwrap(), &eager(&x, 2), BOUND);
}

#[test]
fn over_every_dim() {
    let x = tensor(&[3, 4, 5], 4);
    for dim in 0..3 {
        assert_close(&lazy(&x).softmax(dim).unwrap().eval().unwrap(), &eager(&x, dim), BOUND);
    }
}

#[test]
fn large_magnitudes() {
    for scale in [100.0, 200.0, 400.0] {
        let x = scaled(&[4, 32], 5, scale);
        let got = lazy(&x).softmax(1).unwrap().eval().unwrap();
        assert!(values(&got).iter().all(|v| v.is_finite()));
        assert_close(&got, &eager(&x, 1), BOUND);
    }
}

#[test]
fn chained_with_mul_scalar() {
    let x = tensor(&[4, 16], 6);
    let chain = lazy(&x).mul_scalar(2.5).unwrap().softmax(1).unwrap().mul_scalar(3.0).unwrap();
    let want = eager(&x.affine(2.5, 0.0).unwrap(), 1).affine(3.0, 0.0).unwrap();
    // three times the result
    assert_close(&chain.eval().unwrap(), &want, 3.0 * BOUND);
}

#[test]
fn a_dim_out_of_range_is_refused_when_recorded() {
    let x = lazy(&tensor(&[2, 2], 7));
    assert!(x.softmax(2).unwrap_err().to_string().contains("out of range"));
    assert_eq!(x.graph_size(), 1);
}
