//! `cargo xtask api`: the public API of `candle-lazy-compat` as a listing that is checked in, so that a change to what v1's users call
//! shows in a review.
//!
//! The listing is read from the sources: every `pub` item, method, field and variant with its signature, every `pub use` and every trait
//! implementation, each on one line with the features it depends on. That a `pub` item can be reached is the lint `unreachable_pub`'s
//! to say.

mod read;
mod render;

use crate::output::{self, complain, say};
use crate::tidy::repository_root;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Options of `cargo xtask api`.
#[derive(Debug, clap::Args)]
pub struct ApiArgs {
    /// Write the listing instead of comparing it.
    #[arg(long)]
    write: bool,
}

/// Why there is no listing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not Rust.
    #[error("{}: {source}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: syn::Error,
    },
    /// A module has no file.
    #[error("{}: no file of module `{name}`", path.display())]
    NoModule {
        /// The file that declares it.
        path: PathBuf,
        /// Its name.
        name: String,
    },
}

const CRATE: &str = "crates/compat";
const LISTING: &str = "crates/compat/api.txt";

/// The listing of the crate in `dir`, a line per item, sorted.
///
/// # Errors
/// When a source cannot be read.
pub fn listing(dir: &Path) -> Result<BTreeSet<String>, Error> {
    let mut lines = BTreeSet::new();
    for module in read::modules(&dir.join("src").join("lib.rs"))? {
        render::items(&module, &mut lines);
    }
    Ok(lines)
}

/// What differs between the listing in the repository and the sources: lines with `+` are in the sources only.
///
/// # Errors
/// When a file cannot be read.
pub fn differences(root: &Path) -> Result<Vec<String>, Error> {
    let path = root.join(LISTING);
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Io { path, source })?;
    let written: BTreeSet<String> = text.lines().map(str::to_string).collect();
    let found = listing(&root.join(CRATE))?;
    let gone = written.difference(&found).map(|line| format!("- {line}"));
    let new = found.difference(&written).map(|line| format!("+ {line}"));
    Ok(gone.chain(new).collect())
}

fn write(root: &Path) -> Result<usize, Error> {
    let path = root.join(LISTING);
    let lines = listing(&root.join(CRATE))?;
    let text: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    std::fs::write(&path, text).map_err(|source| Error::Io { path, source })?;
    Ok(lines.len())
}

/// Runs the command; the exit code is 1 where the listing is not what the sources say.
#[must_use]
pub fn run(args: &ApiArgs) -> i32 {
    let root = repository_root();
    let found = if args.write {
        write(&root).map(|lines| (format!("api: {lines} lines in {LISTING}"), 0))
    } else {
        differences(&root).map(|lines| match lines.len() {
            0 => (format!("api: {LISTING} is what the sources say"), 0),
            n => {
                let hint = "`cargo xtask api --write` takes the sources for right";
                (format!("{}\napi: {n} lines differ; {hint}", lines.join("\n")), 1)
            }
        })
    };
    match found {
        Ok((text, code)) => match say!("{text}") {
            Ok(()) => code,
            Err(error) => output::failed("api", &error),
        },
        Err(error) => {
            complain!("api: {error}");
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listing_is_what_the_sources_say() -> Result<(), Error> {
        assert_eq!(differences(&repository_root())?, Vec::<String>::new(), "cargo xtask api --write");
        Ok(())
    }

    #[test]
    fn every_kind_of_item_has_its_line() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let src = dir.path().join("src");
        std::fs::create_dir_all(src.join("inner"))?;
        std::fs::write(
            src.join("lib.rs"),
            r#"
            #[cfg(feature = "graph")]
            pub mod inner;
            mod other;
            pub use other::{Hidden, Second as Renamed};
            pub const SIZE: usize = 3;
            fn private() {}
            #[cfg(test)]
            mod tests { pub fn not_listed() {} }
            "#,
        )?;
        std::fs::write(
            src.join("inner").join("mod.rs"),
            r#"
            /// Docs.
            #[derive(Debug, Clone)]
            pub struct Point { pub x: f32, hidden: u8 }
            impl Point {
                /// More.
                #[must_use]
                pub const fn new(x: f32) -> Self { Self { x, hidden: 0 } }
                fn private(&self) {}
            }
            impl std::fmt::Display for Point {
                fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { Ok(()) }
            }
            "#,
        )?;
        std::fs::write(
            src.join("other.rs"),
            r#"
            pub struct Hidden(pub usize);
            pub type Second = Hidden;
            #[non_exhaustive]
            pub enum Kind { A, B { n: usize }, C(String) }
            pub trait Op: Send { const N: usize; fn run(&self) -> usize; fn twice(&self) -> usize { 2 * self.run() } }
            #[deprecated(note = "use b")]
            pub async fn a<T: Clone>(t: &[T]) -> impl Iterator<Item = T> + '_ where T: Send { t.iter().cloned() }
            "#,
        )?;
        let lines: Vec<String> = listing(dir.path())?.into_iter().collect();
        let mut expected = vec![
            "const SIZE: usize",
            "inner: #[derive(Debug, Clone)] struct Point [feature = \"graph\"]",
            "inner::Point: x: f32 [feature = \"graph\"]",
            "inner::Point: const fn new(x: f32) -> Self [feature = \"graph\"]",
            "inner: impl std::fmt::Display for Point [feature = \"graph\"]",
            "mod inner [feature = \"graph\"]",
            "use other::{Hidden, Second as Renamed}",
            "other: struct Hidden",
            "other::Hidden: 0: usize",
            "other: type Second = Hidden",
            "other: #[non_exhaustive] enum Kind",
            "other::Kind: A",
            "other::Kind: B { n: usize }",
            "other::Kind: C(String)",
            "other: trait Op: Send",
            "other::Op: const N: usize",
            "other::Op: fn run(&self) -> usize",
            "other::Op: fn twice(&self) -> usize (provided)",
            "other: #[deprecated(note = \"use b\")] async fn a<T: Clone>(t: &[T]) -> impl Iterator<Item = T> + '_ where T: Send",
        ];
        expected.sort_unstable();
        assert_eq!(lines, expected);
        Ok(())
    }
}
