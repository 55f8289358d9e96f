//! Directories with a model in them.

use crate::common::{close, decoder_vars, row, tiny_config, TestResult};
use crate::gguf::{parts, wide_config};
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use candle_lazy_nn::{Error, ModelDir, WeightFiles};
use std::collections::HashMap;

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5}"#;

#[test]
fn a_decoder_loads_from_one_file_and_from_shards_alike() -> TestResult {
    let vars = decoder_vars(&tiny_config(), 1)?;
    let whole = tempfile::tempdir()?;
    std::fs::write(whole.path().join("config.json"), CONFIG)?;
    candle_core::safetensors::save(&vars, whole.path().join("model.safetensors"))?;
    let shards = tempfile::tempdir()?;
    std::fs::write(shards.path().join("config.json"), CONFIG)?;
    let (first, second): (HashMap<_, _>, HashMap<_, _>) = vars.into_iter().partition(|(name, _)| name.contains("mlp"));
    let mut map = serde_json::Map::new();
    for (file, vars) in [("a.safetensors", &first), ("b.safetensors", &second)] {
        candle_core::safetensors::save(vars, shards.path().join(file))?;
        map.extend(vars.keys().map(|name| (name.clone(), file.into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(shards.path().join("model.safetensors.index.json"), index.to_string())?;
    let mut logits = Vec::new();
    for dir in [&whole, &shards] {
        let model = ModelDir::open(dir.path())?.causal_lm(DType::F32, &Device::Cpu)?;
        logits.push(model.forward(&row(&[1, 2, 3])?.into(), &mut model.new_cache(4)?)?.eval()?);
    }
    close(&logits[0], &logits[1], 0.)
}

#[test]
fn a_gguf_is_found_by_its_ending() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = wide_config();
    let path = parts(&config, &decoder_vars(&config, 2)?, "llama", GgmlDType::Q8_0)?.write(dir.path())?;
    let found = ModelDir::open(dir.path())?;
    assert_eq!(found.weights(), &WeightFiles::Gguf(path.clone()));
    assert_eq!(found.causal_lm(DType::F32, &Device::Cpu)?.config().vocab_size, 61);
    assert!(matches!(found.sentence_encoder(DType::F32, &Device::Cpu), Err(Error::Unsupported { .. })));
    std::fs::copy(&path, dir.path().join("other.gguf"))?;
    assert!(matches!(ModelDir::open(dir.path()), Err(Error::Config { .. })), "two of them");
    Ok(())
}

#[test]
fn what_is_absent_is_named() -> TestResult {
    let dir = tempfile::tempdir()?;
    assert!(matches!(ModelDir::open(dir.path().join("nowhere")), Err(Error::Io { .. })));
    let error = ModelDir::open(dir.path()).map(|_| ());
    assert!(
        matches!(&error, Err(Error::MissingFile { expected, .. }) if expected.contains("model.safetensors")),
        "{error:?}"
    );
    candle_core::safetensors::save(&decoder_vars(&tiny_config(), 3)?, dir.path().join("model.safetensors"))?;
    let found = ModelDir::open(dir.path())?;
    let error = found.causal_lm(DType::F32, &Device::Cpu).map(|_| ());
    assert!(matches!(&error, Err(Error::MissingFile { expected, .. }) if expected == "config.json"), "{error:?}");
    #[cfg(feature = "tokenizers")]
    assert!(matches!(found.tokenizer(), Err(Error::MissingFile { .. })));
    std::fs::write(dir.path().join("config.json"), CONFIG.replace("\"vocab_size\": 61", "\"vocab_size\": 62"))?;
    let error = found.causal_lm(DType::F32, &Device::Cpu).map(|_| ());
    assert!(matches!(&error, Err(Error::TensorShape { name, .. }) if name.contains("embed_tokens")), "{error:?}");
    Ok(())
}

#[test]
fn an_encoder_that_pools_otherwise_is_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    let config = crate::bert::config()?;
    let json = crate::bert::CONFIG;
    std::fs::write(dir.path().join("config.json"), json)?;
    candle_core::safetensors::save(&crate::bert::weights(&config, 4)?, dir.path().join("model.safetensors"))?;
    let load = || ModelDir::open(dir.path())?.sentence_encoder(DType::F32, &Device::Cpu).map(|_| ());
    load()?;
    let pooling = dir.path().join("1_Pooling").join("config.json");
    std::fs::create_dir(dir.path().join("1_Pooling"))?;
    let mean = r#"{"word_embedding_dimension": 24, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}"#;
    std::fs::write(&pooling, mean)?;
    load()?;
    std::fs::write(&pooling, mean.replace("token\": false", "token\": true"))?;
    let error = load();
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "pooling_mode_cls_token"), "{error:?}");
    std::fs::write(&pooling, "[")?;
    let error = load();
    assert!(matches!(&error, Err(Error::Config { .. })), "{error:?}");
    Ok(())
}

#[test]
fn an_index_names_files_beside_it_and_no_others() -> TestResult {
    let dir = tempfile::tempdir()?;
    let open = |index: &str| {
        std::fs::write(dir.path().join("model.safetensors.index.json"), index)?;
        Ok::<_, std::io::Error>(ModelDir::open(dir.path()).map(|_| ()))
    };
    for outside in ["../x.safetensors", "/etc/passwd"] {
        let error = open(&format!(r#"{{"weight_map": {{"a": "{outside}"}}}}"#))?;
        assert!(matches!(&error, Err(Error::Format { message, .. }) if message.contains("outside")), "{error:?}");
    }
    let absent = open(r#"{"weight_map": {"a": "1.safetensors"}}"#)?;
    assert!(matches!(&absent, Err(Error::MissingFile { expected, .. }) if expected == "1.safetensors"), "{absent:?}");
    assert!(matches!(open(r#"{"weight_map": {}}"#)?, Err(Error::Format { .. })));
    assert!(matches!(open("not json")?, Err(Error::Format { .. })));
    Ok(())
}
