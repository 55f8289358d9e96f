//! A bounded line of jobs, for who serves them and who asks.

use super::alarm::Alarm;
use super::line::{Line, Place, Refused, Started};
use super::stats::Counters;
use super::task::{Asker, Task};
use super::window::{MaxWait, Pace, Window};
use super::BatchStats;
use crate::error::{Error, QueueError, Result};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// How often a request gets its turn beside those of other priorities: each one sixteen times as often as the next. None starves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Priority {
    /// Before the others.
    High,
    /// In the order of arrival.
    #[default]
    Normal,
    /// When the others leave room, or every sixteenth time.
    Low,
}

impl Priority {
    /// How far apart the turns of one lane are.
    fn step(self) -> u64 {
        match self {
            Self::High => 1,
            Self::Normal => 16,
            Self::Low => 256,
        }
    }
}

/// How a request is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SubmitOptions {
    /// How often requests like this get their turn.
    pub priority: Priority,
    /// When it must have begun: a request that has not is an error then, and is not run. Who waits for it is told then; for futures a thread
    /// of this crate sees to it, and no timer of a runtime.
    pub deadline: Option<Instant>,
    /// Whose it is: callers with different numbers get equal turns, however much one of them asks for.
    pub lane: u64,
}

/// What becomes of the requests that wait when a line is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// They are served.
    Drain,
    /// They end in [`QueueError::Closed`].
    Cancel,
}

struct Shared<J, T> {
    line: Line<J, Result<T>>,
    pace: Pace,
    counters: Counters,
}

/// A bounded line of jobs `J`, each answered by a `T`. A clone is the same line.
pub struct Inbox<J, T>(Arc<Shared<J, T>>);

impl<J, T> Clone for Inbox<J, T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<J, T> std::fmt::Debug for Inbox<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inbox({} of {} wait)", self.len(), self.0.line.capacity())
    }
}

impl<J, T> Inbox<J, T> {
    /// A line in which at most `capacity` jobs wait (at least one).
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let (line, pace, counters) = (Line::new(capacity), Pace::default(), Counters::default());
        Self(Arc::new(Shared { line, pace, counters }))
    }

    /// How many jobs wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.line.len()
    }

    /// Whether no job waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether no job is let in any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.line.is_closed()
    }

    /// What went through the line since it was made.
    #[must_use]
    pub fn stats(&self) -> BatchStats {
        self.0.counters.snapshot(self.len())
    }

    /// Lets a job in; sleeps while the line is full.
    ///
    /// # Errors
    /// [`QueueError::Deadline`] where it passes first, [`QueueError::Closed`].
    pub fn submit(&self, job: J, how: &SubmitOptions) -> Result<Ticket<J, T>> {
        let place = self.place(how)?;
        match self.0.line.push_when_room(job, place) {
            Ok(task) => Ok(self.ticket(task, how)),
            Err(Refused::Full(_)) => Err(self.refuse(QueueError::Deadline)),
            Err(Refused::Closed(_)) => Err(self.refuse(QueueError::Closed)),
        }
    }

    /// Lets a job in if there is room.
    ///
    /// # Errors
    /// [`QueueError::Full`], [`QueueError::Deadline`] where it has passed, [`QueueError::Closed`].
    pub fn try_submit(&self, job: J, how: &SubmitOptions) -> Result<Ticket<J, T>> {
        let place = self.place(how)?;
        match self.0.line.push(job, place) {
            Ok(task) => Ok(self.ticket(task, how)),
            Err(Refused::Full(_)) => Err(self.refuse(QueueError::Full { capacity: self.0.line.capacity() })),
            Err(Refused::Closed(_)) => Err(self.refuse(QueueError::Closed)),
        }
    }

    /// Lets a job in once there is room, without a thread that sleeps: a future for any runtime. Dropped, it lets nothing in.
    ///
    /// # Errors
    /// The future's: as [`Inbox::submit`].
    pub fn submit_async(&self, job: J, how: &SubmitOptions) -> Entering<J, T> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Entering { inbox: self.clone(), job: Some(job), how: *how, number, alarm: Alarm::default() }
    }

    fn place(&self, how: &SubmitOptions) -> Result<Place> {
        let arrived = Instant::now();
        if how.deadline.is_some_and(|deadline| deadline <= arrived) {
            return Err(self.refuse(QueueError::Deadline));
        }
        Ok(Place { lane: how.lane, step: how.priority.step(), arrived, deadline: how.deadline })
    }

    fn refuse(&self, why: QueueError) -> Error {
        self.0.counters.refused(&why);
        Error::Queue(why)
    }

    fn ticket(&self, task: Arc<Task<J, Result<T>>>, how: &SubmitOptions) -> Ticket<J, T> {
        self.0.counters.submitted();
        Ticket { task, inbox: self.clone(), deadline: how.deadline, alarm: Alarm::default() }
    }

    /// Sleeps until a job waits, then for others as the window says, and takes them, in the order in which they are due. `None` once the
    /// line is closed and empty.
    ///
    /// One thread at a time is meant to draw. Between two draws it serves what it drew, which is how adaptive waiting knows how long that
    /// takes.
    pub fn draw(&self, window: &Window) -> Option<Vec<Drawn<J, T>>> {
        self.draw_by(window, false)
    }

    /// The same where small jobs are served by who asks for them: for those it takes its time, until somebody hurries.
    pub(super) fn draw_at_leisure(&self, window: &Window) -> Option<Vec<Drawn<J, T>>> {
        self.draw_by(window, true)
    }

    fn draw_by(&self, window: &Window, leisure: bool) -> Option<Vec<Drawn<J, T>>> {
        loop {
            let more = |waiting, since| self.0.pace.more(window, leisure, waiting, since);
            let drawn = self.begin(self.0.line.draw(window.max_batch, more)?);
            if !drawn.is_empty() {
                return Some(drawn);
            }
        }
    }

    /// Says how many jobs would begin at once: as many are let in beside those that may wait, one less for each that is drawn from now on.
    /// A server that is idle, or has room beside what it does, says so before it draws; a line whose server never does lets in its capacity.
    pub fn set_free_slots(&self, slots: usize) {
        self.0.line.set_slots(slots);
    }

    /// Takes what waits now, at most `most`.
    #[must_use]
    pub fn try_draw(&self, most: usize) -> Vec<Drawn<J, T>> {
        self.begin(self.0.line.try_draw(most))
    }

    /// The same of jobs that fit, up to the first that does not or that a waker looks for, where jobs take so little that who waits for one
    /// does it. `fits` is asked under locks.
    pub(super) fn try_draw_small(&self, window: &Window, most: usize, fits: impl Fn(&J) -> bool) -> Vec<Drawn<J, T>> {
        match window.max_wait == MaxWait::Adaptive && self.0.pace.is_small() {
            true => self.begin(self.0.line.try_draw_unwatched(most.min(window.max_batch.max(1)), fits)),
            false => Vec::new(),
        }
    }

    /// Answers a job by `answer`, here and now, where jobs take so little that to let it in would cost as much, and nobody waits before it.
    /// `None` where that is not so, or there is no answer.
    pub(super) fn at_once(&self, window: &Window, answer: impl FnOnce() -> Option<Result<T>>) -> Option<Result<T>> {
        let Shared { line, pace, counters } = &*self.0;
        if !(window.max_wait == MaxWait::Adaptive && pace.is_small() && line.is_idle()) {
            return None;
        }
        // what the clock says takes a tenth of such a job
        let begin = counters.samples().then(Instant::now);
        let answer = answer()?;
        counters.at_once(answer.as_ref().err());
        if let Some(begin) = begin {
            pace.took(begin.elapsed());
        }
        Some(answer)
    }

    /// Somebody waits: a drawer at leisure comes.
    pub(super) fn hurry(&self) {
        self.0.line.hurry();
    }

    /// Tells adaptive waiting that a batch of `drawn` jobs took `run`.
    pub fn ran(&self, drawn: usize, run: Duration) {
        self.0.pace.ran(drawn, self.len(), run);
        self.0.counters.ran(drawn, run);
    }

    /// So many products were made for several jobs at once.
    pub(super) fn merged(&self, products: usize) {
        self.0.counters.merged(products);
    }

    /// Answers those that are late, and hands out the others.
    fn begin(&self, started: Vec<Started<J, Result<T>>>) -> Vec<Drawn<J, T>> {
        let now = Instant::now();
        let mut drawn = Vec::with_capacity(started.len());
        for Started { task, job, arrived, late } in started {
            let waited = now.saturating_duration_since(arrived);
            let one = Drawn { task, inbox: self.clone(), job: Some(job), waited, answered: false };
            if late {
                one.finish(Err(Error::Queue(QueueError::Deadline)));
            } else {
                self.0.counters.drawn(waited);
                drawn.push(one);
            }
        }
        drawn
    }

    /// Lets no job in any more; [`Inbox::draw`] ends when the line is empty.
    pub fn close(&self, how: Shutdown) {
        for Started { task, job, .. } in self.0.line.close(how == Shutdown::Cancel) {
            let inbox = self.clone();
            let one = Drawn { task, inbox, job: Some(job), waited: Duration::ZERO, answered: false };
            one.finish(Err(Error::Queue(QueueError::Closed)));
        }
    }
}

/// A job that was let in, for who asked: a future of its answer, and a way to wait for it.
///
/// Dropping it cancels: a job that waits is dropped at once; for one that was drawn, [`Drawn::is_cancelled`] says so.
#[must_use = "a request whose ticket is dropped is cancelled"]
pub struct Ticket<J, T> {
    task: Arc<Task<J, Result<T>>>,
    inbox: Inbox<J, T>,
    deadline: Option<Instant>,
    alarm: Alarm,
}

impl<J, T> std::fmt::Debug for Ticket<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.task.is_waiting() { "Ticket(waiting)" } else { "Ticket(drawn)" })
    }
}

/// How long a thread that waits for an answer looks for it before it sleeps: to sleep and to be woken takes longer than a small job.
const HOT: Duration = Duration::from_micros(50);

impl<J, T> Ticket<J, T> {
    /// The answer. Blocks; at most until the deadline where the job has not begun by then.
    ///
    /// # Errors
    /// The answer's own, [`QueueError`] where there is none.
    pub fn wait(self) -> Result<T> {
        if self.is_waiting() {
            self.inbox.0.line.hurry();
        }
        let begin = Instant::now();
        let hot = loop {
            if let Some(result) = self.task.ready() {
                break Some(result);
            }
            if begin.elapsed() > HOT {
                break None;
            }
            // the one that runs it may need this very processor
            std::thread::yield_now();
        };
        taken(match hot {
            Some(result) => result,
            None => match self.deadline {
                Some(deadline) => match self.task.sleep_until(deadline) {
                    Some(result) => result,
                    None => match self.withdraw() {
                        true => return Err(self.inbox.refuse(QueueError::Deadline)),
                        // it runs
                        false => self.task.sleep(),
                    },
                },
                None => self.task.sleep(),
            },
        })
    }

    /// Whether the job was not drawn yet.
    pub(super) fn is_waiting(&self) -> bool {
        self.task.is_waiting()
    }

    /// The line that the job is in.
    pub(super) fn inbox(&self) -> &Inbox<J, T> {
        &self.inbox
    }

    /// The answer, if it is there.
    pub(super) fn ready_now(&self) -> Option<Result<T>> {
        self.task.ready().map(taken)
    }

    /// The job, for who asked: to run it on this thread instead. `None` where it was drawn.
    pub(super) fn take_back(&self) -> Option<J> {
        let job = self.task.start()?;
        self.inbox.0.line.forget();
        Some(job)
    }

    /// Takes a job that waits out of the line; whether it did.
    fn withdraw(&self) -> bool {
        let Some(job) = self.take_back() else { return false };
        drop(job);
        self.task.abandon();
        true
    }

    fn cancel(&self) {
        if self.task.abandon() {
            self.inbox.0.line.forget();
            self.inbox.0.counters.cancelled();
        }
    }
}

/// The answer to a request, or that there was one.
pub(super) fn taken<T>(result: Option<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|| Err(Error::msg("the answer to a request was taken before")))
}

impl<J, T> Future for Ticket<J, T> {
    type Output = Result<T>;

    /// Ready once; an error after that.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = self.task.poll(context.waker());
        if polled.is_pending() && self.is_waiting() {
            if let Some(deadline) = self.deadline {
                let alarm = match deadline <= Instant::now() {
                    true => Err(Error::Queue(QueueError::Deadline)),
                    false => self.alarm.set(deadline, context.waker()).map_err(Error::from),
                };
                // one that was drawn in this very moment runs, and wakes when it has
                if let Some(error) = alarm.err().filter(|_| self.withdraw()) {
                    match &error {
                        Error::Queue(why) => self.inbox.0.counters.refused(why),
                        // without an alarm nobody would be told in time: the request goes
                        _ => self.inbox.0.counters.cancelled(),
                    }
                    return Poll::Ready(Err(error));
                }
            }
            self.inbox.0.line.hurry();
        }
        polled.map(taken)
    }
}

impl<J, T> Drop for Ticket<J, T> {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// A job on its way into a line; made by [`Inbox::submit_async`].
#[must_use = "a request that is not polled is not let in"]
pub struct Entering<J, T> {
    inbox: Inbox<J, T>,
    job: Option<J>,
    how: SubmitOptions,
    number: u64,
    alarm: Alarm,
}

impl<J, T> std::fmt::Debug for Entering<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Entering")
    }
}

impl<J: Unpin, T> Future for Entering<J, T> {
    type Output = Result<Ticket<J, T>>;

    /// Ready once; an error after that.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            let Some(job) = this.job.take() else {
                return Poll::Ready(Err(Error::msg("a submission was polled after it had given its ticket")));
            };
            let place = match this.inbox.place(&this.how) {
                Ok(place) => place,
                Err(error) => return Poll::Ready(Err(error)),
            };
            match this.inbox.0.line.push(job, place) {
                Ok(task) => return Poll::Ready(Ok(this.inbox.ticket(task, &this.how))),
                Err(Refused::Closed(_)) => return Poll::Ready(Err(this.inbox.refuse(QueueError::Closed))),
                Err(Refused::Full(job)) => this.job = Some(job),
            }
            if let Some(deadline) = this.how.deadline {
                this.alarm.set(deadline, context.waker())?;
            }
            if !this.inbox.0.line.knock(this.number, context.waker()) {
                return Poll::Pending;
            }
        }
    }
}

impl<J, T> Drop for Entering<J, T> {
    fn drop(&mut self) {
        self.inbox.0.line.leave(self.number);
    }
}

/// A job that was drawn, for who serves it. Dropped without an answer, it is answered with [`QueueError::Lost`].
pub struct Drawn<J, T> {
    task: Arc<Task<J, Result<T>>>,
    inbox: Inbox<J, T>,
    job: Option<J>,
    waited: Duration,
    answered: bool,
}

impl<J: std::fmt::Debug, T> std::fmt::Debug for Drawn<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Drawn({:?} after {:?})", self.job, self.waited)
    }
}

impl<J, T> Drawn<J, T> {
    /// The job, until it is taken.
    #[must_use]
    pub fn job(&self) -> Option<&J> {
        self.job.as_ref()
    }

    /// Takes the job out, to own what it holds.
    pub fn take_job(&mut self) -> Option<J> {
        self.job.take()
    }

    /// How long it waited in the line.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Whether nobody wants the answer any more.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        !self.task.is_wanted()
    }

    /// Answers.
    pub fn finish(mut self, answer: Result<T>) {
        self.answer(answer);
    }

    fn answer(&mut self, answer: Result<T>) {
        self.answered = true;
        // who asked may hold what the job holds, and counts on having it alone once the answer is there
        drop(self.job.take());
        let wanted = self.task.is_wanted();
        self.inbox.0.counters.answered(wanted, answer.as_ref().err());
        // an answer that nobody wants is dropped in there; a waker is the asker's code
        let Asker { waker, asleep } = self.task.end(answer);
        if asleep {
            self.task.tell();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<J, T> Drop for Drawn<J, T> {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(Err(Error::Queue(QueueError::Lost)));
        }
    }
}
