//! The generated crate: the ported sources, and beside them what compares them.

use super::rewrite::{changes, port, Change};
use super::source::Checkout;
use super::{Error, MODELS};
use std::path::{Path, PathBuf};

/// The files that are ours, by their place in the crate.
const OWN: &[(&str, &str)] = &[
    ("src/main.rs", include_str!("template/main.rs")),
    ("src/check.rs", include_str!("template/check.rs")),
    ("src/weights.rs", include_str!("template/weights.rs")),
    ("src/bert.rs", include_str!("template/bert.rs")),
    ("src/decoders.rs", include_str!("template/decoders.rs")),
    ("src/models/with_tracing.rs", include_str!("template/with_tracing.rs")),
];

/// A ported source and what was changed in it.
#[derive(Debug)]
pub(super) struct Ported {
    pub(super) name: String,
    pub(super) lines: usize,
    pub(super) changes: Vec<Change>,
}

/// Writes the crate into `folder`; what is the same already is left alone, so that cargo need not build it again.
pub(super) fn write(root: &Path, checkout: &Checkout, folder: &Path) -> Result<Vec<Ported>, Error> {
    let mut ported = Vec::new();
    let names = MODELS.iter().map(|model| format!("models/{model}.rs")).chain(["utils.rs".to_string()]);
    for name in names {
        let original = read(&checkout.sources.join(&name))?;
        let text = port(&original);
        let changes = changes(&original, &text).map_err(|source| Error::Rewrite { name: name.clone(), source })?;
        put(&folder.join("src").join(&name), &text)?;
        ported.push(Ported { name, lines: original.lines().count(), changes });
    }
    for (name, text) in OWN {
        put(&folder.join(name), text)?;
    }
    put(&folder.join("Cargo.toml"), &manifest(root, &checkout.version)?)?;
    // the versions that the workspace was tested with; cargo adds this crate to them
    let lock = folder.join("Cargo.lock");
    let workspace = read(&root.join("Cargo.lock"))?;
    let copied = folder.join("Cargo.lock.workspace");
    if !lock.is_file() || std::fs::read_to_string(&copied).ok().as_deref() != Some(workspace.as_str()) {
        put(&lock, &workspace)?;
        put(&copied, &workspace)?;
    }
    Ok(ported)
}

/// The manifest, with the profile of the workspace so that what is built already is used.
fn manifest(root: &Path, version: &str) -> Result<String, Error> {
    let workspace = read(&root.join("Cargo.toml"))?;
    let profile = workspace.find("[profile.").map_or("", |at| &workspace[at..]);
    // members there, which are optimised less than what they depend on; here they are dependencies too
    let members: String = ["candle-lazy", "candle-lazy-exec", "candle-lazy-graph", "candle-lazy-nn", "candle-lazy-ops"]
        .map(|member| format!("\n[profile.dev.package.{member}]\nopt-level = 1\n"))
        .concat();
    // a JSON string is a TOML string too
    let umbrella = serde_json::Value::from(root.join("crates").join("candle-lazy").display().to_string());
    Ok(format!(
        r#"[package]
name = "candle-lazy-port"
version = "0.0.0"
edition = "2021"
publish = false

[workspace]

[features]
# named by the sources, never on
flash-attn = []

[dependencies]
candle-lazy = {{ path = {umbrella}, features = ["hub", "tokenizers"] }}
candle-core = {{ version = "={version}", default-features = false }}
candle-transformers = {{ version = "={version}", default-features = false }}
# not under its own name: the ported sources take that from candle-lazy
eager-nn = {{ package = "candle-nn", version = "={version}", default-features = false }}
serde = {{ version = "1", features = ["derive"] }}
serde_json = "1"
tracing = "0.1"

{profile}
{members}"#
    ))
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })
}

fn put(path: &Path, text: &str) -> Result<(), Error> {
    if std::fs::read_to_string(path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    let error = |path: &Path| {
        let path = PathBuf::from(path);
        move |source| Error::Io { path, source }
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(error(parent))?;
    }
    std::fs::write(path, text).map_err(error(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::repository_root;

    #[test]
    fn the_manifest_is_of_one_version_and_has_the_workspaces_profile() {
        let text = manifest(&repository_root(), "9.8.7").unwrap();
        assert_eq!(text.matches("\"=9.8.7\"").count(), 3, "{text}");
        assert!(text.contains("\n[profile.release]\n"), "{text}");
    }

    #[test]
    fn a_file_that_is_the_same_is_not_written_again() {
        let path = std::env::temp_dir().join(format!("candle-lazy-port-{}", std::process::id())).join("a").join("b.rs");
        put(&path, "one").unwrap();
        let first = std::fs::metadata(&path).unwrap().modified().unwrap();
        put(&path, "one").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), first);
        put(&path, "two").unwrap();
        assert_eq!(read(&path).unwrap(), "two");
        std::fs::remove_dir_all(path.parent().unwrap().parent().unwrap()).unwrap();
    }
}
