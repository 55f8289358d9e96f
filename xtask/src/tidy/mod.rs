//! What can be checked about the repository itself: `cargo xtask tidy`, and a test of this crate.
//!
//! Every check is a function over data (the files' text, cargo's own description of the workspace), so that each has a
//! test which shows that it finds what it looks for.

mod docs;
mod edges;
mod folders;
mod lexer;
mod manifests;
mod sources;
mod tree;

use crate::output::{self, complain, say};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tree::Tree;

/// Something that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// The file, with a line where one is known, or the crate.
    pub place: String,
    /// The check that found it.
    pub check: &'static str,
    /// What is wrong.
    pub message: String,
}

impl Violation {
    fn new(check: &'static str, place: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self { place: place.to_string(), check, message: message.to_string() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.place, self.check, self.message)
    }
}

/// Why the checks could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Cargo failed.
    #[error("`{command}` failed: {message}")]
    Cargo {
        /// The command.
        command: String,
        /// What it said.
        message: String,
    },
    /// Cargo's answer is not what it should be.
    #[error("`{command}` gave something unexpected: {message}")]
    Unexpected {
        /// The command.
        command: String,
        /// What is wrong with its answer.
        message: String,
    },
}

impl Error {
    fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }
}

/// The root of this repository, which this crate is compiled in.
#[must_use]
pub fn repository_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

type TreeCheck = fn(&Tree) -> Vec<Violation>;

/// The checks that look at files alone.
const TREE_CHECKS: &[TreeCheck] = &[
    sources::module_docs,
    sources::no_features_in_graph,
    sources::file_length,
    sources::no_ignored_tests,
    sources::names,
    sources::no_panics,
    sources::unsafe_places,
    sources::no_local_paths,
    manifests::lints_inherited,
    manifests::versions_in_the_workspace,
    folders::edges_of_exec,
    docs::ops_described,
    docs::invariants_tested,
    docs::readmes_agree,
];

/// All checks on the repository at `root`; what they found, sorted.
///
/// # Errors
/// When a file cannot be read or cargo does not answer.
pub fn check(root: &Path) -> Result<Vec<Violation>, Error> {
    let tree = Tree::read(root)?;
    let mut found: Vec<Violation> = TREE_CHECKS.iter().flat_map(|check| check(&tree)).collect();
    let metadata = cargo(root, &["metadata", "--no-deps", "--format-version", "1"])?;
    let metadata = serde_json::from_str(&metadata)
        .map_err(|e| Error::Unexpected { command: "cargo metadata".into(), message: e.to_string() })?;
    found.extend(edges::crate_edges(&metadata));
    let dependencies = cargo(root, manifests::TREE_ARGS)?;
    found.extend(manifests::weight(&dependencies));
    found.sort();
    found.dedup();
    Ok(found)
}

/// `cargo xtask tidy`: prints what was found; the exit code is 1 if anything was.
#[must_use]
pub fn run() -> i32 {
    match check(&repository_root()) {
        Ok(found) => match print(&found) {
            Ok(()) => i32::from(!found.is_empty()),
            Err(error) => output::failed("tidy", &error),
        },
        Err(error) => {
            complain!("tidy: {error}");
            1
        }
    }
}

fn print(found: &[Violation]) -> Result<(), output::Error> {
    for violation in found {
        say!("{violation}")?;
    }
    match found.len() {
        0 => say!("tidy: nothing found"),
        n => say!("tidy: {n} found"),
    }
}

/// What cargo prints on stdout.
fn cargo(root: &Path, args: &[&str]) -> Result<String, Error> {
    let command = format!("cargo {}", args.join(" "));
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(args)
        .current_dir(root)
        .output()
        .map_err(|e| Error::Cargo { command: command.clone(), message: e.to_string() })?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(Error::Cargo { command, message });
    }
    String::from_utf8(output.stdout).map_err(|e| Error::Unexpected { command, message: e.to_string() })
}
