//! Functions, rotary embeddings and activations.

use super::{at_line, random, same};
use candle_core::{DType, Device, Tensor, D};
use candle_lazy_nn::candle::Module;
use candle_lazy_nn::candle_nn::{ops, rotary_emb, Activation, PReLU};
use candle_lazy_nn::LazyTensor;
use candle_nn::Module as _;

#[test]
fn functions_are_candles() {
    let x = random(&[2, 3, 8], 1);
    let lazy = LazyTensor::from(&x);
    for dim in 0..3 {
        same(ops::softmax(&lazy, dim), candle_nn::ops::softmax(&x, dim));
        same(ops::log_softmax(&lazy, dim), candle_nn::ops::log_softmax(&x, dim));
    }
    same(ops::softmax(&lazy, D::Minus2), candle_nn::ops::softmax(&x, D::Minus2));
    same(ops::softmax_last_dim(&lazy), candle_nn::ops::softmax_last_dim(&x));
    same(ops::silu(&lazy), candle_nn::ops::silu(&x));
    same(ops::swiglu(&lazy), candle_nn::ops::swiglu(&x));
    same(ops::sigmoid(&lazy), candle_nn::ops::sigmoid(&x));
    let wide = (&x * 3.0).unwrap();
    let lazy_wide = LazyTensor::from(&wide);
    same(ops::hard_sigmoid(&lazy_wide), candle_nn::ops::hard_sigmoid(&wide));
    same(ops::mish(&lazy_wide), candle_nn::ops::mish(&wide));
    same(ops::leaky_relu(&lazy_wide, 0.1), candle_nn::ops::leaky_relu(&wide, 0.1));
    same(ops::selu(&lazy_wide, 1.6733, 1.0507), candle_nn::ops::selu(&wide, 1.6733, 1.0507));
    let (weight, bias) = (random(&[8], 2), random(&[8], 3));
    let (lazy_weight, lazy_bias) = (LazyTensor::from(&weight), LazyTensor::from(&bias));
    same(ops::rms_norm(&lazy, &lazy_weight, 1e-5), candle_nn::ops::rms_norm(&x, &weight, 1e-5));
    same(ops::rms_norm_slow(&lazy, &lazy_weight, 1e-5), candle_nn::ops::rms_norm_slow(&x, &weight, 1e-5));
    same(ops::layer_norm(&lazy, &lazy_weight, &lazy_bias, 1e-5), candle_nn::ops::layer_norm(&x, &weight, &bias, 1e-5));
    let image = random(&[2, 8, 2, 6], 4);
    let lazy_image = LazyTensor::from(&image);
    same(ops::pixel_shuffle(&lazy_image, 2), candle_nn::ops::pixel_shuffle(&image, 2));
    same(ops::pixel_unshuffle(&lazy_image, 2), candle_nn::ops::pixel_unshuffle(&image, 2));
    assert!(ops::pixel_shuffle(&lazy_image, 0).is_err() && ops::pixel_unshuffle(&lazy_image, 0).is_err());
}

#[test]
fn losses_are_candles() {
    use candle_lazy_nn::candle_nn::loss;
    let (x, y) = (random(&[5, 7], 1), random(&[5, 7], 2));
    let (lx, ly) = (LazyTensor::from(&x), LazyTensor::from(&y));
    let targets = Tensor::new(&[0u32, 6, 3, 3, 1], &Device::Cpu).unwrap();
    let lt = LazyTensor::from(&targets);
    same(loss::nll(&lx, &lt), candle_nn::loss::nll(&x, &targets));
    same(loss::cross_entropy(&lx, &lt), candle_nn::loss::cross_entropy(&x, &targets));
    same(loss::mse(&lx, &ly), candle_nn::loss::mse(&x, &y));
    for delta in [0.5, 1.0, 10.0] {
        same(loss::huber(&lx, &ly, delta), candle_nn::loss::huber(&x, &y, delta));
    }
    let p = candle_nn::ops::sigmoid(&y).unwrap();
    let bce = candle_nn::loss::binary_cross_entropy_with_logit(&x, &p);
    same(loss::binary_cross_entropy_with_logit(&lx, &LazyTensor::from(&p)), bce);
    let line = line!() + 1;
    for wrong in [loss::nll(&lx, &lx), loss::cross_entropy(&lx, &ly), loss::mse(&lx, &lt), loss::huber(&lx, &lt, 1.0)] {
        at_line(&wrong.unwrap_err(), line);
    }
}

#[test]
fn group_norms_and_one_hot_are_candles() {
    use candle_lazy_nn::candle_nn::{encoding, GroupNorm};
    let (x, w, b) = (random(&[2, 6, 5], 1), random(&[6], 2), random(&[6], 3));
    let (lx, lw, lb) = (LazyTensor::from(&x), LazyTensor::from(&w), LazyTensor::from(&b));
    for groups in [1, 2, 6] {
        let eager = candle_nn::GroupNorm::new(w.clone(), b.clone(), 6, groups, 1e-5).unwrap();
        let lazy = GroupNorm::new(lw.clone(), lb.clone(), 6, groups, 1e-5).unwrap();
        same(lazy.forward(&lx), eager.forward(&x));
    }
    assert!(GroupNorm::new(lw.clone(), lb.clone(), 6, 4, 1e-5).is_err());
    let line = line!() + 1;
    at_line(&GroupNorm::new(lw, lb, 6, 2, 1e-5).unwrap().forward(&lx.t().unwrap()).unwrap_err(), line);
    let ids = Tensor::new(&[[0i64, 2], [-1, 1]], &Device::Cpu).unwrap();
    let hot = |ids: &Tensor| encoding::one_hot(LazyTensor::from(ids), 3, 2f32, -1f32);
    same(hot(&ids), candle_nn::encoding::one_hot(ids.clone(), 3, 2f32, -1f32));
    let wrong = Tensor::new(&[3u32], &Device::Cpu).unwrap();
    assert!(hot(&wrong).unwrap_err().to_string().contains("exceeds depth"));
}

#[test]
fn dropout_keeps_the_mean_and_differs_between_calls() {
    let x = LazyTensor::ones(20_000, DType::F32, &Device::Cpu).unwrap();
    let drop = |train| ops::Dropout::new(0.25).forward(&x, train).unwrap().to_vec1::<f32>().unwrap();
    assert!(drop(false).iter().all(|v| *v == 1.0));
    let dropped = drop(true);
    let zeros = dropped.iter().filter(|v| **v == 0.0).count();
    // six standard deviations around a quarter: √(20000·0.25·0.75) is 61
    assert!((4633..5367).contains(&zeros), "{zeros} zeros");
    assert!(dropped.iter().all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6));
    assert_ne!(drop(true), dropped);
    assert!(ops::dropout(&x, 1.0).is_err());
}

#[test]
fn rotary_embeddings_are_candles() {
    for (seed, (b, h, t, d, table)) in
        [(1, 1, 1, 2, 1), (2, 3, 5, 8, 5), (1, 4, 7, 6, 11), (3, 2, 4, 10, 4)].into_iter().enumerate()
    {
        let seed = seed as u64 * 10;
        let x = random(&[b, h, t, d], seed);
        let x_thd = random(&[b, t, h, d], seed + 1);
        let (lazy, lazy_thd) = (LazyTensor::from(&x), LazyTensor::from(&x_thd));
        let angles = random(&[table, d / 2], seed + 2);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let (lazy_cos, lazy_sin) = (LazyTensor::from(&cos), LazyTensor::from(&sin));
        let eager = candle_nn::rotary_emb::rope;
        same(rotary_emb::rope(&lazy, &lazy_cos, &lazy_sin), eager(&x, &cos, &sin));
        same(rotary_emb::rope_slow(&lazy, &lazy_cos, &lazy_sin), candle_nn::rotary_emb::rope_slow(&x, &cos, &sin));
        same(rotary_emb::rope_i(&lazy, &lazy_cos, &lazy_sin), candle_nn::rotary_emb::rope_i(&x, &cos, &sin));
        same(rotary_emb::rope_i_slow(&lazy, &lazy_cos, &lazy_sin), candle_nn::rotary_emb::rope_i_slow(&x, &cos, &sin));
        same(
            rotary_emb::rope_thd(&lazy_thd, &lazy_cos, &lazy_sin),
            candle_nn::rotary_emb::rope_thd(&x_thd, &cos, &sin),
        );
        // a table of its own for every batch entry
        let angles = random(&[b, t, d / 2], seed + 3);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let (lazy_cos, lazy_sin) = (LazyTensor::from(&cos), LazyTensor::from(&sin));
        same(rotary_emb::rope(&lazy, &lazy_cos, &lazy_sin), eager(&x, &cos, &sin));
        same(rotary_emb::rope_i(&lazy, &lazy_cos, &lazy_sin), candle_nn::rotary_emb::rope_i(&x, &cos, &sin));
    }
}

#[test]
fn a_rope_that_does_not_fit_is_refused_at_this_line() {
    let x = LazyTensor::from(random(&[2, 1, 5, 8], 1));
    let thd = x.transpose(1, 2).unwrap();
    let table = |dims: &[usize]| LazyTensor::from(random(dims, 2));
    for wrong in [table(&[4, 4]), table(&[5, 3]), table(&[3, 5, 4]), table(&[4])] {
        let line = line!() + 1;
        let error = rotary_emb::rope(&x, &wrong, &table(&[5, 4])).unwrap_err();
        at_line(&error, line);
        let error = rotary_emb::rope_thd(&thd, &table(&[5, 4]), &wrong).unwrap_err();
        at_line(&error, line + 2);
    }
}

/// Both crates' activations, by name.
fn activations() -> Vec<(Activation, candle_nn::Activation)> {
    use candle_nn::Activation as C;
    use Activation as A;
    vec![
        (A::Gelu, C::Gelu),
        (A::NewGelu, C::NewGelu),
        (A::Relu, C::Relu),
        (A::Relu2, C::Relu2),
        (A::Relu6, C::Relu6),
        (A::Silu, C::Silu),
        (A::Sigmoid, C::Sigmoid),
        (A::HardSigmoid, C::HardSigmoid),
        (A::Swiglu, C::Swiglu),
        (A::Swish, C::Swish),
        (A::Mish, C::Mish),
        (A::HardSwish, C::HardSwish),
        (A::Elu(0.7), C::Elu(0.7)),
        (A::LeakyRelu(0.2), C::LeakyRelu(0.2)),
        (A::GeluPytorchTanh, C::GeluPytorchTanh),
    ]
}

#[test]
fn every_activation_is_candles_and_has_its_name_in_configs() {
    let x = (random(&[3, 10], 5) * 4.0).unwrap();
    let lazy = LazyTensor::from(&x);
    for (ours, theirs) in activations() {
        same(ours.forward(&lazy), theirs.forward(&x));
        let name = serde_json::to_string(&theirs).unwrap();
        assert_eq!(serde_json::to_string(&ours).unwrap(), name);
        assert_eq!(serde_json::from_str::<Activation>(&name).unwrap(), ours);
    }
    for (alias, want) in [
        ("gelu_new", Activation::NewGelu),
        ("gelu_pytorch_tanh", Activation::GeluPytorchTanh),
        ("gelu", Activation::Gelu),
    ] {
        let name = format!("\"{alias}\"");
        assert_eq!(serde_json::from_str::<Activation>(&name).unwrap(), want);
        assert!(serde_json::from_str::<candle_nn::Activation>(&name).is_ok());
    }
    assert_eq!(Activation::default(), Activation::Gelu);
}

#[test]
fn prelu_is_candles() {
    for (dims, weight, scalar) in [(vec![2, 3, 4], vec![3], false), (vec![5], vec![1], true), (vec![4], vec![4], false)]
    {
        let (x, weight) = (random(&dims, 6), random(&weight, 7));
        let want = candle_nn::PReLU::new(weight.clone(), scalar).forward(&x);
        same(PReLU::new(weight.into(), scalar).forward(&x.into()), want);
    }
    let prelu = PReLU::new(random(&[2], 1).into(), false);
    assert!(prelu.forward(&random(&[2, 3], 1).into()).is_err());
}

#[test]
fn half_precision_is_computed_wide() {
    let x = Tensor::full(1f32, (1, 4096), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap();
    let sum = ops::softmax_last_dim(&LazyTensor::from(&x)).unwrap().to_dtype(DType::F32).unwrap().sum_all().unwrap();
    assert!((sum.to_scalar::<f32>().unwrap() - 1.0).abs() < 1e-3);
}
