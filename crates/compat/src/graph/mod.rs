//! Lazy tensors under v1's names: an arena of nodes that counts as v1's does, over the engine's own recording.
//!
//! The arena says what was recorded; it computes nothing and keeps no recorded node alive. Each [`LazyTensor`] holds the engine's
//! handle, so after an evaluation the arena has values of exactly those nodes that somebody held.

#[cfg(feature = "async-exec")]
pub mod async_executor;
pub mod executor;
pub mod lazy_tensor;
pub mod node;
pub mod operation;

#[cfg(feature = "async-exec")]
pub use async_executor::AsyncGraphExecutor;
pub use executor::AsyncExecutor;
pub use lazy_tensor::LazyTensor;
pub use node::{ComputationGraph, GraphNode, NodeData, NodeId};
pub use operation::Operation;
