//! Many callers, one plan: independent evaluations that arrive together run together.
//!
//! A [`BatchExecutor`] takes tensors from any number of threads. Its thread draws what has arrived within a window, groups the requests
//! whose graphs have the same plan (the same ops on the same kinds of inputs, at any sizes), and runs each group as one: products with
//! the same weight read it once for the rows of all, everything else is shared out over the threads, request by request. A result has the
//! bits that [`LazyTensor::eval`](crate::LazyTensor::eval) gives it, whoever else is in the batch and in whatever order they came.
//!
//! ```
//! use candle_core::Device;
//! use candle_lazy_exec::batch::BatchExecutor;
//! use candle_lazy_exec::{LazyTensor, Result};
//! # fn main() -> Result<()> {
//! let executor = BatchExecutor::new()?;
//! let mut running = Vec::new();
//! for i in 0..8 {
//!     let x = LazyTensor::new(&[i as f32, 1.0], &Device::Cpu)?;
//!     running.push(executor.submit(&x.softmax(0)?)?); // any thread may do this
//! }
//! for one in running {
//!     assert_eq!(one.wait()?.dims(), [2]); // or `one.await`
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`Inbox`] is what it is built on: a bounded line of jobs with priorities, equal turns, deadlines and cancelling, for services that
//! batch something else.

mod alarm;
mod executor;
mod inbox;
mod line;
mod stats;
mod window;

use crate::future::task;

/// The locks of `line`, which its tests replace.
mod sync {
    use crate::future::task::held;
    pub(super) use std::sync::{Arc, Condvar, Mutex, MutexGuard};
    use std::time::Instant;

    /// Sleeps until it is told or `end` is there.
    pub(super) fn wait_until<'a, T>(on: &Condvar, guard: MutexGuard<'a, T>, end: Instant) -> MutexGuard<'a, T> {
        let left = end.saturating_duration_since(Instant::now());
        held(on.wait_timeout(guard, left)).0
    }

    pub(super) fn nap() {
        std::thread::yield_now();
    }
}

pub use executor::{BatchExecutor, BatchOptions, Submission, SubmissionAll, Submitting};
pub use inbox::{Drawn, Entering, Inbox, Priority, Shutdown, SubmitOptions, Ticket};
pub use stats::{BatchStats, Histogram};
pub use window::{MaxWait, Window};

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
