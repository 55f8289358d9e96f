//! Stand-in for the engine's queue while it is being built.

use candle_lazy_exec::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How urgent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Priority {
    /// First.
    High,
    /// As most.
    #[default]
    Normal,
    /// Last.
    Low,
}

/// How a job waits.
#[derive(Debug, Clone, Default)]
pub struct SubmitOptions {
    /// Urgency.
    pub priority: Priority,
    /// When it is too late.
    pub deadline: Option<Instant>,
    /// Whose it is.
    pub lane: u64,
}

/// How to close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Serve what waits.
    Drain,
    /// Drop it.
    Cancel,
}

/// How long to wait for company.
#[derive(Debug, Clone, Copy)]
pub enum MaxWait {
    /// By what is known.
    Adaptive,
    /// So long.
    Fixed(Duration),
}

/// What is drawn together.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// The most jobs.
    pub max_batch: usize,
    /// How long.
    pub max_wait: MaxWait,
}

struct Cell<T> {
    state: Mutex<CellState<T>>,
    done: Condvar,
}

struct CellState<T> {
    result: Option<Result<T>>,
    cancelled: bool,
    waker: Option<Waker>,
}

struct Waiting<J, T> {
    job: J,
    cell: Arc<Cell<T>>,
    since: Instant,
}

struct State<J, T> {
    jobs: VecDeque<Waiting<J, T>>,
    closed: bool,
}

struct Shared<J, T> {
    state: Mutex<State<J, T>>,
    changed: Condvar,
    capacity: usize,
}

/// The queue.
pub struct Inbox<J, T>(Arc<Shared<J, T>>);

impl<J, T> Clone for Inbox<J, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// The answer to come.
pub struct Ticket<J, T>(Arc<Cell<T>>, std::marker::PhantomData<fn() -> J>);

/// A job that was drawn.
pub struct Drawn<J, T> {
    job: Option<J>,
    cell: Arc<Cell<T>>,
    waited: Duration,
    finished: bool,
}

impl<J: Send, T: Send> Inbox<J, T> {
    pub fn new(capacity: usize) -> Self {
        let state = Mutex::new(State { jobs: VecDeque::new(), closed: false });
        Self(Arc::new(Shared { state, changed: Condvar::new(), capacity }))
    }

    fn put(&self, state: &mut State<J, T>, job: J) -> Ticket<J, T> {
        let state_of = Mutex::new(CellState { result: None, cancelled: false, waker: None });
        let cell = Arc::new(Cell { state: state_of, done: Condvar::new() });
        state.jobs.push_back(Waiting { job, cell: Arc::clone(&cell), since: Instant::now() });
        self.0.changed.notify_all();
        Ticket(cell, std::marker::PhantomData)
    }

    pub fn submit(&self, job: J, _how: &SubmitOptions) -> Result<Ticket<J, T>> {
        let mut state = self.0.state.lock();
        while state.jobs.len() >= self.0.capacity && !state.closed {
            self.0.changed.wait(&mut state);
        }
        if state.closed {
            return Err(Error::msg("closed"));
        }
        Ok(self.put(&mut state, job))
    }

    pub fn try_submit(&self, job: J, _how: &SubmitOptions) -> Result<Ticket<J, T>> {
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(Error::msg("closed"));
        }
        if state.jobs.len() >= self.0.capacity {
            return Err(Error::msg("the queue is full"));
        }
        Ok(self.put(&mut state, job))
    }

    pub async fn submit_async(&self, job: J, how: &SubmitOptions) -> Result<Ticket<J, T>> {
        self.submit(job, how)
    }

    pub fn draw(&self, window: &Window) -> Option<Vec<Drawn<J, T>>> {
        let mut state = self.0.state.lock();
        loop {
            if !state.jobs.is_empty() {
                drop(state);
                return Some(self.try_draw(window.max_batch));
            }
            if state.closed {
                return None;
            }
            self.0.changed.wait(&mut state);
        }
    }

    pub fn try_draw(&self, most: usize) -> Vec<Drawn<J, T>> {
        let mut state = self.0.state.lock();
        let mut drawn = Vec::new();
        while drawn.len() < most {
            let Some(waiting) = state.jobs.pop_front() else { break };
            if waiting.cell.state.lock().cancelled {
                continue;
            }
            let waited = waiting.since.elapsed();
            drawn.push(Drawn { job: Some(waiting.job), cell: waiting.cell, waited, finished: false });
        }
        self.0.changed.notify_all();
        drawn
    }

    pub fn close(&self, how: Shutdown) {
        let mut state = self.0.state.lock();
        state.closed = true;
        let dropped = if how == Shutdown::Cancel { std::mem::take(&mut state.jobs) } else { VecDeque::new() };
        self.0.changed.notify_all();
        drop(state);
        for waiting in dropped {
            waiting.cell.finish(Err(Error::msg("closed")));
        }
    }

    pub fn len(&self) -> usize {
        self.0.state.lock().jobs.len()
    }
}

impl<T> Cell<T> {
    fn finish(&self, result: Result<T>) {
        let mut state = self.state.lock();
        state.result = Some(result);
        let waker = state.waker.take();
        self.done.notify_all();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<J, T> Ticket<J, T> {
    pub fn wait(self) -> Result<T> {
        let mut state = self.0.state.lock();
        loop {
            if let Some(result) = state.result.take() {
                return result;
            }
            self.0.done.wait(&mut state);
        }
    }
}

impl<J, T> Drop for Ticket<J, T> {
    fn drop(&mut self) {
        self.0.state.lock().cancelled = true;
    }
}

impl<J, T> Future for Ticket<J, T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.state.lock();
        match state.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<J, T> Drawn<J, T> {
    pub fn take_job(&mut self) -> Option<J> {
        self.job.take()
    }

    pub fn waited(&self) -> Duration {
        self.waited
    }

    pub fn is_cancelled(&self) -> bool {
        self.cell.state.lock().cancelled
    }

    pub fn finish(mut self, result: Result<T>) {
        self.finished = true;
        self.cell.finish(result);
    }
}

impl<J, T> Drop for Drawn<J, T> {
    fn drop(&mut self) {
        if !self.finished {
            self.cell.finish(Err(Error::msg("dropped")));
        }
    }
}

impl<J, T> std::fmt::Debug for Inbox<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inbox")
    }
}

impl<J, T> std::fmt::Debug for Ticket<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket")
    }
}

impl<J, T> std::fmt::Debug for Drawn<J, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Drawn")
    }
}
