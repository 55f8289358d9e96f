//! What can go wrong while recording or running.

use candle_core::DType;
use candle_lazy_graph::BuildSite;
use std::fmt;
use std::path::PathBuf;

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
    #[error("{op}{operands}: {source}, recorded at {site}{members}", members = Listed(members))]
    Run {
        /// The op.
        op: &'static str,
        /// The dtypes and shapes of its inputs in parentheses; empty where it has none.
        operands: String,
        /// Where it was recorded.
        site: Box<BuildSite>,
        /// Where several ops ran as one step: each of them, in the order in which they compute.
        members: Vec<Member>,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Candle refused something outside a recorded graph (making a tensor from a slice, reading a result).
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel panicked: a defect of the kernel or of a custom op, contained here.
    #[error("{op}{operands}: a kernel panicked ({message}), recorded at {site}{members}", members = Listed(members))]
    Panic {
        /// The op.
        op: &'static str,
        /// The dtypes and shapes of its inputs in parentheses; empty where it has none.
        operands: String,
        /// Where it was recorded.
        site: Box<BuildSite>,
        /// Where several ops ran as one step: each of them, in the order in which they compute.
        members: Vec<Member>,
        /// The panic's message.
        message: String,
    },
    /// A value needs more memory than the system grants.
    #[error("{bytes} bytes of memory were asked for and not granted")]
    Memory {
        /// How much was asked for.
        bytes: usize,
    },
    /// A run would need more memory than it may have. Nothing was run.
    #[error(
        "evaluation needs {needed} bytes at once, of which this result is the largest part; the budget is {budget}"
    )]
    Budget {
        /// How much is needed.
        needed: u64,
        /// How much is allowed.
        budget: u64,
    },
    /// A request that waited to be evaluated with others was not.
    #[error(transparent)]
    Queue(QueueError),
    /// Checked mode: what the plan computes for a node is not what eager execution of that node gives.
    #[error(transparent)]
    Differs(Box<Difference>),
    /// A defect of this library.
    #[error("internal error: {0}")]
    Internal(String),
    /// A message of the user's program, as `candle::bail!` makes it.
    #[error("{0}")]
    Msg(String),
    /// An error of the user's program or of a layer above.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
    /// An error and what was being done.
    #[error("{context}\n{inner}")]
    Context {
        /// What was being done.
        context: String,
        /// The error.
        inner: Box<Error>,
    },
    /// An error and the file that it is about.
    #[error("path: {path:?} {inner}")]
    WithPath {
        /// The file.
        path: PathBuf,
        /// The error.
        inner: Box<Error>,
    },
    /// An error that does not come from an op, and the line of the user's program.
    #[error("{inner}, at {site}")]
    At {
        /// The error.
        inner: Box<Error>,
        /// The line that asked for what failed.
        site: Box<BuildSite>,
    },
}

/// Why a request that stood in a line was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// As many wait as may.
    #[error("the queue is full: {capacity} may wait, and as many do")]
    Full {
        /// How many may wait.
        capacity: usize,
    },
    /// Its deadline passed before it began.
    #[error("the deadline of the request passed before it began")]
    Deadline,
    /// The line was closed.
    #[error("the queue is closed")]
    Closed,
    /// Who was to serve it dropped it, for instance by a panic.
    #[error("the request was dropped without an answer")]
    Lost,
}

/// One of the ops that ran as one step.
#[derive(Debug, Clone)]
pub struct Member {
    /// The op.
    pub op: &'static str,
    /// Where it was recorded.
    pub site: BuildSite,
}

struct Listed<'a>(&'a [Member]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, member) in self.0.iter().enumerate() {
            let before = if i == 0 { "; one step of " } else { ", " };
            write!(f, "{before}{} at {}", member.op, member.site)?;
        }
        Ok(())
    }
}

/// The first recorded node whose planned value is not what eager execution gives: what checked mode found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Difference {
    /// The op with its attributes, as dumps print it.
    pub op: String,
    /// The dtypes and shapes of its inputs.
    pub operands: String,
    /// The shape of the result.
    pub dims: Vec<usize>,
    /// The dtype of the result.
    pub dtype: DType,
    /// Where it was recorded.
    pub site: BuildSite,
    /// The index of the element that is furthest off.
    pub index: Vec<usize>,
    /// That element by the plan.
    pub planned: f64,
    /// That element by Candle's own op on the same inputs.
    pub eager: f64,
    /// That element computed in f64 from the same inputs, where the op may round.
    pub exact: Option<f64>,
    /// How far the plan is off and how far it may be, in units in the last place at the scale of the row; `None` where every
    /// bit must be the same.
    pub ulp: Option<(f64, f64)>,
}

impl std::error::Error for Difference {}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, operands, dims, dtype, site, index, planned, eager, .. } = self;
        write!(f, "{op} of ({operands}) to {} {dims:?}: element {index:?} is {planned:?} by the plan", dtype.as_str())?;
        write!(f, " and {eager:?} by eager execution")?;
        match (self.ulp, self.exact) {
            (Some((off, allowed)), Some(exact)) => {
                write!(f, " ({exact:?} in f64: {off:.1} ulp off, {allowed:.1} allowed)")?;
            }
            _ => write!(f, " (every bit must be the same)")?,
        }
        write!(f, ", recorded at {site}")
    }
}

/// Candle's error without the backtrace that it carries where `RUST_BACKTRACE` is set: in the middle of our text it would part the
/// user's line from the rest, and it shows this crate's frames.
pub(crate) fn bare(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => bare(*inner),
        other => other,
    }
}

/// What Candle's error says that our own text does not: op, shapes and dtypes stand before it.
pub(crate) fn words(error: &candle_core::Error) -> String {
    use candle_core::Error as C;
    match error {
        C::WithBacktrace { inner, .. } => words(inner),
        C::DimOutOfRange { dim, .. } => format!("there is no dim {dim}"),
        C::DuplicateDimIndex { dims, .. } => format!("a dim is named twice in {dims:?}"),
        C::ShapeMismatch { buffer_size, shape } => format!("{buffer_size} elements do not make {shape:?}"),
        other => other.to_string(),
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            Error::Msg(message) => candle_core::Error::Msg(message),
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
            Self::Context { inner, .. } | Self::WithPath { inner, .. } | Self::At { inner, .. } => inner.as_record(),
            _ => None,
        }
    }

    /// Where the op that failed was recorded, if an op failed.
    #[must_use]
    pub fn site(&self) -> Option<&BuildSite> {
        match self {
            Self::Record(error) => error.site.as_deref(),
            Self::Run { site, .. } | Self::Panic { site, .. } | Self::At { site, .. } => Some(site),
            Self::Differs(difference) => Some(&difference.site),
            Self::Context { inner, .. } | Self::WithPath { inner, .. } => inner.site(),
            Self::Candle(_)
            | Self::Memory { .. }
            | Self::Budget { .. }
            | Self::Queue(_)
            | Self::Internal(_)
            | Self::Msg(_)
            | Self::Other(_) => None,
        }
    }
}

/// The constructors of `candle_core::Error` under their names, so that ported code makes its errors as before.
impl Error {
    /// An error that says what `error` says.
    pub fn wrap(error: impl std::fmt::Display + Send + Sync + 'static) -> Self {
        Self::Msg(error.to_string())
    }

    /// An error with this message.
    pub fn msg(message: impl std::fmt::Display) -> Self {
        Self::Msg(message.to_string())
    }

    /// An error with the debug form of `message`.
    pub fn debug(message: impl std::fmt::Debug) -> Self {
        Self::Msg(format!("{message:?}"))
    }

    /// The same error. Candle adds a backtrace here; errors of this crate name the user's line instead.
    #[must_use]
    pub fn bt(self) -> Self {
        self
    }

    /// The same error, naming the file that it is about.
    #[must_use]
    pub fn with_path<P: AsRef<std::path::Path>>(self, path: P) -> Self {
        Self::WithPath { path: path.as_ref().to_path_buf(), inner: Box::new(self) }
    }

    /// The same error, saying what was being done.
    #[must_use]
    pub fn context(self, context: impl std::fmt::Display + Send + Sync + 'static) -> Self {
        Self::Context { context: context.to_string(), inner: Box::new(self) }
    }

    /// The same error, naming the caller's line unless it names one already.
    #[track_caller]
    #[must_use]
    pub fn at_caller(self) -> Self {
        if self.site().is_some() {
            return self;
        }
        let inner = match self {
            Self::Candle(error) => Self::Candle(bare(error)),
            other => other,
        };
        Self::At { inner: Box::new(inner), site: Box::new(BuildSite::here()) }
    }
}

macro_rules! through_candle {
    ($($error:ty),+ $(,)?) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::Candle(error.into())
            }
        })+
    };
}

through_candle!(std::io::Error, std::num::ParseIntError, std::num::TryFromIntError, std::string::FromUtf8Error,);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_say_what_was_being_done_and_keep_the_line() {
        let inner = candle_lazy_graph::Error::new("add", candle_lazy_graph::ErrorKind::Shape("x".into()))
            .at(&BuildSite::here());
        let line = line!() - 1;
        let error = Error::from(inner).context("loading").with_path("w.gguf").at_caller();
        assert_eq!(error.site().map(|site| site.location().line()), Some(line));
        assert_eq!(error.as_record().map(|error| error.op), Some("add"));
        let text = error.to_string();
        assert!(text.starts_with("path: \"w.gguf\" loading\nadd: shape mismatch"), "{text}");
    }

    #[test]
    fn an_error_without_a_line_gets_the_callers() {
        let line = line!() + 1;
        let error = Error::msg("nothing there").at_caller();
        assert!(error.to_string().starts_with("nothing there, at "), "{error}");
        assert_eq!(error.site().map(|site| site.location().line()), Some(line));
    }

    #[test]
    fn a_backtrace_of_candles_stays_out_of_the_text() {
        let inner = candle_core::Error::Msg("gone".into());
        let traced = candle_core::Error::WithBacktrace {
            inner: Box::new(inner),
            backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
        };
        assert_eq!(words(&traced), "gone");
        let text = Error::from(traced).at_caller().to_string();
        assert!(text.starts_with("gone, at ") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn messages_and_candles_errors_pass_through() {
        assert!(matches!(candle_core::Error::from(Error::msg("m")), candle_core::Error::Msg(m) if m == "m"));
        assert!(matches!(Error::from(std::io::Error::other("gone")), Error::Candle(candle_core::Error::Io(_))));
        assert_eq!(Error::wrap("a").to_string(), "a");
        assert_eq!(Error::debug("a").bt().to_string(), "\"a\"");
    }
}
