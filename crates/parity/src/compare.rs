//! When two results are the same.
//!
//! - **Bits**: every element has the same bits; every NaN equals every NaN, −0 and +0 differ (Candle's kernels give a
//!   definite zero, so an op that claims to be exact gives the same one).
//! - **Rounding**: the error against the f64 reference, in units in the last place at the row's scale, is at most the larger
//!   of 1.5 × eager's largest error and 2. Infinities and NaN must be where the reference has them, except where a result is
//!   beyond the dtype's range, or where eager has the same non-finite number.
//!
//! One draw of the numbers says little about either side's largest error: a row of five has five roundings to be lucky with, and
//! of thousands of cells one is unlucky. A cell that is over its limit, by a factor of [`LUCK`] at most, is therefore drawn
//! [`DRAWS`] times in all, and the largest errors of both sides over all draws, the first among them, are held against the
//! same rule.

use crate::referee::Judged;
use crate::reference::Arr;
use crate::value::{bits, overflows, to_arr, ulp};
use crate::Result;
use candle_core::{DType, Tensor};

/// The factor of eager's error that is allowed.
pub const EAGER_FACTOR: f64 = 1.5;

/// The error that is always allowed, in units in the last place at the row's scale.
pub const ALLOWED_ULP: f64 = 2.0;

/// How many draws of its numbers a cell over its limit is judged by: as many as it takes for eager to be unlucky too.
pub const DRAWS: u64 = 256;

/// The factor of its limit beyond which an error is a fault and no bad luck.
pub const LUCK: f64 = 2.0;

/// An error in units in the last place, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Worst {
    /// The largest error; infinite for a wrong infinity or NaN.
    pub ulp: f64,
    /// Its flat index.
    pub at: usize,
}

/// Whether two tensors are the same bit for bit; else where they first differ.
///
/// # Errors
/// When a tensor cannot be read.
pub fn same_bits(what: &str, got: &Tensor, want: &Tensor) -> Result<std::result::Result<(), String>> {
    if got.dtype() != want.dtype() || got.dims() != want.dims() {
        return Ok(Err(format!(
            "{what}: {} {:?} instead of {} {:?}",
            got.dtype().as_str(),
            got.dims(),
            want.dtype().as_str(),
            want.dims()
        )));
    }
    let (g, w) = (bits(got)?, bits(want)?);
    let different = g.iter().zip(&w).filter(|(a, b)| a != b).count();
    let Some(at) = g.iter().zip(&w).position(|(a, b)| a != b) else {
        return Ok(Ok(()));
    };
    let (ga, wa) = (to_arr(got)?, to_arr(want)?);
    Ok(Err(format!(
        "{what}: {different} of {} elements differ in their bits, first at {at}: {:?} instead of {:?}",
        g.len(),
        ga.data[at],
        wa.data[at]
    )))
}

/// The largest error of `got` against the reference. `eager` excuses a wrong infinity or NaN that it has too.
#[must_use]
pub fn worst_error(got: &Arr, judged: &Judged, dtype: DType, eager: Option<&Arr>) -> Worst {
    let scales = judged.scales();
    let mut worst = Worst::default();
    for (at, (&g, &want)) in got.data.iter().zip(&judged.value.data).enumerate() {
        let same_nonfinite = (g.is_nan() && want.is_nan()) || g == want;
        let excused = !g.is_finite()
            && (eager
                .and_then(|e| e.data.get(at))
                .is_some_and(|e| e.to_bits() == g.to_bits() || (e.is_nan() && g.is_nan()))
                || (overflows(dtype, want) && g.signum() == want.signum()));
        let saturated = want.is_infinite() && overflows(dtype, g);
        let error = if same_nonfinite || excused || saturated {
            0.0
        } else if !g.is_finite() || !want.is_finite() {
            f64::INFINITY
        } else {
            (g - want).abs() / ulp(dtype, scales[at])
        };
        if error > worst.ulp {
            worst = Worst { ulp: error, at };
        }
    }
    worst
}

/// The verdict of the rounding rule.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// Our largest error.
    pub ours: Worst,
    /// Eager's largest error, if eager can compute this.
    pub eager: Option<Worst>,
    /// What was allowed, in units in the last place.
    pub limit: f64,
    /// The part of it that does not depend on eager.
    pub floor: f64,
    /// What is wrong, if anything.
    pub wrong: Option<String>,
    /// The input whose gradient was measured; `None` for a result.
    pub gradient: Option<usize>,
}

impl Verdict {
    /// Our error as a share of what is allowed.
    #[must_use]
    pub fn share(&self) -> f64 {
        if self.limit > 0.0 {
            self.ours.ulp / self.limit
        } else {
            0.0
        }
    }
}

/// The error that is allowed beside eager's.
fn limit(eager: Option<Worst>, floor: f64) -> f64 {
    eager.filter(|e| e.ulp.is_finite()).map_or(0.0, |e| e.ulp * EAGER_FACTOR).max(floor)
}

/// Applies the rounding rule to the largest errors of several draws of one cell.
#[must_use]
pub fn over_all_draws<'v>(draws: impl IntoIterator<Item = &'v Verdict>) -> Verdict {
    let larger = |a: Worst, b: Worst| if b.ulp > a.ulp { b } else { a };
    let (mut ours, mut eager, mut floor, mut count) = (Worst::default(), None::<Worst>, 0.0f64, 0);
    let mut gradient = None;
    for draw in draws {
        ours = larger(ours, draw.ours);
        eager = match (eager, draw.eager) {
            (Some(a), Some(b)) => Some(larger(a, b)),
            (a, b) => a.or(b),
        };
        floor = floor.max(draw.floor);
        gradient = draw.gradient;
        count += 1;
    }
    let limit = limit(eager, floor);
    let wrong = (ours.ulp > limit).then(|| {
        let eager = eager.map_or(f64::NAN, |e| e.ulp);
        format!("over {count} draws {:.2} ulp, allowed {limit:.2} (eager {eager:.2})", ours.ulp)
    });
    Verdict { ours, eager, limit, floor, wrong, gradient }
}

/// Applies the rounding rule to `got`. `steps` is the number of roundings that the rule grants 2 units each (1 for an op).
///
/// # Errors
/// When a tensor cannot be read.
pub fn rounding(what: &str, got: &Tensor, eager: Option<&Tensor>, judged: &Judged, steps: f64) -> Result<Verdict> {
    let dtype = got.dtype();
    if got.dims() != judged.value.dims {
        let wrong = format!("{what}: shape {:?} instead of {:?}", got.dims(), judged.value.dims);
        return Ok(Verdict {
            ours: Worst::default(),
            eager: None,
            limit: 0.0,
            floor: 0.0,
            wrong: Some(wrong),
            gradient: None,
        });
    }
    let eager = eager.map(to_arr).transpose()?;
    let got = to_arr(got)?;
    let ours = worst_error(&got, judged, dtype, eager.as_ref());
    let eager_worst = eager.as_ref().map(|e| worst_error(e, judged, dtype, Some(e)));
    let floor = ALLOWED_ULP * steps;
    let limit = if dtype.is_float() { limit(eager_worst, floor) } else { 0.0 };
    let wrong = (ours.ulp > limit).then(|| {
        format!(
            "{what}: element {} is {:?}, the reference {:?}: {:.2} ulp, allowed {limit:.2} (eager {:.2})",
            ours.at,
            got.data[ours.at],
            judged.value.data[ours.at],
            ours.ulp,
            eager_worst.map_or(f64::NAN, |e| e.ulp)
        )
    });
    Ok(Verdict { ours, eager: eager_worst, limit, floor, wrong, gradient: None })
}
