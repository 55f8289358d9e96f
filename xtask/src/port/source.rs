//! Where cargo keeps candle-transformers, and where it builds.

use super::Error;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "candle-transformers";

/// The version whose sources are known to port.
const VERSION: &str = "0.11.1";

/// What cargo says about this workspace.
#[derive(Debug)]
pub(super) struct Checkout {
    /// The folder of candle-transformers' sources.
    pub(super) sources: PathBuf,
    /// Its version, which is that of all of Candle's crates.
    pub(super) version: String,
    /// Where cargo builds.
    pub(super) target: PathBuf,
}

impl Checkout {
    /// Asks cargo.
    pub(super) fn find(root: &Path) -> Result<Self, Error> {
        let about = String::from_utf8_lossy(&answer(root, &["-vV"])?).into_owned();
        let mut args = vec!["metadata", "--format-version", "1", "--locked", "--offline"];
        // without it cargo wants the crates of every platform, also those that were never fetched here
        if let Some(host) = host(&about) {
            args.extend(["--filter-platform", host]);
        }
        let metadata = serde_json::from_slice(&answer(root, &args)?)
            .map_err(|source| Error::Cargo { what: "metadata", detail: source.to_string() })?;
        Self::read(&metadata)
    }

    fn read(metadata: &Value) -> Result<Self, Error> {
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_string);
        let missing = |detail: &str| Error::Cargo { what: "metadata", detail: detail.to_string() };
        let packages = metadata.get("packages").and_then(Value::as_array).ok_or_else(|| missing("no packages"))?;
        let package = packages
            .iter()
            .find(|package| package.get("name").and_then(Value::as_str) == Some(PACKAGE))
            .ok_or_else(|| missing("candle-transformers is no dependency"))?;
        let version = text(package, "version").unwrap_or_default();
        if version != VERSION {
            return Err(missing(&format!("{PACKAGE} is {version}; the port is proved for {VERSION}")));
        }
        let manifest = PathBuf::from(text(package, "manifest_path").ok_or_else(|| missing("no manifest path"))?);
        let sources = manifest.parent().map(|folder| folder.join("src")).ok_or_else(|| missing("no folder"))?;
        let target = text(metadata, "target_directory").ok_or_else(|| missing("no target folder"))?;
        Ok(Self { sources, version, target: target.into() })
    }
}

/// The platform in what `cargo -vV` prints.
fn host(about: &str) -> Option<&str> {
    about.lines().find_map(|line| line.strip_prefix("host: ")).map(str::trim)
}

/// What cargo prints on stdout.
fn answer(root: &Path, args: &[&str]) -> Result<Vec<u8>, Error> {
    let error = |detail: String| Error::Cargo { what: "metadata", detail };
    let output = cargo().args(args).current_dir(root).output().map_err(|source| error(source.to_string()))?;
    if !output.status.success() {
        return Err(error(String::from_utf8_lossy(&output.stderr).trim().to_string()));
    }
    Ok(output.stdout)
}

/// The cargo that runs this, or the one in the path.
pub(super) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_platform_is_read() {
        assert_eq!(
            host("cargo 1.95.0\nrelease: 1.95.0\nhost: x86_64-unknown-linux-gnu\nos: Linux\n"),
            Some("x86_64-unknown-linux-gnu")
        );
        assert_eq!(host("cargo 1.95.0\n"), None);
    }

    #[test]
    fn the_checkout_is_where_cargo_says() {
        let package = |version: &str| json!({"name": PACKAGE, "version": version, "manifest_path": "r/ct/Cargo.toml"});
        let metadata = |version| json!({"packages": [{"name": "x"}, package(version)], "target_directory": "t"});
        let found = Checkout::read(&metadata(VERSION)).unwrap();
        assert_eq!((found.sources, found.target), (PathBuf::from("r/ct/src"), PathBuf::from("t")));
        assert!(Checkout::read(&metadata("0.12.0")).unwrap_err().to_string().contains("0.12.0"));
        assert!(Checkout::read(&json!({"packages": []})).is_err());
    }
}
