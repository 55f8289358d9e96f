//! Evaluation behind the caller's back: futures that any runtime can poll, and none must.
//!
//! [`LazyTensor::eval_async`] puts an evaluation at the end of a line and returns at once. One thread of this crate evaluates what is in
//! the line, in the order of arrival; it sleeps while the line is empty. So a program records step n + 1 on the pending results of step
//! n while that runs, and step n + 1 finds them computed when its turn comes:
//!
//! ```
//! use candle_core::Device;
//! use candle_lazy_exec::{LazyTensor, Result};
//! # fn main() -> Result<()> {
//! let mut state = LazyTensor::new(&[1f32, 2.0], &Device::Cpu)?;
//! let mut earlier = None;
//! for _ in 0..3 {
//!     state = (state * 2.0)?; // recorded, on what may not be computed yet
//!     let running = state.eval_async(); // or `running.await`
//!     if let Some(earlier) = earlier.replace(running) {
//!         println!("{:?}", earlier.wait()?);
//!     }
//! }
//! assert_eq!(state.to_vec1::<f32>()?, [8.0, 16.0]);
//! # Ok(())
//! # }
//! ```
//!
//! A value has the bits that [`LazyTensor::eval`] gives it. `eval` and its relatives do not stand in the line: called on something that
//! waits there or runs, they compute it a second time, and the first value that is there stays.

mod engine;
mod join;
mod queue;
pub(crate) mod task;

/// The locks of `queue` and `task`, which their tests replace.
mod sync {
    pub(super) use std::sync::{Arc, Condvar, Mutex};
    use std::time::Duration;

    /// How long the engine sleeps while it cannot be called; a job that nobody waits for may begin so much later.
    const NAP: Duration = Duration::from_micros(50);

    pub(super) fn nap() {
        std::thread::sleep(NAP);
    }
}

pub use join::{join, Join};

use crate::error::{Error, Result};
use crate::tensor::LazyTensor;
use candle_core::Tensor;
use candle_lazy_graph::Value;
use engine::{Outcome, Ticket};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// An evaluation of several tensors as one plan; made by [`eval_all_async`].
///
/// Wakes its task once. Dropped before it has begun, it never begins and what it held is freed; later, the evaluation goes on and its
/// values stay in the recorded tensors.
#[must_use = "an evaluation that is dropped before it has begun never begins"]
pub struct EvalAll(State);

/// The evaluation of one tensor; made by [`LazyTensor::eval_async`]. As [`EvalAll`].
#[must_use = "an evaluation that is dropped before it has begun never begins"]
#[derive(Debug)]
pub struct Eval(EvalAll);

enum State {
    Ready(Outcome),
    Submitted(Ticket),
    Taken,
}

impl std::fmt::Debug for EvalAll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            State::Ready(_) => "EvalAll(ready)",
            State::Submitted(_) => "EvalAll(submitted)",
            State::Taken => "EvalAll(taken)",
        })
    }
}

impl LazyTensor {
    /// Begins to evaluate, as [`LazyTensor::eval`] would, and returns at once: a future that needs no runtime. See
    /// [`future`](crate::future).
    ///
    /// # Errors
    /// The future's: those of [`LazyTensor::eval`].
    pub fn eval_async(&self) -> Eval {
        Eval(eval_all_async(&[self]))
    }
}

/// Begins to evaluate all tensors as one plan, as [`eval_all`](crate::eval_all) would, and returns at once: a future that needs no runtime.
/// See [`future`](crate::future).
///
/// # Errors
/// The future's: those of [`eval_all`](crate::eval_all).
pub fn eval_all_async(tensors: &[&LazyTensor]) -> EvalAll {
    if let Err(error) = crate::run::refuse_while_recording(tensors) {
        return EvalAll(State::Ready(Err(error)));
    }
    if let Some(values) = tensors.iter().map(|t| known(t)).collect() {
        return EvalAll(State::Ready(Ok(values)));
    }
    EvalAll(match engine::submit(tensors.iter().map(|&t| t.clone()).collect()) {
        Ok(ticket) => State::Submitted(ticket),
        Err(outcome) => State::Ready(outcome),
    })
}

/// The value of a tensor that evaluation would return as it is.
fn known(tensor: &LazyTensor) -> Option<Tensor> {
    match tensor.node().value()? {
        Value::Tensor(value) => Some(value).filter(|value| value.track_op() || !tensor.track_op()),
        Value::Engine(_) | Value::Quantized(_) => None,
    }
}

impl EvalAll {
    /// The values, in the order of the tensors. Blocks; where the evaluation has not begun and is the next one in the line, this thread
    /// runs it.
    ///
    /// # Errors
    /// As [`eval_all`](crate::eval_all).
    pub fn wait(self) -> Result<Vec<Tensor>> {
        match self.0 {
            State::Ready(outcome) => outcome,
            State::Submitted(ticket) => ticket.wait(),
            State::Taken => taken(),
        }
    }
}

impl Eval {
    /// The value. Blocks; see [`EvalAll::wait`].
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    pub fn wait(self) -> Result<Tensor> {
        one(self.0.wait()?)
    }
}

fn one(mut values: Vec<Tensor>) -> Result<Tensor> {
    values.pop().ok_or_else(|| Error::Internal("no result for a root".into()))
}

fn taken<T>() -> Result<T> {
    Err(Error::msg("an asynchronous evaluation was polled after it had given its result"))
}

impl Future for EvalAll {
    type Output = Result<Vec<Tensor>>;

    /// Ready once; an error after that.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let state = &mut self.get_mut().0;
        if let State::Submitted(ticket) = state {
            let polled = ticket.poll(context);
            if polled.is_ready() {
                *state = State::Taken;
            }
            return polled;
        }
        match std::mem::replace(state, State::Taken) {
            State::Ready(outcome) => Poll::Ready(outcome),
            State::Submitted(_) | State::Taken => Poll::Ready(taken()),
        }
    }
}

impl Future for Eval {
    type Output = Result<Tensor>;

    /// Ready once; an error after that.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.get_mut().0).poll(context).map(|values| one(values?))
    }
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
