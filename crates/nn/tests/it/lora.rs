//! Adapters on single maps and on whole models.

use crate::common::{builder, close, decoder_vars, row, tiny_config, Rng, TestResult};
use candle_core::{DType, Tensor};
use candle_lazy_exec::RandomKey;
use candle_lazy_nn::models::CausalLm;
use candle_lazy_nn::{Error, LazyTensor, Linear, LoraLinear, LoraWeights, Module};

#[test]
fn an_adapter_adds_its_product() -> TestResult {
    let mut rng = Rng::new(1);
    let (weight, bias) = (rng.tensor(&[7, 10], 1.)?, rng.tensor(&[7], 1.)?);
    let (a, b) = (rng.tensor(&[10, 3], 1.)?, rng.tensor(&[3, 7], 1.)?);
    let xs = rng.tensor(&[2, 4, 10], 1.)?;
    let mut layer = LoraLinear::new(Linear::new(weight.clone(), Some(bias.clone().into()))?);
    let lazy: LazyTensor = xs.clone().into();
    let base = candle_nn::Module::forward(&candle_nn::Linear::new(weight, Some(bias)), &xs)?;
    close(&layer.forward(&lazy)?.eval()?, &base, 2e-6)?;
    layer.set_adapter(Some(LoraWeights::new(a.clone(), b.clone(), 0.5)?))?;
    assert_eq!(layer.adapter().map(LoraWeights::rank), Some(3));
    let want = (&base + (xs.broadcast_matmul(&a)?.broadcast_matmul(&b)? * 0.5)?)?;
    close(&layer.forward(&lazy)?.eval()?, &want, 5e-6)?;
    layer.set_adapter(None)?;
    close(&layer.forward(&lazy)?.eval()?, &base, 2e-6)
}

#[test]
fn factors_that_do_not_fit_are_refused_and_the_old_ones_stay() -> TestResult {
    let mut rng = Rng::new(2);
    let mut layer = LoraLinear::new(Linear::new(rng.tensor(&[7, 10], 1.)?, None)?);
    layer.set_adapter(Some(LoraWeights::new(rng.tensor(&[10, 2], 1.)?, rng.tensor(&[2, 7], 1.)?, 1.)?))?;
    for (a, b) in [([9, 2], [2, 7]), ([10, 2], [2, 8]), ([7, 2], [2, 10])] {
        let lora = LoraWeights::new(rng.tensor(&a, 1.)?, rng.tensor(&b, 1.)?, 1.)?;
        assert!(matches!(layer.set_adapter(Some(lora)), Err(Error::Module { .. })), "{a:?} {b:?}");
    }
    let halves = LoraWeights::new(
        rng.tensor(&[10, 2], 1.)?.to_dtype(DType::F16)?,
        rng.tensor(&[2, 7], 1.)?.to_dtype(DType::F16)?,
        1.,
    )?;
    assert!(matches!(layer.set_adapter(Some(halves)), Err(Error::Module { .. })));
    assert_eq!(layer.adapter().map(LoraWeights::rank), Some(2));
    Ok(())
}

#[test]
fn factors_that_do_not_fit_each_other_are_refused() -> TestResult {
    let mut rng = Rng::new(3);
    assert!(LoraWeights::new(rng.tensor(&[4, 2], 1.)?, rng.tensor(&[3, 4], 1.)?, 1.).is_err(), "ranks differ");
    assert!(LoraWeights::new(rng.tensor(&[4], 1.)?, rng.tensor(&[4, 4], 1.)?, 1.).is_err(), "a vector");
    let double = rng.tensor(&[2, 4], 1.)?.to_dtype(DType::F64)?;
    assert!(LoraWeights::new(rng.tensor(&[4, 2], 1.)?, double, 1.).is_err(), "dtypes differ");
    Ok(())
}

const MAPS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 24, 24),
    ("self_attn.k_proj", 24, 8),
    ("self_attn.v_proj", 24, 8),
    ("self_attn.o_proj", 24, 24),
    ("mlp.gate_proj", 24, 40),
    ("mlp.up_proj", 24, 40),
    ("mlp.down_proj", 40, 24),
];

#[test]
fn adapters_on_every_map_equal_merged_weights() -> TestResult {
    let config = tiny_config();
    let vars = decoder_vars(&config, 4)?;
    let ids = Rng::new(5).ids(6, config.vocab_size);
    let logits = |model: &CausalLm| -> Result<Tensor, Error> {
        Ok(model.forward(&row(&ids)?.into(), &mut model.new_cache(8)?)?.eval()?)
    };
    let mut adapted = CausalLm::load(builder(&vars), &config)?;
    let base = logits(&adapted)?;
    let mut merged = vars.clone();
    let mut rng = Rng::new(6);
    for layer in 0..config.num_hidden_layers {
        for (name, input, out) in MAPS {
            let (a, b) = (rng.tensor(&[input, 2], 0.5)?, rng.tensor(&[2, out], 0.5)?);
            let path = format!("model.layers.{layer}.{name}");
            adapted.set_lora(&path, Some(LoraWeights::new(a.clone(), b.clone(), 0.25)?))?;
            let weight = format!("{path}.weight");
            let delta = (a.matmul(&b)?.t()? * 0.25)?;
            let sum = (merged.get(&weight).ok_or("no such weight")? + delta)?;
            merged.insert(weight, sum);
        }
    }
    let want = logits(&CausalLm::load(builder(&merged), &config)?)?;
    let got = logits(&adapted)?;
    close(&got, &want, 1e-4)?;
    adapted.clear_lora()?;
    close(&logits(&adapted)?, &base, 0.)
}

#[test]
fn each_map_takes_its_own_adapter() -> TestResult {
    let config = tiny_config();
    let vars = decoder_vars(&config, 7)?;
    let ids = Rng::new(8).ids(5, config.vocab_size);
    let logits = |model: &CausalLm| -> Result<Vec<f32>, Error> {
        let logits = model.forward(&row(&ids)?.into(), &mut model.new_cache(8)?)?;
        Ok(logits.eval()?.flatten_all()?.to_vec1::<f32>()?)
    };
    let base = logits(&CausalLm::load(builder(&vars), &config)?)?;
    for (name, input, out) in MAPS {
        let mut model = CausalLm::load(builder(&vars), &config)?;
        let mut rng = Rng::new(9);
        let lora = LoraWeights::new(rng.tensor(&[input, 2], 1.)?, rng.tensor(&[2, out], 1.)?, 1.)?;
        model.set_lora(&format!("model.layers.1.{name}"), Some(lora))?;
        let moved = crate::common::relative(&logits(&model)?, &base);
        assert!(moved > 1e-3, "{name} moved the logits by {moved:e}");
    }
    Ok(())
}

#[test]
fn an_unknown_map_is_refused_by_name() -> TestResult {
    let config = tiny_config();
    let mut model = CausalLm::load(builder(&decoder_vars(&config, 10)?), &config)?;
    for path in ["", "lm_head", "model.layers.9.mlp.up_proj", "model.layers.0.mlp.q_proj", "model.layers.x.mlp.up_proj"]
    {
        let error = model.set_lora(path, None);
        assert!(
            matches!(&error, Err(Error::Module { message, .. }) if message.contains("no such")),
            "{path}: {error:?}"
        );
    }
    Ok(())
}

#[test]
fn dropout_drops_elements_of_the_inner_product() -> TestResult {
    let mut rng = Rng::new(11);
    let (weight, a, b) = (rng.tensor(&[7, 10], 1.)?, rng.tensor(&[10, 4], 1.)?, rng.tensor(&[4, 7], 1.)?);
    let xs = rng.tensor(&[64, 10], 1.)?;
    let lazy: LazyTensor = xs.clone().into();
    let mut layer = LoraLinear::new(Linear::new(weight.clone(), None)?);
    let base = layer.forward(&lazy)?.eval()?;
    let key = RandomKey::new(5);
    layer.set_adapter(Some(LoraWeights::new(a.clone(), b.clone(), 0.5)?.with_dropout(0.25, key)?))?;
    // the numbers that the key stands for: below 0.25 the element is dropped
    let inner = xs.broadcast_matmul(&a)?;
    let kept = LazyTensor::from(inner.clone()).dropout(0.25, key)?.eval()?;
    let (kept_values, inner_values) = (kept.flatten_all()?.to_vec1::<f32>()?, inner.flatten_all()?.to_vec1::<f32>()?);
    let dropped = kept_values.iter().zip(&inner_values).filter(|(kept, inner)| **kept == 0. && **inner != 0.).count();
    assert!((32..=96).contains(&dropped), "{dropped} of 256, 64 expected");
    let want = (&base + (kept.matmul(&b)? * 0.5)?)?;
    close(&layer.forward(&lazy)?.eval()?, &want, 5e-6)?;
    // without gradient there is no dropout either
    let want = (&base + (inner.matmul(&b)? * 0.5)?)?;
    close(&layer.detached()?.forward(&lazy)?.eval()?, &want, 5e-6)?;
    for p in [1., -0.1, f64::NAN] {
        assert!(matches!(LoraWeights::new(a.clone(), b.clone(), 1.)?.with_dropout(p, key), Err(Error::Module { .. })));
    }
    Ok(())
}
