//! `cargo xtask verify`: eager against lazy for every op, over shapes, layouts, dtypes and modes.

mod train;

use crate::output::{self, complain, say};
use crate::progress::Bars;
use candle_lazy::nn::hub::{cache_dir, ModelSource, ALL_MINILM_L6_V2, SMOLLM2_135M_INSTRUCT};
use candle_lazy_parity::cases::{Extent, FLOATS, INTEGERS};
use candle_lazy_parity::models::{compare_decoder, compare_encoder, published_facts};
use candle_lazy_parity::modes::{Cell, Outcome};
use candle_lazy_parity::mutants;
use candle_lazy_parity::verify::{run as run_matrix, Options, Summary};
use std::path::PathBuf;

/// What `cargo xtask verify` takes.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// A part of the table that ends within two minutes.
    #[arg(long)]
    pub quick: bool,
    /// Check the checker instead: inject every fault, and expect the matrix to catch it.
    #[arg(long)]
    pub mutants: bool,
    /// With --mutants: only those whose name begins so.
    #[arg(long, value_name = "NAME", requires = "mutants")]
    pub only: Option<String>,
    /// The two real models too (fetched if they are not in the cache).
    #[arg(long)]
    pub models: bool,
    /// With --models: a training of the decoder, beside PyTorch's steps and by what it learns and keeps. It takes minutes.
    #[arg(long, requires = "models")]
    pub train: bool,
    /// Only this op, by its name in docs/ops.md; `random` for the random graphs.
    #[arg(long, value_name = "NAME", conflicts_with = "mutants")]
    pub op: Option<String>,
    /// Only these modes, separated by commas.
    #[arg(long, value_name = "NAME", conflicts_with = "mutants")]
    pub mode: Option<String>,
    /// Only gradients: the modes that take them, or with --mutants the faults that those catch.
    #[arg(long, conflicts_with = "mode")]
    pub grad: bool,
    /// Only cases of this dtype.
    #[arg(long, value_name = "D", conflicts_with = "mutants")]
    pub dtype: Option<String>,
    /// The seed of inputs and random graphs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// How many failures are shown.
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub show: usize,
    /// Writes the result to a file, as JSON.
    #[arg(long, value_name = "FILE", conflicts_with = "mutants")]
    pub json: Option<PathBuf>,
}

/// The modes that take gradients.
const GRADIENTS: [&str; 3] = ["ops-tracked", "tracked", "grad"];

/// Why nothing was verified.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Parity(#[from] candle_lazy_parity::Error),
    #[error(transparent)]
    Library(#[from] candle_lazy::nn::Error),
    #[error("no dtype {0}; there are u8, u32, i64, bf16, f16, f32, f64")]
    DType(String),
    #[error("{path}: {source}")]
    Json { path: String, source: std::io::Error },
    #[error("{0}")]
    Training(String),
    #[error(transparent)]
    Output(#[from] output::Error),
}

/// Runs the matrix; the exit code is 1 if anything failed or nothing could be checked.
#[must_use]
pub fn run(args: VerifyArgs) -> i32 {
    let all_passed = if args.mutants { all_caught(&args) } else { all_agree(&args) };
    match all_passed {
        Ok(all) => i32::from(!all),
        Err(Error::Output(error)) => output::failed("verify", &error),
        Err(error) => {
            complain!("verify: {error}");
            1
        }
    }
}

fn all_agree(args: &VerifyArgs) -> Result<bool, Error> {
    let summary = verify(args)?;
    say!("{}", summary.text(args.show))?;
    Ok(summary.failed() == 0)
}

/// Injects the faults; whether all of them were caught.
fn all_caught(args: &VerifyArgs) -> Result<bool, Error> {
    let mut written = Ok(());
    let modes = args.grad.then_some(&GRADIENTS[..]);
    let verdicts = mutants::run(args.only.as_deref(), modes, args.seed, |verdict| {
        if written.is_ok() {
            written = say!("{}", verdict.line());
        }
    })?;
    written?;
    say!("{}", mutants::last_line(&verdicts))?;
    Ok(verdicts.iter().all(|v| v.caught.is_some()))
}

fn verify(args: &VerifyArgs) -> Result<Summary, Error> {
    if let Some(path) = &args.json {
        // a file that cannot be written is said before the work, not after it
        std::fs::File::create(path).map_err(|source| Error::Json { path: path.display().to_string(), source })?;
    }
    let mut options = Options::new(if args.quick { Extent::Quick } else { Extent::Full });
    options.op.clone_from(&args.op);
    options.mode = if args.grad { Some(GRADIENTS.join(",")) } else { args.mode.clone() };
    options.seed = args.seed;
    options.dtype = match &args.dtype {
        None => None,
        Some(name) => {
            let known = FLOATS.into_iter().chain(INTEGERS).find(|d| d.as_str() == name);
            Some(known.ok_or_else(|| Error::DType(name.clone()))?)
        }
    };
    let mut summary = run_matrix(&options)?;
    if args.models {
        models(&mut summary, args)?;
    }
    if let Some(path) = &args.json {
        std::fs::write(path, json(&summary))
            .map_err(|source| Error::Json { path: path.display().to_string(), source })?;
    }
    Ok(summary)
}

/// The two published models: what is known of them, and lazy against eager. Their speed is the demo's concern.
fn models(summary: &mut Summary, args: &VerifyArgs) -> Result<(), Error> {
    let encoder = ALL_MINILM_L6_V2.fetch(&cache_dir()?, &Bars::default())?;
    let decoder = SMOLLM2_135M_INSTRUCT.fetch(&cache_dir()?, &Bars::default())?;
    let outcome = |wrong: Option<String>| wrong.map_or(Outcome::Passed, Outcome::Failed);
    for (fact, wrong) in published_facts(&encoder, &decoder)? {
        summary.count("models", &fact, "lazy", &Cell::of(outcome(wrong)));
    }
    let rows = compare_encoder(&encoder, 1)?.into_iter().chain(compare_decoder(&decoder, 1)?);
    for row in rows {
        let wrong = match &row.eager {
            Err(why) => Some(format!("no eager twin: {why}")),
            Ok(eager) if !eager.agrees => {
                Some(format!("lazy and eager differ by {:.1e} or in their ids", eager.largest_difference))
            }
            Ok(_) => (row.fallbacks > 0).then(|| format!("{} ops ran as Candle's own", row.fallbacks)),
        };
        summary.count("models", &row.name, "lazy against eager", &Cell::of(outcome(wrong)));
    }
    if args.train {
        for (fact, wrong) in train::facts(&decoder, args.seed)? {
            say!("training: {fact}{}", wrong.as_deref().map_or(String::new(), |wrong| format!(": no, {wrong}")))?;
            summary.count("models", &fact, "training", &Cell::of(outcome(wrong)));
        }
    }
    Ok(())
}

fn json(summary: &Summary) -> String {
    let ops: serde_json::Map<String, serde_json::Value> = summary
        .rows
        .iter()
        .map(|(op, row)| {
            let row = serde_json::json!({
                "cases": row.cases,
                "failed": row.failed,
                "skipped": row.skipped,
                // JSON has no infinity
                "worst_ulp": row.worst_ulp.is_finite().then_some(row.worst_ulp),
                "worst_share": row.worst_share.is_finite().then_some(row.worst_share),
                "worst_case": row.worst_case,
                "kernels": row.kernels,
            });
            (op.clone(), row)
        })
        .collect();
    let failures: Vec<serde_json::Value> = summary
        .failures
        .iter()
        .map(|f| serde_json::json!({ "op": f.op, "case": f.case, "mode": f.mode, "what": f.what }))
        .collect();
    serde_json::json!({
        "cases": summary.cases(),
        "failed": summary.failed(),
        "skipped": summary.skipped(),
        "ops": ops,
        "failures": failures,
        "skips": summary.skips,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_holds_counts_and_failures() {
        let mut summary = Summary::default();
        summary.count("softmax", "softmax(1)(f32 [2, 3])", "warm", &Cell::of(Outcome::Passed));
        summary.count("softmax", "softmax(0)(f32 [2, 3])", "cold", &Cell::of(Outcome::Failed("off".into())));
        let value: serde_json::Value = serde_json::from_str(&json(&summary)).unwrap();
        assert_eq!((value["cases"].as_u64(), value["failed"].as_u64()), (Some(2), Some(1)));
        assert_eq!(value["failures"][0]["what"], "off");
        assert_eq!(value["ops"]["softmax"]["cases"], 2);
    }

    fn quick(op: Option<&str>, mode: Option<&str>, dtype: Option<&str>) -> VerifyArgs {
        VerifyArgs {
            quick: true,
            mutants: false,
            only: None,
            models: false,
            train: false,
            op: op.map(str::to_string),
            mode: mode.map(str::to_string),
            grad: false,
            dtype: dtype.map(str::to_string),
            seed: 1,
            show: 1,
            json: None,
        }
    }

    #[test]
    fn a_dtype_that_does_not_exist_or_has_no_cases_is_refused_by_name() {
        for name in ["f7", "i32", "i16", "f8e4m3"] {
            let error = verify(&quick(None, None, Some(name))).unwrap_err();
            assert!(matches!(&error, Error::DType(said) if said == name), "{error}");
        }
    }

    #[test]
    fn filters_that_leave_no_cell_are_errors() {
        for (op, mode, dtype, says) in [
            (Some("add"), Some("decomposed"), None, "no cell has op add and mode decomposed"),
            (Some("random"), None, Some("u8"), "no cell has op random and dtype u8"),
            (Some("random"), Some("warm"), None, "random graphs have no mode warm"),
            (Some("softmin"), None, None, "no op softmin"),
        ] {
            let error = verify(&quick(op, mode, dtype)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            assert_eq!(run(quick(op, mode, dtype)), 1);
        }
    }
}
