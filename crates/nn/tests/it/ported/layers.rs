//! Layers with weights.

use super::{at_line, random, same};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::candle::{Module, ModuleT};
use candle_lazy_nn::candle_nn::{self as lazy_nn, VarBuilder};
use candle_lazy_nn::LazyTensor;
use candle_nn::{LayerNormConfig, Module as _};
use std::collections::HashMap;

/// Both builders over the same tensors.
fn builders(tensors: &[(&str, &[usize])]) -> (VarBuilder<'static>, candle_nn::VarBuilder<'static>) {
    let tensors: HashMap<String, Tensor> =
        tensors.iter().enumerate().map(|(i, (name, dims))| (name.to_string(), random(dims, i as u64))).collect();
    let lazy = VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
    (lazy, candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

#[test]
fn linear_maps_are_candles() {
    let (lazy, eager) = builders(&[("l.weight", &[5, 4]), ("l.bias", &[5])]);
    for dims in [vec![3, 4], vec![2, 3, 4], vec![2, 1, 3, 4]] {
        let x = random(&dims, 9);
        let xs = LazyTensor::from(&x);
        for bias in [false, true] {
            let layer = lazy_nn::linear_b(4, 5, bias, lazy.pp("l")).unwrap();
            assert_eq!(layer.bias().is_some(), bias);
            same(layer.forward(&xs), candle_nn::linear_b(4, 5, bias, eager.pp("l")).unwrap().forward(&x));
        }
        let weight = lazy.get((5, 4), "l.weight").unwrap();
        let alone = lazy_nn::Linear::new(weight, None);
        same(xs.apply(&alone), candle_nn::linear_no_bias(4, 5, eager.pp("l")).unwrap().forward(&x));
    }
}

#[test]
fn embeddings_are_candles() {
    let (lazy, eager) = builders(&[("weight", &[7, 4])]);
    let ids = Tensor::new(&[[0u32, 6, 3], [1, 1, 2]], &Device::Cpu).unwrap();
    let layer = lazy_nn::embedding(7, 4, lazy).unwrap();
    assert_eq!((layer.hidden_size(), layer.embeddings().dims()), (4, &[7, 4][..]));
    same(layer.forward(&LazyTensor::from(&ids)), candle_nn::embedding(7, 4, eager).unwrap().forward(&ids));
}

#[test]
fn norms_are_candles_under_both_names() {
    let (lazy, eager) = builders(&[("n.weight", &[6]), ("n.bias", &[6]), ("o.gamma", &[6]), ("o.beta", &[6])]);
    let x = random(&[2, 3, 6], 8);
    let xs = LazyTensor::from(&x);
    for name in ["n", "o"] {
        for affine in [true, false] {
            for remove_mean in [true, false] {
                let config = LayerNormConfig { eps: 1e-3, remove_mean, affine };
                let want = candle_nn::layer_norm(6, config, eager.pp(name)).unwrap().forward(&x);
                same(lazy_nn::layer_norm(6, config, lazy.pp(name)).unwrap().forward(&xs), want);
            }
        }
        let want = candle_nn::rms_norm(6, 1e-3, eager.pp(name)).unwrap().forward(&x);
        same(lazy_nn::rms_norm(6, 1e-3, lazy.pp(name)).unwrap().forward(&xs), want);
        let want = candle_nn::layer_norm_no_bias(6, 1e-3, eager.pp(name)).unwrap().forward(&x);
        same(lazy_nn::layer_norm_no_bias(6, 1e-3, lazy.pp(name)).unwrap().forward(&xs), want);
    }
    let diff = lazy_nn::rms_norm(6, 1e-3, lazy.pp("n")).unwrap();
    same(diff.forward_diff(&xs), candle_nn::rms_norm(6, 1e-3, eager.pp("n")).unwrap().forward_diff(&x));
}

#[test]
fn modules_in_a_row() {
    let (lazy, eager) = builders(&[("weight", &[4, 4])]);
    let x = random(&[3, 4], 8);
    let layers = lazy_nn::seq()
        .add(lazy_nn::linear_no_bias(4, 4, lazy).unwrap())
        .add(lazy_nn::Activation::Relu)
        .add_fn(|xs| xs * 2.0);
    let want = (candle_nn::linear_no_bias(4, 4, eager).unwrap().forward(&x).unwrap().relu().unwrap() * 2.0).unwrap();
    same(layers.forward(&LazyTensor::from(&x)), Ok(want.clone()));
    let all = layers.forward_all(&LazyTensor::from(&x)).unwrap();
    assert_eq!((layers.len(), all.len(), layers.is_empty()), (3, 3, false));
    same(Ok(all[2].clone()), Ok(want));
    let twice = lazy_nn::func_t(|xs, train| if train { xs * 2.0 } else { Ok(xs.clone()) });
    same(LazyTensor::from(&x).apply_t(&twice, true), &x * 2.0);
    same(twice.forward_t(&LazyTensor::from(&x), false), Ok(x));
}

#[test]
fn our_own_modules_apply_too() {
    let (weight, x) = (random(&[5, 4], 1), random(&[3, 4], 2));
    let ours = candle_lazy_nn::Linear::new(weight.clone(), None).unwrap();
    same(LazyTensor::from(&x).apply(&ours), candle_nn::Linear::new(weight, None).forward(&x));
}

#[test]
fn an_input_that_does_not_fit_is_refused_where_the_layer_was_applied() {
    let (lazy, _) = builders(&[("model.l.weight", &[5, 4]), ("model.n.weight", &[6])]);
    let linear = lazy_nn::linear_no_bias(4, 5, lazy.pp("model").pp("l")).unwrap();
    let norm = lazy_nn::rms_norm(6, 1e-5, lazy.pp("model.n")).unwrap();
    let x = LazyTensor::from(random(&[3, 7], 1));
    let error = x.apply(&linear).unwrap_err();
    at_line(&error, line!() - 1);
    assert!(error.to_string().contains("model.l"), "{error}");
    let error = norm.forward(&x).unwrap_err();
    at_line(&error, line!() - 1);
    assert!(error.to_string().contains("model.n"), "{error}");
    let layers = lazy_nn::seq().add(norm.clone()).add(linear);
    at_line(&layers.forward_all(&x).unwrap_err(), line!());
}
