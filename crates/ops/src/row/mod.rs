//! Row programs: one mechanism for softmax, every norm and any elementwise chain.
//!
//! A program is straight-line code over the elements of a row with reductions in between. A portable
//! tiled kernel runs it: tiles of a few thousand elements stay in cache, one vectorisable loop per
//! instruction, rows in parallel.
//!
//! **The order of a sum** depends on the row's length alone: 128 interleaved accumulators per segment of 1,024
//! elements, folded in halves, segments added in order. So a row's bits are the same alone or among
//! thousands, on one thread or many, contiguous or strided.

mod columns;
pub mod direct;
pub mod emit;
mod fuse;
pub(crate) mod gather;
pub(crate) mod loops;
mod prepared;
mod program;
pub mod programs;
mod quotient;
pub(crate) mod reduce;
mod run;
mod schedule;
pub(crate) mod space;
mod span;
mod tile;
mod whole;
#[cfg(target_arch = "x86_64")]
pub(crate) mod wide;

pub use program::{BinaryFn, Builder, Class, FloatKind, Instr, Kind, ReduceFn, Reg, RowProgram, UnaryFn};
pub use run::Input;
