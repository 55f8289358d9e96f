//! Candle's custom ops, which pass through the graph unread.

use candle_core::{CustomOp1, CustomOp2, CustomOp3};
use std::sync::Arc;

/// A custom op of one to three inputs. Two are the same only if they are the same `Arc`.
#[derive(Clone)]
pub enum CustomOp {
    /// Of one input.
    One(Arc<Box<dyn CustomOp1 + Send + Sync>>),
    /// Of two inputs.
    Two(Arc<Box<dyn CustomOp2 + Send + Sync>>),
    /// Of three inputs.
    Three(Arc<Box<dyn CustomOp3 + Send + Sync>>),
    /// The backward of a custom op: takes its inputs, its result and the gradient of that, and gives the gradient of one input.
    Backward(Box<CustomOp>, u8),
}

impl CustomOp {
    /// The name that the op gives itself.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::One(op) => op.name(),
            Self::Two(op) => op.name(),
            Self::Three(op) => op.name(),
            Self::Backward(op, _) => op.name(),
        }
    }

    /// How many inputs it takes.
    #[must_use]
    pub fn arity(&self) -> u8 {
        match self {
            Self::One(_) => 1,
            Self::Two(_) => 2,
            Self::Three(_) => 3,
            Self::Backward(op, _) => op.arity().saturating_add(2),
        }
    }

    /// Whether both are one object.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::One(a), Self::One(b)) => Arc::ptr_eq(a, b),
            (Self::Two(a), Self::Two(b)) => Arc::ptr_eq(a, b),
            (Self::Three(a), Self::Three(b)) => Arc::ptr_eq(a, b),
            (Self::Backward(a, i), Self::Backward(b, j)) => i == j && a.is(b),
            _ => false,
        }
    }
}

impl std::fmt::Debug for CustomOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Backward(op, input) => write!(f, "{op:?}.bwd[{input}]"),
            Self::One(_) | Self::Two(_) | Self::Three(_) => write!(f, "CustomOp{}({})", self.arity(), self.name()),
        }
    }
}
