//! Where fetched files are kept, and how one knows that they are whole.

use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// `$CANDLE_LAZY_CACHE`, else `$XDG_CACHE_HOME/candle-lazy`, else `~/.cache/candle-lazy`.
///
/// # Errors
/// [`Error::Config`] where none of the three variables is set.
pub fn cache_dir() -> Result<PathBuf> {
    cache_dir_from(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
}

fn cache_dir_from(var: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<PathBuf> {
    if let Some(dir) = var("CANDLE_LAZY_CACHE") {
        return Ok(dir.into());
    }
    if let Some(dir) = var("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(dir).join("candle-lazy"));
    }
    match var("HOME").or_else(|| var("USERPROFILE")) {
        Some(home) => Ok(PathBuf::from(home).join(".cache").join("candle-lazy")),
        None => Err(Error::config(
            "the cache",
            "no place is known for it: set CANDLE_LAZY_CACHE, XDG_CACHE_HOME or HOME, or give --model-dir",
        )),
    }
}

/// Size, time of change and hash of a file when it was last found whole.
fn stamp(metadata: &Metadata, sha256: &str) -> Option<String> {
    let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("{sha256} {} {}\n", metadata.len(), changed.as_nanos()))
}

fn stamp_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(".verified");
    name.into()
}

/// Whether `path` is the published file.
///
/// A file is hashed once; a stamp beside it saves that as long as neither its size nor its time of change differ.
///
/// # Errors
/// [`Error::Io`] where it exists and cannot be read.
pub(super) fn is_whole(path: &Path, size: u64, sha256: &str) -> Result<bool> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io(path, e)),
    };
    if !metadata.is_file() || metadata.len() != size {
        return Ok(false);
    }
    let expected = stamp(&metadata, sha256);
    if let (Some(expected), Ok(found)) = (&expected, std::fs::read_to_string(stamp_path(path))) {
        if *expected == found {
            return Ok(true);
        }
    }
    let whole = hash_file(path)? == sha256;
    if whole {
        mark_whole(path, sha256);
    }
    Ok(whole)
}

/// Leaves the stamp of a file that was just found whole. Without it (a read-only cache) the next run hashes again.
pub(super) fn mark_whole(path: &Path, sha256: &str) {
    if let Some(stamp) = std::fs::metadata(path).ok().and_then(|metadata| stamp(&metadata, sha256)) {
        drop(std::fs::write(stamp_path(path), stamp));
    }
}

/// Lower-case hexadecimal sha256 of a file.
fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let read = file.read(&mut buffer).map_err(|e| Error::io(path, e))?;
        match buffer.get(..read) {
            Some([]) | None => return Ok(hex(&hash.finalize())),
            Some(bytes) => hash.update(bytes),
        }
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_lies_where_the_variables_say() -> Result<()> {
        let with = |vars: &'static [(&'static str, &'static str)]| {
            cache_dir_from(move |name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
        };
        assert_eq!(with(&[("CANDLE_LAZY_CACHE", "/a"), ("HOME", "/h")])?, PathBuf::from("/a"));
        assert_eq!(with(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")])?, PathBuf::from("/x/candle-lazy"));
        assert_eq!(with(&[("HOME", "/h")])?, PathBuf::from("/h/.cache/candle-lazy"));
        assert!(matches!(with(&[]), Err(Error::Config { .. })));
        Ok(())
    }

    #[test]
    fn a_changed_file_is_not_whole() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("f");
        // sha256 of "abc", from FIPS 180-4's examples.
        let sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(!is_whole(&path, 3, sha)?, "an absent file");
        std::fs::write(&path, "abc")?;
        assert!(is_whole(&path, 3, sha)?);
        assert!(stamp_path(&path).is_file());
        assert!(is_whole(&path, 3, sha)?, "by its stamp");
        std::fs::write(&path, "abcd")?;
        assert!(!is_whole(&path, 3, sha)?, "another size");
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, "abd")?;
        assert!(!is_whole(&path, 3, sha)?, "another content of the same size");
        Ok(())
    }
}
