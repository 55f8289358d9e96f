//! `cargo xtask demo` on models of one's own: tiny ones with made-up weights, no network.

#![allow(clippy::unwrap_used)] // outside the test functions too: a model that cannot be written fails the test

use candle_core::{Device, Tensor};
use candle_lazy::nn::models::CausalLmConfig;
use candle_lazy::nn::ModelDir;
use candle_lazy_parity::models::compare_decoder;
use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const VOCAB: usize = 40;

/// A tokenizer of whole words; without marks of a chat.
fn write_tokenizer(dir: &Path) {
    let words = "What is the capital of France? A man eating food. a meal. lazy tensor graph plan";
    let mut vocab = serde_json::Map::new();
    for (id, word) in ["[UNK]"].into_iter().chain(words.split(' ')).enumerate() {
        vocab.insert(word.to_string(), id.into());
    }
    assert!(vocab.len() <= VOCAB);
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    });
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
}

/// Weights by name, with numbers that depend on the name alone.
#[derive(Default)]
struct Weights(HashMap<String, Tensor>);

impl Weights {
    fn add(&mut self, name: &str, shape: &[usize]) {
        let mut state = name.bytes().fold(1u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let norm = name.to_lowercase().contains("norm.weight");
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let unit = (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5;
                if norm {
                    1. + 0.2 * unit
                } else {
                    0.6 * unit
                }
            })
            .collect();
        self.0.insert(name.to_string(), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    }

    /// A linear map with a bias.
    fn linear(&mut self, name: &str, width: usize, features: usize) {
        self.add(&format!("{name}.weight"), &[width, features]);
        self.add(&format!("{name}.bias"), &[width]);
    }
}

const HIDDEN: usize = 32;
const INNER: usize = 48;
const LAYERS: usize = 2;
const HEADS: usize = 4;

fn write_config(dir: &Path, json: &serde_json::Value) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
    write_tokenizer(dir);
}

fn write_decoder(dir: &Path, more: serde_json::Value) {
    let mut json = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS / 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config = CausalLmConfig::from_json(&json.to_string()).unwrap();
    write_config(dir, &json);
    let (q, kv) = (HEADS * config.head_dim, HEADS / 2 * config.head_dim);
    let mut weights = Weights::default();
    weights.add("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
    weights.add("model.norm.weight", &[HIDDEN]);
    if !config.tie_word_embeddings {
        weights.add("lm_head.weight", &[VOCAB, HIDDEN]);
    }
    for layer in 0..LAYERS {
        let at = format!("model.layers.{layer}");
        weights.add(&format!("{at}.input_layernorm.weight"), &[HIDDEN]);
        weights.add(&format!("{at}.post_attention_layernorm.weight"), &[HIDDEN]);
        // a bias that the config denies would be refused
        let maps = [
            ("self_attn.q_proj", q, HIDDEN, config.qkv_bias),
            ("self_attn.k_proj", kv, HIDDEN, config.qkv_bias),
            ("self_attn.v_proj", kv, HIDDEN, config.qkv_bias),
            ("self_attn.o_proj", HIDDEN, q, config.out_bias),
            ("mlp.gate_proj", INNER, HIDDEN, config.mlp_bias),
            ("mlp.up_proj", INNER, HIDDEN, config.mlp_bias),
            ("mlp.down_proj", HIDDEN, INNER, config.mlp_bias),
        ];
        for (name, width, features, bias) in maps {
            match bias {
                true => weights.linear(&format!("{at}.{name}"), width, features),
                false => weights.add(&format!("{at}.{name}.weight"), &[width, features]),
            }
        }
    }
    candle_core::safetensors::save(&weights.0, dir.join("model.safetensors")).unwrap();
}

fn write_encoder(dir: &Path) {
    const POSITIONS: usize = 64;
    let json = serde_json::json!({
        "model_type": "bert", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02, "pad_token_id": 0,
    });
    write_config(dir, &json);
    let mut weights = Weights::default();
    for (name, rows) in [("word", VOCAB), ("position", POSITIONS), ("token_type", 2)] {
        weights.add(&format!("embeddings.{name}_embeddings.weight"), &[rows, HIDDEN]);
    }
    let norm = |weights: &mut Weights, name: &str| {
        weights.add(&format!("{name}.LayerNorm.weight"), &[HIDDEN]);
        weights.add(&format!("{name}.LayerNorm.bias"), &[HIDDEN]);
    };
    norm(&mut weights, "embeddings");
    for layer in 0..LAYERS {
        let at = format!("encoder.layer.{layer}");
        for name in ["self.query", "self.key", "self.value", "output.dense"] {
            weights.linear(&format!("{at}.attention.{name}"), HIDDEN, HIDDEN);
        }
        norm(&mut weights, &format!("{at}.attention.output"));
        weights.linear(&format!("{at}.intermediate.dense"), INNER, HIDDEN);
        weights.linear(&format!("{at}.output.dense"), HIDDEN, INNER);
        norm(&mut weights, &format!("{at}.output"));
    }
    candle_core::safetensors::save(&weights.0, dir.join("model.safetensors")).unwrap();
}

/// The program itself, with a cache that is empty and no registry to ask.
fn demo(dir: &Path, args: &[&str], stdout: Stdio) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("demo").args(args).env("CANDLE_LAZY_CACHE", dir.join("no-cache"));
    command.env("PIP_INDEX_URL", "http://127.0.0.1:9/simple").env("PIP_RETRIES", "0").env("PIP_NO_INPUT", "1");
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap()
}

/// The variants whose eager twins are different models or configs.
fn decoders() -> Vec<(&'static str, serde_json::Value)> {
    let llama3 = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    vec![
        ("llama", serde_json::json!({"tie_word_embeddings": true})),
        ("llama3 scaling", serde_json::json!({"rope_scaling": llama3, "rope_theta": 500_000.0})),
        ("linear scaling", serde_json::json!({"rope_scaling": {"type": "linear", "factor": 4.0}})),
        ("qwen2", serde_json::json!({"model_type": "qwen2"})),
        ("qwen2, tied", serde_json::json!({"model_type": "qwen2", "tie_word_embeddings": true})),
        ("mistral", serde_json::json!({"model_type": "mistral", "head_dim": 16})),
        ("mistral, tied", serde_json::json!({"model_type": "mistral", "head_dim": 16, "tie_word_embeddings": true})),
        ("a window", serde_json::json!({"model_type": "mistral", "sliding_window": 40})),
        ("a short context", serde_json::json!({"max_position_embeddings": 20})),
    ]
}

#[test]
fn every_variant_of_a_decoder_agrees_with_its_eager_twin() {
    for (name, more) in decoders() {
        let dir = tempfile::tempdir().unwrap();
        write_decoder(dir.path(), more);
        let rows = compare_decoder(&ModelDir::open(dir.path()).unwrap(), 1).unwrap();
        assert_eq!(rows.len(), 2);
        for row in rows {
            let eager = row.eager.unwrap_or_else(|why| panic!("{name}: {why}"));
            assert!(eager.agrees, "{name}, {}: {}", row.name, eager.largest_difference);
            assert_eq!(row.fallbacks, 0, "{name}");
        }
    }
}

#[test]
fn models_of_ones_own_answer_with_and_without_a_twin() {
    let dir = tempfile::tempdir().unwrap();
    write_encoder(&dir.path().join("encoder"));
    for (more, twin) in [
        (serde_json::json!({"model_type": "qwen2"}), true),
        (serde_json::json!({"attention_bias": true, "mlp_bias": true}), false),
    ] {
        write_decoder(&dir.path().join("decoder"), more);
        let path = dir.path().display().to_string();
        let out =
            demo(dir.path(), &["--model-dir", &path, "--repetitions", "1", "--max-new-tokens", "4"], Stdio::piped());
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
        assert!(text.contains("no chat marks") && text.contains("cut off after 4 tokens"), "{text}");
        assert_eq!(text.contains("no eager twin"), !twin, "{text}");
        assert!(text.trim_end().lines().last().unwrap().contains("lazy agrees with eager"), "{text}");
    }
}

#[test]
fn without_a_network_and_a_cache_the_demo_says_so() {
    let dir = tempfile::tempdir().unwrap();
    write_encoder(&dir.path().join("encoder"));
    let path = dir.path().display().to_string();
    let out = demo(dir.path(), &["--model-dir", &path], Stdio::piped());
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.lines().any(|line| line.starts_with("demo: ")) && !error.contains("panicked"), "{error}");
}

#[test]
fn no_token_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = demo(dir.path(), &["--max-new-tokens", "0"], Stdio::piped());
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("at least 1"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_a_reader_that_left_is_none() {
    let dir = tempfile::tempdir().unwrap();
    write_encoder(&dir.path().join("encoder"));
    write_decoder(&dir.path().join("decoder"), serde_json::json!({}));
    let path = dir.path().display().to_string();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let out = demo(dir.path(), &["--model-dir", &path], full.into());
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains("stdout cannot be written") && !error.contains("panicked"), "{error}");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let out = demo(dir.path(), &["--model-dir", &path], writer.into());
    assert_eq!(out.status.code(), Some(xtask::output::READER_LEFT));
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
}
