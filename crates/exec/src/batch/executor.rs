//! The executor: a line of tensors, and the thread that evaluates what it draws.

use super::inbox::{taken, Drawn, Entering, Inbox, Shutdown, SubmitOptions, Ticket};
use super::window::Window;
use super::BatchStats;
use crate::buffer::keep_freed;
use crate::config::{is_recording, TARGET};
use crate::error::{Error, Result};
use crate::run::{
    eval_group, eval_now, eval_small, in_group, is_small, message_of, refuse_while_recording, Request, Values,
};
use crate::tensor::LazyTensor;
use candle_core::Tensor;
use parking_lot::Mutex;
use std::future::Future;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Instant;
use tracing::{debug, debug_span, enabled, Level};

/// How an executor batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchOptions {
    /// How many requests may wait.
    pub capacity: usize,
    /// What is drawn as one batch.
    pub window: Window,
}

impl Default for BatchOptions {
    /// 1,024 may wait; at most 64 at once, with adaptive waiting.
    fn default() -> Self {
        Self { capacity: 1024, window: Window::default() }
    }
}

type Line = Inbox<Request, Values>;

/// Evaluates what many callers ask for, together where it arrives together; see [`batch`](crate::batch).
///
/// A clone is the same executor. When the last one drops, what waits is still evaluated.
#[derive(Clone)]
pub struct BatchExecutor(Arc<Running>);

struct Running {
    line: Line,
    window: Window,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for BatchExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BatchExecutor({:?})", self.0.line)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.line.close(Shutdown::Drain);
    }
}

/// As much as a main thread has: Candle's tape is dropped by recursion.
const STACK: usize = 8 << 20;

fn work(line: &Line, window: &Window) {
    while let Some(drawn) = line.draw_at_leisure(window) {
        let (begin, count) = (Instant::now(), drawn.len());
        let span = debug_span!(target: TARGET, "batch", requests = count).entered();
        let merged = serve(drawn);
        drop(span);
        line.ran(count, begin.elapsed());
        line.merged(merged);
        if enabled!(target: TARGET, Level::DEBUG) {
            let BatchStats { queued, cancelled, .. } = line.stats();
            debug!(target: TARGET, queued, cancelled, merged_products = merged, "batch done");
        }
    }
}

/// Evaluates a batch and answers every request of it; how many products were made for several. Nothing that one of them does ends the
/// thread.
fn serve(drawn: Vec<Drawn<Request, Values>>) -> usize {
    let mut requests = Vec::with_capacity(drawn.len());
    let mut slots = Vec::with_capacity(drawn.len());
    for mut one in drawn {
        if one.is_cancelled() {
            // what it held is the user's to drop, and may panic
            let _ = catch_unwind(AssertUnwindSafe(|| drop(one)));
            continue;
        }
        requests.push(one.take_job().unwrap_or_default());
        slots.push(Mutex::new(Some(one)));
    }
    let answer = |number: usize, result: Result<Values>| {
        let one = slots.get(number).and_then(|slot| slot.lock().take());
        // a waker is the asker's code
        let _ = catch_unwind(AssertUnwindSafe(|| one.map(|one| one.finish(result))));
    };
    let ran = catch_unwind(AssertUnwindSafe(|| eval_group(requests, &answer)));
    ran.unwrap_or_else(|panic| {
        let message = message_of(panic.as_ref());
        for number in 0..slots.len() {
            answer(number, Err(Error::Internal(format!("a panic ended it: {message}"))));
        }
        0
    })
}

/// How many small requests a thread that asks serves at a time: those that it finds when it waits, and those that have come together when it
/// asks for another one.
const TURN: usize = 16;

/// Serves what waits in a line, on this thread, if all of it is small; whether there was anything.
fn serve_small(line: &Line, window: &Window) -> bool {
    // a function that is being recorded evaluates nothing on its thread
    if is_recording() {
        return false;
    }
    let drawn = line.try_draw_small(window, TURN, is_small);
    let (begin, count) = (Instant::now(), drawn.len());
    for mut one in drawn {
        // what it held is the user's to drop, and a waker is the asker's code
        let _ = catch_unwind(AssertUnwindSafe(|| {
            if !one.is_cancelled() {
                let result = eval_small(one.take_job().unwrap_or_default());
                one.finish(result);
            }
        }));
    }
    if count > 0 {
        line.ran(count, begin.elapsed());
    }
    count > 0
}

impl BatchExecutor {
    /// An executor with default options and a thread of its own.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new() -> Result<Self> {
        Self::with_options(&BatchOptions::default())
    }

    /// An executor with a thread of its own. From the first one on, glibc's allocator keeps up to 64 MiB of freed memory for what is asked for
    /// next, unless the environment has set a threshold of its own (`MALLOC_TRIM_THRESHOLD_`): the results of a batch come and go together.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn with_options(options: &BatchOptions) -> Result<Self> {
        keep_freed();
        let line = Line::new(options.capacity);
        let (drawn, window) = (line.clone(), options.window);
        let thread = std::thread::Builder::new().name("candle-lazy-batch".into()).stack_size(STACK);
        let thread = thread.spawn(move || work(&drawn, &window))?;
        Ok(Self(Arc::new(Running { line, window, thread: Mutex::new(Some(thread)) })))
    }

    /// Asks for the value of `tensor`. Sleeps while the line is full. Where requests take a few microseconds, which is less than handing them
    /// to another thread takes, the calling thread evaluates it at once if nobody waits, or serves those that wait once sixteen do.
    ///
    /// # Errors
    /// [`QueueError`](crate::error::QueueError) where it is not let in; the ticket's are those of [`LazyTensor::eval`].
    pub fn submit(&self, tensor: &LazyTensor) -> Result<Submission> {
        Ok(Submission(self.submit_all(&[tensor], &SubmitOptions::default())?))
    }

    /// As [`BatchExecutor::submit`], if there is room; the calling thread evaluates nothing.
    ///
    /// # Errors
    /// As [`BatchExecutor::submit`], and [`QueueError::Full`](crate::error::QueueError::Full).
    pub fn try_submit(&self, tensor: &LazyTensor) -> Result<Submission> {
        Ok(Submission(self.try_submit_all(&[tensor], &SubmitOptions::default())?))
    }

    /// Asks for the values of tensors, which are one request. Sleeps while the line is full.
    ///
    /// # Errors
    /// As [`BatchExecutor::submit`].
    pub fn submit_all(&self, tensors: &[&LazyTensor], how: &SubmitOptions) -> Result<SubmissionAll> {
        refuse_while_recording(tensors)?;
        // a full line is emptied by this very thread
        if in_group() {
            return self.try_submit_all(tensors, how);
        }
        if let Some(result) = self.at_once(tensors, how) {
            return Ok(SubmissionAll(Asked::Answered(Some(result))));
        }
        let (submission, small) = self.enter(tensors, |request| self.0.line.submit(request, how))?;
        if small && self.0.line.len() >= TURN {
            serve_small(&self.0.line, &self.0.window);
        }
        Ok(submission)
    }

    /// As [`BatchExecutor::submit_all`], if there is room.
    ///
    /// # Errors
    /// As [`BatchExecutor::try_submit`].
    pub fn try_submit_all(&self, tensors: &[&LazyTensor], how: &SubmitOptions) -> Result<SubmissionAll> {
        refuse_while_recording(tensors)?;
        Ok(self.enter(tensors, |request| self.0.line.try_submit(request, how))?.0)
    }

    /// As [`BatchExecutor::submit_all`], with a future that waits for room: for any runtime. Dropped, it asks for nothing.
    ///
    /// # Errors
    /// The future's: as [`BatchExecutor::submit_all`].
    pub fn submit_async(&self, tensors: &[&LazyTensor], how: &SubmitOptions) -> Submitting {
        Submitting(match refuse_while_recording(tensors) {
            Ok(()) => Ok((self.0.line.submit_async(request(tensors), how), self.0.window)),
            Err(error) => Err(Some(error)),
        })
    }

    /// The answer to a small request before which nobody waits: to put it into the line and to draw it would take as long as it does.
    fn at_once(&self, tensors: &[&LazyTensor], how: &SubmitOptions) -> Option<Result<Values>> {
        let [root] = tensors else { return None };
        // a function that is being recorded evaluates nothing on its thread
        if how.deadline.is_some() || is_recording() {
            return None;
        }
        self.0.line.at_once(&self.0.window, || eval_now(root.node()))
    }

    /// Lets a request in; whether it is small.
    fn enter(
        &self,
        tensors: &[&LazyTensor],
        let_in: impl FnOnce(Request) -> Result<Ticket<Request, Values>>,
    ) -> Result<(SubmissionAll, bool)> {
        let request = request(tensors);
        let small = is_small(&request);
        let submission = SubmissionAll(Asked::InLine(let_in(request)?, self.0.window));
        // the executor's thread is not to take its time over one that nobody else serves
        if !small {
            self.0.line.hurry();
        }
        Ok((submission, small))
    }

    /// What went through since it was made.
    #[must_use]
    pub fn stats(&self) -> BatchStats {
        self.0.line.stats()
    }

    /// Lets no request in any more, for any of its clones, and returns when its thread has ended: once those that wait have been served,
    /// or were told that they are not. Small requests that a caller's thread serves just then are answered by that thread.
    pub fn shutdown(&self, how: Shutdown) {
        self.0.line.close(how);
        let thread = self.0.thread.lock().take();
        // from inside of a batch it cannot be waited for
        if let Some(thread) = thread.filter(|_| !in_group()) {
            // it contains panics, and has none to tell of
            let _ = thread.join();
        }
    }
}

fn request(tensors: &[&LazyTensor]) -> Request {
    tensors.iter().map(|&t| t.clone()).collect()
}

/// How far a request is.
enum Asked {
    /// In the line of an executor that draws so.
    InLine(Ticket<Request, Values>, Window),
    /// It was answered while it was submitted; nothing once the answer was taken.
    Answered(Option<Result<Values>>),
}

/// A request for several tensors; made by [`BatchExecutor::submit_all`]. A future, for any runtime.
///
/// Dropping it cancels what has not begun, and frees what it held. A small request may have been answered while it was submitted.
#[must_use = "a request that is dropped before it has begun never begins"]
pub struct SubmissionAll(Asked);

impl std::fmt::Debug for SubmissionAll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Asked::InLine(ticket, _) => write!(f, "SubmissionAll({ticket:?})"),
            Asked::Answered(_) => f.write_str("SubmissionAll(answered)"),
        }
    }
}

/// A request for one tensor; made by [`BatchExecutor::submit`]. As [`SubmissionAll`].
#[must_use = "a request that is dropped before it has begun never begins"]
#[derive(Debug)]
pub struct Submission(SubmissionAll);

impl SubmissionAll {
    /// The values, in the order of the tensors. Blocks; where requests take a few microseconds, the calling thread serves those that are due
    /// until its own is.
    ///
    /// # Errors
    /// As [`eval_all`](crate::eval_all).
    pub fn wait(self) -> Result<Vec<Tensor>> {
        Ok(self.values()?.into_vec())
    }

    fn values(self) -> Result<Values> {
        let (ticket, window) = match self.0 {
            Asked::InLine(ticket, window) => (ticket, window),
            Asked::Answered(answer) => return taken(answer),
        };
        if let Some(result) = here(&ticket) {
            return result;
        }
        // to hand a small request to another thread takes longer than to do it
        loop {
            if let Some(result) = ticket.ready_now() {
                return result;
            }
            if !(ticket.is_waiting() && serve_small(ticket.inbox(), &window)) {
                return ticket.wait();
            }
        }
    }

    fn poll_values(&mut self, context: &mut Context<'_>) -> Poll<Result<Values>> {
        match &mut self.0 {
            Asked::Answered(answer) => Poll::Ready(taken(answer.take())),
            Asked::InLine(ticket, _) => match here(ticket) {
                Some(result) => Poll::Ready(result),
                None => Pin::new(ticket).poll(context),
            },
        }
    }
}

/// On a thread that evaluates for an executor: nobody else will evaluate this one meanwhile.
fn here(ticket: &Ticket<Request, Values>) -> Option<Result<Values>> {
    if !in_group() {
        return None;
    }
    let Some(job) = ticket.take_back() else {
        return ticket
            .ready_now()
            .or_else(|| Some(Err(Error::msg("an op that is being evaluated waits for a request of the same batch"))));
    };
    Some(crate::run::eval_all(&job.iter().collect::<Vec<_>>()).map(Values::from_vec))
}

impl Submission {
    /// The value. Blocks.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    pub fn wait(self) -> Result<Tensor> {
        one(self.0.values()?)
    }
}

fn one(mut values: Values) -> Result<Tensor> {
    values.pop().ok_or_else(|| Error::Internal("no result for a root".into()))
}

impl Future for SubmissionAll {
    type Output = Result<Vec<Tensor>>;

    /// Ready once; an error after that.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.get_mut().poll_values(context).map(|values| Ok(values?.into_vec()))
    }
}

impl Future for Submission {
    type Output = Result<Tensor>;

    /// Ready once; an error after that.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.get_mut().0.poll_values(context).map(|values| one(values?))
    }
}

/// A request on its way in; made by [`BatchExecutor::submit_async`].
#[must_use = "a request that is not polled is not let in"]
#[derive(Debug)]
pub struct Submitting(std::result::Result<(Entering<Request, Values>, Window), Option<Error>>);

impl Future for Submitting {
    type Output = Result<SubmissionAll>;

    /// Ready once; an error after that.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.get_mut().0 {
            Ok((entering, window)) => {
                let window = *window;
                Pin::new(entering).poll(context).map(|ticket| Ok(SubmissionAll(Asked::InLine(ticket?, window))))
            }
            Err(error) => {
                let after = || Error::msg("a submission was polled after it had given its ticket");
                Poll::Ready(Err(error.take().unwrap_or_else(after)))
            }
        }
    }
}

#[cfg(test)]
mod tests;
