//! What a service counts, for whoever watches it.

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
const TIMES: &[f64] = &[1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// What a service has done since it was made, at one moment.
///
/// A request is counted in `submitted` when it is accepted, and in exactly one of `completed`, `failed` and `cancelled` when it is over.
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
    /// Requests per evaluation.
    pub batch: Histogram,
    /// Seconds from the submission of a request to the beginning of its work.
    pub wait: Histogram,
    /// Seconds from the beginning of a request's work to its end.
    pub run: Histogram,
    /// Seconds from the submission of a generation to its first token; nothing of embeddings.
    pub first_token: Histogram,
    /// Seconds of each evaluation, with all that is done before and after it.
    pub step: Histogram,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Completed,
    Failed,
    Cancelled,
}

/// The counters behind [`ServiceStats`].
#[derive(Debug)]
pub(super) struct Counters(Mutex<ServiceStats>);

impl Default for Counters {
    fn default() -> Self {
        Self(Mutex::new(ServiceStats {
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
        }))
    }
}

impl Counters {
    /// What a submission came to.
    pub(super) fn submitted<T, E>(&self, result: &Result<T, E>) {
        let mut stats = self.0.lock();
        match result {
            Ok(_) => stats.submitted += 1,
            Err(_) => stats.refused += 1,
        }
    }

    /// A request begins.
    pub(super) fn began(&self, waited: Duration) {
        let mut stats = self.0.lock();
        stats.running += 1;
        stats.wait.add(waited.as_secs_f64());
    }

    pub(super) fn first_token(&self, after: Duration) {
        self.0.lock().first_token.add(after.as_secs_f64());
    }

    /// One evaluation.
    pub(super) fn step(&self, requests: usize, tokens_in: usize, tokens_out: usize, took: Duration) {
        let mut stats = self.0.lock();
        stats.batch.add(requests as f64);
        stats.step.add(took.as_secs_f64());
        stats.tokens_in += tokens_in as u64;
        stats.tokens_out += tokens_out as u64;
    }

    /// A request that had begun is over.
    pub(super) fn ended(&self, how: End, ran: Duration) {
        let mut stats = self.0.lock();
        stats.running = stats.running.saturating_sub(1);
        stats.run.add(ran.as_secs_f64());
        match how {
            End::Completed => stats.completed += 1,
            End::Failed => stats.failed += 1,
            End::Cancelled => stats.cancelled += 1,
        }
    }

    /// The numbers of now, with the queue's. What was accepted and neither waits, runs nor has ended was cancelled or too late in the
    /// queue, which does not call anybody for it.
    pub(super) fn snapshot(&self, queued: usize) -> ServiceStats {
        let mut stats = self.0.lock().clone();
        stats.queued = queued;
        let known = stats.completed + stats.failed + stats.cancelled + (stats.running + queued) as u64;
        stats.cancelled += stats.submitted.saturating_sub(known);
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
        for _ in 0..5 {
            counters.submitted(&Ok::<(), ()>(()));
        }
        counters.submitted(&Err::<(), ()>(()));
        for how in [End::Completed, End::Failed, End::Cancelled] {
            counters.began(Duration::ZERO);
            counters.ended(how, Duration::ZERO);
        }
        // one still waits, and one left the queue
        let stats = counters.snapshot(1);
        assert_eq!((stats.submitted, stats.refused, stats.queued, stats.running), (5, 1, 1, 0));
        assert_eq!((stats.completed, stats.failed, stats.cancelled), (1, 1, 2));
    }
}
