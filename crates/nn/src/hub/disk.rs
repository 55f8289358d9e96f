//! Room on the disk: asked for before a fetch, named when it runs out.

use crate::error::{Error, Result};
use std::path::Path;
use std::process::Command;

/// Free bytes of the file system that `dir` is on, where the system's `df` can say.
pub(super) fn available(dir: &Path) -> Option<u64> {
    let output = Command::new("df").arg("-Pk").arg(dir).output().ok()?;
    parse_df(&String::from_utf8_lossy(&output.stdout))
}

/// The fourth column of the second line, in KiB (the format that POSIX fixes for `df -P -k`).
fn parse_df(text: &str) -> Option<u64> {
    let kib: u64 = text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Refuses to begin what does not fit. Where the free space is not known, it begins.
pub(super) fn require(dir: &Path, needed: u64) -> Result<()> {
    match available(dir) {
        Some(available) if available < needed => {
            Err(Error::DiskFull { path: dir.to_path_buf(), needed, available: Some(available), output: String::new() })
        }
        _ => Ok(()),
    }
}

/// An error of writing: a full disk by its name, others as they are.
pub(super) fn write_error(path: &Path, needed: u64, source: std::io::Error) -> Error {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            let available = path.parent().and_then(available);
            Error::DiskFull { path: path.to_path_buf(), needed, available, output: String::new() }
        }
        _ => Error::io(path, source),
    }
}

/// A full disk, as pip found it while it worked in `dir`: `dir` is named, or the system's folder for temporary files where
/// that is the fuller one (Python goes there when it cannot write where it should).
pub(super) fn full_for(dir: &Path, needed: u64, output: String) -> Error {
    let temporary = std::env::temp_dir();
    let free = available(dir);
    let elsewhere = available(&temporary);
    let (path, available) = match (free, elsewhere) {
        (Some(free), Some(elsewhere)) if elsewhere < free && elsewhere < needed => (temporary, Some(elsewhere)),
        _ => (dir.to_path_buf(), free),
    };
    Error::DiskFull { path, needed, available, output }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn df_is_parsed() {
        let text = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/vda 100 40 60 40% /\n";
        assert_eq!(parse_df(text), Some(60 * 1024));
        assert_eq!(parse_df(""), None);
        assert_eq!(parse_df("a\nb c d e"), None);
    }

    #[test]
    fn what_does_not_fit_is_refused_before_it_begins() {
        let dir = std::env::temp_dir();
        if available(&dir).is_some() {
            assert!(matches!(require(&dir, u64::MAX), Err(Error::DiskFull { available: Some(_), .. })));
        }
        assert!(require(&dir, 0).is_ok());
    }

    #[test]
    fn a_full_disk_is_named() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = write_error(Path::new("/nowhere/model.part"), 17, full);
        assert!(matches!(error, Error::DiskFull { needed: 17, .. }));
        assert!(error.to_string().contains("/nowhere/model.part"));
        let other = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        assert!(matches!(write_error(Path::new("/x"), 1, other), Error::Io { .. }));
    }
}
