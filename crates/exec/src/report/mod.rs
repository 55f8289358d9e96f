//! What an evaluation did.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What an evaluation did: how much there was, which kernels ran, and what it took.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct EvalReport {
    /// Pending nodes that were captured.
    pub nodes: usize,
    /// Steps of the plan that ran.
    pub steps: usize,
    /// How often each kernel of ours ran, by name.
    pub kernels: BTreeMap<&'static str, usize>,
    /// How often Candle's own op ran because no kernel of ours serves, by op.
    pub fallbacks: BTreeMap<&'static str, usize>,
    /// How often Candle's own op ran because Candle's autograd tracks the value or it is not on the CPU, by op.
    pub replayed: BTreeMap<&'static str, usize>,
    /// Views that moved no data.
    pub views: usize,
    /// Results that were written over a value that was given away: of slice assignments and of elementwise steps.
    pub in_place: usize,
    /// Slice assignments that copied the tensor first, because somebody else still held it.
    pub copies: usize,
    /// Whether the plan was in the cache.
    pub cache_hit: bool,
    /// How often each pass rewrote something when the plan was made, by name.
    pub passes: Vec<(&'static str, usize)>,
    /// The largest number of bytes that the plan's own buffers need at once, results included: computed before running.
    pub peak_bytes: u64,
    /// From the call to the result.
    pub elapsed: Duration,
}

impl EvalReport {
    /// How many of our kernels ran.
    #[must_use]
    pub fn kernel_count(&self) -> usize {
        self.kernels.values().sum()
    }

    /// How many Candle ops ran because no kernel of ours serves.
    #[must_use]
    pub fn fallback_count(&self) -> usize {
        self.fallbacks.values().sum()
    }

    /// Adds another report: counts add up, the peak is the larger one, a hit is a hit only if both were.
    pub fn merge(&mut self, other: &Self) {
        let first = self.nodes == 0 && self.steps == 0;
        self.nodes += other.nodes;
        self.steps += other.steps;
        self.views += other.views;
        self.in_place += other.in_place;
        self.copies += other.copies;
        self.cache_hit = other.cache_hit && (first || self.cache_hit);
        self.peak_bytes = self.peak_bytes.max(other.peak_bytes);
        self.elapsed += other.elapsed;
        self.passes.clone_from(&other.passes);
        let pairs = [
            (&mut self.kernels, &other.kernels),
            (&mut self.fallbacks, &other.fallbacks),
            (&mut self.replayed, &other.replayed),
        ];
        for (mine, theirs) in pairs {
            for (name, count) in theirs {
                *mine.entry(name).or_default() += count;
            }
        }
    }
}

fn list(map: &BTreeMap<&'static str, usize>) -> String {
    if map.is_empty() {
        return "none".into();
    }
    map.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for EvalReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "nodes      {}", self.nodes)?;
        writeln!(f, "steps      {} and {} views", self.steps, self.views)?;
        writeln!(f, "kernels    {}", list(&self.kernels))?;
        writeln!(f, "fallbacks  {}", list(&self.fallbacks))?;
        writeln!(f, "replayed   {}", list(&self.replayed))?;
        writeln!(f, "in place   {}, copied {}", self.in_place, self.copies)?;
        writeln!(f, "plan       {}", if self.cache_hit { "from the cache" } else { "made" })?;
        writeln!(f, "peak       {} bytes", self.peak_bytes)?;
        write!(f, "time       {:?}", self.elapsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_adds_counts_and_keeps_the_larger_peak() {
        let mut a = EvalReport { nodes: 1, steps: 2, peak_bytes: 10, cache_hit: true, ..EvalReport::default() };
        a.kernels.insert("row", 2);
        let mut b = EvalReport { nodes: 3, steps: 1, peak_bytes: 7, ..EvalReport::default() };
        b.kernels.insert("row", 1);
        b.fallbacks.insert("sum", 1);
        a.merge(&b);
        assert_eq!((a.nodes, a.steps, a.peak_bytes, a.cache_hit), (4, 3, 10, false));
        assert_eq!((a.kernel_count(), a.fallback_count()), (3, 1));
        assert!(a.to_string().contains("row 3"), "{a}");
    }
}
