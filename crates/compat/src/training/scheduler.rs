//! The learning rate as a function of the step.

use crate::error::{Result, TrainingError};
use candle_lazy_nn::optim::LrSchedule;

/// How the learning rate goes with the steps taken, which are counted from 0.
#[derive(Debug, Clone)]
pub enum LRScheduler {
    /// Always the same.
    Constant {
        /// The rate.
        lr: f32,
    },
    /// From 0 up in a line, then the same.
    Linear {
        /// The step at which `max_lr` is reached.
        warmup_steps: usize,
        /// The rate from there on.
        max_lr: f32,
    },
    /// Half a cosine down, then the same.
    Cosine {
        /// The step at which `min_lr` is reached.
        total_steps: usize,
        /// The rate at step 0.
        max_lr: f32,
        /// The rate at the end and after it.
        min_lr: f32,
    },
    /// From 0 up in a line, then half a cosine down, then the same.
    WarmupCosine {
        /// The step at which `max_lr` is reached.
        warmup_steps: usize,
        /// The step at which `min_lr` is reached; that of the warm-up counts in.
        total_steps: usize,
        /// The highest rate.
        max_lr: f32,
        /// The rate at the end and after it.
        min_lr: f32,
    },
}

impl LRScheduler {
    /// Always `lr`.
    #[must_use]
    pub const fn constant(lr: f32) -> Self {
        Self::Constant { lr }
    }

    /// From 0 to `max_lr` in `warmup_steps`, then `max_lr`.
    #[must_use]
    pub const fn linear(warmup_steps: usize, max_lr: f32) -> Self {
        Self::Linear { warmup_steps, max_lr }
    }

    /// From `max_lr` to `min_lr` in `total_steps`, then `min_lr`.
    #[must_use]
    pub const fn cosine(total_steps: usize, max_lr: f32, min_lr: f32) -> Self {
        Self::Cosine { total_steps, max_lr, min_lr }
    }

    /// From 0 to `max_lr` in `warmup_steps`, then to `min_lr` until `total_steps`, then `min_lr`.
    #[must_use]
    pub const fn warmup_cosine(warmup_steps: usize, total_steps: usize, max_lr: f32, min_lr: f32) -> Self {
        Self::WarmupCosine { warmup_steps, total_steps, max_lr, min_lr }
    }

    fn schedule(&self) -> LrSchedule {
        match *self {
            Self::Constant { lr } => LrSchedule::Constant { lr: lr.into() },
            Self::Linear { warmup_steps, max_lr } => LrSchedule::Warmup { warmup_steps, max_lr: max_lr.into() },
            Self::Cosine { total_steps, max_lr, min_lr } => {
                LrSchedule::Cosine { total_steps, max_lr: max_lr.into(), min_lr: min_lr.into() }
            }
            Self::WarmupCosine { warmup_steps, total_steps, max_lr, min_lr } => {
                LrSchedule::WarmupCosine { warmup_steps, total_steps, max_lr: max_lr.into(), min_lr: min_lr.into() }
            }
        }
    }

    /// The rate of a step.
    #[must_use]
    pub fn get_lr(&self, step: usize) -> f32 {
        self.schedule().lr(step) as f32
    }

    /// Whether the numbers mean something.
    ///
    /// # Errors
    /// [`TrainingError::InvalidConfig`] for a highest rate that is not finite and above 0, a lowest one that is not in 0 ≤ min ≤ max, a
    /// phase of 0 steps (a warm-up before a cosine may have none), a warm-up that leaves nothing of the total.
    pub fn validate(&self) -> Result<()> {
        self.schedule().validate().map_err(TrainingError::refused)
    }
}
