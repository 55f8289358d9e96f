//! `cargo xtask demo`: two real models computed lazily, then eagerly beside it.
//!
//! The sentence encoder and the language model are those of `nn::hub`, or the user's own (`--model-dir`). What is known
//! of the published ones is checked: the similarity of three sentences, one answer, and the bounds of time and memory. Of
//! one's own models the agreement with eager Candle is checked, where candle-transformers has a twin.

mod adapter;
mod answers;
pub(crate) mod sources;
mod table;

use crate::output::{self, complain, say};
use candle_lazy::nn::ModelDir;
use candle_lazy_parity::models::{compare_decoder, compare_encoder, ModelRow};
use std::path::PathBuf;
use table::Row;

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
    /// The most tokens of an answer, at least 1.
    #[arg(long, default_value_t = 48, value_parser = at_least_one)]
    pub max_new_tokens: usize,
    /// Measured runs per model, at least 1; short work runs more often. The table shows medians.
    #[arg(long, default_value_t = 5, value_parser = at_least_one)]
    pub repetitions: usize,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_string()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

/// Why the demo ends with exit code 1.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Library(#[from] candle_lazy::Error),
    #[error("the comparison with eager Candle failed: {0}")]
    Compare(#[from] candle_lazy_parity::Error),
    #[error("{}: {message}", path.display())]
    Model { path: PathBuf, message: String },
    #[error(transparent)]
    Output(#[from] output::Error),
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
        Ok(fine) => i32::from(!fine),
        Err(Error::Output(error)) => output::failed("demo", &error),
        Err(error) => {
            complain!("demo: {error}");
            1
        }
    }
}

/// Whether everything that is checked holds.
fn demo(args: &DemoArgs) -> Result<bool, Error> {
    let models = sources::open(&args.model_dir)?;
    let mut faults = answers::sentences(&models)?;
    faults.extend(answers::question(&models, args)?);
    say!("\neager against lazy (medians of at least {} runs, step by step in turns):", args.repetitions)?;
    let rows = compare(&models, args.repetitions)?;
    say!("{}", table::text(&rows))?;
    for row in &rows {
        for note in table::notes(row) {
            say!("  {note}")?;
        }
        faults.extend(table::faults(row));
    }
    say!("")?;
    for fault in &faults {
        say!("demo: {fault}")?;
    }
    if faults.is_empty() {
        let answers = if models.encoder.published && models.decoder.published {
            "every answer is the expected one"
        } else {
            "every model has answered"
        };
        let compared = if rows.iter().all(|row| row.model.eager.is_ok()) {
            "lazy agrees with eager"
        } else {
            "lazy agrees with eager where there is a twin"
        };
        say!("demo: {answers}, {compared}")?;
    }
    Ok(faults.is_empty())
}

type Compare = fn(&ModelDir, usize) -> candle_lazy_parity::Result<Vec<ModelRow>>;

/// Both models; one that is only slow is measured again, and each of its rows keeps its better time.
fn compare(models: &sources::Models, repetitions: usize) -> Result<Vec<Row>, Error> {
    let of = |source: &sources::Source, compare: Compare| -> Result<Vec<Row>, Error> {
        let measure = || -> Result<Vec<Row>, Error> {
            let rows = compare(&source.dir, repetitions)?;
            Ok(rows.into_iter().map(|model| Row { model, published: source.published, tries: 1 }).collect())
        };
        let rows = measure()?;
        if !table::only_slow(&rows) {
            return Ok(rows);
        }
        Ok(rows.into_iter().zip(measure()?).map(|(row, again)| row.better(again)).collect())
    };
    let mut rows = of(&models.encoder, compare_encoder)?;
    rows.extend(of(&models.decoder, compare_decoder)?);
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        demo: DemoArgs,
    }

    #[test]
    fn no_token_and_no_run_are_refused_before_anything_is_loaded() {
        for option in ["--max-new-tokens", "--repetitions"] {
            let error = Line::try_parse_from(["demo", option, "0"]).unwrap_err().to_string();
            assert!(error.contains("at least 1"), "{error}");
            assert!(Line::try_parse_from(["demo", option, "1"]).is_ok());
        }
        assert_eq!(Line::parse_from(["demo"]).demo.max_new_tokens, 48);
    }
}
