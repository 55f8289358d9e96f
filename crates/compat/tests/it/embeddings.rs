//! The embeddings module: published models' names, pooling, and models from a directory with made-up weights.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on says why by panicking

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_compat::embeddings::{pooling, EmbeddingConfig, EmbeddingModel, EmbeddingModelType};
use candle_lazy_compat::error::{EmbeddingError, Error};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::models::{BertConfig, BertModel, MpnetConfig, MpnetModel};
use candle_nn::{VarBuilder, VarMap};
use std::path::Path;

type TestResult = Result<(), Box<dyn std::error::Error>>;

#[test]
fn published_models_have_their_names_and_sizes() -> TestResult {
    let expected = [
        (EmbeddingModelType::E5SmallV2, "intfloat/e5-small-v2", 384, "\"E5SmallV2\""),
        (EmbeddingModelType::AllMiniLmL6V2, "sentence-transformers/all-MiniLM-L6-v2", 384, "\"AllMiniLmL6V2\""),
        (EmbeddingModelType::AllMpnetBaseV2, "sentence-transformers/all-mpnet-base-v2", 768, "\"AllMpnetBaseV2\""),
    ];
    for (model, id, dimension, json) in expected {
        assert_eq!((model.model_id(), model.dimension()), (id, dimension));
        assert_eq!(serde_json::to_string(&model)?, json);
        assert_eq!(serde_json::from_str::<EmbeddingModelType>(json)?, model);
    }
    assert_eq!(EmbeddingModelType::default(), EmbeddingModelType::E5SmallV2);
    let config = EmbeddingConfig::default();
    assert_eq!(
        (config.model_type, config.normalize, config.max_seq_length),
        (EmbeddingModelType::E5SmallV2, true, 512)
    );
    Ok(())
}

#[test]
fn mean_pool_is_the_mean_where_the_mask_is_one() -> TestResult {
    let hidden = Tensor::new(&[[[1f32, 2.], [3., 6.], [50., 50.]], [[4., 8.], [9., 9.], [9., 9.]]], &Device::Cpu)?;
    // by hand: (1+3)/2 and (2+6)/2; the first token alone
    let expected = vec![vec![2f32, 4.], vec![4., 8.]];
    for dtype in [DType::F32, DType::U32, DType::I64] {
        let mask = Tensor::new(&[[1u32, 1, 0], [1, 0, 0]], &Device::Cpu)?.to_dtype(dtype)?;
        assert_eq!(pooling::mean_pool(&hidden, &mask)?.to_vec2::<f32>()?, expected);
    }
    let none = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    assert_eq!(pooling::mean_pool(&hidden, &none)?.to_vec2::<f32>()?, vec![vec![0f32; 2]; 2]);
    let error = pooling::mean_pool(&hidden, &Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?).unwrap_err().to_string();
    assert!(error.contains("[2, 3, 2]") && error.contains("[2, 4]"), "{error}");
    Ok(())
}

#[test]
fn normalize_gives_rows_of_length_one_and_keeps_zeros() -> TestResult {
    let xs = Tensor::new(&[[3f32, 4.], [0., 0.], [-5., 12.]], &Device::Cpu)?;
    let rows = pooling::normalize(&xs)?.to_vec2::<f32>()?;
    // 3-4-5 and 5-12-13
    for (row, want) in rows.iter().zip([[0.6f64, 0.8], [0., 0.], [-5. / 13., 12. / 13.]]) {
        for (got, want) in row.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-7, "{rows:?}");
        }
    }
    Ok(())
}

#[test]
fn gradients_pass_through_pooling() -> TestResult {
    let hidden = Var::from_tensor(&Tensor::new(&[[[1f32, 2.], [3., 6.]]], &Device::Cpu)?)?;
    let mask = Tensor::new(&[[1f32, 1.]], &Device::Cpu)?;
    let loss = pooling::normalize(&pooling::mean_pool(hidden.as_tensor(), &mask)?)?.sum_all()?;
    let gradients = loss.backward()?;
    let got = gradients.get(hidden.as_tensor()).unwrap().to_vec3::<f32>()?;
    // m = (2, 4), n = √20; d(m₀+m₁)/n by mᵢ is 1/n − mᵢ·(m₀+m₁)/n³, and each token has half of it
    let n = 20f64.sqrt();
    for token in &got[0] {
        for (got, m) in token.iter().zip([2f64, 4.]) {
            let want = 0.5 * (1. / n - m * 6. / n.powi(3));
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
        }
    }
    Ok(())
}

const WORDS: [&str; 9] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "is", "eating", "food"];

fn write_tokenizer(dir: &Path) -> TestResult {
    let vocab: serde_json::Map<String, serde_json::Value> =
        WORDS.iter().enumerate().map(|(id, word)| (word.to_string(), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    });
    Ok(std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string())?)
}

fn bert_json(hidden: usize) -> String {
    format!(
        r#"{{"model_type": "bert", "vocab_size": 9, "hidden_size": {hidden}, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 16, "max_position_embeddings": 8}}"#
    )
}

/// A directory with a BERT of random weights, and the model in it.
fn write_bert(dir: &Path, hidden: usize) -> Result<BertModel, Box<dyn std::error::Error>> {
    let json = bert_json(hidden);
    let weights = VarMap::new();
    let model =
        BertModel::load(VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu), &BertConfig::from_json(&json)?)?;
    weights.save(dir.join("model.safetensors"))?;
    std::fs::write(dir.join("config.json"), json)?;
    write_tokenizer(dir)?;
    Ok(model)
}

/// The mean of the rows, of length 1 if asked for.
fn pooled(rows: &[Vec<f32>], normalize: bool) -> Vec<f64> {
    let mut mean = vec![0f64; rows[0].len()];
    for row in rows {
        for (sum, value) in mean.iter_mut().zip(row) {
            *sum += f64::from(*value) / rows.len() as f64;
        }
    }
    let norm = if normalize { mean.iter().map(|v| v * v).sum::<f64>().sqrt() } else { 1. };
    mean.iter().map(|v| v / norm).collect()
}

fn close(got: &[f32], want: &[f64]) {
    let scale = want.iter().fold(0f64, |m, v| m.max(v.abs()));
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((f64::from(*got) - want).abs() < 1e-5 * scale, "{got} {want}");
    }
}

#[test]
fn encode_pools_what_the_encoder_gives() -> TestResult {
    let dir = tempfile::tempdir()?;
    let bert = write_bert(dir.path(), 384)?;
    for normalize in [true, false] {
        let config = EmbeddingConfig { normalize, max_seq_length: 6, ..EmbeddingConfig::default() };
        let model = EmbeddingModel::from_dir(dir.path(), config, Device::Cpu)?;
        assert_eq!((model.dimension(), model.model_type()), (384, EmbeddingModelType::E5SmallV2));
        // The last text has seven words, of which four stand between its marks; an empty one has only these.
        let texts = ["a man is", "food", "", "a man is eating food food food"];
        let ids: [&[u32]; 4] = [&[2, 4, 5, 6, 3], &[2, 8, 3], &[2, 3], &[2, 4, 5, 6, 7, 3]];
        let got = model.encode(&texts)?;
        assert_eq!((got.dims(), got.dtype()), (&[4, 384][..], DType::F32));
        for (row, ids) in got.to_vec2::<f32>()?.iter().zip(ids) {
            let s = ids.len();
            let ids = LazyTensor::from_slice(ids, (1, s), &Device::Cpu)?;
            let segments = LazyTensor::zeros((1, s), DType::U32, &Device::Cpu)?;
            let hidden = bert.forward(&ids, &segments, None)?.squeeze(0)?.to_vec2::<f32>()?;
            close(row, &pooled(&hidden, normalize));
        }
    }
    Ok(())
}

#[test]
fn an_mpnet_is_loaded_as_one() -> TestResult {
    let dir = tempfile::tempdir()?;
    let json = r#"{"model_type": "mpnet", "vocab_size": 9, "hidden_size": 768, "num_hidden_layers": 1,
        "num_attention_heads": 12, "intermediate_size": 8, "max_position_embeddings": 12, "pad_token_id": 1}"#;
    let weights = VarMap::new();
    let mpnet =
        MpnetModel::load(VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu), &MpnetConfig::from_json(json)?)?;
    weights.save(dir.path().join("model.safetensors"))?;
    std::fs::write(dir.path().join("config.json"), json)?;
    write_tokenizer(dir.path())?;
    let config = EmbeddingConfig { model_type: EmbeddingModelType::AllMpnetBaseV2, ..EmbeddingConfig::default() };
    let model = EmbeddingModel::from_dir(dir.path(), config, Device::Cpu)?;
    let got = model.encode(&["a man is eating", "food"])?.to_vec2::<f32>()?;
    for (row, ids) in got.iter().zip([&[2u32, 4, 5, 6, 7, 3][..], &[2, 8, 3]]) {
        let ids = LazyTensor::from_slice(ids, (1, ids.len()), &Device::Cpu)?;
        let hidden = mpnet.forward(&ids, None)?.squeeze(0)?.to_vec2::<f32>()?;
        close(row, &pooled(&hidden, true));
    }
    Ok(())
}

#[test]
fn what_cannot_be_embedded_says_why() -> TestResult {
    let dir = tempfile::tempdir()?;
    let embedding = |result: candle_lazy_compat::Result<EmbeddingModel>| match result.unwrap_err() {
        Error::Embedding(error) => error,
        other => panic!("{other}"),
    };
    let load = |config: EmbeddingConfig| embedding(EmbeddingModel::from_dir(dir.path(), config, Device::Cpu));
    let error = load(EmbeddingConfig::default());
    assert!(matches!(error, EmbeddingError::ModelNotFound { .. }) && error.to_string().contains("model not found"));
    write_bert(dir.path(), 16)?;
    let error = load(EmbeddingConfig::default());
    assert_eq!(error.to_string(), "dimension mismatch: expected 384, got 16");
    let error = load(EmbeddingConfig { max_seq_length: 0, ..EmbeddingConfig::default() });
    assert_eq!(error.to_string(), "invalid embedding configuration: max_seq_length is 0");
    std::fs::write(dir.path().join("config.json"), bert_json(24))?;
    let error = load(EmbeddingConfig::default());
    assert!(
        matches!(error, EmbeddingError::InvalidConfig { .. }) && error.to_string().contains("embeddings."),
        "{error}"
    );
    std::fs::remove_file(dir.path().join("tokenizer.json"))?;
    let error = load(EmbeddingConfig::default());
    assert!(matches!(error, EmbeddingError::TokenizerFailed { .. }) && error.to_string().contains("tokenizer.json"));
    write_bert(dir.path(), 384)?;
    let model = EmbeddingModel::from_dir(dir.path(), EmbeddingConfig::default(), Device::Cpu)?;
    assert!(matches!(model.encode(&[]), Err(candle_core::Error::Msg(text)) if text.contains("empty")));
    let short = EmbeddingConfig { max_seq_length: 2, ..EmbeddingConfig::default() };
    let model = EmbeddingModel::from_dir(dir.path(), short, Device::Cpu)?;
    let error = model.encode(&["food"]).unwrap_err().to_string();
    assert!(error.contains("2 tokens leave no room"), "{error}");
    Ok(())
}
