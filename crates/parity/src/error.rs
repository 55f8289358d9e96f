//! What can go wrong while checking (a result that is wrong is no error but a failed cell).

use candle_core::DType;

/// The result of a check's machinery.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the checker's machinery.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Eager Candle refused.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
    /// Lazy evaluation refused.
    #[error("lazy: {0}")]
    Lazy(#[from] candle_lazy_exec::Error),
    /// Recording refused.
    #[error("record: {0}")]
    Record(#[from] candle_lazy_graph::Error),
    /// A model of `nn` refused.
    #[error("nn: {0}")]
    Nn(#[from] candle_lazy_nn::Error),
    /// A reference refused.
    #[error(transparent)]
    Reference(#[from] crate::reference::BadShape),
    /// A dtype that no case has.
    #[error("dtype {0:?} cannot be read")]
    Unreadable(DType),
    /// Nothing to compare with.
    #[error("{0}")]
    NoTwin(String),
    /// A file that could not be read or parsed.
    #[error("{path}: {detail}")]
    File {
        /// The file.
        path: String,
        /// What is wrong.
        detail: String,
    },
    /// A filter or option that names nothing.
    #[error("{0}")]
    Option(String),
}
