//! LoRA layers: values against the formula in f64, gradients against the formula and finite differences; B is never left zero.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::training::{assert_near, numbers, tensor, wide};
use candle_core::{DType, Device, Tensor};
use candle_lazy_compat::training::lora::{LoRAConfig, LoRALayer};

fn layer(input: usize, output: usize, rank: usize, alpha: f32, dropout: f32) -> LoRALayer {
    let layer = LoRALayer::new(input, output, &LoRAConfig { rank, alpha, dropout }, &Device::Cpu).unwrap();
    layer.lora_a().set(&tensor(&[input, rank], 2)).unwrap();
    layer.lora_b().set(&tensor(&[rank, output], 3)).unwrap();
    layer
}

/// ((x·a)·b)·scale of rows, in f64.
fn lora(x: &[f64], a: &[f64], b: &[f64], rank: usize, scale: f64) -> Vec<f64> {
    let (input, output) = (a.len() / rank, b.len() / rank);
    let mut out = Vec::new();
    for row in x.chunks(input) {
        let mid: Vec<f64> = (0..rank).map(|r| (0..input).map(|k| row[k] * a[k * rank + r]).sum()).collect();
        out.extend((0..output).map(|o| scale * (0..rank).map(|r| mid[r] * b[r * output + o]).sum::<f64>()));
    }
    out
}

#[test]
fn the_default_config() {
    let config = LoRAConfig::default();
    assert_eq!((config.rank, config.alpha, config.dropout), (8, 16.0, 0.0));
    assert_eq!(config.scaling(), 2.0);
    config.validate().unwrap();
    assert_eq!(serde_json::to_string(&config).unwrap(), r#"{"rank":8,"alpha":16.0,"dropout":0.0}"#);
    let read: LoRAConfig = serde_json::from_str(r#"{"rank":4,"alpha":1.0,"dropout":0.5}"#).unwrap();
    assert_eq!((read.rank, read.scaling(), read.dropout), (4, 0.25, 0.5));
}

#[test]
fn configs_that_mean_nothing() {
    let refused = |rank, alpha, dropout| {
        let config = LoRAConfig { rank, alpha, dropout };
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains("invalid training configuration"), "{error}");
        assert!(LoRALayer::new(64, 64, &config, &Device::Cpu).is_err());
        error
    };
    assert!(refused(0, 16.0, 0.0).contains("rank must be greater than 0"));
    for alpha in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(refused(8, alpha, 0.0).contains("alpha must be greater than 0"));
    }
    for dropout in [1.0, -0.1, 1.5, f32::NAN] {
        assert!(refused(8, 16.0, dropout).contains("dropout must be in [0, 1)"));
    }
    LoRAConfig { rank: 1, alpha: 0.5, dropout: 0.99 }.validate().unwrap();
    for (input, output) in [(4, 64), (64, 4), (0, 64)] {
        let error = LoRALayer::new(input, output, &LoRAConfig::default(), &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("invalid training configuration") && error.contains("rank 8 exceeds"), "{error}");
    }
    LoRALayer::new(8, 8, &LoRAConfig::default(), &Device::Cpu).unwrap();
}

#[test]
fn a_new_layer_returns_zeros() {
    let config = LoRAConfig { rank: 4, ..LoRAConfig::default() };
    let layer = LoRALayer::new(4096, 16, &config, &Device::Cpu).unwrap();
    assert_eq!((layer.lora_a().dims(), layer.lora_b().dims()), (&[4096, 4][..], &[4, 16][..]));
    assert_eq!((layer.lora_a().dtype(), layer.lora_b().dtype()), (DType::F32, DType::F32));
    assert!(layer.lora_a().is_variable() && layer.lora_b().is_variable());
    assert!(wide(layer.lora_b_tensor()).iter().all(|v| *v == 0.0));
    // 16384 samples of a standard deviation of 1/√4: the mean's own is 0.5/128, the deviation's 0.5/181; 6 of each are allowed
    let a = wide(layer.lora_a_tensor());
    let mean = a.iter().sum::<f64>() / a.len() as f64;
    let std = (a.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
    assert!(mean.abs() < 0.024 && (std - 0.5).abs() < 0.017, "mean {mean}, std {std}");
    let y = layer.forward(&tensor(&[3, 4096], 1)).unwrap();
    assert_eq!(y.dims(), [3, 16]);
    assert!(wide(&y).iter().all(|v| *v == 0.0));
}

#[test]
fn what_a_layer_says_of_itself() {
    let mut layer = layer(32, 48, 4, 8.0, 0.25);
    assert_eq!(layer.num_parameters(), 4 * (32 + 48));
    assert_eq!((layer.in_features(), layer.out_features()), (32, 48));
    assert_eq!((layer.config().rank, layer.config().alpha, layer.config().dropout), (4, 8.0, 0.25));
    let ids: Vec<_> = layer.trainable_variables().iter().map(|var| var.as_tensor().id()).collect();
    assert_eq!(ids, [layer.lora_a_tensor().id(), layer.lora_b_tensor().id()]);
    assert!(layer.is_training());
    layer.eval();
    assert!(!layer.is_training());
    layer.set_training(true);
    assert!(layer.is_training());
    assert!(format!("{layer:?}").contains("LoRALayer"));
}

#[test]
fn forward_of_every_rank_of_input() {
    for dims in [&[16][..], &[3, 16], &[2, 3, 16], &[2, 1, 3, 16]] {
        let layer = layer(16, 24, 4, 6.0, 0.0);
        let n = dims.iter().product();
        let y = layer.forward(&tensor(dims, 1)).unwrap();
        assert_eq!(y.dims().split_last(), Some((&24, &dims[..dims.len() - 1])));
        let want = lora(&numbers(n, 1), &numbers(64, 2), &numbers(96, 3), 4, 1.5);
        assert!(want.iter().any(|v| v.abs() > 0.1));
        // sums of 16 and 4 products of numbers in ±1, times 1.5: below 100, a rounding there is 4e-6
        assert_near(&y, &want, 8e-6);
    }
}

#[test]
fn a_variable_that_is_set_is_seen() {
    let layer = layer(8, 8, 2, 4.0, 0.0);
    let x = tensor(&[2, 8], 1);
    layer.lora_b().set(&Tensor::ones((2, 8), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let want = lora(&numbers(16, 1), &numbers(16, 2), &[1.0; 16], 2, 2.0);
    assert_near(&layer.forward(&x).unwrap(), &want, 4e-6);
}

#[test]
fn inputs_that_do_not_fit() {
    let layer = layer(16, 24, 4, 8.0, 0.0);
    let error = layer.forward(&tensor(&[2, 15], 1)).unwrap_err().to_string();
    assert!(error.contains("lora") && error.contains("[2, 15]") && error.contains("[16, 4]"), "{error}");
    let half = tensor(&[2, 16], 1).to_dtype(DType::F16).unwrap();
    let error = layer.forward(&half).unwrap_err().to_string().to_lowercase();
    assert!(error.contains("f16") && error.contains("f32"), "{error}");
}

/// Σ w·y for fixed w, of which the gradients are compared.
fn weighted(y: &Tensor) -> Tensor {
    let w = tensor(y.dims(), 9);
    (y * w).unwrap().sum_all().unwrap()
}

#[test]
fn gradients_reach_a_b_and_x() {
    let (rows, input, output, rank, scale) = (3, 6, 5, 2, 2.0);
    let layer = layer(input, output, rank, 4.0, 0.0);
    let x = candle_core::Var::from_tensor(&tensor(&[rows, input], 1)).unwrap();
    let grads = weighted(&layer.forward(&x).unwrap()).backward().unwrap();
    let values = [numbers(rows * input, 1), numbers(input * rank, 2), numbers(rank * output, 3)];
    let w = numbers(rows * output, 9);
    let loss =
        |v: &[Vec<f64>; 3]| -> f64 { lora(&v[0], &v[1], &v[2], rank, scale).iter().zip(&w).map(|(y, w)| y * w).sum() };
    for (at, var) in [&x, layer.lora_a(), layer.lora_b()].into_iter().enumerate() {
        // the loss is linear in each of the three, so central differences are exact but for rounding (1e-16·20/1e-3)
        let want: Vec<f64> = (0..values[at].len())
            .map(|i| {
                let moved = |by: f64| {
                    let mut values = values.clone();
                    values[at][i] += by;
                    loss(&values)
                };
                (moved(1e-3) - moved(-1e-3)) / 2e-3
            })
            .collect();
        assert!(want.iter().any(|v| v.abs() > 0.1));
        assert_near(grads.get(var.as_tensor()).unwrap(), &want, 4e-6);
    }
}

#[test]
fn dropout_acts_on_the_middle_in_training_only() {
    let (input, output, rank) = (8, 4, 2);
    let mut layer = layer(input, output, rank, 2.0, 0.5);
    // B picks: columns 0 and 1 are the two middle values, the others 0
    let pick = Tensor::new(&[[1f32, 0., 0., 0.], [0., 1., 0., 0.]], &Device::Cpu).unwrap();
    layer.lora_b().set(&pick).unwrap();
    let rows = 512;
    let x = tensor(&[rows, input], 1);
    let whole = lora(&numbers(rows * input, 1), &numbers(16, 2), &wide(&pick), rank, 1.0);
    let y = layer.forward(&x).unwrap();
    let got = wide(&y);
    let mut dropped = 0;
    for (got, want) in got.chunks(output).zip(whole.chunks(output)) {
        for at in 0..2 {
            // dropped, or divided by 1 − p
            assert!(got[at] == 0.0 || (got[at] - 2.0 * want[at]).abs() < 1e-5);
            dropped += usize::from(got[at] == 0.0);
        }
        assert_eq!(got[2..], [0.0, 0.0]);
    }
    // 1024 throws of p = 1/2: a standard deviation is 16
    assert!((dropped as i64 - 512).abs() < 100, "{dropped}");
    let grads = weighted(&y).backward().unwrap();
    assert!(layer.trainable_variables().iter().all(|var| grads.get(var).is_some()));
    assert_eq!(layer.forward(&tensor(&[input], 1)).unwrap().dims(), [output]);
    layer.eval();
    assert_near(&layer.forward(&x).unwrap(), &whole, 8e-6);
}

#[cfg(feature = "graph")]
mod lazy {
    use super::*;
    use candle_lazy_compat::graph::LazyTensor;

    #[test]
    fn forward_lazy_records_without_dropout() {
        let layer = layer(16, 24, 4, 6.0, 0.5);
        let x = LazyTensor::from_tensor(tensor(&[2, 3, 16], 1)).unwrap();
        let y = layer.forward_lazy(&x).unwrap();
        assert!(!y.is_evaluated());
        assert_eq!((y.shape().dims(), y.dtype()), (&[2, 3, 24][..], DType::F32));
        // x, A, B and what is computed: one op, or two products and a multiplication
        assert_eq!(y.graph_size(), if cfg!(feature = "custom-metal") { 4 } else { 6 });
        let want = lora(&numbers(96, 1), &numbers(64, 2), &numbers(96, 3), 4, 1.5);
        assert_near(&y.eval().unwrap(), &want, 8e-6);
    }

    #[test]
    fn gradients_flow_through_a_lazy_forward() {
        let layer = layer(6, 5, 2, 4.0, 0.0);
        let x = tensor(&[3, 6], 1);
        let lazy = layer.forward_lazy(&LazyTensor::from_tensor(x.clone()).unwrap()).unwrap().eval().unwrap();
        let (got, want) =
            (weighted(&lazy).backward().unwrap(), weighted(&layer.forward(&x).unwrap()).backward().unwrap());
        for var in layer.trainable_variables() {
            assert_near(got.get(var).unwrap(), &wide(want.get(var).unwrap()), 4e-6);
        }
    }

    #[test]
    fn a_lazy_input_that_does_not_fit() {
        let layer = layer(16, 24, 4, 8.0, 0.0);
        let x = LazyTensor::from_tensor(tensor(&[2, 15], 1)).unwrap();
        let error = layer.forward_lazy(&x).unwrap_err().to_string();
        assert!(error.contains("Shape mismatch") && error.contains("15"), "{error}");
        let half = LazyTensor::from_tensor(tensor(&[2, 16], 1).to_dtype(DType::F16).unwrap()).unwrap();
        let error = layer.forward_lazy(&half).unwrap_err().to_string().to_lowercase();
        assert!(error.contains("f16") && error.contains("f32"), "{error}");
        assert_eq!((x.graph_size(), half.graph_size()), (1, 1));
    }
}
