//! Lazy tensors for Candle: recording, planning, plan cache and execution.
//!
//! Data flows through the modules in this order:
//!
//! 1. [`tensor`]: [`LazyTensor`], the handle that records.
//! 2. [`lower`]: a captured graph becomes a plan: row programs are formed and kernels chosen by predicates.
//! 3. [`plan`]: the immutable [`Plan`](plan::Plan) and the bounded plan cache.
//! 4. [`run`]: a plan is bound to sizes, scalars and leaves, and run.
//! 5. [`report`]: what a run did.
//!
//! [`future`] evaluates behind the caller's back, [`batch`] what many callers ask for together. [`grad`](mod@grad) records backward passes. [`buffer`] holds the memory of values that no Candle tensor owns.
#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod batch;
pub mod buffer;
pub mod compile;
pub mod config;
pub mod error;
pub mod future;
pub mod grad;
pub mod lower;
pub mod plan;
pub mod report;
pub mod run;
pub mod tensor;

pub use candle_lazy_graph::{module_scope, BuildSite, ModuleScope, NodeId};
pub use compile::compile;
pub use config::EvalOptions;
pub use error::{Difference, Error, Member, QueueError, Result};
pub use future::{eval_all_async, join, Eval, EvalAll};
pub use grad::{
    checkpoint, grad, is_grad_enabled, no_grad, value_and_grad, vjp, without_grad, CheckpointRegion, WithoutGrad,
};
pub use report::EvalReport;
pub use run::{
    eval_all, eval_all_checked, eval_all_with, eval_all_with_report, first_nan, first_nonfinite, materialize, prepare,
    NonFinite,
};
pub use tensor::{
    AttentionOptions, IndexOp, LazyTensor, LoraSegment, Module, ModuleT, RandomKey, TensorIndexer, TensorOrScalar,
};
