//! Streaming with SmolLM2 through v1's names: tokens as they come, by a callback and as an asynchronous stream.
//!
//! ```text
//! cargo run --release -p candle-lazy-compat --features streaming --example streaming
//! ```

mod shared;
#[path = "shared/smollm2.rs"]
mod smollm2;

use candle_lazy_compat::{Generator, GeneratorConfig};
use clap::Parser;
use futures::StreamExt;
use shared::{compare, exit, measured, Outcome};
use smollm2::{eager_greedy, SmolLm2};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Streaming through the names of metal-candle 1.x")]
struct Arguments {
    /// What to continue.
    #[arg(default_value = "Once upon a time")]
    prompt: String,
    /// Number of new tokens.
    #[arg(long, default_value_t = 24)]
    max_tokens: usize,
    /// A directory with the model, instead of the published one.
    #[arg(long)]
    model_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Outcome<()> {
    let files = SmolLm2::open(arguments.model_dir.as_deref())?;
    let prompt = files.tokenizer.encode(&arguments.prompt, false)?;
    let config = GeneratorConfig { max_tokens: arguments.max_tokens, ..GeneratorConfig::default() };
    let mut generator = Generator::new(Box::new(files.qwen()?), config)?;

    // By a callback; it could end the text with `false`.
    print!("{}", arguments.prompt);
    let mut text = files.tokenizer.stream();
    let mut likeliest = (0u32, 0f32);
    let (ids, lazy) = measured(1, || {
        Ok(generator.generate_stream(&prompt, |token| {
            if token.probability > likeliest.1 {
                likeliest = (token.token_id, token.probability);
            }
            if let Ok(piece) = text.push(token.token_id) {
                print!("{piece}");
                drop(std::io::stdout().flush());
            }
            true
        })?)
    })?;
    println!();
    println!("surest of {}: {:.3}", files.tokenizer.decode(&[likeliest.0])?.trim(), likeliest.1);

    // As a stream, on whatever runtime there is.
    let streamed = futures::executor::block_on(async {
        let stream = generator.generate_stream_async(&prompt);
        futures::pin_mut!(stream);
        let mut tokens = Vec::new();
        while let Some(token) = stream.next().await {
            tokens.push(token?.token_id);
        }
        Ok::<_, candle_lazy_compat::Error>(tokens)
    })?;
    println!("the asynchronous stream gave {} tokens, the same: {}", streamed.len(), ids.ends_with(&streamed));

    let mut model = files.eager()?;
    let (_, eager) = measured(1, || eager_greedy(&mut model, &prompt, arguments.max_tokens))?;
    compare(&format!("{} tokens", arguments.max_tokens), eager, lazy);
    Ok(())
}
