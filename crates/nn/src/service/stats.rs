//! What a service counts, for whoever watches it.

use crate::error::{Error, Result};
use candle_lazy_exec::batch::BatchStats;
use candle_lazy_exec::error::QueueError;
use parking_lot::Mutex;
use std::time::Duration;

/// How often values fell between bounds, as Prometheus counts them.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn add(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += value;
    }

    /// The buckets: an upper bound (the last is infinite), and how many values were at most that, those of lower buckets included.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().scan(0, |total, count| {
            *total += count;
            Some(*total)
        }))
    }

    /// The sum of the values.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// The number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The mean of the values; 0 of none.
    #[must_use]
    pub fn mean(&self) -> f64 {
        match self.count() {
            0 => 0.0,
            count => self.sum / count as f64,
        }
    }
}

/// Seconds.
const TIMES: &[f64] =
    &[1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// What a service has done since it was made, at one moment.
///
/// A request is counted in `submitted` when it is accepted, and in one of `completed`, `failed` and `cancelled` when it is over; one whose
/// caller goes away at the very moment of its answer may be counted in two.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ServiceStats {
    /// Requests that wait.
    pub queued: usize,
    /// Requests that are being computed.
    pub running: usize,
    /// Requests that were accepted.
    pub submitted: u64,
    /// Requests that were refused when they came: bad input, a full queue, a closed service.
    pub refused: u64,
    /// Requests that were answered.
    pub completed: u64,
    /// Requests that ended with an error, a deadline that passed included.
    pub failed: u64,
    /// Requests whose caller went away, or that were dropped when the service was shut down.
    pub cancelled: u64,
    /// Tokens of prompts and of texts that were computed.
    pub tokens_in: u64,
    /// Tokens that were generated.
    pub tokens_out: u64,
    /// Texts per evaluation.
    pub batch: Histogram,
    /// Seconds from the submission of a request to the beginning of its work.
    pub wait: Histogram,
    /// Seconds from the beginning of a request's work to its end.
    pub run: Histogram,
    /// Seconds from the submission of a generation to its first token; nothing of embeddings.
    pub first_token: Histogram,
    /// Seconds of each evaluation, with what is done before and after it.
    pub step: Histogram,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Completed,
    Failed,
    /// Its caller went away.
    Unwanted,
    /// The service was shut down.
    ShutDown,
}

/// The counters behind [`ServiceStats`].
#[derive(Debug)]
pub(super) struct Counters(Mutex<Counted>);

#[derive(Debug)]
struct Counted {
    /// What the service's thread counts: requests that began.
    stats: ServiceStats,
    /// Requests that were drawn and have not begun.
    held: usize,
    /// Requests that were refused because their deadline had passed, which the queue counts too.
    late: u64,
}

impl Default for Counters {
    fn default() -> Self {
        let stats = ServiceStats {
            queued: 0,
            running: 0,
            submitted: 0,
            refused: 0,
            completed: 0,
            failed: 0,
            cancelled: 0,
            tokens_in: 0,
            tokens_out: 0,
            batch: Histogram::new(SIZES),
            wait: Histogram::new(TIMES),
            run: Histogram::new(TIMES),
            first_token: Histogram::new(TIMES),
            step: Histogram::new(TIMES),
        };
        Self(Mutex::new(Counted { stats, held: 0, late: 0 }))
    }
}

impl Counters {
    /// What a submission came to.
    pub(super) fn submitted<T>(&self, result: &Result<T>) {
        let mut counted = self.0.lock();
        match result {
            Ok(_) => counted.stats.submitted += 1,
            Err(error) => {
                counted.stats.refused += 1;
                let late = |error: &candle_lazy_exec::Error| {
                    matches!(error, candle_lazy_exec::Error::Queue(QueueError::Deadline))
                };
                counted.late += u64::from(matches!(error, Error::Exec(error) if late(error)));
            }
        }
    }

    /// So many requests were drawn and have not begun.
    pub(super) fn held(&self, count: usize) {
        self.0.lock().held = count;
    }

    /// A request begins.
    pub(super) fn began(&self, waited: Duration) {
        let stats = &mut self.0.lock().stats;
        stats.running += 1;
        stats.wait.add(waited.as_secs_f64());
    }

    pub(super) fn first_token(&self, after: Duration) {
        self.0.lock().stats.first_token.add(after.as_secs_f64());
    }

    /// One evaluation.
    pub(super) fn step(&self, requests: usize, tokens_in: usize, tokens_out: usize, took: Duration) {
        let stats = &mut self.0.lock().stats;
        stats.batch.add(requests as f64);
        stats.step.add(took.as_secs_f64());
        stats.tokens_in += tokens_in as u64;
        stats.tokens_out += tokens_out as u64;
    }

    /// A request that had begun is over.
    pub(super) fn ended(&self, how: End, ran: Duration) {
        let stats = &mut self.0.lock().stats;
        stats.running = stats.running.saturating_sub(1);
        stats.run.add(ran.as_secs_f64());
        match how {
            End::Completed => stats.completed += 1,
            End::Failed => stats.failed += 1,
            End::ShutDown => stats.cancelled += 1,
            // the queue counts those whose callers went away, begun or not
            End::Unwanted => {}
        }
    }

    /// The numbers of now, with the queue's.
    pub(super) fn snapshot(&self, line: &BatchStats) -> ServiceStats {
        let counted = self.0.lock();
        let mut stats = counted.stats.clone();
        stats.queued = line.queued + counted.held;
        stats.cancelled += line.cancelled;
        stats.failed += line.failed + line.expired.saturating_sub(counted.late);
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_into_the_bucket_that_holds_them() {
        let mut sizes = Histogram::new(&[1.0, 2.0, 4.0]);
        for value in [1.0, 2.0, 3.0, 4.0, 5.0] {
            sizes.add(value);
        }
        let buckets: Vec<_> = sizes.cumulative().collect();
        assert_eq!(buckets, [(1.0, 1), (2.0, 2), (4.0, 4), (f64::INFINITY, 5)]);
        assert_eq!((sizes.count(), sizes.sum(), sizes.mean()), (5, 15.0, 3.0));
    }

    #[test]
    fn a_request_is_counted_once() {
        let counters = Counters::default();
        for _ in 0..6 {
            counters.submitted(&Ok(()));
        }
        counters.submitted::<()>(&Err(candle_lazy_exec::Error::Queue(QueueError::Deadline).into()));
        for how in [End::Completed, End::Failed, End::Unwanted, End::ShutDown] {
            counters.began(Duration::ZERO);
            counters.ended(how, Duration::ZERO);
        }
        counters.held(1);
        // one waits in the queue and one was drawn; the queue has seen who went away, and who was late at the door
        let mut line = BatchStats::default();
        (line.queued, line.cancelled, line.expired) = (1, 1, 1);
        let stats = counters.snapshot(&line);
        assert_eq!((stats.submitted, stats.refused, stats.queued, stats.running), (6, 1, 2, 0));
        assert_eq!((stats.completed, stats.failed, stats.cancelled), (1, 1, 2));
    }
}
