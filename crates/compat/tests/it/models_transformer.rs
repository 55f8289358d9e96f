//! Rotary embedding, attention and the feed-forward block against their formulas in f64.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::decoder::{
    assert_near, attention, builder, causal, config, flat, mask_tensor, random, rotated, rows, swiglu, variables,
    weights,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, ModelError};
use metal_candle::models::transformer::{Attention, RotaryEmbedding, MLP};

/// Sums of at most 40 terms of order one, one after another, in f32.
const BOUND: f64 = 1e-5;

const PREFIX: &str = "model.layers.0.self_attn";

fn tested() -> Attention {
    let config = config();
    let vb = builder(&weights(&config)).pp(PREFIX);
    Attention::new(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        40,
        config.rope_theta,
        &vb,
    )
    .unwrap()
}

#[track_caller]
fn config_error<T: std::fmt::Debug>(result: metal_candle::Result<T>, words: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Model(ModelError::InvalidConfig { .. })), "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn rotary_embedding_is_its_formula() {
    let (b, s, h, d) = (2, 5, 3, 8);
    let rope = RotaryEmbedding::new(d, 16, 100.0, &Device::Cpu).unwrap();
    let x = random(&[b, s, h, d], 1, 2.0);
    let want: Vec<f64> = rows(&x).iter().enumerate().flat_map(|(row, x)| rotated(x, row / h % s, 100.0)).collect();
    let got = rope.clone().apply_rotary_emb(&x, s).unwrap();
    assert_eq!(got.dims(), [b, s, h, d]);
    assert!(got.is_contiguous());
    assert_near(&got, &want, BOUND);
    // position 0 stays
    assert_near(&got.narrow(1, 0, 1).unwrap(), &flat(&x.narrow(1, 0, 1).unwrap()), 0.0);
    // f16 rounds the tables and the products: three roundings of 2⁻¹¹ of values up to 2·√2
    let halves = rope.apply_rotary_emb(&x.to_dtype(DType::F16).unwrap(), s).unwrap();
    assert_eq!(halves.dtype(), DType::F16);
    assert_near(&halves, &want, 5e-3);
}

#[test]
fn rotary_embedding_refuses_what_it_has_no_angles_for() {
    let rope = RotaryEmbedding::new(4, 3, 1e4, &Device::Cpu).unwrap();
    assert!(rope.apply_rotary_emb(&random(&[1, 4, 1, 4], 1, 1.0), 4).is_err(), "longer than the tables");
    assert!(rope.apply_rotary_emb(&random(&[1, 2, 1, 6], 1, 1.0), 2).is_err(), "wider than a head");
    assert!(rope.apply_rotary_emb(&random(&[2, 4], 1, 1.0), 2).is_err(), "another rank");
    let error = rope.apply_rotary_emb(&random(&[1, 2, 1, 4], 1, 1.0), 3).unwrap_err();
    assert!(matches!(error, Error::Model(ModelError::ShapeMismatch { .. })), "{error:?}");
    config_error(RotaryEmbedding::new(5, 3, 1e4, &Device::Cpu), "invalid model configuration");
    config_error(RotaryEmbedding::new(0, 3, 1e4, &Device::Cpu), "invalid model configuration");
}

#[test]
fn attention_without_a_mask_sees_everything() {
    let (config, weights) = (config(), weights(&config()));
    let x = random(&[2, 5, 24], 3, 1.0);
    let got = tested().forward(&x, None).unwrap();
    assert_eq!((got.dims(), tested().head_dim()), ([2, 5, 24].as_slice(), 6));
    let sequence = |b: usize| attention(&rows(&x.get(b).unwrap()), &weights, PREFIX, &config, None).concat();
    assert_near(&got, &[sequence(0), sequence(1)].concat(), BOUND);
}

#[test]
fn a_mask_is_added_by_broadcasting() {
    let (config, weights) = (config(), weights(&config()));
    let x = random(&[1, 5, 24], 4, 1.0);
    let mut mask = causal(5);
    mask[3][1] = -0.75; // any number may be added
    let want = attention(&rows(&x), &weights, PREFIX, &config, Some(&mask)).concat();
    for shape in [[5, 5].as_slice(), &[1, 5, 5], &[1, 1, 5, 5]] {
        assert_near(&tested().forward(&x, Some(&mask_tensor(&mask, shape))).unwrap(), &want, BOUND);
    }
    // one mask per head, and per key only
    let one = mask_tensor(&mask, &[1, 1, 5, 5]);
    let all = Tensor::cat(&[&one, &one, &one, &one], 1).unwrap();
    assert_near(&tested().forward(&x, Some(&all)).unwrap(), &want, BOUND);
    let keys: Vec<f64> = vec![0.0, 0.0, f64::NEG_INFINITY, 0.5, 0.0];
    let want = attention(&rows(&x), &weights, PREFIX, &config, Some(&vec![keys.clone(); 5])).concat();
    assert_near(&tested().forward(&x, Some(&mask_tensor(&vec![keys], &[1, 1, 1, 5]))).unwrap(), &want, BOUND);
    assert!(tested().forward(&x, Some(&mask_tensor(&causal(4), &[4, 4]))).is_err());
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let vb = builder(&weights(&config())).pp(PREFIX);
    config_error(Attention::new(24, 5, None, 40, 1e4, &vb), "5 heads over 5 key/value heads do not divide");
    config_error(Attention::new(24, 4, Some(3), 40, 1e4, &vb), "4 heads over 3 key/value heads");
    config_error(Attention::new(24, 0, None, 40, 1e4, &vb), "0 heads");
    config_error(Attention::new(24, 8, Some(4), 40, 1e4, &vb), "invalid model configuration"); // heads of 3 dims
    let error = Attention::new(24, 4, None, 40, 1e4, &vb).unwrap_err(); // k_proj is for two heads
    assert!(matches!(error, Error::Candle(_)), "{error:?}");
    assert!(error.to_string().contains("k_proj.weight"), "{error}");
    assert!(tested().forward(&random(&[1, 5, 23], 1, 1.0), None).is_err());
    assert!(tested().forward(&random(&[5, 24], 1, 1.0), None).is_err());
    assert!(tested().forward(&random(&[1, 41, 24], 1, 1.0), None).is_err(), "more positions than the tables have");
}

#[test]
fn the_feed_forward_block_is_swiglu() {
    let weights = weights(&config());
    let mlp = MLP::new(24, 40, &builder(&weights).pp("model.layers.1.mlp")).unwrap();
    let x = random(&[2, 3, 24], 5, 1.0);
    let got = mlp.forward(&x).unwrap();
    assert_eq!(got.dims(), [2, 3, 24]);
    assert_near(&got, &swiglu(&rows(&x), &weights, "model.layers.1.mlp").concat(), BOUND);
    assert!(mlp.forward(&random(&[2, 3, 40], 5, 1.0)).is_err());
    let error = MLP::new(24, 41, &builder(&weights).pp("model.layers.1.mlp")).unwrap_err();
    assert!(error.to_string().contains("model.layers.1.mlp.gate_proj.weight"), "{error}");
}

/// The slope of Σ y·c at one element of a tensor, by a step to either side in the reference.
fn slope(f: impl Fn(f64) -> Vec<f64>) -> f64 {
    let weighted = |step: f64| -> f64 { f(step).iter().enumerate().map(|(i, y)| y * (i % 7) as f64).sum() };
    (weighted(1e-4) - weighted(-1e-4)) / 2e-4
}

/// Σ y·c as a tensor.
fn loss(y: &Tensor) -> Tensor {
    let n = y.elem_count();
    let c: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
    (y.flatten_all().unwrap() * Tensor::from_vec(c, n, &Device::Cpu).unwrap()).unwrap().sum_all().unwrap()
}

/// `tensor` with `step` added to element `at`, in f64.
fn moved(tensor: &Tensor, at: usize, step: f64) -> Tensor {
    let mut values = flat(tensor);
    values[at] += step;
    Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap()
}

#[test]
fn gradients_reach_the_input_and_the_variables() {
    let (config, weights) = (config(), weights(&config()));
    let (vars, vb) = variables(&weights);
    let tested = Attention::new(24, 4, config.num_key_value_heads, 40, config.rope_theta, &vb.pp(PREFIX)).unwrap();
    let x = Var::from_tensor(&random(&[1, 5, 24], 6, 1.0)).unwrap();
    let grads = loss(&tested.forward(x.as_tensor(), None).unwrap()).backward().unwrap();
    let plain =
        |x: &Tensor, weights: &crate::decoder::Weights| attention(&rows(x), weights, PREFIX, &config, None).concat();
    // f32 against differences of f64: the sums have a few hundred terms of order one
    let near = |got: &Tensor, at: usize, want: f64| {
        let got = flat(got)[at];
        assert!((got - want).abs() <= 1e-3 * want.abs().max(1.0), "{got} against {want}");
    };
    for at in [0, 31, 119] {
        near(grads.get(&x).unwrap(), at, slope(|step| plain(&moved(&x, at, step), &weights)));
    }
    for name in ["q_proj.weight", "k_proj.bias", "v_proj.weight", "o_proj.weight"] {
        let name = format!("{PREFIX}.{name}");
        let change = |step: f64| {
            let mut weights = weights.clone();
            weights.insert(name.clone(), moved(&weights[&name], 7, step));
            plain(&x, &weights)
        };
        near(grads.get(&vars[&name]).unwrap(), 7, slope(change));
    }
    let mlp = MLP::new(24, 40, &vb.pp("model.layers.0.mlp")).unwrap();
    let grads = loss(&mlp.forward(&x).unwrap()).backward().unwrap();
    for name in ["gate", "up", "down"] {
        let name = format!("model.layers.0.mlp.{name}_proj.weight");
        let change = |step: f64| {
            let mut weights = weights.clone();
            weights.insert(name.clone(), moved(&weights[&name], 11, step));
            swiglu(&rows(&x), &weights, "model.layers.0.mlp").concat()
        };
        near(grads.get(&vars[&name]).unwrap(), 11, slope(change));
    }
}
