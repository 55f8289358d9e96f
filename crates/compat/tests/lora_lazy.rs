//! Lazy LoRA against the formula in plain Candle ops and in f64; B is never zero.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too
#![cfg(all(feature = "graph", feature = "custom-metal"))]

mod common;

use candle_core::{Tensor, Var};
use candle_lazy_compat::graph::LazyTensor;
use common::{assert_close, assert_near, lazy, numbers, tensor, values};

/// Inputs in ±1, inner sizes up to 64 and ranks up to 16: partial sums stay below 64, of which 1e-7 is one rounding at that size.
const BOUND: f32 = 2e-5;

/// ((x·A)·B)·scale in Candle's own ops.
fn eager(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Tensor {
    x.broadcast_matmul(a).unwrap().broadcast_matmul(b).unwrap().affine(scale, 0.0).unwrap()
}

fn recorded(x: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> LazyTensor {
    lazy(x).lora_fused(&lazy(a), &lazy(b), scale).unwrap()
}

#[test]
fn basic() {
    let got = recorded(&tensor(&[3, 8], 1), &tensor(&[8, 2], 2), &tensor(&[2, 8], 3), 2.0).eval().unwrap();
    let at = |n, seed| numbers(n, seed, 1.0).into_iter().map(f64::from).collect::<Vec<_>>();
    let (x, a, b) = (at(24, 1), at(16, 2), at(16, 3));
    let mut want = Vec::new();
    for row in x.chunks(8) {
        let mid: Vec<f64> = (0..2).map(|r| (0..8).map(|k| row[k] * a[k * 2 + r]).sum()).collect();
        want.extend((0..8).map(|o| 2.0 * (mid[0] * b[o] + mid[1] * b[8 + o])));
    }
    assert!(want.iter().any(|v| v.abs() > 0.1));
    assert_near(&got, &want, f64::from(BOUND));
}

#[test]
fn batched() {
    let (x, a, b) = (tensor(&[2, 5, 64], 4), tensor(&[64, 8], 5), tensor(&[8, 64], 6));
    assert_close(&recorded(&x, &a, &b, 2.0).eval().unwrap(), &eager(&x, &a, &b, 2.0), BOUND);
}

#[test]
fn chained() {
    let (x, a, b) = (tensor(&[4, 32], 7), tensor(&[32, 4], 8), tensor(&[4, 32], 9));
    let (c, d) = (tensor(&[32, 4], 10).affine(0.1, 0.0).unwrap(), tensor(&[4, 32], 11));
    let once = recorded(&x, &a, &b, 0.5);
    let twice = once.lora_fused(&lazy(&c), &lazy(&d), 0.5).unwrap().softmax(1).unwrap();
    let want = eager(&eager(&x, &a, &b, 0.5), &c, &d, 0.5);
    assert_close(&twice.eval().unwrap(), &candle_nn::ops::softmax(&want, 1).unwrap(), BOUND);
}

#[test]
fn different_ranks() {
    let x = tensor(&[4, 32], 12);
    for rank in [1, 2, 3, 8, 16] {
        let (a, b) = (tensor(&[32, rank], 13), tensor(&[rank, 32], 14));
        let scale = 16.0 / rank as f32;
        let want = eager(&x, &a, &b, f64::from(scale));
        // the scale multiplies the error too
        assert_close(&recorded(&x, &a, &b, scale).eval().unwrap(), &want, BOUND);
    }
}

#[test]
fn other_widths_and_the_recorded_shape() {
    let (x, a, b) = (tensor(&[2, 3, 16], 15), tensor(&[16, 4], 16), tensor(&[4, 48], 17));
    let lora = recorded(&x, &a, &b, 2.0);
    assert_eq!(lora.shape().dims(), [2, 3, 48]);
    assert_eq!(lora.graph_size(), 4);
    assert_close(&lora.eval().unwrap(), &eager(&x, &a, &b, 2.0), BOUND);
}

#[test]
fn every_variable_gets_its_gradient() {
    let var = |shape: &[usize], seed| Var::from_tensor(&tensor(shape, seed)).unwrap();
    let (x, a, b) = (var(&[3, 8], 18), var(&[8, 2], 19), var(&[2, 5], 20));
    let got = recorded(&x, &a, &b, 2.0).eval().unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let want = eager(&x, &a, &b, 2.0).sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for var in [&x, &a, &b] {
        let want = want.get(var).unwrap();
        assert!(values(want).iter().any(|v| v.abs() > 0.1));
        // gradients of a sum of squares are some tens
        assert_close(got.get(var).unwrap(), want, 5e-5);
    }
}
