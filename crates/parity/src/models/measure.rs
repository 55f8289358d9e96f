//! Measuring two ways of doing the same work, step by step.

use super::EagerSide;
use crate::alloc::Count;
use crate::Result;
use candle_lazy_exec::buffer::trim;
use candle_lazy_exec::EvalReport;
use std::time::{Duration, Instant};

/// Work that is repeated in steps: a forward pass, or a prefill and one step per new token.
pub trait Way {
    /// Makes ready what the work needs beside weights and input, such as an empty KV cache. Not measured.
    ///
    /// # Errors
    /// When that fails.
    fn begin(&mut self) -> Result<()>;

    /// Does step `index`; the report of what the engine evaluated, if it did.
    ///
    /// # Errors
    /// When the work fails.
    fn step(&mut self, index: usize) -> Result<Option<EvalReport>>;

    /// Drops what [`Way::begin`] and the steps made.
    fn end(&mut self);
}

/// One side of a comparison.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Side {
    /// The sum over the steps of each step's median time.
    pub time: Duration,
    /// Most bytes at once, beyond what was alive before.
    pub peak: u64,
}

/// Times and peaks of two ways.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// The first way, where there is one.
    pub eager: Option<Side>,
    /// The second.
    pub lazy: Side,
    /// Measured runs of each.
    pub runs: usize,
    /// Kernels of the second's last run.
    pub kernels: usize,
    /// Candle ops that stood in for kernels in it.
    pub fallbacks: usize,
    /// Evaluations with a plan from the cache, over all measured runs.
    pub cache_hits: usize,
    /// Evaluations with a new plan.
    pub cache_misses: usize,
}

/// Where more than one run is asked for, short work is repeated until the runs have taken this long together.
const ENOUGH: Duration = Duration::from_millis(1500);

/// No more runs than this, however short.
const MOST_RUNS: usize = 51;

/// The whole work once.
fn whole(way: &mut dyn Way, steps: usize) -> Result<()> {
    way.begin()?;
    for index in 0..steps {
        way.step(index)?;
    }
    Ok(())
}

/// The most bytes that a run had allocated at once. The engine's pool is emptied first: what an earlier run left in it would
/// otherwise count as alive before.
fn peak_of(way: &mut dyn Way, steps: usize) -> Result<u64> {
    way.end();
    trim();
    let count = Count::begin();
    whole(way, steps)?;
    let peak = count.peak_bytes() as u64;
    drop(count);
    way.end();
    Ok(peak)
}

/// The middle of the sorted times, the mean of the two in the middle of an even number.
fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    match times.len() {
        0 => Duration::ZERO,
        n => (at((n - 1) / 2) + at(n / 2)) / 2,
    }
}

/// The times of every step over all runs.
struct Times(Vec<Vec<Duration>>);

impl Times {
    fn new(steps: usize) -> Self {
        Self(vec![Vec::new(); steps])
    }

    /// Does a step, and returns its time and report.
    fn step(&mut self, way: &mut dyn Way, index: usize) -> Result<(Duration, Option<EvalReport>)> {
        let start = Instant::now();
        let report = way.step(index)?;
        let time = start.elapsed();
        if let Some(times) = self.0.get_mut(index) {
            times.push(time);
        }
        Ok((time, report))
    }

    fn sum_of_medians(mut self) -> Duration {
        self.0.iter_mut().map(|times| median(times)).sum()
    }
}

/// Measures `lazy`, and `eager` beside it.
///
/// After a whole run of each to warm up, every run does the work twice, step by step: a step of one way, the same step of the
/// other, and which of the two goes first changes from step to step. A busy moment of the machine, which lasts longer than a
/// step, so meets both. A step counts with its median over all runs, for both ways alike; no run is left out. Last comes a
/// run of each for its memory.
///
/// # Errors
/// When the work fails.
pub fn measure(
    repetitions: usize,
    steps: usize,
    mut eager: Option<&mut dyn Way>,
    lazy: &mut dyn Way,
) -> Result<Measured> {
    if let Some(eager) = eager.as_deref_mut() {
        whole(eager, steps)?;
    }
    whole(lazy, steps)?;
    let mut out = Measured::default();
    let (mut eager_times, mut lazy_times) = (Times::new(steps), Times::new(steps));
    let mut spent = Duration::ZERO;
    while out.runs < repetitions.max(1) || (repetitions > 1 && spent < ENOUGH && out.runs < MOST_RUNS) {
        (out.kernels, out.fallbacks) = (0, 0);
        if let Some(eager) = eager.as_deref_mut() {
            eager.begin()?;
        }
        lazy.begin()?;
        for index in 0..steps {
            let eager_first = (out.runs + index) % 2 == 0;
            if let (Some(eager), true) = (eager.as_deref_mut(), eager_first) {
                spent += eager_times.step(eager, index)?.0;
            }
            let (time, report) = lazy_times.step(lazy, index)?;
            spent += time;
            if let (Some(eager), false) = (eager.as_deref_mut(), eager_first) {
                spent += eager_times.step(eager, index)?.0;
            }
            if let Some(report) = report {
                out.kernels += report.kernel_count();
                out.fallbacks += report.fallback_count();
                out.cache_hits += usize::from(report.cache_hit);
                out.cache_misses += usize::from(!report.cache_hit);
            }
        }
        out.runs += 1;
    }
    if let Some(eager) = eager {
        eager.end();
        lazy.end();
        out.eager = Some(Side { time: eager_times.sum_of_medians(), peak: peak_of(eager, steps)? });
    }
    out.lazy = Side { time: lazy_times.sum_of_medians(), peak: peak_of(lazy, steps)? };
    Ok(out)
}

impl Measured {
    /// A row of the comparison; `eager` is how far the results are apart and whether they agree, or why there is no twin.
    #[must_use]
    pub(super) fn row(self, name: String, eager: std::result::Result<(f64, bool), String>) -> super::ModelRow {
        let side = self.eager.unwrap_or_default();
        super::ModelRow {
            name,
            eager: eager.map(|(largest_difference, agrees)| EagerSide {
                largest_difference,
                agrees,
                time: side.time,
                peak: side.peak,
            }),
            lazy: self.lazy.time,
            lazy_peak: self.lazy.peak,
            runs: self.runs,
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
    use std::cell::RefCell;

    #[test]
    fn the_median_is_of_the_sorted_times() {
        let ms = |n| Duration::from_millis(n);
        assert_eq!(median(&mut [ms(9), ms(1), ms(5)]), ms(5));
        assert_eq!(median(&mut [ms(9), ms(1), ms(5), ms(3)]), ms(4));
        assert_eq!(median(&mut []), Duration::ZERO);
    }

    #[test]
    fn a_step_counts_with_its_median_over_the_runs() {
        let ms = |n| Duration::from_millis(n);
        // one slow run spoils neither step
        let times = Times(vec![vec![ms(10), ms(900), ms(12)], vec![ms(3), ms(700), ms(1)]]);
        assert_eq!(times.sum_of_medians(), ms(15));
    }

    #[test]
    fn a_difference_is_relative_to_the_largest_number() {
        assert_eq!(relative_difference(&[1.0, 4.5], &[1.0, 4.0]), 0.125);
        assert_eq!(relative_difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(relative_difference(&[f32::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
    }

    /// Writes down what is asked of it.
    struct Logged<'a>(&'static str, &'a RefCell<String>, Duration);

    impl Way for Logged<'_> {
        fn begin(&mut self) -> Result<()> {
            self.1.borrow_mut().push_str(&format!(" {}:", self.0));
            Ok(())
        }

        fn step(&mut self, index: usize) -> Result<Option<EvalReport>> {
            self.1.borrow_mut().push_str(&format!("{}{index}", self.0));
            std::thread::sleep(self.2);
            Ok((self.0 == "l").then(EvalReport::default))
        }

        fn end(&mut self) {}
    }

    #[test]
    fn steps_take_turns_and_so_does_who_begins() {
        let log = RefCell::new(String::new());
        let pause = Duration::from_millis(400);
        let (mut eager, mut lazy) = (Logged("e", &log, pause), Logged("l", &log, pause));
        let measured = measure(2, 2, Some(&mut eager), &mut lazy).unwrap();
        let warm = " e:e0e1 l:l0l1";
        let runs = " e: l:e0l0l1e1 e: l:l0e0e1l1";
        assert_eq!(log.take(), format!("{warm}{runs}{warm}"));
        assert_eq!((measured.runs, measured.cache_hits, measured.cache_misses), (2, 0, 4));
    }

    #[test]
    fn short_work_runs_more_often_unless_one_run_is_asked_for() {
        let log = RefCell::new(String::new());
        let mut lazy = Logged("l", &log, Duration::ZERO);
        assert_eq!(measure(5, 1, None, &mut lazy).unwrap().runs, MOST_RUNS);
        let once = measure(1, 1, None, &mut lazy).unwrap();
        assert_eq!(once.runs, 1);
        assert!(once.eager.is_none());
    }
}
