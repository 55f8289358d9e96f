//! What trains variables: the update of AdamW, clipping of gradients, schedules of the learning rate.
//!
//! Everything takes and returns plain Candle tensors, as Candle's `backward` gives them; an update is recorded and evaluated as one
//! plan. Nothing here is tracked by autograd.

mod adamw;
mod clip;
mod schedule;

pub use adamw::{validate_adamw, Moments};
pub use clip::{clip_grad_norm, grad_norm};
pub use schedule::LrSchedule;

pub use ::candle_nn::ParamsAdamW;
