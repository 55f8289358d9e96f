//! The decoder against f64, its session against its forward pass, its counts and its errors.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too
#![allow(deprecated)] // what v1 had is tested as well

use crate::decoder::{
    assert_near, builder, causal, config, flat, layer, logits, mask_tensor, random, rows, variables, weights,
};
use candle_core::{DType, Device, Tensor};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, InferenceError, ModelError};
use metal_candle::models::qwen::QwenDecoderLayer;
use metal_candle::models::{DecodingSession, LanguageModel, ModelConfig, Qwen};

/// Two layers of sums of at most 40 terms; logits are of order ten.
const BOUND: f64 = 5e-5;

fn qwen() -> Qwen {
    Qwen::new(&config(), builder(&weights(&config()))).unwrap()
}

#[test]
fn models_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Qwen>();
    shared::<QwenDecoderLayer>();
    shared::<metal_candle::models::transformer::Attention>();
    shared::<metal_candle::models::transformer::MLP>();
    shared::<metal_candle::models::transformer::RotaryEmbedding>();
}

fn ids(rows: &[&[u32]]) -> Tensor {
    Tensor::new(rows.concat(), &Device::Cpu).unwrap().reshape((rows.len(), rows[0].len())).unwrap()
}

#[test]
fn logits_are_the_formulas() {
    let (config, weights) = (config(), weights(&config()));
    let (a, b) = ([3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 18]);
    let got = qwen().forward(&ids(&[&a, &b]), None).unwrap();
    assert_eq!(got.dims(), [2, 6, 19]);
    let want = [logits(&a, &weights, &config, None).concat(), logits(&b, &weights, &config, None).concat()].concat();
    assert_near(&got, &want, BOUND);
    let mask = causal(6);
    let got = qwen().forward(&ids(&[&a]), Some(&mask_tensor(&mask, &[1, 1, 6, 6]))).unwrap();
    assert_near(&got, &logits(&a, &weights, &config, Some(&mask)).concat(), BOUND);
}

#[test]
fn a_layer_is_its_formula() {
    let (config, weights) = (config(), weights(&config()));
    let vb = builder(&weights).pp("model.layers.1");
    let tested = QwenDecoderLayer::new(&config, 1, &vb).unwrap();
    let x = random(&[1, 4, 24], 9, 1.0);
    let mask = causal(4);
    let got = tested.forward(&x, Some(&mask_tensor(&mask, &[4, 4])), None).unwrap();
    assert_eq!(got.dims(), [1, 4, 24]);
    assert_near(&got, &layer(&rows(&x), &weights, "model.layers.1", &config, Some(&mask)).concat(), BOUND);
    let got = tested.forward(&x, None, None).unwrap();
    assert_near(&got, &layer(&rows(&x), &weights, "model.layers.1", &config, None).concat(), BOUND);
    assert!(format!("{tested:?}").contains("QwenDecoderLayer"));
}

#[test]
fn a_mask_takes_the_dtype_of_the_model() {
    let vb = candle_lazy_nn::VarBuilder::from_tensors(weights(&config()), DType::BF16, &Device::Cpu);
    let model = Qwen::new(&config(), vb).unwrap();
    let got = model.forward(&ids(&[&[1, 2, 3]]), Some(&mask_tensor(&causal(3), &[3, 3]))).unwrap();
    assert_eq!(got.dtype(), DType::BF16);
    let want = logits(&[1, 2, 3], &weights(&config()), &config(), Some(&causal(3))).concat();
    let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (g, w) in flat(&got).iter().zip(&want) {
        // two layers with some ten roundings of 2⁻⁸ each
        assert!((g - w).abs() < 0.1 * largest, "{g} against {w}");
    }
}

#[test]
fn counts_and_the_trait() {
    let model = qwen();
    // 2·19·24 + 24 outside of the layers
    assert_eq!((model.num_layers(), model.num_parameters()), (2, 936 + 2_000_000));
    let counted: usize =
        crate::decoder::shapes(&config()).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(model.parameter_count(), counted);
    assert!(format!("{model:?}").contains("Qwen"));
    let model: Box<dyn LanguageModel> = Box::new(model);
    assert_eq!(model.vocab_size(), 19);
    assert!(model.device().is_cpu());
    let input = ids(&[&[7, 8]]);
    assert_eq!(flat(&model.forward(&input, None).unwrap()), flat(&qwen().forward(&input, None).unwrap()));
}

/// The logits after each of `ids` from a session that is given pieces of these lengths.
fn decoded(model: &Qwen, ids: &[u32], pieces: &[usize]) -> Vec<(usize, Tensor)> {
    let mut session = model.decoding_session().unwrap().unwrap();
    let mut done = 0;
    let mut all = Vec::new();
    for piece in pieces {
        let logits = session.advance(&ids[done..done + piece]).unwrap();
        done += piece;
        all.push((done - 1, logits));
    }
    all
}

#[test]
fn a_session_gives_the_logits_of_the_causal_forward_pass() {
    let text: Vec<u32> = (0..40).map(|i| (i * i + 3) % 19).collect();
    let full = qwen().forward(&ids(&[&text]), Some(&mask_tensor(&causal(40), &[40, 40]))).unwrap();
    let reference = logits(&text, &weights(&config()), &config(), Some(&causal(40)));
    for pieces in [vec![1; 40], vec![40], vec![7, 1, 1, 20, 1, 10]] {
        for (at, logits) in decoded(&qwen(), &text, &pieces) {
            assert_eq!(logits.dims(), [19]);
            assert_near(&logits, &reference[at], BOUND);
            assert_near(&logits, &flat(&full.get(0).unwrap().get(at).unwrap()), 1e-5);
        }
    }
}

#[test]
fn a_session_grows_and_long_prompts_come_in_pieces() {
    let config = ModelConfig { max_position_embeddings: 1200, ..config() };
    let model = Qwen::new(&config, builder(&weights(&config))).unwrap();
    let text: Vec<u32> = (0..1100).map(|i| (i * 7 + i / 13) % 19).collect();
    let all = decoded(&model, &text, &[100, 300, 1, 650, 1]);
    let mask = mask_tensor(&causal(1052), &[1052, 1052]);
    let full = model.forward(&ids(&[&text[..1052]]), Some(&mask)).unwrap();
    for (at, logits) in all {
        assert_near(&logits, &flat(&full.get(0).unwrap().get(at).unwrap()), BOUND);
    }
}

#[test]
fn a_session_of_variables_computes_without_gradient() {
    let (vars, vb) = variables(&weights(&config()));
    let model = Qwen::new(&config(), vb).unwrap();
    let logits = decoded(&model, &[1, 2, 3], &[2, 1]);
    assert!(logits.iter().all(|(_, logits)| !logits.track_op()));
    let full = model.forward(&ids(&[&[1, 2, 3]]), Some(&mask_tensor(&causal(3), &[3, 3]))).unwrap();
    assert_near(&logits[1].1, &flat(&full.get(0).unwrap().get(2).unwrap()), BOUND);
    // the model itself trains: every variable gets a gradient
    let grads = full.sqr().unwrap().mean_all().unwrap().backward().unwrap();
    for (name, var) in &vars {
        let gradient = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert!(flat(gradient).iter().any(|g| *g != 0.0), "{name}");
    }
    // what is set later is seen by model and session
    for var in vars.values() {
        var.set(&var.zeros_like().unwrap()).unwrap();
    }
    assert!(flat(&decoded(&model, &[1], &[1])[0].1).iter().all(|v| *v == 0.0));
}

#[test]
fn a_session_says_what_it_cannot_take() {
    let model = qwen();
    let mut session = model.decoding_session().unwrap().unwrap();
    session.advance(&[1; 39]).unwrap();
    let failed = |session: &mut Box<dyn DecodingSession + '_>, ids: &[u32], words: &str| {
        let error = session.advance(ids).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        error
    };
    failed(&mut session, &[], "inference failed: there are no tokens to continue with");
    failed(&mut session, &[19], "inference failed: token id 19 is outside of the vocabulary of 19");
    let error = failed(&mut session, &[1, 1], "KV cache is full: position 39, maximum length 40");
    assert!(matches!(error, Error::Inference(InferenceError::CacheFull { position: 39, max_len: 40 })));
    session.advance(&[1]).unwrap();
    failed(&mut session, &[1], "KV cache is full: position 40");
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = qwen();
    assert!(model.forward(&ids(&[&[19]]), None).is_err(), "an id beyond the vocabulary");
    assert!(model.forward(&ids(&[&[0; 41]]), None).is_err(), "more positions than the model has");
    assert!(model.forward(&Tensor::new(&[1u32, 2], &Device::Cpu).unwrap(), None).is_err(), "no batch");
    assert!(model.forward(&ids(&[&[1, 2]]), Some(&mask_tensor(&causal(3), &[3, 3]))).is_err());
    let broken = ModelConfig { num_attention_heads: 5, ..config() };
    for error in [
        Qwen::new(&broken, builder(&weights(&config()))).unwrap_err(),
        QwenDecoderLayer::new(&broken, 0, &builder(&weights(&config())).pp("model.layers.0")).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Model(ModelError::InvalidConfig { .. })), "{error:?}");
    }
    for (name, _) in crate::decoder::shapes(&config()) {
        let mut some = weights(&config());
        some.remove(&name);
        let error = Qwen::new(&config(), builder(&some)).unwrap_err();
        assert!(matches!(error, Error::Candle(_)) && error.to_string().contains(&name), "{error}");
    }
}
