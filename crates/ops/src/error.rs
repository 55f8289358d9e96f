//! The one error type of this crate.

use candle_core::DType;

/// What a kernel, a layout or a row program refuses, naming the operation and the shapes or dtypes.
#[derive(thiserror::Error, Debug, Clone)]
#[non_exhaustive]
pub enum Error {
    /// Shapes that do not fit together, or a dim that does not exist.
    #[error("{op}: {detail}")]
    ShapeMismatch {
        /// The operation that was asked for.
        op: &'static str,
        /// The shapes, in words.
        detail: String,
    },
    /// Operands whose dtypes do not fit together.
    #[error("{op}: {detail}")]
    DTypeMismatch {
        /// The operation that was asked for.
        op: &'static str,
        /// The dtypes, in words.
        detail: String,
    },
    /// A dtype, device or combination that the operation does not cover.
    #[error("{op}: unsupported: {detail}")]
    Unsupported {
        /// The operation that was asked for.
        op: &'static str,
        /// What is not covered.
        detail: String,
    },
    /// An index tensor holds a value outside the indexed dim.
    #[error("{op}: index {index} at position {position} is out of range for a dim of size {size}")]
    IndexOutOfRange {
        /// The operation that was asked for.
        op: &'static str,
        /// The offending index.
        index: i64,
        /// Size of the indexed dim.
        size: usize,
        /// Where the index stands in the (flattened) index tensor.
        position: usize,
    },
    /// A layout reaches past the end of its data.
    #[error("{op}: layout {layout} reaches past the end of {len} elements")]
    OutOfBounds {
        /// The operation that was asked for.
        op: &'static str,
        /// Dims, strides and offset.
        layout: String,
        /// How many elements the data has.
        len: usize,
    },
    /// A row program that breaks one of its rules.
    #[error("row program: {detail}")]
    InvalidProgram {
        /// The rule and the instruction.
        detail: String,
    },
}

/// Shorthand for results of this crate's kernels.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn shape(op: &'static str, detail: impl Into<String>) -> Self {
        Error::ShapeMismatch { op, detail: detail.into() }
    }

    pub(crate) fn dtype(op: &'static str, detail: impl Into<String>) -> Self {
        Error::DTypeMismatch { op, detail: detail.into() }
    }

    pub(crate) fn unsupported(op: &'static str, detail: impl Into<String>) -> Self {
        Error::Unsupported { op, detail: detail.into() }
    }

    pub(crate) fn program(detail: impl Into<String>) -> Self {
        Error::InvalidProgram { detail: detail.into() }
    }

    /// Both dtypes of a pair that had to agree.
    pub(crate) fn dtypes(op: &'static str, what: &str, want: DType, got: DType) -> Self {
        Error::dtype(op, format!("{what} must be {}, got {}", want.as_str(), got.as_str()))
    }
}

impl From<Error> for candle_core::Error {
    fn from(e: Error) -> Self {
        candle_core::Error::wrap(e)
    }
}
