//! `ModelConfig`: defaults, JSON both ways, checks and their words.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, ModelError};
use metal_candle::models::ModelConfig;

const SMALL: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 32, "hidden_size": 12, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "hidden_act": "silu"
}"#;

fn small() -> ModelConfig {
    ModelConfig::from_json(SMALL).unwrap()
}

#[track_caller]
fn reason(result: metal_candle::Result<impl std::fmt::Debug>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Model(ModelError::InvalidConfig { .. })), "{error:?}");
    assert!(error.to_string().contains("invalid model configuration"), "{error}");
    error.to_string()
}

#[test]
fn a_full_config_is_read() {
    let config = small();
    assert_eq!(config.architectures, ["Qwen2ForCausalLM"]);
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (32, 12, 20));
    assert_eq!((config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads), (2, 6, Some(3)));
    assert_eq!((config.max_position_embeddings, config.rms_norm_eps, config.rope_theta), (64, 1e-5, 1e6));
    assert_eq!(config.torch_dtype.as_deref(), Some("bfloat16"));
    assert_eq!((config.head_dim(), config.num_kv_heads()), (2, 3));
    config.validate().unwrap();
}

#[test]
fn what_is_left_out_has_a_default() {
    let json = r#"{"vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}"#;
    let config = ModelConfig::from_json(json).unwrap();
    assert!(config.architectures.is_empty());
    assert_eq!((config.num_key_value_heads, config.torch_dtype.clone()), (None, None));
    assert_eq!((config.max_position_embeddings, config.rms_norm_eps, config.rope_theta), (2048, 1e-6, 10_000.0));
    assert_eq!((config.head_dim(), config.num_kv_heads()), (2, 2));
}

#[test]
fn json_goes_both_ways() {
    let config = small();
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
    let other = ModelConfig { rope_theta: 1.0, ..config.clone() };
    assert_ne!(other, config);
}

#[test]
fn files_are_read_and_every_failure_is_a_config_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::fs::write(&path, SMALL).unwrap();
    assert_eq!(ModelConfig::from_file(&path).unwrap(), small());
    assert!(reason(ModelConfig::from_file(dir.path().join("absent.json"))).contains("absent.json"));
    assert!(reason(ModelConfig::from_json("{")).contains("failed to parse"));
    assert!(reason(ModelConfig::from_json(r#"{"vocab_size": 8}"#)).contains("hidden_size"));
    // the sizes are not compared with one another before `validate`
    let odd = SMALL.replace("\"hidden_size\": 12", "\"hidden_size\": 13");
    assert_eq!(ModelConfig::from_json(&odd).unwrap().hidden_size, 13);
}

#[test]
fn validate_names_the_field() {
    let cases = [
        ("vocab_size must be > 0", ModelConfig { vocab_size: 0, ..small() }),
        ("hidden_size must be > 0", ModelConfig { hidden_size: 0, ..small() }),
        ("intermediate_size must be > 0", ModelConfig { intermediate_size: 0, ..small() }),
        ("num_hidden_layers must be > 0", ModelConfig { num_hidden_layers: 0, ..small() }),
        ("num_attention_heads must be > 0", ModelConfig { num_attention_heads: 0, ..small() }),
        ("num_key_value_heads must be > 0", ModelConfig { num_key_value_heads: Some(0), ..small() }),
        ("max_position_embeddings must be > 0", ModelConfig { max_position_embeddings: 0, ..small() }),
    ];
    for (words, config) in cases {
        assert!(reason(config.validate()).contains(words), "{words}");
    }
    let config = ModelConfig { num_attention_heads: 5, num_key_value_heads: None, ..small() };
    assert!(reason(config.validate()).contains("hidden_size (12) must be divisible by num_attention_heads (5)"));
    let config = ModelConfig { num_key_value_heads: Some(4), ..small() };
    assert!(reason(config.validate()).contains("num_attention_heads (6) must be divisible by num_key_value_heads (4)"));
    assert_eq!(ModelConfig { num_attention_heads: 0, ..small() }.head_dim(), 0);
}
