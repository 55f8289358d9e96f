//! What a node holds: an expression that waits, or a value.

use super::Inputs;
use crate::custom::CustomOp;
use crate::op::{Op, Scalars};
use candle_core::quantized::QTensor;
use candle_core::Tensor;
use std::any::Any;
use std::sync::Arc;

/// A value that the executor holds in its own memory; opaque here.
pub trait EngineValue: Any + Send + Sync + std::fmt::Debug {
    /// Whether the elements lie in row-major order without gaps.
    fn is_contiguous(&self) -> bool;
    /// For downcasting in the executor.
    fn as_any(&self) -> &dyn Any;
    /// For downcasting in the executor, with ownership.
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

/// What a ready node holds.
#[derive(Clone, Debug)]
pub enum Value {
    /// A Candle tensor, the user's or one that `eval` made.
    Tensor(Tensor),
    /// A buffer of the executor.
    Engine(Arc<dyn EngineValue>),
    /// A quantised weight; only [`Op::QMatmul`] reads one.
    Quantized(Arc<QTensor>),
}

impl Value {
    /// Whether the elements lie in row-major order.
    pub(crate) fn is_contiguous(&self) -> bool {
        match self {
            Self::Tensor(tensor) => tensor.is_contiguous(),
            Self::Engine(engine) => engine.is_contiguous(),
            Self::Quantized(_) => true,
        }
    }
}

/// An operation waiting for its inputs.
#[derive(Clone, Debug)]
pub struct Expr {
    /// The operation.
    pub op: Op,
    /// Its run-time scalars.
    pub scalars: Scalars,
    /// Its inputs.
    pub inputs: Inputs,
    /// Which custom op [`Op::Custom`] means.
    pub custom: Option<CustomOp>,
}

/// What [`Node::look`](super::Node::look) saw.
#[derive(Debug)]
pub enum Look {
    /// The op and its inputs.
    Pending(Expr),
    /// The value.
    Ready(Value),
    /// The value is being written in place by a running plan.
    Lent,
}
