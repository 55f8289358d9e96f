//! `cargo xtask port`: models of candle-transformers moved over by their `use` lines, compiled, and compared with the eager
//! originals.
//!
//! The sources come from cargo's own checkout and go into the target folder; none of them is part of this repository.

mod generate;
pub mod rewrite;
mod source;

use crate::demo::sources;
use crate::output::{self, complain, say};
use crate::tidy::repository_root;
use generate::Ported;
use source::{cargo, Checkout};
use std::path::{Path, PathBuf};

/// The models that are ported.
const MODELS: [&str; 4] = ["bert", "llama", "qwen2", "mistral"];

/// What `cargo xtask port` takes.
#[derive(Debug, clap::Args)]
pub struct PortArgs {
    /// A directory with a model of one's own, as for the demo; a BERT encoder or a Llama decoder. What is not there is fetched.
    #[arg(long, value_name = "DIR")]
    pub model_dir: Vec<PathBuf>,
    /// Random weights only: no model is opened and nothing is fetched.
    #[arg(long, conflicts_with = "model_dir")]
    pub random_only: bool,
}

/// Why the ported models could not be compared.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cargo {what}: {detail}")]
    Cargo { what: &'static str, detail: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{name}: {source}")]
    Rewrite { name: String, source: rewrite::Error },
    #[error(transparent)]
    Models(#[from] crate::demo::Error),
    #[error(transparent)]
    Output(#[from] output::Error),
}

/// Ports, compiles and compares; the last line names the outcome of every model, the exit code is 1 if one failed.
#[must_use]
pub fn run(args: &PortArgs) -> i32 {
    let outcome = match port(args) {
        Ok(outcome) => outcome,
        Err(Error::Output(error)) => return output::failed("port", &error),
        Err(error) => {
            complain!("port: {error}");
            [false; MODELS.len()]
        }
    };
    match say!("{}", last_line(outcome)) {
        Ok(()) => i32::from(outcome.contains(&false)),
        Err(error) => output::failed("port", &error),
    }
}

fn last_line(outcome: [bool; MODELS.len()]) -> String {
    let word = |fine| if fine { "ok" } else { "FAILED" };
    let each: Vec<String> = MODELS.iter().zip(outcome).map(|(model, fine)| format!("{model} {}", word(fine))).collect();
    format!("port: {}", each.join(", "))
}

fn port(args: &PortArgs) -> Result<[bool; MODELS.len()], Error> {
    let root = repository_root();
    let checkout = Checkout::find(&root)?;
    let folder = checkout.target.join("port");
    for ported in generate::write(&root, &checkout, &folder)? {
        print_changes(&ported)?;
    }
    let program = build(&folder, &checkout.target)?;
    let models = if args.random_only { None } else { Some(sources::open(&args.model_dir)?) };
    let mut outcome = [false; MODELS.len()];
    for (model, fine) in MODELS.iter().zip(&mut outcome) {
        let dir = models.as_ref().and_then(|models| match *model {
            "bert" => Some(models.encoder.dir.path()),
            "llama" => Some(models.decoder.dir.path()),
            _ => None,
        });
        // a process each: a model that ends its own does not end the others
        let status = std::process::Command::new(&program).arg(model).args(dir).status();
        *fine = status.map_err(|source| Error::Io { path: program.clone(), source })?.success();
    }
    Ok(outcome)
}

fn print_changes(ported: &Ported) -> Result<(), output::Error> {
    let added = ported.changes.iter().filter(|change| change.before.is_none()).count();
    let changed = ported.changes.len() - added;
    say!(
        "{}: {} lines; {changed} `use` lines changed, {added} added, nothing else differs",
        ported.name,
        ported.lines
    )?;
    for change in &ported.changes {
        if let Some(before) = &change.before {
            say!("  {:4} - {before}", change.line)?;
        }
        say!("  {:4} + {}", change.line, change.after)?;
    }
    Ok(())
}

/// Compiles the crate and returns the program. It is built as this program is, so that what was built for this one serves again.
fn build(folder: &Path, target: &Path) -> Result<PathBuf, Error> {
    let (profile, built) = if cfg!(debug_assertions) { ("dev", "debug") } else { ("release", "release") };
    let status = cargo()
        .args(["build", "--profile", profile, "--offline", "--quiet", "--manifest-path"])
        .arg(folder.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .status()
        .map_err(|source| Error::Cargo { what: "build", detail: source.to_string() })?;
    if !status.success() {
        return Err(Error::Cargo { what: "build", detail: "the ported sources do not compile".into() });
    }
    Ok(target.join(built).join(format!("candle-lazy-port{}", std::env::consts::EXE_SUFFIX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_names_every_model() {
        assert_eq!(last_line([true; 4]), "port: bert ok, llama ok, qwen2 ok, mistral ok");
        assert_eq!(last_line([true, false, true, true]), "port: bert ok, llama FAILED, qwen2 ok, mistral ok");
    }
}
