//! A model's files in one directory.

use crate::error::{Error, Result};
use crate::models::{self, BertConfig, BertModel, CausalLm, CausalLmConfig, MpnetConfig, MpnetModel, SentenceEncoder};
use crate::weights::{safetensors, Gguf};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// A local directory: Hugging Face's layout (`config.json`, `model.safetensors` or its shards with
/// `model.safetensors.index.json`, `tokenizer.json`), or one with a `.gguf` file.
#[derive(Debug, Clone)]
pub struct ModelDir {
    dir: PathBuf,
    weights: WeightFiles,
}

/// The files that hold the weights.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightFiles {
    /// One or more safetensors files.
    Safetensors(Vec<PathBuf>),
    /// A GGUF file, with config and tokenizer inside.
    Gguf(PathBuf),
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl ModelDir {
    /// Looks at a directory and finds its weights; reads none.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory cannot be read, [`Error::MissingFile`] where it has no weights or a shard that
    /// its index names is absent, [`Error::Format`] for a broken index.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let mut ggufs = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
            let path = entry.map_err(|e| Error::io(dir, e))?.path();
            if path.extension().is_some_and(|extension| extension == "gguf") {
                ggufs.push(path);
            }
        }
        ggufs.sort();
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let weights = if single.is_file() {
            WeightFiles::Safetensors(vec![single])
        } else if index.is_file() {
            WeightFiles::Safetensors(shards(dir, &index)?)
        } else {
            match ggufs.as_slice() {
                [gguf] => WeightFiles::Gguf(gguf.clone()),
                [] => {
                    return Err(Error::MissingFile {
                        dir: dir.to_path_buf(),
                        expected: "model.safetensors, model.safetensors.index.json or .gguf file".to_string(),
                    })
                }
                several => {
                    return Err(Error::config(
                        dir.display(),
                        format_args!("{} .gguf files: which one is meant is not clear", several.len()),
                    ))
                }
            }
        };
        Ok(Self { dir: dir.to_path_buf(), weights })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The files that hold the weights.
    pub fn weights(&self) -> &WeightFiles {
        &self.weights
    }

    /// The path of a file that the directory must have.
    ///
    /// # Errors
    /// [`Error::MissingFile`].
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if path.is_file() {
            Ok(path)
        } else {
            Err(Error::MissingFile { dir: self.dir.clone(), expected: name.to_string() })
        }
    }

    /// A `VarBuilder` over the weights, with Hugging Face's names.
    ///
    /// # Errors
    /// As [`safetensors`](fn@safetensors) and [`Gguf::open`].
    #[track_caller]
    pub fn var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        match &self.weights {
            WeightFiles::Safetensors(paths) => safetensors(paths, dtype, device),
            WeightFiles::Gguf(path) => Ok(Gguf::open(path)?.var_builder(dtype, device)),
        }
    }

    /// The config of the decoder in the directory: what can be known before its weights are read.
    ///
    /// # Errors
    /// Where its file is missing, corrupt or of another architecture.
    pub fn causal_lm_config(&self) -> Result<CausalLmConfig> {
        match &self.weights {
            WeightFiles::Gguf(path) => Ok(Gguf::open(path)?.config().clone()),
            WeightFiles::Safetensors(_) => CausalLmConfig::from_file(self.file("config.json")?),
        }
    }

    /// Loads the decoder in the directory.
    ///
    /// # Errors
    /// Where a file is missing, corrupt or of another architecture, and as [`CausalLm::load`].
    #[track_caller]
    pub fn causal_lm(&self, dtype: DType, device: &Device) -> Result<CausalLm> {
        match &self.weights {
            WeightFiles::Gguf(path) => {
                let gguf = Gguf::open(path)?;
                CausalLm::load(gguf.var_builder(dtype, device), gguf.config())
            }
            WeightFiles::Safetensors(paths) => {
                let config = CausalLmConfig::from_file(self.file("config.json")?)?;
                CausalLm::load(safetensors(paths, dtype, device)?, &config)
            }
        }
    }

    /// Loads the sentence encoder in the directory.
    ///
    /// # Errors
    /// Where a file is missing, corrupt or of another architecture, and as [`SentenceEncoder::load`].
    #[track_caller]
    pub fn sentence_encoder(&self, dtype: DType, device: &Device) -> Result<SentenceEncoder> {
        match &self.weights {
            WeightFiles::Gguf(path) => Err(Error::Unsupported {
                what: "sentence encoder in",
                found: path.display().to_string(),
                supported: "safetensors with config.json",
            }),
            WeightFiles::Safetensors(paths) => {
                let path = self.file("config.json")?;
                let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
                let architecture = models::model_type(&text, &path.display().to_string())?;
                self.mean_pooling()?;
                // A config without the name is BERT's, as those of old checkpoints are.
                match architecture.as_deref() {
                    Some("mpnet") => {
                        let config = MpnetConfig::from_file(&path)?;
                        Ok(SentenceEncoder::new(MpnetModel::load(safetensors(paths, dtype, device)?, &config)?))
                    }
                    Some("bert") | None => {
                        let config = BertConfig::from_file(&path)?;
                        Ok(SentenceEncoder::new(BertModel::load(safetensors(paths, dtype, device)?, &config)?))
                    }
                    Some(other) => {
                        Err(Error::Unsupported { what: "encoder", found: other.to_string(), supported: "bert, mpnet" })
                    }
                }
            }
        }
    }

    /// Refuses an encoder whose directory says that its tokens' vectors are pooled otherwise than by their mean
    /// (`1_Pooling/config.json` of sentence-transformers).
    fn mean_pooling(&self) -> Result<()> {
        let path = self.dir.join("1_Pooling").join("config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let modes: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(&text).map_err(|e| Error::config(path.display(), e))?;
        let other = modes.iter().find(|(name, value)| {
            name.starts_with("pooling_mode_") && *name != "pooling_mode_mean_tokens" && value.as_bool() == Some(true)
        });
        match other {
            Some((name, _)) => {
                Err(Error::Unsupported { what: "pooling", found: name.clone(), supported: "pooling_mode_mean_tokens" })
            }
            None => Ok(()),
        }
    }

    /// The tokenizer: `tokenizer.json` where there is one, else the one inside the GGUF file.
    ///
    /// # Errors
    /// As [`crate::tokenizer::Tokenizer::from_file`] and [`crate::tokenizer::Tokenizer::from_gguf`].
    #[cfg(feature = "tokenizers")]
    pub fn tokenizer(&self) -> Result<crate::tokenizer::Tokenizer> {
        use crate::tokenizer::Tokenizer;
        match &self.weights {
            WeightFiles::Gguf(path) if self.file("tokenizer.json").is_err() => Tokenizer::from_gguf(&Gguf::open(path)?),
            _ => Tokenizer::from_file(self.file("tokenizer.json")?),
        }
    }
}

/// The files that an index names, each once, all of them inside `dir`.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for name in shard_names(index)? {
        let path = dir.join(&name);
        if !path.is_file() {
            return Err(Error::MissingFile { dir: dir.to_path_buf(), expected: name });
        }
        paths.push(path);
    }
    Ok(paths)
}

/// The names of the files that an index names, each once.
pub(crate) fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(index).map_err(|e| Error::io(index, e))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::format(index, "safetensors index", e))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if names.is_empty() {
        return Err(Error::format(index, "safetensors index", "it names no file"));
    }
    for name in &names {
        // An index comes from outside: it may name files beside itself and no others.
        let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if !plain {
            return Err(Error::format(
                index,
                "safetensors index",
                format_args!("`{name}` lies outside of the directory"),
            ));
        }
    }
    Ok(names)
}
