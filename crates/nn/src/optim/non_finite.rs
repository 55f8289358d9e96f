//! Steps whose numbers are none.

use candle_lazy_exec::{first_nan, first_nonfinite, LazyTensor, NonFinite};
use std::fmt;

/// What is not finite in a step that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NonFinitePart {
    /// The gradient of the parameter of this name, and of no parameter before it.
    Gradient(String),
    /// The loss, though every gradient is finite.
    Loss,
}

impl fmt::Display for NonFinitePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gradient(name) => write!(f, "the gradient of `{name}`"),
            Self::Loss => f.write_str("the loss"),
        }
    }
}

/// Where the first number that is not finite arose.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum NonFiniteOrigin {
    /// At this op or leaf of the loss.
    InLoss(Box<NonFinite>),
    /// On the way back: whatever the loss is made of is finite.
    InBackward,
    /// It cannot be said: the step was given no loss that keeps what it was made of.
    Unknown,
}

impl fmt::Display for NonFiniteOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InLoss(first) => write!(f, "the first such number of the loss is {first}"),
            Self::InBackward => f.write_str("the loss and all it is made of is finite"),
            Self::Unknown => {
                f.write_str("give the step the loss, not detached, to see where the first such number arises")
            }
        }
    }
}

impl NonFiniteOrigin {
    /// In a loss that keeps what it was made of, whether evaluated or not: the first NaN, where there is one, since an infinity may be
    /// meant, as a mask's is.
    ///
    /// Unknown too where it cannot be computed again: that is not to hide what is to be told.
    pub(crate) fn of(loss: Option<&LazyTensor>) -> Self {
        let Some(loss) = loss.filter(|loss| loss.is_traced()) else {
            return Self::Unknown;
        };
        let first = match first_nan(&[loss]) {
            Ok(None) => first_nonfinite(&[loss]),
            other => other,
        };
        match first {
            Ok(Some(first)) => Self::InLoss(Box::new(first)),
            Ok(None) => Self::InBackward,
            Err(_) => Self::Unknown,
        }
    }
}

/// The first of what a step evaluates along, where it is a scalar of floats: the loss.
pub(super) fn loss<'a>(also: &[&'a LazyTensor]) -> Option<&'a LazyTensor> {
    also.first().copied().filter(|value| value.dtype().is_float() && value.elem_count() == 1)
}
