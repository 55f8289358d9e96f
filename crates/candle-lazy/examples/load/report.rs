//! How long the answers took.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What a load measured.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) clients: usize,
    pub(crate) took: Duration,
    /// Times of answers, by what was asked for.
    pub(crate) times: BTreeMap<&'static str, Vec<Duration>>,
    pub(crate) new_tokens: u64,
    /// Requests whose clients went away.
    pub(crate) left: usize,
    /// Nonsense that was refused.
    pub(crate) refused: usize,
}

impl Report {
    pub(crate) fn add(&mut self, other: Self) {
        for (what, times) in other.times {
            self.times.entry(what).or_default().extend(times);
        }
        self.new_tokens += other.new_tokens;
        self.left += other.left;
        self.refused += other.refused;
    }
}

/// The time that `percent` of the sorted times do not exceed (nearest rank).
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.took.as_secs_f64().max(1e-9);
        let answers: usize = self.times.iter().filter(|(what, _)| !what.contains("first")).map(|(_, t)| t.len()).sum();
        writeln!(
            f,
            "{answers} answers for {} clients in {seconds:.2} s, each as it is alone: {:.1} a second, {:.0} new tokens a second",
            self.clients,
            answers as f64 / seconds,
            self.new_tokens as f64 / seconds
        )?;
        for (what, times) in &self.times {
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let ms = |percent| percentile(&sorted, percent).as_secs_f64() * 1e3;
            writeln!(f, "{what:24} {:5}: p50 {:8.1} ms, p99 {:8.1} ms", sorted.len(), ms(50), ms(99))?;
        }
        write!(f, "{} clients went away, {} requests were refused; nothing is left", self.left, self.refused)
    }
}
