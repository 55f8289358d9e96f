//! The errors of v1, with its variants and its words.

use std::path::PathBuf;

/// The result of most functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Any error of this crate.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// A model or its files.
    #[error("Model error: {0}")]
    Model(#[from] ModelError),
    /// Training, adapters, optimiser, and the evaluation of lazy graphs.
    #[error("Training error: {0}")]
    Training(#[from] TrainingError),
    /// Generation and sampling.
    #[error("Inference error: {0}")]
    Inference(#[from] InferenceError),
    /// Checkpoints.
    #[error("Checkpoint error: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// Devices.
    #[error("Device error: {0}")]
    Device(#[from] DeviceError),
    /// Embedding models.
    #[error("Embedding error: {0}")]
    Embedding(#[from] EmbeddingError),
    /// Files.
    #[error("IO error: {0}")]
    Io(#[from] std::io::Error),
    /// Candle or the engine refused an operation.
    #[error("Candle error: {0}")]
    Candle(#[from] candle_core::Error),
    /// JSON.
    #[error("JSON error: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<candle_lazy_exec::Error> for Error {
    fn from(error: candle_lazy_exec::Error) -> Self {
        Self::Candle(error.into())
    }
}

impl From<candle_lazy_nn::Error> for Error {
    fn from(error: candle_lazy_nn::Error) -> Self {
        match error {
            candle_lazy_nn::Error::Exec(error) => Self::Candle((*error).into()),
            other => Self::Candle(candle_core::Error::wrap(other)),
        }
    }
}

/// What can be wrong with a model or its files.
#[derive(thiserror::Error, Debug)]
pub enum ModelError {
    /// There is no such file.
    #[error("model file not found: {path}", path = path.display())]
    FileNotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file is not what its name says.
    #[error("invalid model format: {reason}")]
    InvalidFormat {
        /// Why.
        reason: String,
    },
    /// Another version was expected.
    #[error("incompatible model version: expected {expected}, found {found}")]
    IncompatibleVersion {
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A config is missing, unreadable or contradicts itself.
    #[error("invalid model configuration: {reason}")]
    InvalidConfig {
        /// Why.
        reason: String,
    },
    /// A tensor has another shape.
    #[error("shape mismatch: expected {expected:?}, got {actual:?}")]
    ShapeMismatch {
        /// The shape that was expected.
        expected: Vec<usize>,
        /// The shape that was found.
        actual: Vec<usize>,
    },
}

/// What can go wrong in training.
#[derive(thiserror::Error, Debug)]
pub enum TrainingError {
    /// An adapter's config.
    #[error("invalid LoRA configuration: {reason}")]
    InvalidLoRAConfig {
        /// Why.
        reason: String,
    },
    /// Another config, or inputs that a loss does not take.
    #[error("invalid training configuration: {reason}")]
    InvalidConfig {
        /// Why.
        reason: String,
    },
    /// An operation failed.
    #[error("training failed: {reason}")]
    Failed {
        /// Why.
        reason: String,
    },
    /// A gradient is missing or unusable.
    #[error("gradient error: {reason}")]
    Gradient {
        /// Why.
        reason: String,
    },
    /// The optimiser or the registry does not know what it was asked for.
    #[error("training state error: {reason}")]
    StateError {
        /// Why.
        reason: String,
    },
}

impl TrainingError {
    /// A failure that says what `error` says.
    #[cfg(any(feature = "custom-metal", feature = "graph"))]
    pub(crate) fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed { reason: error.to_string() }
    }

    /// A config or an input that means nothing.
    pub(crate) fn config(reason: impl std::fmt::Display) -> Self {
        Self::InvalidConfig { reason: reason.to_string() }
    }

    /// What `nn` says of a config or an input, as [`TrainingError::InvalidConfig`]; other errors stay what they are.
    pub(crate) fn refused(error: candle_lazy_nn::Error) -> Error {
        use candle_lazy_nn::Error as E;
        match error {
            E::Config { what, message } => Self::config(format_args!("{what}: {message}")).into(),
            E::Module { .. } => Self::config(error).into(),
            other => other.into(),
        }
    }

    /// What `nn` says of a gradient, as [`TrainingError::Gradient`]; of a config, as [`TrainingError::refused`].
    pub(crate) fn gradient_refused(error: candle_lazy_nn::Error) -> Error {
        match error {
            candle_lazy_nn::Error::Module { .. } => Self::Gradient { reason: error.to_string() }.into(),
            other => Self::refused(other),
        }
    }

    /// A name that is not known, or is taken.
    pub(crate) fn state(reason: impl std::fmt::Display) -> Self {
        Self::StateError { reason: reason.to_string() }
    }
}

/// What can go wrong in generation.
#[derive(thiserror::Error, Debug)]
pub enum InferenceError {
    /// A config.
    #[error("invalid inference configuration: {reason}")]
    InvalidConfig {
        /// Why.
        reason: String,
    },
    /// An operation failed.
    #[error("inference failed: {reason}")]
    Failed {
        /// Why.
        reason: String,
    },
    /// A sampling strategy that means nothing.
    #[error("invalid sampling parameters: {reason}")]
    InvalidSampling {
        /// Why.
        reason: String,
    },
    /// The cache has no room.
    #[error("KV cache is full: position {position}, maximum length {max_len}")]
    CacheFull {
        /// Positions held.
        position: usize,
        /// Positions there is room for.
        max_len: usize,
    },
    /// No token could be sampled.
    #[error("sampling error: {reason}")]
    SamplingError {
        /// Why.
        reason: String,
    },
    /// The text has ended.
    #[error("end of sequence at position {position}")]
    EndOfSequence {
        /// Where.
        position: usize,
    },
}

/// What can go wrong with checkpoints.
#[derive(thiserror::Error, Debug)]
pub enum CheckpointError {
    /// A checkpoint could not be written.
    #[error("failed to save checkpoint: {reason}")]
    SaveFailed {
        /// Why.
        reason: String,
    },
    /// A checkpoint does not fit.
    #[error("failed to load checkpoint: {reason}")]
    LoadFailed {
        /// Why.
        reason: String,
    },
    /// A file is no checkpoint.
    #[error("invalid checkpoint format: {reason}")]
    InvalidFormat {
        /// Why.
        reason: String,
    },
}

/// What can go wrong with devices.
#[derive(thiserror::Error, Debug)]
pub enum DeviceError {
    /// There is no Metal device.
    #[error("Metal device not available: {reason}")]
    MetalUnavailable {
        /// Why.
        reason: String,
    },
    /// A device could not be set up.
    #[error("device initialization failed: {reason}")]
    InitializationFailed {
        /// Why.
        reason: String,
    },
    /// There is no memory.
    #[error("memory allocation failed: requested {requested_bytes} bytes")]
    AllocationFailed {
        /// How much was asked for.
        requested_bytes: usize,
    },
    /// An operation failed.
    #[error("device operation failed: {operation}")]
    OperationFailed {
        /// Which.
        operation: String,
    },
}

/// What can go wrong with embedding models.
#[derive(thiserror::Error, Debug)]
pub enum EmbeddingError {
    /// A model could not be fetched.
    #[error("failed to download model: {reason}")]
    DownloadFailed {
        /// Why.
        reason: String,
    },
    /// A model is not where it should be.
    #[error("model not found: {model_id}")]
    ModelNotFound {
        /// Its name.
        model_id: String,
    },
    /// A tokenizer could not be read.
    #[error("failed to initialize tokenizer: {reason}")]
    TokenizerFailed {
        /// Why.
        reason: String,
    },
    /// A text could not be tokenized.
    #[error("tokenization failed: {reason}")]
    TokenizationFailed {
        /// Why.
        reason: String,
    },
    /// There is no text.
    #[error("cannot encode empty text")]
    EmptyInput,
    /// A config.
    #[error("invalid embedding configuration: {reason}")]
    InvalidConfig {
        /// Why.
        reason: String,
    },
    /// A vector has another length.
    #[error("dimension mismatch: expected {expected}, got {actual}")]
    DimensionMismatch {
        /// The length that was expected.
        expected: usize,
        /// The length that was found.
        actual: usize,
    },
}
