//! Writing files whole or not at all.

use crate::error::{Error, Result};
use candle_core::Tensor;
use safetensors::SafeTensorError;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use tempfile::NamedTempFile;

/// A new file beside `path`, with the permissions that any new file has.
fn beside(path: &Path) -> std::io::Result<NamedTempFile> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".unfinished-");
    // the umask takes from these
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir)
}

/// Gives a finished file its name; one that has it is replaced.
fn finish(file: NamedTempFile, path: &Path) -> std::io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Writes `bytes` to `path`, whole or not at all: into a file beside it, which takes its name at the end.
///
/// # Errors
/// [`Error::Io`]; what was at `path` is there still then.
pub fn write_whole(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let written = beside(path).and_then(|mut file| {
        file.write_all(bytes)?;
        finish(file, path)
    });
    written.map_err(|e| Error::io(path, e))
}

/// Writes tensors with their names as a safetensors file, whole or not at all, with `metadata` in its header.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] where the format has no place for a tensor or the header; what was at `path` is there still then.
pub fn save_safetensors(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let io = |e: std::io::Error| Error::io(path, e);
    let file = beside(path).map_err(io)?;
    let metadata = (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect::<HashMap<_, _>>());
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let permissions = file.as_file().metadata().map_err(io)?.permissions();
    safetensors::serialize_to_file(tensors, metadata, file.path()).map_err(|error| match error {
        SafeTensorError::IoError(error) => io(error),
        other => Error::format(path, "safetensors", other),
    })?;
    // the library may have put a file of its own in the place, which its owner alone may read
    std::fs::set_permissions(file.path(), permissions).map_err(io)?;
    finish(file, path).map_err(io)
}
