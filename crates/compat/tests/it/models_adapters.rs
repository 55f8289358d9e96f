//! Adapters on the decoder: each of the seven projections, with and without grouped heads, in training and in generation.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::decoder::{
    assert_near, builder, causal, config, flat, layer, logits, mask_tensor, random, rows, weights, Weights,
};
use crate::training::ALL;
use candle_core::{DType, Device, Tensor};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, TrainingError};
use metal_candle::models::qwen::QwenDecoderLayer;
use metal_candle::models::{LanguageModel, ModelConfig, Qwen};
use metal_candle::training::ApplyAdapter;
use metal_candle::{Generator, GeneratorConfig, LoRAAdapter, LoRAAdapterConfig, TargetModule};
use std::sync::Arc;

const BOUND: f64 = 5e-5;

fn targets(target_modules: &[TargetModule]) -> LoRAAdapterConfig {
    LoRAAdapterConfig { rank: 3, alpha: 6.0, dropout: 0.0, target_modules: target_modules.to_vec() }
}

/// An adapter whose B is not 0.
fn filled(adapter: LoRAAdapter) -> Arc<LoRAAdapter> {
    for (at, (_, layer)) in adapter.layers().enumerate() {
        // A too: another one at every run would make the last digits a matter of luck
        layer.lora_a().set(&random(layer.lora_a().dims(), 80 + at, 0.3)).unwrap();
        layer.lora_b().set(&random(layer.lora_b().dims(), 50 + at, 0.3)).unwrap();
    }
    Arc::new(adapter)
}

fn for_model(target_modules: &[TargetModule]) -> Arc<LoRAAdapter> {
    filled(LoRAAdapter::for_model(&config(), &targets(target_modules), &Device::Cpu).unwrap())
}

/// The name that a projection's weight has in layer `index`.
fn weight_name(index: usize, target: &TargetModule) -> String {
    let part = match target {
        TargetModule::GateProj | TargetModule::UpProj | TargetModule::DownProj => "mlp",
        _ => "self_attn",
    };
    format!("model.layers.{index}.{part}.{}.weight", target.name())
}

/// The weights with W + (A·B)ᵀ·2 in place of each adapted W, in f64; of a B that is too wide the first columns.
fn merged(adapter: &LoRAAdapter) -> Weights {
    let mut weights = weights(&config());
    for index in 0..config().num_hidden_layers {
        for target in &ALL {
            let Some(layer) = adapter.get_layer(index, target) else { continue };
            let name = weight_name(index, target);
            let (mut weight, a, b) = (rows(&weights[&name]), rows(layer.lora_a_tensor()), rows(layer.lora_b_tensor()));
            for (out, row) in weight.iter_mut().enumerate() {
                for (input, value) in row.iter_mut().enumerate() {
                    *value += (0..3).map(|r| a[input][r] * b[r][out]).sum::<f64>() * 2.0;
                }
            }
            let tensor = Tensor::from_vec(weight.concat(), weights[&name].dims(), &Device::Cpu).unwrap();
            weights.insert(name, tensor);
        }
    }
    weights
}

fn qwen() -> Qwen {
    Qwen::new(&config(), builder(&weights(&config()))).unwrap()
}

const IDS: [u32; 5] = [3, 14, 15, 9, 2];

fn forward(model: &Qwen) -> Tensor {
    let ids = Tensor::new(&IDS, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&ids, Some(&mask_tensor(&causal(5), &[5, 5]))).unwrap()
}

/// The logits with an adapter are those of the merged weights; without it again those of the plain ones.
#[track_caller]
fn acts(adapter: &Arc<LoRAAdapter>) {
    let mut model = qwen();
    let plain = flat(&forward(&model));
    assert!(!model.has_adapter());
    model.apply_adapter(Arc::clone(adapter)).unwrap();
    assert!(model.has_adapter());
    let got = forward(&model);
    let mask = causal(5);
    assert_near(&got, &logits(&IDS, &merged(adapter), &config(), Some(&mask)).concat(), BOUND);
    let away = flat(&got).iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(away > 1e-2, "{:?} does nothing: {away}", adapter.config().target_modules);
    // the session too
    let mut session = model.decoding_session().unwrap().unwrap();
    session.advance(&IDS[..3]).unwrap();
    let decoded = session.advance(&IDS[3..]).unwrap();
    assert_near(&decoded, &flat(&got.get(0).unwrap().get(4).unwrap()), BOUND);
    drop(session);
    model.remove_adapter().unwrap();
    assert!(!model.has_adapter());
    assert_eq!(flat(&forward(&model)), plain);
    model.remove_adapter().unwrap();
}

#[test]
fn each_projection_acts_on_its_own_input() {
    for target in ALL {
        acts(&for_model(&[target]));
    }
}

#[test]
fn all_act_together_and_the_default_ones_do() {
    acts(&for_model(&ALL));
    acts(&for_model(&LoRAAdapterConfig::default().target_modules));
}

#[test]
fn keys_and_values_as_wide_as_the_model_count_with_their_first_columns() {
    let (hidden, ffn, layers) = (24, 40, 2);
    for target_modules in [&ALL[..], &ALL[1..2], &ALL[2..3]] {
        let adapter = LoRAAdapter::new(hidden, ffn, layers, &targets(target_modules), &Device::Cpu).unwrap();
        acts(&filled(adapter));
    }
    // 12 of 24 columns get a gradient
    let adapter =
        filled(LoRAAdapter::new(hidden, ffn, layers, &targets(&[TargetModule::VProj]), &Device::Cpu).unwrap());
    let mut model = qwen();
    model.apply_adapter(Arc::clone(&adapter)).unwrap();
    let grads = forward(&model).sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let b = adapter.get_layer(0, &TargetModule::VProj).unwrap().lora_b();
    for row in rows(grads.get(b).unwrap()) {
        assert!(row[..12].iter().all(|g| *g != 0.0) && row[12..].iter().all(|g| *g == 0.0), "{row:?}");
    }
}

#[test]
fn sizes_of_a_model() {
    let adapter = for_model(&ALL);
    let size = |target: &TargetModule| {
        let layer = adapter.get_layer(1, target).unwrap();
        (layer.in_features(), layer.out_features())
    };
    let sizes: Vec<_> = ALL.iter().map(size).collect();
    assert_eq!(sizes, [(24, 24), (24, 12), (24, 12), (24, 24), (24, 40), (24, 40), (40, 24)]);
    assert_eq!((adapter.num_layers(), adapter.layers().count()), (2, 14));
    let broken = ModelConfig { num_attention_heads: 0, ..config() };
    assert!(LoRAAdapter::for_model(&broken, &targets(&ALL), &Device::Cpu).is_err());
}

#[test]
fn gradients_reach_every_variable_of_the_adapter() {
    let adapter = for_model(&ALL);
    let mut model = qwen();
    model.apply_adapter(Arc::clone(&adapter)).unwrap();
    let loss = |model: &Qwen| forward(model).sqr().unwrap().mean_all().unwrap();
    let grads = loss(&model).backward().unwrap();
    for (name, layer) in adapter.layers() {
        for var in layer.trainable_variables() {
            let gradient = flat(grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient")));
            // the slope along the largest, by a step to either side
            let at = (0..gradient.len()).max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs())).unwrap();
            let before = var.as_tensor().copy().unwrap();
            let stepped = |step: f64| {
                let mut values = flat(&before);
                values[at] += step;
                let values = Tensor::from_vec(values, before.dims(), &Device::Cpu).unwrap();
                var.set(&values.to_dtype(DType::F32).unwrap()).unwrap();
                let mask = causal(5);
                let all = logits(&IDS, &merged(&adapter), &config(), Some(&mask)).concat();
                all.iter().map(|v| v * v).sum::<f64>() / all.len() as f64
            };
            let slope = (stepped(1e-3) - stepped(-1e-3)) / 2e-3;
            var.set(&before).unwrap();
            let got = gradient[at];
            assert!((got - slope).abs() <= 2e-2 * slope.abs().max(1e-3), "{name}: {got} against {slope}");
        }
    }
}

#[test]
fn what_is_set_later_is_seen() {
    let adapter = Arc::new(LoRAAdapter::for_model(&config(), &targets(&ALL), &Device::Cpu).unwrap());
    let mut model = qwen();
    let plain = flat(&forward(&model));
    model.apply_adapter(Arc::clone(&adapter)).unwrap();
    assert_near(&forward(&model), &plain, BOUND); // B is 0
    for (at, (_, layer)) in adapter.layers().enumerate() {
        layer.lora_a().set(&random(layer.lora_a().dims(), 80 + at, 0.3)).unwrap();
        layer.lora_b().set(&random(layer.lora_b().dims(), at, 0.3)).unwrap();
    }
    assert_near(&forward(&model), &logits(&IDS, &merged(&adapter), &config(), Some(&causal(5))).concat(), BOUND);
}

#[test]
fn a_layer_takes_its_part_of_an_adapter() {
    let adapter = for_model(&ALL);
    let vb = builder(&weights(&config())).pp("model.layers.1");
    let x = random(&[1, 4, 24], 9, 1.0);
    let tested = QwenDecoderLayer::new(&config(), 1, &vb).unwrap();
    let got = tested.forward(&x, None, Some(&adapter)).unwrap();
    assert_near(&got, &layer(&rows(&x), &merged(&adapter), "model.layers.1", &config(), None).concat(), BOUND);
    // an adapter of fewer layers has nothing for a later one
    let beyond = QwenDecoderLayer::new(&config(), 2, &vb).unwrap();
    let got = beyond.forward(&x, None, Some(&adapter)).unwrap();
    assert_near(&got, &layer(&rows(&x), &weights(&config()), "model.layers.1", &config(), None).concat(), BOUND);
}

#[test]
fn dropout_acts_in_training_and_not_in_generation() {
    let config_of = |dropout: f32| LoRAAdapterConfig { dropout, ..targets(&ALL) };
    let mut adapter = LoRAAdapter::for_model(&config(), &config_of(0.5), &Device::Cpu).unwrap();
    for (at, (_, layer)) in adapter.layers().enumerate() {
        // A too: another one at every run would make the last digits a matter of luck
        layer.lora_a().set(&random(layer.lora_a().dims(), 80 + at, 0.3)).unwrap();
        layer.lora_b().set(&random(layer.lora_b().dims(), 50 + at, 0.3)).unwrap();
    }
    let mut model = qwen();
    model.apply_adapter(Arc::new(adapter.clone())).unwrap();
    let (a, b) = (flat(&forward(&model)), flat(&forward(&model)));
    assert_ne!(a, b, "two passes drop other elements");
    let want = logits(&IDS, &merged(&adapter), &config(), Some(&causal(5)));
    let last = model.decoding_session().unwrap().unwrap().advance(&IDS).unwrap();
    assert_near(&last, &want[4], BOUND);
    adapter.set_training(false);
    model.apply_adapter(Arc::new(adapter)).unwrap();
    assert_near(&forward(&model), &want.concat(), BOUND);
}

#[test]
fn a_generator_uses_the_adapter() {
    let adapter = for_model(&ALL);
    let mut want = vec![1u32];
    for _ in 0..8 {
        let all = logits(&want, &merged(&adapter), &config(), Some(&causal(want.len())));
        let best = all.last().unwrap().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        want.push(best.0 as u32);
    }
    let mut model = qwen();
    model.apply_adapter(adapter).unwrap();
    let mut generator =
        Generator::new(Box::new(model), GeneratorConfig { max_tokens: 8, ..Default::default() }).unwrap();
    assert_eq!(generator.generate(&[1]).unwrap(), want);
}

#[test]
fn what_does_not_fit_is_refused_and_the_model_keeps_what_it_had() {
    let good = for_model(&ALL);
    let make = |hidden, ffn, layers, target: TargetModule| {
        Arc::new(LoRAAdapter::new(hidden, ffn, layers, &targets(&[target]), &Device::Cpu).unwrap())
    };
    let cases = [
        (make(24, 40, 3, TargetModule::QProj), "the adapter has 3 layers, the model has 2"),
        (make(32, 40, 2, TargetModule::QProj), "layers.0.q_proj maps 32 to 32, the model's q_proj maps 24 to 24"),
        (make(32, 40, 2, TargetModule::KProj), "layers.0.k_proj maps 32 to 32, the model's k_proj maps 24 to 12"),
        (make(24, 41, 2, TargetModule::UpProj), "layers.0.up_proj maps 24 to 41, the model's up_proj maps 24 to 40"),
        (
            make(24, 41, 2, TargetModule::DownProj),
            "layers.0.down_proj maps 41 to 24, the model's down_proj maps 40 to 24",
        ),
    ];
    let mut model = qwen();
    model.apply_adapter(Arc::clone(&good)).unwrap();
    let before = flat(&forward(&model));
    for (adapter, words) in cases {
        let error = model.apply_adapter(adapter).unwrap_err();
        assert!(matches!(error, Error::Training(TrainingError::InvalidConfig { .. })), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(model.has_adapter());
        assert_eq!(flat(&forward(&model)), before);
    }
    let vb = candle_lazy_nn::VarBuilder::from_tensors(weights(&config()), DType::BF16, &Device::Cpu);
    let error = Qwen::new(&config(), vb).unwrap().apply_adapter(good).unwrap_err();
    assert!(error.to_string().contains("layers.0.q_proj is F32, the model BF16"), "{error}");
}
