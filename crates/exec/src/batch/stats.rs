//! What went through a line: counters that cost an addition each.

use crate::error::{Error, QueueError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How many values a histogram tells apart: powers of two.
const BUCKETS: usize = 40;

#[derive(Debug)]
struct Buckets {
    counts: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl Default for Buckets {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)), sum: AtomicU64::new(0) }
    }
}

impl Buckets {
    fn add(&self, value: u64) {
        let bucket = (u64::BITS - value.leading_zeros()) as usize;
        if let Some(count) = self.counts.get(bucket.min(BUCKETS - 1)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    fn snapshot(&self) -> Histogram {
        let counts: Vec<u64> = self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        Histogram { counts, sum: self.sum.load(Ordering::Relaxed) }
    }
}

/// How often values of each size were seen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Histogram {
    /// How many values `v` had `2^(i-1) <= v < 2^i`; the first counts zeros, the last whatever is larger.
    pub counts: Vec<u64>,
    /// All of them added up.
    pub sum: u64,
}

impl Histogram {
    /// How many values there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their mean; 0 without any.
    #[must_use]
    pub fn mean(&self) -> f64 {
        match self.count() {
            0 => 0.0,
            count => self.sum as f64 / count as f64,
        }
    }

    /// For each bucket that holds something or lies before one that does, the value that its values are below or equal to, and how many
    /// values are: the cumulative buckets of a Prometheus histogram.
    pub fn cumulative(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let last = self.counts.iter().rposition(|&c| c > 0).map_or(0, |i| i + 1);
        let mut total = 0;
        self.counts.iter().take(last).enumerate().map(move |(i, count)| {
            total += count;
            ((1u64 << i) - 1, total)
        })
    }
}

/// What went through a line since it was made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BatchStats {
    /// Requests that wait now.
    pub queued: usize,
    /// Requests that were let in.
    pub submitted: u64,
    /// Requests that were not, because the line was full.
    pub refused_full: u64,
    /// Requests that were answered with a value.
    pub completed: u64,
    /// Requests that were answered with an error of their own.
    pub failed: u64,
    /// Requests whose deadline passed, before they were let in or after that.
    pub expired: u64,
    /// Requests that nobody wanted any more before they were answered.
    pub cancelled: u64,
    /// Requests that were small enough to be answered while they were submitted. They are among those let in and those answered, and in no
    /// batch.
    pub at_once: u64,
    /// Products that were made for several requests of a [`BatchExecutor`](super::BatchExecutor) at once.
    pub merged_products: u64,
    /// Requests per batch.
    pub batch_sizes: Histogram,
    /// How long requests waited before they were drawn, in microseconds.
    pub wait_us: Histogram,
    /// How long batches took, in microseconds.
    pub run_us: Histogram,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    submitted: AtomicU64,
    refused_full: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    expired: AtomicU64,
    cancelled: AtomicU64,
    at_once: AtomicU64,
    /// Those of them that were answered with an error.
    at_once_failed: AtomicU64,
    merged_products: AtomicU64,
    batch_sizes: Buckets,
    wait_us: Buckets,
    run_us: Buckets,
}

fn one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Counters {
    pub(super) fn submitted(&self) {
        one(&self.submitted);
    }

    pub(super) fn refused(&self, why: &QueueError) {
        match why {
            QueueError::Full { .. } => one(&self.refused_full),
            QueueError::Deadline => one(&self.expired),
            QueueError::Closed | QueueError::Lost => {}
        }
    }

    pub(super) fn drawn(&self, waited: Duration) {
        self.wait_us.add(micros(waited));
    }

    pub(super) fn ran(&self, drawn: usize, run: Duration) {
        self.batch_sizes.add(drawn as u64);
        self.run_us.add(micros(run));
    }

    pub(super) fn merged(&self, products: usize) {
        self.merged_products.fetch_add(products as u64, Ordering::Relaxed);
    }

    pub(super) fn cancelled(&self) {
        one(&self.cancelled);
    }

    /// A request was answered, that somebody still wanted or not.
    pub(super) fn answered(&self, wanted: bool, error: Option<&Error>) {
        one(match error {
            _ if !wanted => &self.cancelled,
            None => &self.completed,
            Some(Error::Queue(QueueError::Deadline)) => &self.expired,
            Some(_) => &self.failed,
        });
    }

    /// Whether it is time to look how long a request takes that is answered at once: each eighth time.
    pub(super) fn samples(&self) -> bool {
        self.at_once.load(Ordering::Relaxed).is_multiple_of(8)
    }

    /// A request was answered while it was submitted.
    pub(super) fn at_once(&self, error: Option<&Error>) {
        one(&self.at_once);
        if error.is_some() {
            one(&self.at_once_failed);
        }
    }

    pub(super) fn snapshot(&self, queued: usize) -> BatchStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (at_once, at_once_failed) = (count(&self.at_once), count(&self.at_once_failed));
        BatchStats {
            queued,
            submitted: count(&self.submitted) + at_once,
            refused_full: count(&self.refused_full),
            completed: count(&self.completed) + at_once.saturating_sub(at_once_failed),
            failed: count(&self.failed) + at_once_failed,
            expired: count(&self.expired),
            cancelled: count(&self.cancelled),
            at_once,
            merged_products: count(&self.merged_products),
            batch_sizes: self.batch_sizes.snapshot(),
            wait_us: self.wait_us.snapshot(),
            run_us: self.run_us.snapshot(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_and_cumulative_counts_end_at_all() {
        let buckets = Buckets::default();
        for value in [0, 1, 2, 3, 4, 1000, u64::MAX >> 2] {
            buckets.add(value);
        }
        let seen = buckets.snapshot();
        assert_eq!((seen.count(), &seen.counts[..4]), (7, &[1, 1, 2, 1][..]));
        assert_eq!(seen.counts[10], 1, "512 <= 1000 < 1024");
        let cumulative: Vec<_> = seen.cumulative().collect();
        assert_eq!(&cumulative[..4], &[(0, 1), (1, 2), (3, 4), (7, 5)]);
        assert_eq!(cumulative.last().map(|&(_, n)| n), Some(7));
        assert_eq!(Histogram::default().mean(), 0.0);
    }
}
