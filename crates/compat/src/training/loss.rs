//! Cross entropy of a language model's logits.

use crate::error::{Result, TrainingError};
use candle_core::Tensor;
use candle_lazy_nn::loss;

/// The mean of −log softmax(logits)\[target\] over the positions whose target is not `ignore_index`: logits (batch, seq, vocab) of
/// floats, targets (batch, seq) of integers; a scalar of the logits' dtype, differentiable.
///
/// # Errors
/// [`TrainingError::InvalidConfig`] for other ranks, shapes that do not fit, a target that is no token of the vocabulary, and where
/// every position is ignored.
#[track_caller]
pub fn cross_entropy_loss(logits: &Tensor, targets: &Tensor, ignore_index: Option<u32>) -> Result<Tensor> {
    let (logits, targets) = rows(logits, targets)?;
    loss::cross_entropy(&logits, &targets, ignore_index).map_err(TrainingError::refused)
}

/// (1 − s)·[`cross_entropy_loss`] + s·(the mean of −log softmax(logits) over all classes and all positions, ignored ones included), with
/// s = `smoothing` in 0 ≤ s ≤ 1.
///
/// # Errors
/// As [`cross_entropy_loss`], and for another `smoothing`.
#[track_caller]
pub fn cross_entropy_loss_with_smoothing(
    logits: &Tensor,
    targets: &Tensor,
    smoothing: f32,
    ignore_index: Option<u32>,
) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&smoothing) {
        let reason = format_args!("label smoothing must be in [0, 1], got {smoothing}");
        return Err(TrainingError::config(reason).into());
    }
    let (logits, targets) = rows(logits, targets)?;
    let nll = loss::cross_entropy(&logits, &targets, ignore_index).map_err(TrainingError::refused)?;
    if smoothing == 0.0 {
        return Ok(nll);
    }
    let uniform = loss::uniform_cross_entropy(&logits).map_err(TrainingError::refused)?;
    let smoothing = f64::from(smoothing);
    Ok(nll.affine(1.0 - smoothing, 0.0)?.add(&uniform.affine(smoothing, 0.0)?)?)
}

/// Logits (batch·seq, vocab) and targets (batch·seq).
fn rows(logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    let refuse = |reason: std::fmt::Arguments<'_>| Err(TrainingError::config(reason).into());
    let &[batch, seq, vocab] = logits.dims() else {
        return refuse(format_args!("logits must be 3-D (batch, seq, vocab), got {:?}", logits.dims()));
    };
    if targets.rank() != 2 {
        return refuse(format_args!("targets must be 2-D (batch, seq), got {:?}", targets.dims()));
    }
    if targets.dims() != [batch, seq] {
        let (logits, targets) = (logits.dims(), targets.dims());
        return refuse(format_args!("logits {logits:?} and targets {targets:?} differ in batch or seq"));
    }
    Ok((logits.reshape((batch * seq, vocab))?, targets.flatten_all()?))
}
