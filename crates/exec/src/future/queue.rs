//! The line of tasks.
//!
//! One task runs at a time, in the order of arrival: on the engine's thread, or on that of whoever waits for the one that is next. So a
//! task that needs what an earlier one computes finds it computed. Nothing here knows what a job is, and no lock is held while one runs,
//! is dropped, or wakes somebody. The same source is compiled a second time against loom's locks, whose tests try every order of threads.

use super::sync::{nap, Arc, Condvar, Mutex};
use super::task::held;
use super::task::Asker;
pub(super) use super::task::Task;
use std::collections::VecDeque;
use std::task::Waker;

struct Line<J, T> {
    tasks: VecDeque<Arc<Task<J, T>>>,
    /// Whether a task runs.
    busy: bool,
    /// Whether the engine sleeps and nobody has called it yet.
    asleep: bool,
    /// Whether a task was run by who waited for it since the engine last looked.
    claimed: bool,
}

impl<J, T> Line<J, T> {
    /// Whether the engine must be called now: a task waits that nobody is about to come back for.
    fn calls(&mut self) -> bool {
        !self.busy && !self.tasks.is_empty() && std::mem::take(&mut self.asleep)
    }
}

/// The tasks that wait, in the order of arrival.
pub(super) struct Queue<J, T> {
    line: Mutex<Line<J, T>>,
    news: Condvar,
}

impl<J, T> Queue<J, T> {
    pub(super) fn new() -> Self {
        Self {
            line: Mutex::new(Line { tasks: VecDeque::new(), busy: false, asleep: false, claimed: false }),
            news: Condvar::new(),
        }
    }

    /// Puts a job at the end of the line.
    pub(super) fn submit(&self, job: J) -> Arc<Task<J, T>> {
        let task = Arc::new(Task::new(job));
        let calls = {
            let mut line = held(self.line.lock());
            line.tasks.push_back(task.clone());
            line.calls()
        };
        if calls {
            self.news.notify_one();
        }
        task
    }

    /// Sleeps until a task is next and none runs; the caller runs it and says so by [`Queue::finish`].
    pub(super) fn next(&self) -> (Arc<Task<J, T>>, J) {
        let mut line = held(self.line.lock());
        loop {
            while !line.busy {
                let Some(task) = line.tasks.pop_front() else { break };
                // not one that was abandoned
                if let Some(job) = task.start() {
                    line.busy = true;
                    return (task, job);
                }
            }
            if std::mem::take(&mut line.claimed) {
                // whoever submitted the last one waited for it at once and ran it; as long as that goes on, a call costs more than
                // a small job and is in vain
                drop(line);
                nap();
                line = held(self.line.lock());
                continue;
            }
            line.asleep = true;
            line = held(self.news.wait(line));
            line.asleep = false;
        }
    }

    /// The job of `task`, if it is next and none runs; the caller runs it and says so by [`Queue::finish`].
    pub(super) fn claim(&self, task: &Arc<Task<J, T>>) -> Option<J> {
        let mut line = held(self.line.lock());
        if line.busy {
            return None;
        }
        while line.tasks.front().is_some_and(|first| !first.is_waiting()) {
            line.tasks.pop_front();
        }
        if !line.tasks.front().is_some_and(|first| Arc::ptr_eq(first, task)) {
            return None;
        }
        line.tasks.pop_front();
        let job = task.start()?;
        (line.busy, line.claimed) = (true, true);
        Some(job)
    }

    /// The task that ran has ended: the next one may run, and whoever waits for this one is told. Gives who is to be woken.
    pub(super) fn finish(&self, task: &Task<J, T>, result: T) -> Option<Waker> {
        // what nobody wants is dropped before the next one may run, and where that panics the next one may run all the same
        let release = Release(self);
        let Asker { waker, asleep } = task.end(result);
        drop(release);
        if asleep {
            task.tell();
        }
        waker
    }
}

struct Release<'a, J, T>(&'a Queue<J, T>);

impl<J, T> Drop for Release<'_, J, T> {
    fn drop(&mut self) {
        let calls = {
            let mut line = held(self.0.line.lock());
            line.busy = false;
            line.calls()
        };
        if calls {
            self.0.news.notify_one();
        }
    }
}
