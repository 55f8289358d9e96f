//! Losses of language models: values and gradients against the formulas in f64.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::training::{assert_near, numbers, tensor, wide};
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_compat::error::TrainingError;
use candle_lazy_compat::training::{cross_entropy_loss, cross_entropy_loss_with_smoothing};
use candle_lazy_compat::Error;

const VOCAB: usize = 5;

fn targets(ids: [[u32; 3]; 2]) -> Tensor {
    Tensor::new(&ids, &Device::Cpu).unwrap()
}

/// log softmax of rows of [`VOCAB`].
fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let row = |row: &[f64]| {
        let log = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        row.iter().map(|x| x - log).collect::<Vec<_>>()
    };
    logits.chunks(VOCAB).flat_map(row).collect()
}

/// (1 − s)·(mean over kept) + s·(mean over all classes and all positions).
fn reference(logits: &[f64], ids: &[u32], smoothing: f64, ignored: Option<u32>) -> f64 {
    let log = log_softmax(logits);
    let kept: Vec<f64> =
        (0..ids.len()).filter(|&at| Some(ids[at]) != ignored).map(|at| -log[at * VOCAB + ids[at] as usize]).collect();
    let nll = kept.iter().sum::<f64>() / kept.len() as f64;
    (1.0 - smoothing) * nll - smoothing * log.iter().sum::<f64>() / log.len() as f64
}

#[test]
fn values() {
    let (logits, n) = (tensor(&[2, 3, VOCAB], 1), numbers(30, 1));
    for (ids, ignored) in [
        ([[0, 1, 2], [3, 4, 0]], None),
        ([[0, 1, 2], [3, 4, 0]], Some(u32::MAX)),
        ([[0, 1, 9], [9, 4, 0]], Some(9)),
        ([[0, 1, u32::MAX], [3, 4, u32::MAX]], Some(u32::MAX)),
        ([[0, 1, 2], [3, 0, 0]], Some(0)),
    ] {
        let (tensor, flat) = (targets(ids), ids.concat());
        let loss = cross_entropy_loss(&logits, &tensor, ignored).unwrap();
        assert_eq!((loss.rank(), loss.dtype()), (0, DType::F32));
        assert_near(&loss, &[reference(&n, &flat, 0.0, ignored)], 5e-7);
        for smoothing in [0.0, 0.25, 1.0] {
            let loss = cross_entropy_loss_with_smoothing(&logits, &tensor, smoothing, ignored).unwrap();
            assert_eq!((loss.rank(), loss.dtype()), (0, DType::F32));
            assert_near(&loss, &[reference(&n, &flat, smoothing.into(), ignored)], 1e-6);
        }
    }
    // equal logits say log(vocab), whatever the target
    let equal = Tensor::zeros((2, 3, VOCAB), DType::F32, &Device::Cpu).unwrap();
    let loss = cross_entropy_loss(&equal, &targets([[0; 3]; 2]), None).unwrap();
    assert_near(&loss, &[(VOCAB as f64).ln()], 2e-7);
    let signed = targets([[0, 1, 2], [3, 4, 0]]).to_dtype(DType::I64).unwrap();
    let want = reference(&n, &[0, 1, 2, 3, 4, 0], 0.0, None);
    assert_near(&cross_entropy_loss(&logits, &signed, None).unwrap(), &[want], 5e-7);
}

#[test]
fn gradients() {
    let (ids, ignored) = ([[0, 1, 9], [3, 9, 2]], Some(9));
    for smoothing in [0.0f32, 0.25] {
        let logits = Var::from_tensor(&tensor(&[2, 3, VOCAB], 1)).unwrap();
        let loss = cross_entropy_loss_with_smoothing(&logits, &targets(ids), smoothing, ignored).unwrap();
        let grads = loss.backward().unwrap();
        let n = numbers(30, 1);
        let want: Vec<f64> = (0..30)
            .map(|at| {
                let moved = |by: f64| {
                    let mut n = n.clone();
                    n[at] += by;
                    reference(&n, &ids.concat(), smoothing.into(), ignored)
                };
                // the third derivative is below 1, so the difference is off by less than 1e-8
                (moved(1e-4) - moved(-1e-4)) / 2e-4
            })
            .collect();
        assert_near(grads.get(&logits).unwrap(), &want, 2e-7);
        assert!(want.iter().any(|v| v.abs() > 0.1));
        // an ignored position counts through the smoothing only
        assert_eq!(wide(grads.get(&logits).unwrap())[10..15] == [0.0; 5], smoothing == 0.0);
    }
}

#[track_caller]
fn refused(result: candle_lazy_compat::Result<Tensor>, what: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Training(TrainingError::InvalidConfig { .. })), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("invalid training configuration") && text.contains(what), "{text}");
}

#[test]
fn inputs_that_do_not_fit() {
    let (logits, ids) = (tensor(&[2, 3, VOCAB], 1), targets([[0; 3]; 2]));
    let flat = logits.reshape((6, VOCAB)).unwrap();
    for result in [cross_entropy_loss(&flat, &ids, None), cross_entropy_loss_with_smoothing(&flat, &ids, 0.1, None)] {
        refused(result, "logits must be 3-D (batch, seq, vocab), got [6, 5]");
    }
    let line = ids.flatten_all().unwrap();
    for result in
        [cross_entropy_loss(&logits, &line, None), cross_entropy_loss_with_smoothing(&logits, &line, 0.1, None)]
    {
        refused(result, "targets must be 2-D (batch, seq), got [6]");
    }
    let turned = ids.reshape((3, 2)).unwrap();
    refused(cross_entropy_loss(&logits, &turned, None), "logits [2, 3, 5] and targets [3, 2]");
    refused(cross_entropy_loss(&logits, &targets([[9; 3]; 2]), Some(9)), "all 6 targets are the ignored index 9");
    refused(
        cross_entropy_loss_with_smoothing(&logits, &targets([[9; 3]; 2]), 0.5, Some(9)),
        "all 6 targets are the ignored index 9",
    );
    refused(cross_entropy_loss(&logits, &targets([[5; 3]; 2]), None), "target 5 at position 0 is not one of 5 classes");
    for smoothing in [-0.1, 1.1, f32::NAN] {
        refused(cross_entropy_loss_with_smoothing(&logits, &ids, smoothing, None), "label smoothing must be in [0, 1]");
    }
}
