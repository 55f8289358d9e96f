//! Cross entropy against its formula in f64, its gradient against softmax minus target.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_nn::loss::{cross_entropy, uniform_cross_entropy};

const LOGITS: [[f64; 3]; 4] = [[1.0, 2.0, 0.5], [-1.0, 0.0, 3.0], [0.25, 0.25, 0.25], [40.0, -40.0, 0.0]];

fn logits() -> Var {
    Var::from_tensor(&Tensor::new(&LOGITS, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()).unwrap()
}

fn targets(ids: &[u32]) -> Tensor {
    Tensor::from_slice(ids, ids.len(), &Device::Cpu).unwrap()
}

fn softmax(row: &[f64; 3]) -> [f64; 3] {
    let max = row.iter().fold(f64::MIN, |a, b| a.max(*b));
    let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
    row.map(|x| (x - max).exp() / sum)
}

fn scalar(loss: &Tensor) -> f64 {
    assert_eq!(loss.rank(), 0);
    loss.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

fn log_softmax(row: &[f64; 3]) -> [f64; 3] {
    let max = row.iter().fold(f64::MIN, |a, b| a.max(*b));
    let log = row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    row.map(|x| x - max - log)
}

#[test]
fn the_mean_of_what_is_kept() {
    let ids = [1, 2, 0, 1];
    let loss = |kept: &[usize]| {
        kept.iter().map(|&at| -log_softmax(&LOGITS[at])[ids[at] as usize]).sum::<f64>() / kept.len() as f64
    };
    for (ignore, kept) in
        [(None, &[0, 1, 2, 3][..]), (Some(7), &[0, 1, 2, 3]), (Some(1), &[1, 2]), (Some(0), &[0, 1, 3])]
    {
        let got = scalar(&cross_entropy(&logits(), &targets(&ids), ignore).unwrap());
        // 80 in f32 is good to 4e-6
        assert!((got - loss(kept)).abs() < 1e-5, "{ignore:?}: {got} against {}", loss(kept));
    }
    let signed = targets(&ids).to_dtype(DType::I64).unwrap();
    let half = cross_entropy(&logits().to_dtype(DType::F16).unwrap(), &signed, Some(1)).unwrap();
    assert_eq!(half.dtype(), DType::F16);
    assert!((scalar(&half) - loss(&[1, 2])).abs() < 1e-3);
}

#[test]
fn the_gradient_is_softmax_minus_target() {
    let (logits, ids) = (logits(), [1u32, 2, 9, 0]);
    let loss = cross_entropy(&logits, &targets(&ids), Some(9)).unwrap();
    let grads = loss.backward().unwrap();
    let got: Vec<Vec<f32>> = grads.get(&logits).unwrap().to_vec2().unwrap();
    for (at, row) in got.iter().enumerate() {
        for (class, got) in row.iter().enumerate() {
            let hot = f64::from(u8::from(ids[at] as usize == class));
            let want = if ids[at] == 9 { 0.0 } else { (softmax(&LOGITS[at])[class] - hot) / 3.0 };
            assert!((f64::from(*got) - want).abs() < 1e-7, "{at}, {class}: {got} against {want}");
        }
    }
}

#[test]
fn against_a_uniform_distribution() {
    let logits = logits();
    let loss = uniform_cross_entropy(&logits).unwrap();
    let want = -LOGITS.iter().flat_map(log_softmax).sum::<f64>() / 12.0;
    assert!((scalar(&loss) - want).abs() < 2e-6);
    let grads = loss.backward().unwrap();
    let got: Vec<Vec<f32>> = grads.get(&logits).unwrap().to_vec2().unwrap();
    for (row, logits) in got.iter().zip(&LOGITS) {
        for (got, p) in row.iter().zip(softmax(logits)) {
            assert!((f64::from(*got) - (p - 1.0 / 3.0) / 4.0).abs() < 1e-7);
        }
    }
    let three = logits.reshape((2, 2, 3)).unwrap();
    assert!((scalar(&uniform_cross_entropy(&three).unwrap()) - want).abs() < 2e-6);
}

#[test]
fn inputs_that_do_not_fit() {
    let logits = logits();
    let said = |targets: &Tensor, ignore| cross_entropy(&logits, targets, ignore).unwrap_err().to_string();
    let text = said(&targets(&[0, 1]), None);
    assert!(text.contains("cross_entropy: ") && text.contains("logits [4, 3] and targets [2]"), "{text}");
    assert!(text.contains("loss.rs"), "{text}");
    let text = said(&targets(&[0, 1, 3, 0]), None);
    assert!(text.contains("target 3 at position 2 is not one of 3 classes"), "{text}");
    let text = said(&targets(&[0, 1, u32::MAX, 0]), Some(7));
    assert!(text.contains("target 4294967295 at position 2"), "{text}");
    let negative = Tensor::new(&[0i64, -100, 1, 1], &Device::Cpu).unwrap();
    assert!(said(&negative, None).contains("target -100 at position 1"));
    assert!(said(&targets(&[9, 9, 9, 9]), Some(9)).contains("all 4 targets are the ignored index 9"));
    assert!(said(&targets(&[0; 4]).to_dtype(DType::F32).unwrap(), None).contains("targets must be integers, found F32"));
    let whole = logits.to_dtype(DType::U32).unwrap();
    assert!(cross_entropy(&whole, &targets(&[0; 4]), None).unwrap_err().to_string().contains("must be a float tensor"));
    assert!(uniform_cross_entropy(&whole).unwrap_err().to_string().contains("must be a float tensor"));
    let none = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(cross_entropy(&none, &targets(&[]), None).unwrap_err().to_string().contains("none empty"));
    assert!(uniform_cross_entropy(&none).unwrap_err().to_string().contains("not empty"));
}
