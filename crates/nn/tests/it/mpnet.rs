//! MPNet against Hugging Face's implementation: `tests/fixtures/mpnet.py` wrote what it gives in f64.

use crate::common::{builder, relative, Rng, TestResult, Vars};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::models::{Encoder, MpnetConfig, MpnetModel, SentenceEncoder};
use candle_lazy_nn::{Error, LazyTensor, ModelDir};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    config: serde_json::Value,
    weights: Vec<(String, Vec<usize>)>,
    ids: Vec<Vec<u32>>,
    every: usize,
    /// Of every text, the vectors of every so manieth token.
    hidden: Vec<Vec<Vec<f32>>>,
}

fn fixture() -> Result<(Fixture, MpnetConfig, Vars), Box<dyn std::error::Error>> {
    let fixture: Fixture = serde_json::from_str(include_str!("../fixtures/mpnet.json"))?;
    let config = MpnetConfig::from_json(&fixture.config.to_string())?;
    let mut rng = Rng::new(1);
    let mut vars = Vars::new();
    for (name, shape) in &fixture.weights {
        let scale = match name {
            name if name.contains("LayerNorm") => 0.2,
            name if name.contains("relative") => 2.,
            _ => 0.35,
        };
        let shift = if name.ends_with("LayerNorm.weight") { 1. } else { 0. };
        vars.insert(name.clone(), rng.tensor(shape, 1.)?.affine(scale, shift)?);
    }
    Ok((fixture, config, vars))
}

/// Two texts in one row each, the shorter filled up with id 1.
fn batch(fixture: &Fixture) -> candle_core::Result<(LazyTensor, LazyTensor)> {
    let (rows, s) = (fixture.ids.len(), fixture.ids[0].len());
    let ids = Tensor::from_vec(fixture.ids.concat(), (rows, s), &Device::Cpu)?;
    let mask = ids.ne(1u32)?;
    Ok((ids.into(), mask.into()))
}

#[test]
fn hidden_states_are_hugging_faces() -> TestResult {
    let (fixture, config, vars) = fixture()?;
    let model = MpnetModel::load(builder(&vars), &config)?;
    let (ids, mask) = batch(&fixture)?;
    let hidden = model.forward(&ids, Some(&mask))?.to_vec3::<f32>()?;
    for (text, want) in hidden.iter().zip(&fixture.hidden) {
        assert!(want.len() > 5, "the fixture is no stub");
        let got: Vec<f32> = text.iter().step_by(fixture.every).take(want.len()).flatten().copied().collect();
        let error = relative(&got, &want.concat());
        assert!(error < 1e-5, "{error}");
    }
    Ok(())
}

#[test]
fn a_text_alone_is_the_text_in_a_batch() -> TestResult {
    let (fixture, config, vars) = fixture()?;
    let model = MpnetModel::load(builder(&vars), &config)?;
    let (ids, mask) = batch(&fixture)?;
    let together = model.forward(&ids, Some(&mask))?.to_vec3::<f32>()?;
    let len = fixture.ids[1].iter().filter(|id| **id != 1).count();
    let alone = LazyTensor::from_slice(&fixture.ids[1][..len], (1, len), &Device::Cpu)?;
    let alone = model.forward(&alone, None)?.to_vec3::<f32>()?;
    let error = relative(&alone[0].concat(), &together[1][..len].concat());
    assert!(error < 1e-5, "{error}");
    Ok(())
}

#[test]
fn distances_matter() -> TestResult {
    let (fixture, config, mut vars) = fixture()?;
    let (ids, mask) = batch(&fixture)?;
    let with =
        MpnetModel::load(builder(&vars), &config)?.forward(&ids, Some(&mask))?.flatten_all()?.to_vec1::<f32>()?;
    let name = "encoder.relative_attention_bias.weight";
    let zeros = vars[name].zeros_like()?;
    vars.insert(name.to_string(), zeros);
    let without =
        MpnetModel::load(builder(&vars), &config)?.forward(&ids, Some(&mask))?.flatten_all()?.to_vec1::<f32>()?;
    assert!(relative(&without, &with) > 0.01);
    Ok(())
}

#[test]
fn a_directory_says_which_encoder_it_holds() -> TestResult {
    let (fixture, _, vars) = fixture()?;
    let dir = tempfile::tempdir()?;
    let prefixed: Vars = vars.iter().map(|(name, tensor)| (format!("mpnet.{name}"), tensor.clone())).collect();
    candle_core::safetensors::save(&prefixed, dir.path().join("model.safetensors"))?;
    std::fs::write(dir.path().join("config.json"), fixture.config.to_string())?;
    let encoder = ModelDir::open(dir.path())?.sentence_encoder(DType::F32, &Device::Cpu)?;
    let Encoder::Mpnet(model) = encoder.model() else {
        return Err("an MPNet was expected".into());
    };
    assert_eq!((model.config().max_tokens(), encoder.model().max_tokens()), (200, 200));
    assert_eq!(
        (encoder.model().hidden_size(), encoder.model().vocab_size(), encoder.model().pad_token_id()),
        (8, 50, 1)
    );
    // Vectors of length 1, the direction of the mean of the hidden states.
    let text = &fixture.ids[0][..9];
    let vector = encoder.embed(&[text])?.to_vec2::<f32>()?.concat();
    let ids = LazyTensor::from_slice(text, (1, 9), &Device::Cpu)?;
    let rows = model.forward(&ids, None)?.squeeze(0)?.to_vec2::<f32>()?;
    let mean: Vec<f64> = (0..8).map(|i| rows.iter().map(|row| f64::from(row[i])).sum::<f64>() / 9.).collect();
    let norm = mean.iter().map(|v| v * v).sum::<f64>().sqrt();
    let want: Vec<f32> = mean.iter().map(|v| (v / norm) as f32).collect();
    assert!(relative(&vector, &want) < 1e-5);
    let bert = fixture.config.to_string().replace("mpnet", "roberta");
    std::fs::write(dir.path().join("config.json"), bert)?;
    let error = ModelDir::open(dir.path())?.sentence_encoder(DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert_eq!(error, "encoder `roberta` is not supported (supported: bert, mpnet)");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> TestResult {
    let (fixture, config, vars) = fixture()?;
    let model = MpnetModel::load(builder(&vars), &config)?;
    let ids = |dims: (usize, usize)| LazyTensor::zeros(dims, DType::U32, &Device::Cpu);
    let text = |result: candle_lazy_nn::Result<LazyTensor>| result.map(|_| ()).unwrap_err().to_string();
    assert!(text(model.forward(&ids((1, 201))?, None)).contains("201 tokens"));
    assert!(text(model.forward(&ids((1, 0))?, None)).contains("empty"));
    assert!(text(model.forward(&ids((2, 3))?, Some(&ids((2, 4))?))).contains("attention_mask [2, 4]"));
    let changed = |name: &str, value: serde_json::Value| {
        let mut json = fixture.config.clone();
        json[name] = value;
        MpnetConfig::from_json(&json.to_string()).map(|_| ()).unwrap_err().to_string()
    };
    assert!(changed("model_type", "bert".into()).contains("encoder `bert` is not supported (supported: mpnet)"));
    assert!(changed("num_attention_heads", 3.into()).contains("hidden_size 8 is no multiple of num_attention_heads 3"));
    assert!(changed("max_position_embeddings", 2.into()).contains("max_position_embeddings is 2"));
    assert!(changed("relative_attention_num_buckets", 30.into()).contains("relative_attention_num_buckets is 30"));
    assert!(changed("layer_norm_eps", (-1.).into()).contains("layer_norm_eps is -1"));
    assert!(changed("hidden_act", "swoosh".into()).contains("swoosh"));
    assert!(changed("vocab_size", 0.into()).contains("vocab_size is 0"));
    let fewer = MpnetConfig { num_hidden_layers: 1, ..config.clone() };
    let error = MpnetModel::load(builder(&vars), &fewer).unwrap_err();
    assert!(matches!(&error, Error::Config { .. }) && error.to_string().contains("encoder.layer.1"), "{error}");
    let mut missing = vars.clone();
    missing.remove("encoder.relative_attention_bias.weight");
    let error = MpnetModel::load(builder(&missing), &config).unwrap_err().to_string();
    assert!(error.contains("encoder.relative_attention_bias.weight"), "{error}");
    Ok(())
}

#[test]
fn a_sentence_encoder_pads_without_a_trace() -> TestResult {
    let (fixture, config, vars) = fixture()?;
    let encoder = SentenceEncoder::new(MpnetModel::load(builder(&vars), &config)?);
    let texts: Vec<&[u32]> = vec![&fixture.ids[0][..40], &fixture.ids[1][..7]];
    let together = encoder.embed(&texts)?.to_vec2::<f32>()?;
    for (text, row) in texts.iter().zip(&together) {
        let alone = encoder.embed(&[text])?.to_vec2::<f32>()?.concat();
        assert!(relative(&alone, row) < 1e-5);
    }
    Ok(())
}
