//! The three examples on made-up models: what they print, and what they refuse before anything is fetched or loaded.

// each example has the file that both share, as a program of its own
#![allow(clippy::duplicate_mod)]

use candle_core::{Device, Tensor};
use clap::Parser;
use std::collections::HashMap;
use std::error::Error;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

mod made_up;

#[allow(dead_code)]
#[path = "../examples/decode_loop.rs"]
mod decode_loop;
#[allow(dead_code)]
#[path = "../examples/embed.rs"]
mod embed;
#[allow(dead_code)]
#[path = "../examples/generate.rs"]
mod generate;

use made_up::{numbers, Sizes};

type TestResult = Result<(), Box<dyn Error>>;

const HIDDEN: usize = 8;
const CONTEXT: usize = 12;

/// Words are tokens; one token stands in front of what a model is given.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": TRUNCATION, "padding": null,
    "added_tokens": [
        {"id": 0, "content": "<|im_start|>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false},
        {"id": 1, "content": "<|im_end|>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false}],
    "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}}},
    "decoder": null,
    "model": {"type": "WordLevel", "unk_token": "?",
              "vocab": {"<|im_start|>": 0, "<|im_end|>": 1, "?": 2, "eat": 3, "food": 4, "user": 5, "assistant": 6}}}"#;
const VOCABULARY: usize = 7;
const SIZES: Sizes = Sizes { words: VOCABULARY, hidden: HIDDEN, inner: 16 };

/// Writes the model's files; `change` may spoil its weights.
fn write_model(
    dir: &Path,
    config: &str,
    shapes: &[(&str, Vec<usize>)],
    change: impl Fn(&str, Tensor) -> candle_core::Result<Tensor>,
) -> TestResult {
    std::fs::write(dir.join("config.json"), config)?;
    std::fs::write(dir.join("tokenizer.json"), TOKENIZER.replace("TRUNCATION", "null"))?;
    let mut weights = HashMap::new();
    for (seed, (name, shape)) in shapes.iter().enumerate() {
        weights.insert((*name).to_string(), change(name, numbers(shape, seed)?)?);
    }
    candle_core::safetensors::save(&weights, dir.join("model.safetensors"))?;
    Ok(())
}

fn encoder(dir: &Path, change: impl Fn(&str, Tensor) -> candle_core::Result<Tensor>) -> TestResult {
    let config = format!(
        r#"{{"vocab_size": {VOCABULARY}, "hidden_size": {HIDDEN}, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "max_position_embeddings": {CONTEXT}}}"#
    );
    write_model(dir, &config, &made_up::encoder(&SIZES, CONTEXT), change)
}

fn decoder(dir: &Path) -> TestResult {
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCABULARY}, "hidden_size": {HIDDEN}, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": {CONTEXT}, "tie_word_embeddings": true}}"#
    );
    write_model(dir, &config, &made_up::decoder(&SIZES, false), |_, tensor| Ok(tensor))
}

/// What an example prints, or its error.
fn printed<A: Parser>(
    (name, dir): (&str, &Path),
    more: &[&str],
    run: impl FnOnce(&A, &mut dyn Write) -> Result<(), Box<dyn Error>>,
) -> Result<String, String> {
    let dir = dir.display().to_string();
    let arguments = [name, "--model-dir", &dir].into_iter().chain(more.iter().copied());
    let arguments = A::try_parse_from(arguments).map_err(|e| e.to_string())?;
    let mut out = Vec::new();
    run(&arguments, &mut out).map_err(|e| e.to_string())?;
    String::from_utf8(out).map_err(|e| e.to_string())
}

fn run_embed(dir: &Path, more: &[&str]) -> Result<String, String> {
    printed(("embed", dir), more, embed::run)
}

fn run_generate(dir: &Path, more: &[&str]) -> Result<String, String> {
    printed(("generate", dir), more, generate::run)
}

/// The error; empty where there is none, which holds nothing that a test looks for.
fn error(result: Result<String, String>) -> String {
    result.err().unwrap_or_default()
}

#[test]
fn embed_prints_one_vector_of_length_1_per_text() -> TestResult {
    let dir = tempfile::tempdir()?;
    encoder(dir.path(), |_, tensor| Ok(tensor))?;
    let printed = run_embed(dir.path(), &["--json", "eat food", "food"])?;
    let vectors: Vec<Vec<f32>> = printed.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(vectors.len(), 2);
    for vector in &vectors {
        assert_eq!(vector.len(), HIDDEN);
        let norm: f32 = vector.iter().map(|v| v * v).sum();
        assert!((norm - 1.).abs() < 1e-5, "{norm}");
    }
    let printed = run_embed(dir.path(), &["eat food", "eat food", "food"])?;
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines[..2], ["8 numbers per text; similarity to \"eat food\":", "  1.0000  eat food"]);
    assert!(lines.len() == 3 && lines[2].ends_with("  food"), "{printed}");
    Ok(())
}

#[test]
fn embed_refuses_weights_that_make_no_vector() -> TestResult {
    const SPOILT: &str = "encoder.layer.0.output.dense.bias";
    for (value, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let dir = tempfile::tempdir()?;
        encoder(dir.path(), |name, tensor| {
            if name == SPOILT {
                Tensor::full(value, tensor.shape(), tensor.device())
            } else {
                Ok(tensor)
            }
        })?;
        let error = error(run_embed(dir.path(), &["--json", "eat"]));
        assert!(error.contains("encoder.layer.0.output.dense") && error.contains(shown), "{error}");
    }
    let dir = tempfile::tempdir()?;
    encoder(dir.path(), |_, tensor| tensor.zeros_like())?;
    let error = error(run_embed(dir.path(), &["--json", "eat"]));
    assert!(error.contains("text 1") && error.contains("zeros"), "{error}");
    Ok(())
}

#[test]
fn embed_refuses_weights_whose_header_says_whole_numbers() -> TestResult {
    let dir = tempfile::tempdir()?;
    encoder(dir.path(), |_, tensor| Ok(tensor))?;
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path)?;
    let name = b"\"embeddings.word_embeddings.weight\":{\"dtype\":\"F32\"";
    let at = bytes.windows(name.len()).position(|window| window == name).ok_or("the header is written otherwise")?;
    bytes[at + name.len() - 4] = b'I';
    std::fs::write(&path, bytes)?;
    let error = error(run_embed(dir.path(), &["--json", "eat"]));
    assert!(error.contains("embeddings.word_embeddings.weight") && error.contains("I32"), "{error}");
    Ok(())
}

#[test]
fn embed_cuts_a_text_only_with_truncate() -> TestResult {
    let dir = tempfile::tempdir()?;
    encoder(dir.path(), |_, tensor| Ok(tensor))?;
    let (fits, long) = (["eat"; CONTEXT - 1].join(" "), ["eat"; 30].join(" "));
    let shortest = run_embed(dir.path(), &["--json", &fits])?;
    // the model's positions are the limit, then the tokenizer's own smaller number
    let refused = error(run_embed(dir.path(), &["--json", "eat", &long]));
    assert!(refused.contains("text 2") && refused.contains("31 tokens") && refused.contains("12 at most"), "{refused}");
    assert_eq!(run_embed(dir.path(), &["--json", "--truncate", &long])?, shortest);
    let limit = r#"{"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}"#;
    std::fs::write(dir.path().join("tokenizer.json"), TOKENIZER.replace("TRUNCATION", limit))?;
    let refused = error(run_embed(dir.path(), &["--json", &fits]));
    assert!(refused.contains("text 1") && refused.contains("12 tokens") && refused.contains("5 at most"), "{refused}");
    let cut = run_embed(dir.path(), &["--json", "--truncate", &long])?;
    assert_eq!(cut, run_embed(dir.path(), &["--json", "eat eat eat eat"])?);
    Ok(())
}

#[test]
fn generate_prints_one_line_of_json() -> TestResult {
    let dir = tempfile::tempdir()?;
    decoder(dir.path())?;
    let printed = run_generate(dir.path(), &["--json", "--prompt", "eat food", "--max-new-tokens", "3"])?;
    assert!(printed.starts_with("{\"prompt_ids\":[3,4],\"ids\":["), "{printed}");
    assert_eq!(printed.matches('\n').count(), 1, "{printed}");
    let value: serde_json::Value = serde_json::from_str(&printed)?;
    assert_eq!(value["ids"].as_array().map(Vec::len), Some(3));
    let streamed = run_generate(dir.path(), &["--prompt", "eat food", "--max-new-tokens", "3"])?;
    assert_eq!(Some(streamed.trim_end_matches('\n')), value["text"].as_str());
    Ok(())
}

#[test]
fn a_decode_loop_that_is_a_step_ahead_gives_the_tokens_of_generate() -> TestResult {
    let dir = tempfile::tempdir()?;
    decoder(dir.path())?;
    let run = |more: &[&str]| {
        printed(("decode_loop", dir.path()), &[&["--prompt", "eat food"], more].concat(), decode_loop::run)
    };
    let both = run(&["--max-new-tokens", "10"])?;
    let (text, times) = both.split_once('\n').ok_or("one line")?;
    let generated = run_generate(dir.path(), &["--prompt", "eat food", "--max-new-tokens", "10"])?;
    assert!(text.starts_with(generated.trim_end()), "{text} is not {generated}");
    assert!(times.starts_with("10 tokens: ") && times.ends_with(" ms a step ahead\n"), "{times}");
    assert!(error(run(&["--max-new-tokens", "11"])).contains("do not fit the model's context of 12"));
    assert!(error(run(&["--max-new-tokens", "0"])).contains("0"));
    Ok(())
}

#[test]
fn generate_puts_an_adapter_on_the_model() -> TestResult {
    use candle_lazy::nn::{LoraAdapter, LoraConfig, ModelDir};
    let dir = tempfile::tempdir()?;
    decoder(dir.path())?;
    let prompt = ["--json", "--prompt", "eat food", "--max-new-tokens", "4"];
    let plain = run_generate(dir.path(), &prompt)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().display().to_string();
    let with = |more: &[&str]| run_generate(dir.path(), &[&prompt[..], &["--adapter", &path], more].concat());
    assert!(error(with(&[])).ends_with("has no adapter_config.json"));
    let mut model = ModelDir::open(dir.path())?.causal_lm(candle_core::DType::F32, &Device::Cpu)?;
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig { alpha: 400., ..LoraConfig::default() }, 1)?;
    adapter.save(folder.path(), None)?;
    // B is zero: nothing changes
    assert_eq!(with(&[])?, plain);
    for (seed, param) in adapter.params().matching("*.lora_B.weight")?.into_iter().enumerate() {
        param.set(numbers(param.shape().dims(), seed + 20)?)?;
    }
    adapter.save(folder.path(), None)?;
    let adapted: serde_json::Value = serde_json::from_str(&with(&[])?)?;
    let prompt = model.generate(&[3, 4], Default::default())?.take(4).collect::<Result<Vec<_>, _>>()?;
    assert_eq!(adapted["ids"], serde_json::json!(prompt));
    // a field that is not supported is refused before a model is opened
    let config = folder.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config)?.replace("\"use_dora\": false", "\"use_dora\": true");
    std::fs::write(&config, text)?;
    let refused = error(run_generate(Path::new("no/such/model"), &["--prompt", "eat", "--adapter", &path]));
    assert!(refused.contains("`use_dora` is true, which is not supported (supported: nothing, or"), "{refused}");
    Ok(())
}

#[test]
fn what_says_nothing_is_refused_before_anything_is_opened() {
    let nowhere = Path::new("no/such/model");
    for more in [&["--prompt", ""][..], &["--prompt", "", "--chat"], &["--prompt", " \n", "--chat"]] {
        let error = error(run_generate(nowhere, more));
        assert!(error.contains("empty") || error.contains("blank"), "{error}");
    }
    // spaces may be continued
    assert!(error(run_generate(nowhere, &["--prompt", " "])).contains("no/such/model"));
    for texts in [&["eat", ""][..], &["eat", " \t"]] {
        assert!(error(run_embed(nowhere, texts)).contains("text 2 is empty"));
    }
    assert!(error(run_embed(nowhere, &["eat"])).contains("no/such/model"));
    assert!(error(run_embed(nowhere, &[])).contains("required"));
    assert!(error(run_generate(nowhere, &[])).contains("required"));
    for number in ["-1", "many", ""] {
        let number = format!("--max-new-tokens={number}");
        assert!(error(run_generate(nowhere, &["--prompt", "a", &number])).contains("--max-new-tokens <"));
    }
}

#[test]
fn a_prompt_beyond_the_context_is_refused_before_the_weights_are_read() -> TestResult {
    let dir = tempfile::tempdir()?;
    decoder(dir.path())?;
    std::fs::write(dir.path().join("model.safetensors"), "no weights")?;
    let long = ["eat"; CONTEXT].join(" ");
    let refused = error(run_generate(dir.path(), &["--prompt", &long]));
    assert!(refused.contains("12 tokens") && refused.contains("room for 12"), "{refused}");
    assert!(error(run_generate(dir.path(), &["--prompt", "eat"])).contains("model.safetensors"));
    Ok(())
}

/// An output that fails.
struct Broken(ErrorKind);

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(self.0.into())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Err(self.0.into())
    }
}

#[test]
fn an_output_that_fails_ends_the_program_without_a_panic() -> TestResult {
    let (texts, prompts) = (tempfile::tempdir()?, tempfile::tempdir()?);
    encoder(texts.path(), |_, tensor| Ok(tensor))?;
    decoder(prompts.path())?;
    let (texts, prompts) = (texts.path().display().to_string(), prompts.path().display().to_string());
    for (kind, code) in [(ErrorKind::BrokenPipe, ExitCode::SUCCESS), (ErrorKind::StorageFull, ExitCode::FAILURE)] {
        for json in [&["--json"][..], &[]] {
            let arguments = ["embed", "--model-dir", &texts, "eat", "food"].into_iter().chain(json.iter().copied());
            let result = embed::run(&embed::Arguments::try_parse_from(arguments)?, &mut Broken(kind));
            assert!(result.is_err());
            assert_eq!(embed::shared::exit(result), code, "{kind:?}");
            let arguments =
                ["generate", "--model-dir", &prompts, "--prompt", "eat"].into_iter().chain(json.iter().copied());
            let result = generate::run(&generate::Arguments::try_parse_from(arguments)?, &mut Broken(kind));
            assert!(result.is_err());
            assert_eq!(generate::shared::exit(result), code, "{kind:?}");
        }
    }
    Ok(())
}
