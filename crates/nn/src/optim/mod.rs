//! What trains parameters: rules of updates, clipping of gradients, schedules of the learning rate.
//!
//! [`Optimizer`] moves the parameters of a tree ([`crate::params`]) by gradients that may be recorded only: a step is recorded, and
//! evaluated with them as one plan. [`Moments`], [`grad_norm`] and [`clip_grad_norm`] take and return plain Candle tensors, as Candle's
//! `backward` gives them. Nothing here is tracked by Candle's autograd.

mod adamw;
mod clip;
mod non_finite;
mod optimizer;
mod rules;
mod schedule;
mod state;

pub use adamw::Moments;
pub use clip::{clip_grad_norm, grad_norm};
pub use non_finite::{NonFiniteOrigin, NonFinitePart};
pub(crate) use optimizer::scalar;
pub use optimizer::{OnNonFinite, Optimizer, OptimizerOptions, ParamGroup, StepReport};
pub use rules::{validate_adamw, Lion, Rule, Sgd};
pub use schedule::LrSchedule;

pub use ::candle_nn::ParamsAdamW;
