//! `cargo xtask demo`: two real models computed lazily, then eagerly beside it.
//!
//! The sentence encoder and the language model are those of `nn::hub`, or the user's own (`--model-dir`). What is known
//! of the published ones is checked: the similarity of three sentences, and one answer.

mod adapter;
mod answers;
pub(crate) mod sources;
mod table;

use candle_lazy_parity::models::{compare_models, CompareOptions};
use std::path::PathBuf;

/// What `cargo xtask demo` takes.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// A directory with a model of one's own: Hugging Face's layout or one with a .gguf file; for both models, the option
    /// twice, or a directory with one directory for each. What is not there is fetched.
    #[arg(long, value_name = "DIR")]
    pub model_dir: Vec<PathBuf>,
    /// The question for the language model.
    #[arg(long, default_value = answers::QUESTION)]
    pub question: String,
    /// The most tokens of an answer.
    #[arg(long, default_value_t = 48)]
    pub max_new_tokens: usize,
    /// Measured runs per model; the table shows their median.
    #[arg(long, default_value_t = 5)]
    pub repetitions: usize,
}

/// Why the demo ends with exit code 1.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Library(#[from] candle_lazy::Error),
    #[error("the comparison with eager Candle failed: {0}")]
    Compare(#[from] candle_lazy_parity::Error),
    #[error("the terminal could not be written: {0}")]
    Output(#[from] std::io::Error),
}

macro_rules! from_layer {
    ($($error:ty),+) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::Library(error.into())
            }
        })+
    };
}

from_layer!(candle_lazy::nn::Error, candle_lazy::exec::Error, candle_core::Error);

/// Runs the demo; the exit code is 1 if anything that it checks does not hold.
#[must_use]
pub fn run(args: &DemoArgs) -> i32 {
    match demo(args) {
        Ok(faults) if faults.is_empty() => {
            println!("\ndemo: every answer is the expected one, lazy agrees with eager");
            0
        }
        Ok(faults) => {
            println!();
            for fault in faults {
                println!("demo: {fault}");
            }
            1
        }
        Err(error) => {
            eprintln!("demo: {error}");
            1
        }
    }
}

fn demo(args: &DemoArgs) -> Result<Vec<String>, Error> {
    let models = sources::open(&args.model_dir)?;
    let mut faults = answers::sentences(&models)?;
    faults.extend(answers::question(&models, args)?);
    println!("\neager against lazy (median of {} runs):", args.repetitions.max(1));
    let options = CompareOptions {
        encoder: models.encoder.dir,
        decoder: models.decoder.dir,
        repetitions: args.repetitions.max(1),
    };
    let mut report = compare_models(&options)?;
    if table::only_slow(&report) {
        // a busy machine can spoil one measurement; a second one decides
        println!("{}", table::text(&report));
        println!("\nlazy was slower than allowed; a second try:");
        report = compare_models(&options)?;
    }
    println!("{}", table::text(&report));
    faults.extend(table::faults(&report));
    Ok(faults)
}
