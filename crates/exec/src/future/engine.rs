//! The thread that runs what waits, and those that run it instead.

use super::queue::{Queue, Task};
use crate::config::{Flag, TARGET};
use crate::error::{Error, Result};
use crate::run::{eval_all, message_of};
use crate::tensor::LazyTensor;
use candle_core::Tensor;
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tracing::{debug_span, trace};

/// What is evaluated together.
type Job = Vec<LazyTensor>;
/// Its values, in that order.
pub(super) type Outcome = Result<Vec<Tensor>>;

/// As much as a main thread has: Candle's tape is dropped by recursion.
const STACK: usize = 8 << 20;
/// How long a thread that waits for a result looks for it before it sleeps.
const HOT: Duration = Duration::from_micros(50);

thread_local! {
    /// Whether this thread runs a job: one that it waits for then would wait for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The queue, if its thread could be started.
fn queue() -> Option<&'static Arc<Queue<Job, Outcome>>> {
    static QUEUE: OnceLock<Option<Arc<Queue<Job, Outcome>>>> = OnceLock::new();
    let start = || {
        let queue = Arc::new(Queue::new());
        let engine = queue.clone();
        let thread = std::thread::Builder::new().name("candle-lazy-async".into()).stack_size(STACK);
        thread.spawn(move || work(&engine)).ok().map(|_| queue)
    };
    QUEUE.get_or_init(start).as_ref()
}

/// The life of the engine's thread.
fn work(queue: &Queue<Job, Outcome>) {
    loop {
        let (task, job) = queue.next();
        let result = run(job);
        finish(queue, &task, result);
    }
}

/// Evaluates. Nothing that a job does ends the thread, and nothing of it is left when this returns but the result.
fn run(job: Job) -> Outcome {
    let _span = debug_span!(target: TARGET, "job", tensors = job.len()).entered();
    let _inside = Flag::set(&INSIDE);
    let evaluated = catch_unwind(AssertUnwindSafe(|| {
        let values = match job.as_slice() {
            [one] => one.eval().map(|value| vec![value]),
            several => eval_all(&several.iter().collect::<Vec<_>>()),
        };
        drop(job);
        values
    }));
    evaluated.unwrap_or_else(|panic| Err(Error::Internal(format!("a panic ended it: {}", message_of(panic.as_ref())))))
}

fn finish(queue: &Queue<Job, Outcome>, task: &Task<Job, Outcome>, result: Outcome) {
    // a result that nobody wants is dropped in there, with what of the user's hangs on it; a waker is the user's code
    let _ = catch_unwind(AssertUnwindSafe(|| {
        if let Some(waker) = queue.finish(task, result) {
            waker.wake();
        }
    }));
}

/// A job that was submitted.
pub(super) struct Ticket(Arc<Task<Job, Outcome>>);

/// Puts `job` at the end of the line. Where the system gives no thread for it, this thread evaluates it now.
pub(super) fn submit(job: Job) -> std::result::Result<Ticket, Outcome> {
    trace!(target: TARGET, tensors = job.len(), "submitted");
    match queue() {
        Some(queue) => Ok(Ticket(queue.submit(job))),
        None => Err(run(job)),
    }
}

impl Ticket {
    /// The result; evaluates on this thread where nobody has begun and this job is next.
    pub(super) fn wait(&self) -> Outcome {
        if let Some(result) = self.inside() {
            return result;
        }
        let Some(queue) = queue() else {
            return Err(Error::Internal("a job without a queue".into()));
        };
        // a function that is being recorded evaluates nothing on its thread
        if !crate::config::is_recording() {
            if let Some(job) = queue.claim(&self.0) {
                let result = run(job);
                finish(queue, &self.0, result);
            }
        }
        taken(self.soon().unwrap_or_else(|| self.0.sleep()))
    }

    /// The result, if it is there before long: to sleep and to be woken takes longer than a small evaluation.
    fn soon(&self) -> Option<Option<Outcome>> {
        let begin = Instant::now();
        loop {
            if let Some(result) = self.0.ready() {
                return Some(result);
            }
            if begin.elapsed() > HOT {
                return None;
            }
            // the one that runs it may need this very processor
            std::thread::yield_now();
        }
    }

    pub(super) fn poll(&self, context: &Context<'_>) -> Poll<Outcome> {
        match self.inside() {
            Some(result) => Poll::Ready(result),
            None => self.0.poll(context.waker()).map(taken),
        }
    }

    /// On a thread that runs a job, which the others wait for: nobody else will run this one meanwhile.
    fn inside(&self) -> Option<Outcome> {
        if !INSIDE.get() {
            return None;
        }
        if let Some(job) = self.0.start() {
            let result = run(job);
            self.0.abandon();
            return Some(result);
        }
        let itself = || Err(Error::msg("an op that is being evaluated waits for its own evaluation"));
        Some(self.0.ready().map_or_else(itself, taken))
    }
}

fn taken(result: Option<Outcome>) -> Outcome {
    result.unwrap_or_else(|| Err(Error::msg("the result of an asynchronous evaluation was taken before")))
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.abandon();
    }
}
