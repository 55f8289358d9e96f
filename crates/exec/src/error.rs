//! What can go wrong while recording or running.

use candle_core::DType;
use candle_lazy_graph::BuildSite;
use std::fmt;

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
    /// Checked mode: what the plan computes for a node is not what eager execution of that node gives.
    #[error(transparent)]
    Differs(Box<Difference>),
    /// A defect of this library.
    #[error("internal error: {0}")]
    Internal(String),
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
            Self::Differs(difference) => Some(&difference.site),
            Self::Candle(_) | Self::Memory { .. } | Self::Internal(_) => None,
        }
    }
}
