//! The example `train_lora` on a made-up model: what it prints and writes, how it goes on after an interruption, and what it refuses.

use candle_core::{DType, Device, Tensor};
use candle_lazy::nn::{LoraAdapter, ModelDir};
use clap::Parser;
use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

// as a program of its own
#[allow(dead_code)]
#[path = "../examples/train_lora/main.rs"]
mod example;

type TestResult = Result<(), Box<dyn Error>>;

const CONTEXT: usize = 24;
const WORDS: [&str; 8] = ["<|im_start|>", "<|im_end|>", "?", "eat", "food", "sleep", "user", "assistant"];

/// Questions and answers, a question whose answer is to stay, and a plain text.
const TEXT: &str = "# a remark\nQ: eat\nA: food food\n\nQ: food\nA: sleep sleep\n\nQ: sleep\nA: eat eat\n\nKeep: food food\n\neat eat food\n\n";

/// Numbers between −0.5 and 0.5, no two alike (Weyl's sequence of the golden ratio).
fn numbers(shape: &[usize], seed: usize) -> candle_core::Result<Tensor> {
    let count: usize = shape.iter().product();
    let values = (0..count).map(|i| ((((i + 1) * (seed + 1)) as f64 * 0.618_033_988_749_895).fract() - 0.5) as f32);
    Tensor::from_vec(values.collect(), shape, &Device::Cpu)
}

/// A decoder whose tokens are words.
fn write_model(dir: &Path, hidden: usize) -> TestResult {
    let vocabulary: serde_json::Map<_, _> = (0..).zip(WORDS).map(|(id, word)| (word.to_string(), id.into())).collect();
    let special = |id: usize| {
        serde_json::json!({"id": id, "content": WORDS[id], "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    };
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [special(0), special(1)], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": vocabulary},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string())?;
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": WORDS.len(), "hidden_size": hidden, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT, "tie_word_embeddings": true, "eos_token_id": 1,
    });
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let shapes: [(&str, &[usize]); 11] = [
        ("embed_tokens", &[WORDS.len(), hidden]),
        ("norm", &[hidden]),
        ("layers.0.input_layernorm", &[hidden]),
        ("layers.0.post_attention_layernorm", &[hidden]),
        ("layers.0.self_attn.q_proj", &[hidden, hidden]),
        ("layers.0.self_attn.k_proj", &[hidden / 2, hidden]),
        ("layers.0.self_attn.v_proj", &[hidden / 2, hidden]),
        ("layers.0.self_attn.o_proj", &[hidden, hidden]),
        ("layers.0.mlp.gate_proj", &[16, hidden]),
        ("layers.0.mlp.up_proj", &[16, hidden]),
        ("layers.0.mlp.down_proj", &[hidden, 16]),
    ];
    let mut weights = HashMap::new();
    for (seed, (name, shape)) in shapes.into_iter().enumerate() {
        // norms lie around 1, so that the signal is not lost
        let shift = if name.contains("norm") { 1. } else { 0. };
        weights.insert(format!("model.{name}.weight"), numbers(shape, seed)?.affine(1., shift)?);
    }
    candle_core::safetensors::save(&weights, dir.join("model.safetensors"))?;
    Ok(())
}

/// A model, a text and a place for what is made.
struct Bench {
    model: tempfile::TempDir,
    output: tempfile::TempDir,
}

impl Bench {
    fn new() -> Result<Self, Box<dyn Error>> {
        let bench = Self { model: tempfile::tempdir()?, output: tempfile::tempdir()? };
        write_model(bench.model.path(), 8)?;
        bench.write(&TEXT.repeat(6))?;
        Ok(bench)
    }

    fn write(&self, text: &str) -> TestResult {
        Ok(std::fs::write(self.model.path().join("text.txt"), text)?)
    }

    /// Whether it learned, and what it printed.
    fn run(&self, output: &str, more: &[&str]) -> Result<(bool, String), Box<dyn Error>> {
        self.run_for(u64::MAX, output, more)
    }

    /// The same of a run that is interrupted after so many steps.
    fn run_for(&self, steps: u64, output: &str, more: &[&str]) -> Result<(bool, String), Box<dyn Error>> {
        let model = self.model.path().display().to_string();
        let text = self.model.path().join("text.txt").display().to_string();
        let output = self.output.path().join(output).display().to_string();
        let usual =
            [("--model-dir", &*model), ("--text", &text), ("--output", &output), ("--ask", "eat"), ("--batch", "3")];
        let usual = usual.into_iter().filter(|(name, _)| !more.contains(name)).flat_map(|(name, value)| [name, value]);
        let arguments = std::iter::once("train_lora").chain(usual).chain(more.iter().copied());
        let arguments = example::Arguments::try_parse_from(arguments)?;
        let mut out = Vec::new();
        let asked = AtomicU64::new(0);
        let learned = example::run(&arguments, &|| asked.fetch_add(1, Ordering::Relaxed) == steps, &mut out)?;
        Ok((learned, String::from_utf8(out)?))
    }

    /// The error; empty where there is none, which holds nothing that a test looks for.
    fn refused(&self, more: &[&str]) -> String {
        self.run("refused", more).err().map(|error| error.to_string()).unwrap_or_default()
    }

    fn bytes(&self, path: &str) -> std::io::Result<Vec<u8>> {
        std::fs::read(self.output.path().join(path))
    }
}

/// A and B of the last line.
fn losses(printed: &str) -> Option<(f64, f64)> {
    let last = printed.lines().last()?.strip_prefix("train: held-out loss ")?;
    let (first, last) = last.split_once(" -> ")?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

const LEARN: [&str; 6] = ["--lr", "0.05", "--steps", "40", "--held-out", "0.25"];

#[test]
fn it_learns_and_saves_what_peft_reads() -> TestResult {
    let bench = Bench::new()?;
    // what is held out is learned from its other copies
    bench.write(&"Q: eat\nA: food food\n\nQ: food\nA: food food\n\n".repeat(8))?;
    let (learned, printed) = bench.run("out", &LEARN)?;
    let (first, last) = losses(&printed).ok_or_else(|| printed.clone())?;
    assert!(learned && last <= 0.8 * first, "{printed}");
    assert_eq!(example::status(Ok(learned)), ExitCode::SUCCESS);
    assert!(printed.starts_with("loss ") && printed.contains("question: eat\n  before: "), "{printed}");
    let answers: serde_json::Value = serde_json::from_slice(&bench.bytes("out/answers.json")?)?;
    assert_eq!((&answers[0]["question"], &answers[0]["after"]), (&"eat".into(), &"food food".into()), "{answers}");
    let table = String::from_utf8(bench.bytes("out/loss.csv")?)?;
    assert_eq!(table.lines().filter(|line| line.contains(",train,")).count(), 40);
    // before the first step, every 20 steps, and at the end
    assert_eq!(table.lines().filter(|line| line.contains(",held-out,")).count(), 3);
    assert!(bench.bytes("out/loss.svg")?.starts_with(b"<svg "));
    // the files are an adapter, which says what the trained model said
    let mut model = ModelDir::open(bench.model.path())?.causal_lm(DType::F32, &Device::Cpu)?;
    let adapter = LoraAdapter::load(&mut model, bench.output.path().join("out"))?;
    assert_eq!((adapter.config().rank, adapter.paths().len()), (8, 7));
    let prompt = ModelDir::open(bench.model.path())?.tokenizer()?;
    let prompt = prompt.encode_chat(&[candle_lazy::nn::tokenizer::ChatMessage::user("eat")])?;
    let said = model.generate(&prompt, Default::default())?.take(2).collect::<Result<Vec<_>, _>>()?;
    assert_eq!(said, [4, 4]);
    Ok(())
}

#[test]
fn what_learns_too_little_is_a_failure() -> TestResult {
    let bench = Bench::new()?;
    let (learned, printed) = bench.run("out", &["--lr", "1e-9", "--steps", "2", "--held-out", "0.25"])?;
    let (first, last) = losses(&printed).ok_or_else(|| printed.clone())?;
    assert!(!learned && last > 0.8 * first, "{printed}");
    assert_eq!(example::status(Ok(learned)), ExitCode::FAILURE);
    assert_eq!(example::status(Err("no".into())), ExitCode::FAILURE);
    Ok(())
}

#[test]
fn what_was_interrupted_goes_on() -> TestResult {
    let bench = Bench::new()?;
    let more = ["--dropout", "0.1", "--accumulate", "2"];
    let arguments = [&LEARN[..], &more].concat();
    let (_, whole) = bench.run("whole", &arguments)?;
    // before the first step as well as later
    for steps in [0, 23] {
        let interrupted = bench.run_for(steps, "part", &arguments).err().map(|error| error.to_string());
        assert_eq!(interrupted.as_deref(), Some("interrupted: go on with --resume"));
        // there is a checkpoint and no adapter
        assert!(bench.bytes("part/adapter_config.json").is_err());
        let checkpoint = bench.output.path().join(format!("part/checkpoint-{steps}"));
        assert!(checkpoint.is_dir());
        // the same again has a checkpoint of its own
        assert!(bench.run_for(steps, "part", &arguments).is_err());
        assert!(bench.output.path().join(format!("part/checkpoint-{steps}-2")).is_dir());
    }
    let resume = |steps: u64| bench.output.path().join(format!("part/checkpoint-{steps}")).display().to_string();
    // a file that is no curve is not written over
    let (curve, first) = (bench.output.path().join("part/loss.csv"), resume(0));
    let kept = std::fs::read(&curve)?;
    std::fs::write(&curve, "step,of,loss\n1,train,?\n")?;
    let error = bench.run("part", &[&arguments[..], &["--resume", &first]].concat()).err().map(|e| e.to_string());
    assert!(error.is_some_and(|e| e.contains("loss.csv is no table of `step,of,loss`")));
    assert_eq!(std::fs::read(&curve)?, b"step,of,loss\n1,train,?\n");
    std::fs::write(&curve, kept)?;
    let resume = resume(23);
    let (_, rest) = bench.run("part", &[&arguments[..], &["--resume", &resume]].concat())?;
    assert_eq!(losses(&rest), losses(&whole));
    // the curve holds the steps of both parts, held-out losses too
    assert_eq!(bench.bytes("part/loss.csv")?, bench.bytes("whole/loss.csv")?);
    let weights = "adapter_model.safetensors";
    assert_eq!(bench.bytes(&format!("part/{weights}"))?, bench.bytes(&format!("whole/{weights}"))?);
    // it is of this model, this text and these options: other weights of the same shapes, another text of as many rows
    let (text, alike) = (bench.model.path().join("text.txt"), tempfile::tempdir()?);
    write_model(alike.path(), 8)?;
    let weights = alike.path().join("model.safetensors");
    let mut changed = candle_core::safetensors::load(&weights, &Device::Cpu)?;
    for tensor in changed.values_mut() {
        *tensor = tensor.affine(0.5, 0.25)?;
    }
    candle_core::safetensors::save(&changed, &weights)?;
    let alike = alike.path().display().to_string();
    let error = bench.refused(&[&arguments[..], &["--resume", &resume, "--model-dir", &alike]].concat());
    assert!(error.contains("it is of another training"), "{error}");
    let kept = std::fs::read_to_string(&text)?;
    bench.write(&kept.replace("A: eat eat", "A: eat food"))?;
    let error = bench.refused(&[&arguments[..], &["--resume", &resume]].concat());
    assert!(error.contains("it is of another training"), "{error}");
    bench.write(&kept)?;
    let other = tempfile::tempdir()?;
    write_model(other.path(), 12)?;
    let other = other.path().display().to_string();
    let error = bench.refused(&[&arguments[..], &["--resume", &resume, "--model-dir", &other]].concat());
    assert!(error.contains("it is of another training"), "{error}");
    let error = bench.refused(&[&arguments[..], &["--resume", &resume, "--seed", "9"]].concat());
    assert!(error.contains("it is of another training"), "{error}");
    for other in [&["--alpha", "3"][..], &["--rslora"], &["--base", "bf16"], &["--label-smoothing", "0.1"]] {
        let error = bench.refused(&[&arguments[..], &["--resume", &resume], other].concat());
        assert!(error.contains("it is of another training"), "{other:?}: {error}");
    }
    assert!(bench.refused(&["--resume", "no/such/checkpoint"]).contains("no/such/checkpoint"));
    Ok(())
}

#[test]
fn what_ends_in_a_number_that_is_none_can_be_looked_at() -> TestResult {
    let bench = Bench::new()?;
    let error = bench.run("out", &["--lr", "1e38", "--steps", "9", "--held-out", "0.25", "--clip", "1e30"]).err();
    let error = error.map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("is not finite"), "{error}");
    // the curve and a checkpoint of before, and no adapter
    assert!(String::from_utf8(bench.bytes("out/loss.csv")?)?.contains(",train,"));
    let left = std::fs::read_dir(bench.output.path().join("out"))?.filter_map(Result::ok);
    assert!(left.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-")));
    assert!(bench.bytes("out/adapter_config.json").is_err());
    // what is none of ours stays
    std::fs::write(bench.output.path().join("out/loss.csv"), "mine\n")?;
    let error = bench.run("out", &LEARN).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("loss.csv is no table"), "{error}");
    assert_eq!(bench.bytes("out/loss.csv")?, b"mine\n");
    Ok(())
}

#[test]
fn bad_input_is_refused_and_leaves_no_adapter() -> TestResult {
    let bench = Bench::new()?;
    for (more, says) in [
        (&["--targets", "q_projection"][..], "the targets `q_projection` match no linear map of the model"),
        (&["--rank", "0"], "a rank of 0 adapts nothing"),
        (&["--length", "3"], "positions, a row has 3"),
        (&["--pack", "--length", "25"], "25"),
        (&["--held-out", "1"], "--held-out 1: needs a share between 0 and 1"),
        (&["--batch", "0"], "batches of 0"),
        (&["--accumulate", "0"], "a step of no batches"),
        (&["--clip", "0"], "the largest norm must be"),
        (&["--lr", "nan"], "NaN"),
        (&["--label-smoothing", "1"], "--label-smoothing 1: needs"),
        (&["--text", "no/such/text"], "no/such/text"),
        (&["--model-dir", "no/such/model"], "no/such/model"),
    ] {
        let error = bench.refused(more);
        assert!(error.contains(says), "{more:?}: {error}");
    }
    let long = format!("Q: eat\nA: {}\n\nQ: food\nA: eat\n", ["food"; CONTEXT].join(" "));
    for (text, says) in [
        ("", "there is no text in it"),
        ("# nothing but a remark\n\n", "there is no text in it"),
        ("Q: eat\n\nA: food\n", "the question `eat` has no line that begins with `A:`"),
        ("Keep: eat\nA: food\n", "after `Keep: eat` comes `A: food`"),
        ("Q: eat\nA: food\n", "nothing to train on"),
        (&long, "30"),
    ] {
        bench.write(text)?;
        let error = bench.refused(&[]);
        assert!(error.contains(says), "{text:?}: {error}");
    }
    assert!(bench.bytes("refused/adapter_config.json").is_err());
    Ok(())
}
