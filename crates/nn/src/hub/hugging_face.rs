//! Models of the Hugging Face hub.

use super::{ModelSource, Progress};
use crate::error::{Error, Result};
use crate::model_dir::{self, ModelDir};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model of the Hugging Face hub, with its weights in safetensors.
///
/// Its files lie in the hub's own cache, which Python's libraries use as well (`HF_HOME`, else `~/.cache/huggingface`), so that what
/// is there already is not fetched again; the cache that [`ModelSource::fetch`] is given stays as it is. `HF_ENDPOINT` names a
/// mirror. A model whose files are all there touches no network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    repo: String,
    revision: String,
    files: Vec<String>,
}

impl HubModel {
    /// The model `repo` (`owner/name`) on its main branch: weights, `config.json` and `tokenizer.json`.
    pub fn new(repo: impl Into<String>) -> Self {
        let files = ["config.json", "tokenizer.json"].map(str::to_string).to_vec();
        Self { repo: repo.into(), revision: "main".to_string(), files }
    }

    /// Of a branch, tag or commit.
    pub fn with_revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = revision.into();
        self
    }

    /// With one more file beside the weights, for instance `1_Pooling/config.json` of a sentence encoder.
    pub fn with_file(mut self, name: impl Into<String>) -> Self {
        self.files.push(name.into());
        self
    }

    /// The model, where all its files are in the hub's cache; asks nobody.
    ///
    /// # Errors
    /// As [`ModelDir::open`].
    pub fn open_cached(&self) -> Result<Option<ModelDir>> {
        self.cached(&Cache::from_env())?.map(ModelDir::open).transpose()
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, self.revision.clone())
    }

    fn error(&self, file: Option<&str>, reason: &dyn std::fmt::Display) -> Error {
        Error::HubDownload { repo: self.repo.clone(), file: file.map(str::to_string), reason: reason.to_string() }
    }

    /// The directory of a model whose files are all in the cache.
    fn cached(&self, cache: &Cache) -> Result<Option<PathBuf>> {
        let cached = cache.repo(self.repo());
        let mut dir = None;
        for name in &self.files {
            let Some(path) = cached.get(name) else {
                return Ok(None);
            };
            // the directory of the snapshot: as many folders up as the name has parts
            dir = path.ancestors().nth(Path::new(name).components().count()).map(Path::to_path_buf);
        }
        let shards = match (cached.get(SINGLE), cached.get(INDEX)) {
            (Some(_), _) => BTreeSet::new(),
            (None, Some(index)) => model_dir::shard_names(&index)?,
            (None, None) => return Ok(None),
        };
        let whole = shards.iter().all(|shard| cached.get(shard).is_some());
        Ok(if whole { dir } else { None })
    }

    fn download(&self, api: &ApiRepo, name: &str, progress: &dyn Progress) -> Result<PathBuf> {
        let told = Told { progress, done: 0, total: None };
        api.download_with_progress(name, told).map_err(|e| self.error(Some(name), &e))
    }

    fn fetch_with(&self, builder: ApiBuilder, cache: &Cache, progress: &dyn Progress) -> Result<ModelDir> {
        if let Some(dir) = self.cached(cache)? {
            return ModelDir::open(dir);
        }
        let api = builder.build().map_err(|e| self.error(None, &e))?.repo(self.repo());
        let cached = cache.repo(self.repo());
        let bring = |name: &str| match cached.get(name) {
            Some(path) => Ok(path),
            None => self.download(&api, name, progress),
        };
        let listed = api.info().map_err(|e| self.error(None, &e))?;
        let has = |name: &str| listed.siblings.iter().any(|file| file.rfilename == name);
        let missing = self.files.iter().map(String::as_str).find(|name| !has(name));
        if let Some(name) = missing.or((!has(SINGLE) && !has(INDEX)).then_some(SINGLE)) {
            return Err(self.error(Some(name), &"the repository has no such file"));
        }
        for name in &self.files {
            bring(name)?;
        }
        if has(SINGLE) {
            bring(SINGLE)?;
        } else {
            for shard in model_dir::shard_names(&bring(INDEX)?)? {
                bring(&shard)?;
            }
        }
        match self.cached(cache)? {
            Some(dir) => ModelDir::open(dir),
            None => Err(self.error(None, &"its files were fetched and are not in the cache")),
        }
    }
}

impl ModelSource for HubModel {
    fn name(&self) -> &str {
        &self.repo
    }

    fn fetch(&self, _cache: &Path, progress: &dyn Progress) -> Result<ModelDir> {
        self.fetch_with(ApiBuilder::from_env(), &Cache::from_env(), progress)
    }
}

/// The hub's progress, told to ours.
struct Told<'a> {
    progress: &'a dyn Progress,
    done: u64,
    total: Option<u64>,
}

impl hf_hub::api::Progress for Told<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        // The client says so at the start and again for every attempt, which then reports what the last one had brought.
        self.done = 0;
        if self.total.replace(size as u64).is_none() {
            self.progress.start(&format!("fetching {filename}"), self.total);
        }
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.progress.update(self.done, self.total);
    }

    fn finish(&mut self) {
        self.progress.finish();
    }
}

#[cfg(test)]
#[path = "hugging_face_tests.rs"]
mod tests;
