//! The intermediate representation of candle-lazy.
//!
//! This crate knows what was recorded, what shape it has and how it may be rewritten. It computes nothing: no kernel,
//! no allocation of tensor memory, no cargo feature. Data flows through the modules in this order:
//!
//! 1. [`mod@op`]: the operations, their attributes and the class table ([`OpClass`], [`Exactness`]).
//! 2. [`mod@infer`]: the only truth about shape, dtype and device of a result.
//! 3. [`mod@node`]: the implicit graph. A [`Node`] is *pending* (an op and its inputs) or *ready* (a value).
//! 4. [`mod@capture`]: from several roots into a hash-consed [`Graph`] in topological order, in relative form.
//! 5. [`mod@decompose`]: what a composite means, in primitives.
//! 6. [`mod@passes`]: pure functions `Graph → Graph`, each validated and counted.
//! 7. [`mod@grad`]: the backward pass of recorded nodes, recorded as nodes.
//! 8. [`mod@dump`]: a graph as text.
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod capture;
pub mod custom;
pub mod decompose;
pub mod dump;
pub mod error;
pub mod grad;
mod hash;
pub mod infer;
pub mod node;
pub mod op;
pub mod passes;
mod recorder;
pub mod site;
pub mod validate;

pub use capture::{
    capture, Bindings, CaptureOptions, Captured, GNode, Graph, GraphKey, Guard, LeafKey, LeafKind, Sym, Workspace,
};
pub use custom::CustomOp;
pub use decompose::decompose;
pub use error::{describe, Error, ErrorKind, Result};
pub use grad::{vjp, vjp_changed, why_unreached};
pub use hash::{FastHasher, FastMap};
pub use infer::{infer, Meta, OutMeta};
pub use node::{
    is_grad_enabled, live_nodes, no_grad, without_grad, EngineValue, Expr, Node, NodeId, NodeRef, Value, WithoutGrad,
};
pub use op::{
    ArgOp, BinaryOp, CmpOp, Dims, Distribution, Exactness, Op, OpClass, ReduceOp, Scalars, ScatterOp, UnaryOp,
};
pub use recorder::Recorder;
pub use site::{module_scope, BuildSite, ModuleScope};
