//! Measuring two ways of doing the same work.

use crate::alloc;
use crate::Result;
use candle_lazy_exec::buffer::trim;
use candle_lazy_exec::EvalReport;
use std::time::{Duration, Instant};

/// What a run of lazy work did.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// The reports of its evaluations.
    pub reports: Vec<EvalReport>,
}

/// Times and peaks of two ways.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Median time of the first.
    pub eager: Duration,
    /// Median time of the second.
    pub lazy: Duration,
    /// Most bytes at once of the first, beyond what was alive before.
    pub eager_peak: u64,
    /// Most bytes at once of the second.
    pub lazy_peak: u64,
    /// Kernels of the second's last run.
    pub kernels: usize,
    /// Candle ops that stood in for kernels in it.
    pub fallbacks: usize,
    /// Evaluations with a plan from the cache, over all measured runs.
    pub cache_hits: usize,
    /// Evaluations with a new plan.
    pub cache_misses: usize,
}

/// The result of `f` and its time.
fn timed<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let value = f()?;
    Ok((value, start.elapsed()))
}

/// The most bytes that `f` had allocated at once. The engine's pool is emptied first: what an earlier run left in it would
/// otherwise count as alive before.
fn peak_of<T>(f: impl FnOnce() -> Result<T>) -> Result<u64> {
    trim();
    let before = alloc::live_bytes();
    alloc::reset_peak();
    f()?;
    Ok(alloc::peak_bytes().saturating_sub(before) as u64)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// One warm-up of each, `repetitions` of each in turns, then one of each for its memory.
///
/// # Errors
/// When the work fails.
pub fn measure(
    repetitions: usize,
    mut eager: impl FnMut() -> Result<()>,
    mut lazy: impl FnMut() -> Result<Work>,
) -> Result<Measured> {
    eager()?;
    lazy()?;
    let mut out = Measured::default();
    let (mut eager_times, mut lazy_times) = (Vec::new(), Vec::new());
    for _ in 0..repetitions.max(1) {
        let ((), time) = timed(&mut eager)?;
        eager_times.push(time);
        let (work, time) = timed(&mut lazy)?;
        lazy_times.push(time);
        out.kernels = work.reports.iter().map(EvalReport::kernel_count).sum();
        out.fallbacks = work.reports.iter().map(EvalReport::fallback_count).sum();
        let hits = work.reports.iter().filter(|r| r.cache_hit).count();
        out.cache_hits += hits;
        out.cache_misses += work.reports.len() - hits;
    }
    (out.eager, out.lazy) = (median(eager_times), median(lazy_times));
    (out.eager_peak, out.lazy_peak) = (peak_of(&mut eager)?, peak_of(&mut lazy)?);
    Ok(out)
}

impl Measured {
    /// A row of the comparison.
    #[must_use]
    pub fn row(self, name: String, largest_difference: f64, agrees: bool) -> super::ModelRow {
        super::ModelRow {
            name,
            largest_difference,
            agrees,
            eager: self.eager,
            lazy: self.lazy,
            eager_peak: self.eager_peak,
            lazy_peak: self.lazy_peak,
            kernels: self.kernels,
            fallbacks: self.fallbacks,
            cache_hits: self.cache_hits,
            cache_misses: self.cache_misses,
        }
    }
}

/// The largest |a − b| relative to the largest |b|; infinite where the lengths differ or a number is none.
#[must_use]
pub(super) fn relative_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let scale = b.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
    let off = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, |m: f64, d| {
        if d.is_nan() {
            f64::INFINITY
        } else {
            m.max(d)
        }
    });
    if off == 0.0 {
        0.0
    } else {
        off / scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_the_sorted_times() {
        let ms = |n| Duration::from_millis(n);
        assert_eq!(median(vec![ms(9), ms(1), ms(5)]), ms(5));
        assert_eq!(median(Vec::new()), Duration::ZERO);
    }

    #[test]
    fn a_difference_is_relative_to_the_largest_number() {
        assert_eq!(relative_difference(&[1.0, 4.5], &[1.0, 4.0]), 0.125);
        assert_eq!(relative_difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(relative_difference(&[f32::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
    }

    #[test]
    fn runs_take_turns_after_a_warm_up_and_memory_comes_last() {
        use std::cell::RefCell;
        let log = RefCell::new(String::new());
        let eager = || {
            log.borrow_mut().push('e');
            Ok(())
        };
        let lazy = || {
            log.borrow_mut().push('l');
            Ok(Work { reports: vec![EvalReport::default()] })
        };
        let measured = measure(2, eager, lazy).unwrap();
        assert_eq!(log.into_inner(), "elelelel");
        assert_eq!((measured.cache_hits, measured.cache_misses), (0, 2));
    }
}
