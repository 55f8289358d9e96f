//! What can go wrong while recording or running.

use candle_lazy_graph::BuildSite;

/// The result of recording or evaluating.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of recording or of running.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An op refused its inputs when it was recorded.
    #[error(transparent)]
    Record(#[from] candle_lazy_graph::Error),
    /// A kernel or a Candle op failed while a plan ran. The graph is as it was before, and evaluation can be retried.
    #[error("{op}: {source}, recorded at {site}")]
    Run {
        /// The op.
        op: &'static str,
        /// Where it was recorded.
        site: Box<BuildSite>,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Candle refused something outside a recorded graph (making a tensor from a slice, reading a result).
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel panicked: a defect of the kernel or of a custom op, contained here.
    #[error("{op}: a kernel panicked ({message}), recorded at {site}")]
    Panic {
        /// The op.
        op: &'static str,
        /// Where it was recorded.
        site: Box<BuildSite>,
        /// The panic's message.
        message: String,
    },
    /// A defect of this library.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

impl Error {
    /// The recording error, if this is one.
    #[must_use]
    pub fn as_record(&self) -> Option<&candle_lazy_graph::Error> {
        match self {
            Self::Record(error) => Some(error),
            _ => None,
        }
    }

    /// Where the op that failed was recorded, if an op failed.
    #[must_use]
    pub fn site(&self) -> Option<&BuildSite> {
        match self {
            Self::Record(error) => error.site.as_deref(),
            Self::Run { site, .. } | Self::Panic { site, .. } => Some(site),
            Self::Candle(_) | Self::Internal(_) => None,
        }
    }
}
