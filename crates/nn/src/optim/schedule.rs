//! The learning rate as a function of the step.

use crate::error::{Error, Result};

/// How the learning rate goes with the steps taken, which are counted from 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LrSchedule {
    /// Always the same.
    Constant {
        /// The rate.
        lr: f64,
    },
    /// From 0 up in a line, then the same.
    Warmup {
        /// The step at which `max_lr` is reached.
        warmup_steps: usize,
        /// The rate from there on.
        max_lr: f64,
    },
    /// Half a cosine down (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts), then the same.
    Cosine {
        /// The step at which `min_lr` is reached.
        total_steps: usize,
        /// The rate at step 0.
        max_lr: f64,
        /// The rate at the end and after it.
        min_lr: f64,
    },
    /// Down in a line, then the same.
    Linear {
        /// The step at which `min_lr` is reached.
        total_steps: usize,
        /// The rate at step 0.
        max_lr: f64,
        /// The rate at the end and after it.
        min_lr: f64,
    },
    /// From 0 up in a line, then down in a line, then the same.
    WarmupLinear {
        /// The step at which `max_lr` is reached.
        warmup_steps: usize,
        /// The step at which `min_lr` is reached; that of the warm-up counts in.
        total_steps: usize,
        /// The highest rate.
        max_lr: f64,
        /// The rate at the end and after it.
        min_lr: f64,
    },
    /// From 0 up in a line, then half a cosine down, then the same.
    WarmupCosine {
        /// The step at which `max_lr` is reached.
        warmup_steps: usize,
        /// The step at which `min_lr` is reached; that of the warm-up counts in.
        total_steps: usize,
        /// The highest rate.
        max_lr: f64,
        /// The rate at the end and after it.
        min_lr: f64,
    },
}

/// From `max` at 0 down to `min` at 1.
fn half_cosine(max: f64, min: f64, progress: f64) -> f64 {
    min + 0.5 * (max - min) * (1.0 + (std::f64::consts::PI * progress).cos())
}

/// From `max` at 0 down to `min` at 1 in a line, with both ends exact.
fn line(max: f64, min: f64, progress: f64) -> f64 {
    max * (1.0 - progress) + min * progress
}

/// How far `step` is on the way of `steps`, at most 1.
fn progress(step: usize, steps: usize) -> f64 {
    if step >= steps {
        return 1.0;
    }
    step as f64 / steps as f64
}

impl LrSchedule {
    /// The rate of a step. What [`LrSchedule::validate`] refuses has a rate too: no phase of 0 steps divides by 0.
    #[must_use]
    pub fn lr(&self, step: usize) -> f64 {
        match *self {
            Self::Constant { lr } => lr,
            Self::Warmup { warmup_steps, max_lr } => max_lr * progress(step, warmup_steps),
            Self::Cosine { total_steps, max_lr, min_lr } => half_cosine(max_lr, min_lr, progress(step, total_steps)),
            Self::Linear { total_steps, max_lr, min_lr } => line(max_lr, min_lr, progress(step, total_steps)),
            Self::WarmupCosine { warmup_steps, max_lr, .. } | Self::WarmupLinear { warmup_steps, max_lr, .. }
                if step < warmup_steps =>
            {
                max_lr * progress(step, warmup_steps)
            }
            Self::WarmupCosine { warmup_steps, total_steps, max_lr, min_lr } => {
                half_cosine(max_lr, min_lr, progress(step - warmup_steps, total_steps.saturating_sub(warmup_steps)))
            }
            Self::WarmupLinear { warmup_steps, total_steps, max_lr, min_lr } => {
                line(max_lr, min_lr, progress(step - warmup_steps, total_steps.saturating_sub(warmup_steps)))
            }
        }
    }

    /// Whether the numbers mean something.
    ///
    /// # Errors
    /// [`Error::Config`] for a highest rate that is not finite and above 0, a lowest one that is not in 0 ≤ min ≤ max, a phase of 0
    /// steps (a warm-up before something else may have none), a warm-up that leaves nothing of the total.
    pub fn validate(&self) -> Result<()> {
        let (max, min, steps) = match *self {
            Self::Constant { lr } => (lr, 0.0, 1),
            Self::Warmup { warmup_steps, max_lr } => (max_lr, 0.0, warmup_steps),
            Self::Cosine { total_steps, max_lr, min_lr }
            | Self::Linear { total_steps, max_lr, min_lr }
            | Self::WarmupLinear { total_steps, max_lr, min_lr, .. }
            | Self::WarmupCosine { total_steps, max_lr, min_lr, .. } => (max_lr, min_lr, total_steps),
        };
        let refuse = |message: std::fmt::Arguments<'_>| Err(Error::config("the learning rate schedule", message));
        if !(max > 0.0 && max.is_finite()) {
            return refuse(format_args!("the learning rate must be finite and greater than 0, got {max}"));
        }
        if !(0.0..=max).contains(&min) {
            return refuse(format_args!("min_lr must be from 0 to max_lr {max}, got {min}"));
        }
        match *self {
            Self::Warmup { .. } if steps == 0 => refuse(format_args!("warmup_steps must be greater than 0")),
            _ if steps == 0 => refuse(format_args!("total_steps must be greater than 0")),
            Self::WarmupCosine { warmup_steps, total_steps, .. }
            | Self::WarmupLinear { warmup_steps, total_steps, .. }
                if warmup_steps >= total_steps =>
            {
                refuse(format_args!("warmup_steps {warmup_steps} must be less than total_steps {total_steps}"))
            }
            _ => Ok(()),
        }
    }
}
