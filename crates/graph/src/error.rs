//! What can go wrong while recording.

use crate::infer::Meta;
use crate::site::BuildSite;
use std::fmt;

/// A recording error: the op, its operands, what is wrong with their shapes or dtypes, and the user's line.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{op}{operands}: {kind}{site}", operands = Operands(operands), site = Located(site))]
#[non_exhaustive]
pub struct Error {
    /// The name of the op that refused.
    pub op: &'static str,
    /// The dtypes and shapes that it refused, where it had operands: `f32 [2, 3], f32 [4]`.
    pub operands: Option<Box<str>>,
    /// What is wrong.
    pub kind: ErrorKind,
    /// Where the op was written; absent only for a graph that no user line built (a rewritten one).
    pub site: Option<Box<BuildSite>>,
}

struct Operands<'a>(&'a Option<Box<str>>);

impl fmt::Display for Operands<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(operands) => write!(f, "({operands})"),
            None => Ok(()),
        }
    }
}

/// Dtypes and shapes as errors name them: `f32 [2, 3], u32 [4]`.
#[must_use]
pub fn describe(operands: &[Meta<'_>]) -> String {
    let one = |m: &Meta<'_>| format!("{} {:?}", m.dtype.as_str(), m.dims);
    operands.iter().map(one).collect::<Vec<_>>().join(", ")
}

struct Located<'a>(&'a Option<Box<BuildSite>>);

impl fmt::Display for Located<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(site) => write!(f, ", at {site}"),
            None => Ok(()),
        }
    }
}

/// The kinds of recording errors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Shapes that do not fit each other or the op.
    #[error("shape mismatch, {0}")]
    Shape(String),
    /// Dtypes that do not fit each other or the op.
    #[error("dtype mismatch, {0}")]
    DType(String),
    /// Inputs on different devices.
    #[error("device mismatch, {0}")]
    Device(String),
    /// A dimension or an index out of range.
    #[error("out of range, {0}")]
    Range(String),
    /// Something that this version does not do.
    #[error("unsupported, {0}")]
    Unsupported(String),
    /// A value that was given away to an in-place update and lost when that update failed.
    #[error("state lost, {0}")]
    Lost(String),
    /// A rewrite broke the graph: a defect of this library, never of the user's program.
    #[error("invalid graph, {0}")]
    Invalid(String),
}

/// The result of recording.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `op` without a line yet.
    #[must_use]
    pub fn new(op: &'static str, kind: ErrorKind) -> Self {
        Self { op, operands: None, kind, site: None }
    }

    /// The same error, naming the dtypes and shapes of the operands.
    #[must_use]
    pub fn on(mut self, operands: &[Meta<'_>]) -> Self {
        if self.operands.is_none() && !operands.is_empty() {
            self.operands = Some(describe(operands).into());
        }
        self
    }

    /// The same error, naming the line that wrote the op.
    #[must_use]
    pub fn at(mut self, site: &BuildSite) -> Self {
        if self.site.is_none() {
            self.site = Some(Box::new(site.clone()));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_op_kind_and_line() {
        let error = Error::new("matmul", ErrorKind::Shape("[2, 3] x [4, 5]".into())).at(&BuildSite::here());
        let text = error.to_string();
        assert!(text.starts_with("matmul: shape mismatch, [2, 3] x [4, 5], at "), "{text}");
        assert!(text.contains("error.rs:"), "{text}");
    }

    #[test]
    fn operands_stand_behind_the_op() {
        let operands = [Meta { dims: &[2, 3], dtype: candle_core::DType::F32 }];
        let error = Error::new("sum", ErrorKind::Range("dim 5".into())).on(&operands);
        assert_eq!(error.to_string(), "sum(f32 [2, 3]): out of range, dim 5");
    }

    #[test]
    fn the_first_line_wins() {
        let first = BuildSite::here();
        let second = BuildSite::here();
        let error = Error::new("add", ErrorKind::DType("x".into())).at(&first).at(&second);
        assert_eq!(error.site.unwrap().location().line(), first.location().line());
    }
}
