//! BERT and sentence encoders against candle-transformers on the same random weights.

use crate::common::{builder, close, random_vars, relative, Rng, TestResult, Vars};
use candle_core::{Device, Tensor};
use candle_lazy_nn::models::{BertConfig, BertModel, SentenceEncoder};
use candle_lazy_nn::{Error, LazyTensor};
use candle_transformers::models::bert as eager;

pub(crate) const CONFIG: &str = r#"{"model_type": "bert", "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 40, "hidden_act": "gelu", "max_position_embeddings": 16,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0}"#;

pub(crate) fn config() -> Result<BertConfig, Error> {
    BertConfig::from_json(CONFIG)
}

fn eager_config(config: &BertConfig) -> eager::Config {
    eager::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        intermediate_size: config.intermediate_size,
        max_position_embeddings: config.max_position_embeddings,
        ..eager::Config::default()
    }
}

fn shapes(config: &BertConfig, scale: &str, shift: &str) -> Vec<(String, Vec<usize>)> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let mut shapes = vec![
        ("embeddings.word_embeddings.weight".to_string(), vec![config.vocab_size, hidden]),
        ("embeddings.position_embeddings.weight".to_string(), vec![config.max_position_embeddings, hidden]),
        ("embeddings.token_type_embeddings.weight".to_string(), vec![config.type_vocab_size, hidden]),
        (format!("embeddings.LayerNorm.{scale}"), vec![hidden]),
        (format!("embeddings.LayerNorm.{shift}"), vec![hidden]),
    ];
    for layer in 0..config.num_hidden_layers {
        let mut push = |name: &str, shape: Vec<usize>| shapes.push((format!("encoder.layer.{layer}.{name}"), shape));
        for name in ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"] {
            push(&format!("{name}.weight"), vec![hidden, hidden]);
            push(&format!("{name}.bias"), vec![hidden]);
        }
        for name in ["attention.output.LayerNorm", "output.LayerNorm"] {
            push(&format!("{name}.{scale}"), vec![hidden]);
            push(&format!("{name}.{shift}"), vec![hidden]);
        }
        push("intermediate.dense.weight", vec![ffn, hidden]);
        push("intermediate.dense.bias", vec![ffn]);
        push("output.dense.weight", vec![hidden, ffn]);
        push("output.dense.bias", vec![hidden]);
    }
    shapes
}

pub(crate) fn weights(config: &BertConfig, seed: u64) -> candle_core::Result<Vars> {
    random_vars(&shapes(config, "weight", "bias"), seed)
}

fn input(rows: usize, len: usize, seed: u64) -> candle_core::Result<(Tensor, Tensor)> {
    let mut rng = Rng::new(seed);
    Ok((
        Tensor::from_vec(rng.ids(rows * len, 50), (rows, len), &Device::Cpu)?,
        Tensor::from_vec(rng.ids(rows * len, 2), (rows, len), &Device::Cpu)?,
    ))
}

#[test]
fn hidden_states_are_candle_transformers() -> TestResult {
    let config = config()?;
    for (rows, len, seed) in [(1, 1, 1), (1, 7, 2), (3, 16, 3)] {
        let vars = weights(&config, seed)?;
        let (ids, segments) = input(rows, len, seed + 10)?;
        let want = eager::BertModel::load(builder(&vars), &eager_config(&config))?.forward(&ids, &segments, None)?;
        let ours = BertModel::load(builder(&vars), &config)?;
        let got = ours.forward(&ids.into(), &segments.into(), None)?.eval()?;
        close(&got, &want, 1e-5)?;
    }
    Ok(())
}

#[test]
fn masked_hidden_states_are_candle_transformers() -> TestResult {
    let config = config()?;
    let vars = weights(&config, 4)?;
    let (ids, segments) = input(2, 5, 14)?;
    let mask = Tensor::new(&[[1u32, 1, 1, 1, 1], [1, 1, 0, 0, 0]], &Device::Cpu)?;
    let want = eager::BertModel::load(builder(&vars), &eager_config(&config))?.forward(&ids, &segments, Some(&mask))?;
    let ours = BertModel::load(builder(&vars), &config)?;
    let got = ours.forward(&ids.into(), &segments.into(), Some(&mask.into()))?.eval()?;
    close(&got, &want, 1e-5)
}

#[test]
fn names_with_a_prefix_and_old_norm_names_load() -> TestResult {
    let config = config()?;
    let vars = weights(&config, 5)?;
    let renamed: Vars = vars
        .iter()
        .map(|(name, tensor)| {
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
            (format!("bert.{name}"), tensor.clone())
        })
        .collect();
    let (ids, segments) = input(1, 6, 15)?;
    let run = |vars: &Vars| -> candle_lazy_nn::Result<Tensor> {
        let model = BertModel::load(builder(vars), &config)?;
        Ok(model.forward(&ids.clone().into(), &segments.clone().into(), None)?.eval()?)
    };
    close(&run(&renamed)?, &run(&vars)?, 0.)
}

#[test]
fn sentence_vectors_are_normalised_means() -> TestResult {
    let config = config()?;
    let vars = weights(&config, 6)?;
    let ids = vec![3u32, 9, 27, 4];
    let model = BertModel::load(builder(&vars), &config)?;
    let row: LazyTensor = Tensor::from_slice(&ids, (1, 4), &Device::Cpu)?.into();
    let segments = LazyTensor::zeros((1, 4), candle_core::DType::U32, &Device::Cpu)?;
    let hidden = model.forward(&row, &segments, None)?.eval()?.to_vec3::<f32>()?;
    let mean: Vec<f64> = (0..24).map(|j| hidden[0].iter().map(|token| f64::from(token[j])).sum::<f64>() / 4.).collect();
    let norm = mean.iter().map(|v| v * v).sum::<f64>().sqrt();
    let unit: Vec<f32> = mean.iter().map(|v| (v / norm) as f32).collect();
    let plain: Vec<f32> = mean.iter().map(|v| *v as f32).collect();
    let encoder = SentenceEncoder::new(model);
    let got = encoder.embed(&[&ids])?.to_vec2::<f32>()?;
    assert!(relative(&got[0], &unit) < 1e-5);
    let got = encoder.normalize(false).embed(&[&ids])?.to_vec2::<f32>()?;
    assert!(relative(&got[0], &plain) < 1e-5);
    Ok(())
}

#[test]
fn padding_changes_no_vector() -> TestResult {
    let config = config()?;
    let encoder = SentenceEncoder::load(builder(&weights(&config, 7)?), &config)?;
    let texts = vec![vec![5u32, 6], vec![7, 8, 9, 10, 11, 12, 13], vec![14]];
    let together = encoder.embed(&texts)?.to_vec2::<f32>()?;
    for (text, row) in texts.iter().zip(&together) {
        let alone = encoder.embed(std::slice::from_ref(text))?.to_vec2::<f32>()?;
        assert!(relative(row, &alone[0]) < 1e-5, "{text:?}");
    }
    for batch in [0, 1, 2, 8] {
        let batched = encoder.embed_batched(&texts, batch)?;
        for (row, other) in together.iter().zip(&batched) {
            assert!(relative(other, row) < 1e-5, "batch {batch}");
        }
    }
    Ok(())
}

#[test]
fn texts_that_do_not_fit_are_refused() -> TestResult {
    let config = config()?;
    let encoder = SentenceEncoder::load(builder(&weights(&config, 8)?), &config)?;
    let none: [Vec<u32>; 0] = [];
    assert!(matches!(encoder.embed(&none), Err(Error::EmptyPrompt { .. })));
    assert!(matches!(encoder.embed(&[vec![1u32], vec![]]), Err(Error::EmptyPrompt { .. })));
    assert!(matches!(encoder.embed(&[vec![1u32; 17]]), Err(Error::PromptTooLong { len: 17, context: 16, .. })));
    assert!(matches!(encoder.embed(&[vec![50u32]]), Err(Error::TokenOutOfRange { id: 50, vocab: 50, .. })));
    assert!(encoder.embed(&[vec![1u32; 16]]).is_ok());
    assert!(encoder.embed_batched(&none, 4)?.is_empty());
    Ok(())
}

#[test]
fn a_vector_that_is_not_finite_is_an_error_with_the_weight_it_comes_from() -> TestResult {
    let config = config()?;
    let texts = [vec![1u32, 2], vec![3u32, 4, 5]];
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let mut vars = weights(&config, 11)?;
        let name = "encoder.layer.1.output.dense.bias";
        let broken = Tensor::full(value, 24, &Device::Cpu)?;
        assert!(vars.insert(name.to_string(), broken).is_some(), "a weight of the model");
        let encoder = SentenceEncoder::load(builder(&vars), &config)?;
        let error = encoder.embed_batched(&texts, 8).map(|_| ());
        let Err(Error::NonFinite { first: Some(first), .. }) = &error else { panic!("{error:?}") };
        assert_eq!(first.op, None, "a leaf");
        let said = error.map_or_else(|e| e.to_string(), |()| String::new());
        assert!(said.contains("encoder.layer.1.output.dense") && said.contains(shown), "{said}");
        assert!(said.contains("bert.rs"), "the line that loaded it: {said}");
    }
    // no weight is infinite, a product is
    let mut vars = weights(&config, 12)?;
    vars.insert("embeddings.LayerNorm.weight".to_string(), Tensor::full(3e38f32, 24, &Device::Cpu)?);
    let encoder = SentenceEncoder::load(builder(&vars), &config)?;
    let error = encoder.embed_batched(&texts, 8).map(|_| ());
    assert!(matches!(&error, Err(Error::NonFinite { first: Some(first), .. }) if first.op.is_some()), "{error:?}");
    Ok(())
}

#[test]
fn shapes_that_differ_are_refused() -> TestResult {
    let config = config()?;
    let model = BertModel::load(builder(&weights(&config, 9)?), &config)?;
    let ids = |rows, len| LazyTensor::zeros((rows, len), candle_core::DType::U32, &Device::Cpu);
    assert!(matches!(model.forward(&ids(1, 4)?, &ids(1, 5)?, None), Err(Error::Module { .. })));
    assert!(matches!(model.forward(&ids(1, 4)?, &ids(1, 4)?, Some(&ids(2, 4)?)), Err(Error::Module { .. })));
    assert!(matches!(model.forward(&ids(1, 17)?, &ids(1, 17)?, None), Err(Error::PromptTooLong { .. })));
    assert!(matches!(model.forward(&ids(1, 0)?, &ids(1, 0)?, None), Err(Error::EmptyPrompt { .. })));
    let flat = LazyTensor::zeros(4, candle_core::DType::U32, &Device::Cpu)?;
    assert!(matches!(model.forward(&flat, &flat, None), Err(Error::Module { .. })));
    Ok(())
}

#[test]
fn a_config_that_does_not_fit_its_weights_is_refused() -> TestResult {
    let config = config()?;
    let vars = weights(&config, 10)?;
    let load = |change: &dyn Fn(&mut BertConfig)| {
        let mut config = config.clone();
        change(&mut config);
        BertModel::load(builder(&vars), &config).map(|_| ())
    };
    let missing = load(&|c| c.num_hidden_layers = 3);
    assert!(matches!(&missing, Err(Error::MissingTensor { name, .. }) if name.contains("layer.2.")), "{missing:?}");
    let unused = load(&|c| c.num_hidden_layers = 1);
    assert!(matches!(&unused, Err(Error::Config { message, .. }) if message.contains("encoder.layer.1")), "{unused:?}");
    let vocab = load(&|c| c.vocab_size = 51);
    assert!(matches!(&vocab, Err(Error::TensorShape { name, .. }) if name.contains("word_embeddings")), "{vocab:?}");
    let width = load(&|c| c.intermediate_size = 41);
    assert!(matches!(&width, Err(Error::TensorShape { name, .. }) if name.contains("intermediate")), "{width:?}");
    Ok(())
}

#[test]
fn configs_that_contradict_themselves_are_refused() -> TestResult {
    let check = |change: &dyn Fn(&mut BertConfig)| -> Result<Result<(), Error>, Error> {
        let mut config = config()?;
        change(&mut config);
        Ok(config.validate("test"))
    };
    assert!(matches!(check(&|c| c.num_attention_heads = 5)?, Err(Error::Config { .. })));
    assert!(matches!(check(&|c| c.hidden_size = 0)?, Err(Error::Config { .. })));
    assert!(matches!(check(&|c| c.layer_norm_eps = f64::NAN)?, Err(Error::Config { .. })));
    assert!(matches!(check(&|c| c.hidden_act = "snake".into())?, Err(Error::Unsupported { .. })));
    assert!(matches!(check(&|c| c.position_embedding_type = "rotary".into())?, Err(Error::Unsupported { .. })));
    assert!(matches!(check(&|c| c.model_type = Some("t5".into()))?, Err(Error::Unsupported { .. })));
    assert!(matches!(BertConfig::from_json("{"), Err(Error::Config { .. })));
    assert!(matches!(BertConfig::from_json(r#"{"vocab_size": 3}"#), Err(Error::Config { .. })));
    assert!(matches!(BertConfig::from_file("/nowhere/config.json"), Err(Error::Io { .. })));
    Ok(())
}
