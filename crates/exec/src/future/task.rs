//! A job that was submitted: while it waits, while it runs, and its result.
//!
//! Nothing here knows what a job is, and no lock is held while one runs, is dropped, or wakes somebody. The same source is compiled a
//! second time against loom's locks, whose tests try every order of threads.

use super::sync::{Condvar, Mutex};
use std::sync::{LockResult, PoisonError};
use std::task::{Poll, Waker};

/// The guard of a lock. Nothing that can panic runs under one, and a panic elsewhere says nothing about what it guards.
pub(crate) fn held<G>(lock: LockResult<G>) -> G {
    lock.unwrap_or_else(PoisonError::into_inner)
}

/// How far a task is.
enum Stage<J, T> {
    Waiting(J),
    /// It runs, and somebody wants its result.
    Running,
    Ended(T),
    /// Nobody wants its result, or somebody has it.
    Over,
}

/// Who is to be told that a task has ended.
#[derive(Debug)]
#[must_use = "somebody may wait for it"]
pub(crate) struct Asker {
    /// To be woken.
    pub(crate) waker: Option<Waker>,
    /// Whether threads sleep, for [`Task::tell`]: nobody lies down any more where the result is there already.
    pub(crate) asleep: bool,
}

struct Cell<J, T> {
    stage: Stage<J, T>,
    waker: Option<Waker>,
    /// How many threads sleep until it has ended: to call for nobody takes longer than a small job.
    asleep: usize,
}

/// A job that was submitted, and its result.
pub(crate) struct Task<J, T> {
    cell: Mutex<Cell<J, T>>,
    /// Told when the task has ended.
    ended: Condvar,
}

impl<J, T> Task<J, T> {
    pub(crate) fn new(job: J) -> Self {
        Self { cell: Mutex::new(Cell { stage: Stage::Waiting(job), waker: None, asleep: 0 }), ended: Condvar::new() }
    }

    /// Takes the job out, to run it: one caller gets it, and none after [`Task::abandon`].
    pub(crate) fn start(&self) -> Option<J> {
        let mut cell = held(self.cell.lock());
        match std::mem::replace(&mut cell.stage, Stage::Running) {
            Stage::Waiting(job) => Some(job),
            other => {
                cell.stage = other;
                None
            }
        }
    }

    pub(crate) fn is_waiting(&self) -> bool {
        matches!(held(self.cell.lock()).stage, Stage::Waiting(_))
    }

    /// Whether the job waits, and somebody is to be woken for it, or `f` says so of it. It must neither run, drop nor wake anything.
    pub(crate) fn is_watched_or(&self, f: impl FnOnce(&J) -> bool) -> bool {
        let cell = held(self.cell.lock());
        match &cell.stage {
            Stage::Waiting(job) => cell.waker.is_some() || f(job),
            Stage::Running | Stage::Ended(_) | Stage::Over => false,
        }
    }

    /// The result, once; `Some(None)` where it was taken before.
    fn take(cell: &mut Cell<J, T>) -> Option<Option<T>> {
        match std::mem::replace(&mut cell.stage, Stage::Over) {
            Stage::Ended(result) => Some(Some(result)),
            Stage::Over => Some(None),
            other => {
                cell.stage = other;
                None
            }
        }
    }

    /// The result, or a promise to wake `waker` (the last one that was given) once when it is there; `None` where it was taken before.
    pub(crate) fn poll(&self, waker: &Waker) -> Poll<Option<T>> {
        let mut cell = held(self.cell.lock());
        if let Some(result) = Self::take(&mut cell) {
            return Poll::Ready(result);
        }
        let known = cell.waker.as_ref().is_some_and(|old| old.will_wake(waker));
        let old = if known { None } else { cell.waker.replace(waker.clone()) };
        drop(cell);
        // wakers are the user's code too
        drop(old);
        Poll::Pending
    }

    /// The result, if it is there.
    pub(crate) fn ready(&self) -> Option<Option<T>> {
        let mut cell = held(self.cell.lock());
        Self::take(&mut cell)
    }

    /// Sleeps until the result is there.
    pub(crate) fn sleep(&self) -> Option<T> {
        let mut cell = held(self.cell.lock());
        loop {
            match Self::take(&mut cell) {
                Some(result) => return result,
                None => {
                    cell.asleep += 1;
                    cell = held(self.ended.wait(cell));
                    cell.asleep -= 1;
                }
            }
        }
    }

    /// Sleeps until the result is there, at most until `end`; `None` without one.
    pub(crate) fn sleep_until(&self, end: std::time::Instant) -> Option<Option<T>> {
        let mut cell = held(self.cell.lock());
        loop {
            if let Some(result) = Self::take(&mut cell) {
                return Some(result);
            }
            let left = end.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return None;
            }
            cell.asleep += 1;
            cell = held(self.ended.wait_timeout(cell, left)).0;
            cell.asleep -= 1;
        }
    }

    /// Nobody wants the result any more: a job that waits is dropped, here and now, and a result too. Whether a job did.
    pub(crate) fn abandon(&self) -> bool {
        let (stage, waker) = {
            let mut cell = held(self.cell.lock());
            (std::mem::replace(&mut cell.stage, Stage::Over), cell.waker.take())
        };
        let waited = matches!(stage, Stage::Waiting(_));
        drop(stage);
        drop(waker);
        waited
    }

    /// Whether somebody still wants the result of a job that runs.
    pub(crate) fn is_wanted(&self) -> bool {
        matches!(held(self.cell.lock()).stage, Stage::Running)
    }

    /// Tells the threads that sleep here that the task has ended.
    pub(crate) fn tell(&self) {
        self.ended.notify_all();
    }

    /// The job has run. Says who is to be told; a result that nobody wants is dropped.
    pub(crate) fn end(&self, result: T) -> Asker {
        let (unwanted, asker) = {
            let mut cell = held(self.cell.lock());
            let unwanted = match cell.stage {
                Stage::Running => {
                    cell.stage = Stage::Ended(result);
                    None
                }
                Stage::Waiting(_) | Stage::Ended(_) | Stage::Over => Some(result),
            };
            (unwanted, Asker { waker: cell.waker.take(), asleep: cell.asleep > 0 })
        };
        drop(unwanted);
        asker
    }
}
