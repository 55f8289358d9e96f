//! Two sides timed in turns, and what is concluded from it.

use super::Error;
use std::time::{Duration, Instant};

/// One side of a row: does its work once, on input `i` of a ring, to the end.
pub(super) type Side<'a> = &'a dyn Fn(usize) -> Result<(), Error>;

/// How long a row is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// Both sides together.
    pub(super) time: Duration,
    /// The fewest pairs.
    pub(super) pairs: usize,
    /// How often a row whose measurement was disturbed is measured again.
    pub(super) tries: usize,
}

impl Effort {
    pub(super) const FULL: Self = Self { time: Duration::from_millis(2500), pairs: 21, tries: 6 };
    pub(super) const QUICK: Self = Self { time: Duration::from_millis(300), pairs: 7, tries: 3 };
}

/// A sample of one side lasts at least this long, so that reading the clock is nothing beside it.
const SAMPLE: Duration = Duration::from_millis(2);

/// Eager's time may be this many times the best of its idle probes.
const DISTURBED: f64 = 1.3;

/// What was measured of two sides, in microseconds per call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Paired {
    pub(super) eager_us: f64,
    pub(super) lazy_us: f64,
    /// The median of the ratios eager/lazy of the pairs.
    pub(super) ratio: f64,
    /// The upper end of the ratio's 95 % interval.
    pub(super) ratio_hi: f64,
    /// The best of eager's idle probes.
    pub(super) idle_us: f64,
}

impl Paired {
    /// What the samples of both sides, pair by pair, say.
    fn of(eager: &[f64], lazy: &[f64], idle_us: f64) -> Self {
        let ratios: Vec<f64> = eager.iter().zip(lazy).map(|(e, l)| e / l).collect();
        Self {
            eager_us: median(eager),
            lazy_us: median(lazy),
            ratio: median(&ratios),
            ratio_hi: median_hi(&ratios),
            idle_us,
        }
    }

    /// The same for each of `count` things that a call does.
    pub(super) fn per(self, count: usize) -> Self {
        let per = count as f64;
        let (eager_us, lazy_us, idle_us) = (self.eager_us / per, self.lazy_us / per, self.idle_us / per);
        Self { eager_us, lazy_us, idle_us, ..self }
    }

    /// Whether something else ran meanwhile.
    pub(super) fn disturbed(&self) -> bool {
        self.eager_us.is_nan() || self.eager_us > DISTURBED * self.idle_us
    }
}

/// The middle of some numbers, the mean of the two in the middle of an even count; NaN of none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
    match sorted.len() {
        0 => f64::NAN,
        n => (at((n - 1) / 2) + at(n / 2)) / 2.0,
    }
}

/// The upper end of the two-sided 95 % interval of the median, by order statistics: of n values about n/2 ± 0.98·√n lie on either
/// side of the true median (normal approximation of the binomial). The largest value of few.
pub(super) fn median_hi(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = sorted.len();
    let rank = (n as f64 / 2.0 + 0.98 * (n as f64).sqrt()).ceil() as usize;
    sorted.get(rank.min(n.saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Microseconds per call of `calls` calls, on inputs from `*next` on.
fn sample(side: Side<'_>, calls: usize, next: &mut usize) -> Result<f64, Error> {
    let start = Instant::now();
    for _ in 0..calls {
        side(*next)?;
        *next += 1;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / calls as f64)
}

/// How many calls last as long as a sample.
fn calls(side: Side<'_>) -> Result<usize, Error> {
    let mut next = 0;
    sample(side, 2, &mut next)?;
    let (mut calls, most) = (1, 1 << 16);
    while calls < most {
        let us = sample(side, calls, &mut next)? * calls as f64;
        if us >= SAMPLE.as_secs_f64() * 1e6 {
            break;
        }
        calls *= 2;
    }
    Ok(calls)
}

/// Both sides in turns; which goes first changes from pair to pair.
pub(super) fn paired(effort: Effort, eager: Side<'_>, lazy: Side<'_>) -> Result<Paired, Error> {
    let (eager_calls, lazy_calls) = (calls(eager)?, calls(lazy)?);
    let mut next = 0;
    let mut idle_us = f64::INFINITY;
    for _ in 0..3 {
        let probe = (0..5).map(|_| sample(eager, eager_calls, &mut next)).collect::<Result<Vec<_>, _>>()?;
        idle_us = idle_us.min(median(&probe));
    }
    let (mut eager_us, mut lazy_us) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while eager_us.len() < effort.pairs || start.elapsed() < effort.time {
        let mut at = next;
        let (e, l) = if eager_us.len() % 2 == 0 {
            let e = sample(eager, eager_calls, &mut next)?;
            (e, sample(lazy, lazy_calls, &mut at)?)
        } else {
            let l = sample(lazy, lazy_calls, &mut at)?;
            (sample(eager, eager_calls, &mut next)?, l)
        };
        next = next.max(at);
        eager_us.push(e);
        lazy_us.push(l);
    }
    Ok(Paired::of(&eager_us, &lazy_us, idle_us))
}

/// The median of one side alone, in microseconds.
pub(super) fn alone(effort: Effort, side: Side<'_>) -> Result<f64, Error> {
    let calls = calls(side)?;
    let (mut next, mut all) = (0, Vec::new());
    let start = Instant::now();
    while all.len() < effort.pairs || start.elapsed() < effort.time / 2 {
        all.push(sample(side, calls, &mut next)?);
    }
    Ok(median(&all))
}

/// What has no second side.
pub(super) fn single(lazy_us: f64, ratio: f64) -> Paired {
    Paired { eager_us: f64::NAN, lazy_us, ratio, ratio_hi: ratio, idle_us: f64::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_their_upper_ends() {
        assert!(median(&[]).is_nan());
        assert_eq!((median(&[3.0, 1.0]), median(&[5.0, 1.0, 2.0])), (2.0, 2.0));
        // of 100 values the interval ends at the 61st: ranks 40 and 61 are those of the tables of the sign test
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(median_hi(&values), 61.0);
        assert_eq!(median_hi(&[1.0, 2.0]), 2.0);
    }

    #[test]
    fn the_ratio_is_that_of_the_pairs() {
        let paired = Paired::of(&[1.0, 2.0, 30.0], &[4.0, 8.0, 60.0], 1.0);
        assert_eq!((paired.eager_us, paired.lazy_us, paired.ratio), (2.0, 8.0, 0.25));
        assert_eq!(paired.ratio_hi, 0.5);
        let even = Paired::of(&[1.0, 3.0], &[1.0, 1.0], 1.0);
        assert_eq!((even.ratio, even.ratio_hi), (2.0, 3.0));
    }

    #[test]
    fn both_sides_go_on_over_the_same_inputs() {
        let seen = [std::cell::RefCell::new(Vec::new()), std::cell::RefCell::new(Vec::new())];
        let side = |k: usize| {
            let seen = &seen[k];
            move |i: usize| {
                seen.borrow_mut().push(i);
                std::thread::sleep(Duration::from_millis(3));
                Ok(())
            }
        };
        let effort = Effort { time: Duration::ZERO, pairs: 4, tries: 1 };
        paired(effort, &side(0), &side(1)).unwrap();
        let last = |k: usize| seen[k].borrow().iter().rev().take(4).rev().copied().collect::<Vec<_>>();
        assert_eq!(last(0), last(1));
        assert!(last(0).windows(2).all(|w| w[1] == w[0] + 1), "{:?}", last(0));
    }

    #[test]
    fn a_disturbed_measurement_is_told() {
        let quiet = Paired { eager_us: 12.0, lazy_us: 1.0, ratio: 12.0, ratio_hi: 12.0, idle_us: 10.0 };
        assert!(!quiet.disturbed());
        assert!(Paired { eager_us: 13.1, ..quiet }.disturbed());
        assert!(Paired { eager_us: f64::NAN, ..quiet }.disturbed());
    }
}
