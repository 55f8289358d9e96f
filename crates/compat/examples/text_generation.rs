//! Text generation with SmolLM2 through v1's `Qwen` and `Generator`, beside candle-transformers on the same weights.
//!
//! ```text
//! cargo run --release -p candle-lazy-compat --example text_generation -- "The capital of France is"
//! ```

mod shared;
#[path = "shared/smollm2.rs"]
mod smollm2;

use candle_lazy_compat::{Generator, GeneratorConfig, SamplingStrategy};
use clap::Parser;
use shared::{compare, exit, measured, Outcome};
use smollm2::{eager_greedy, SmolLm2};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Text generation through the names of metal-candle 1.x")]
struct Arguments {
    /// What to continue.
    #[arg(default_value = "The capital of France is")]
    prompt: String,
    /// Number of new tokens.
    #[arg(long, default_value_t = 24)]
    max_tokens: usize,
    /// Draws from the softmax of the logits over this temperature instead of taking the likeliest token.
    #[arg(long)]
    temperature: Option<f64>,
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
    let sampling = match arguments.temperature {
        Some(temperature) => SamplingStrategy::Temperature { temperature },
        None => SamplingStrategy::Greedy,
    };
    let config = GeneratorConfig { max_tokens: arguments.max_tokens, sampling, ..GeneratorConfig::default() };
    let mut generator = Generator::new(Box::new(files.qwen()?), config)?;
    let (ids, lazy) = measured(2, || Ok(generator.generate(&prompt)?))?;
    println!("{}", files.tokenizer.decode(&ids)?);

    let mut model = files.eager()?;
    let (expected, eager) = measured(2, || eager_greedy(&mut model, &prompt, arguments.max_tokens))?;
    compare(&format!("{} tokens", arguments.max_tokens), eager, lazy);
    if arguments.temperature.is_none() {
        let same = ids.iter().zip(&expected).take_while(|(a, b)| a == b).count();
        println!("the first {same} of {} tokens are eager's", ids.len());
    }
    Ok(())
}
