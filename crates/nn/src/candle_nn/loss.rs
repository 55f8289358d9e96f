//! Losses, each a scalar: a mean over everything that is compared.

use crate::candle::{Error, Result, Tensor};

/// The mean of −log p at the targets: log-probabilities (n, classes), targets (n; u8, u32 or i64).
///
/// # Errors
/// When the shapes do not fit. A target out of range is an error when the value is computed.
#[track_caller]
pub fn nll(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    let n = match (inp.dims(), target.dims()) {
        (&[n, _], &[m]) if n == m => n,
        (inp, target) => {
            let message = format!("nll: log-probabilities {inp:?} and targets {target:?}: needs (n, classes) and (n)");
            return Err(Error::Msg(message).at_caller());
        }
    };
    inp.gather(&target.unsqueeze(1)?, 1)?.sum_all()?.affine(-1.0 / n as f64, 0.0)
}

/// The mean of −log softmax(logits) at the targets: logits (n, classes), targets (n; u8, u32 or i64).
///
/// # Errors
/// As [`nll`].
#[track_caller]
pub fn cross_entropy(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    inp.cross_entropy(target)
}

/// The mean of (inp − target)².
///
/// # Errors
/// When shapes or dtypes differ.
#[track_caller]
pub fn mse(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    inp.sub(target)?.sqr()?.mean_all()
}

/// The mean of −t·log σ(x) − (1 − t)·log(1 − σ(x)); as in Candle, infinite where σ(x) rounds to 0 or 1.
///
/// # Errors
/// When shapes or dtypes differ.
#[track_caller]
pub fn binary_cross_entropy_with_logit(inp: &Tensor, target: &Tensor) -> Result<Tensor> {
    let p = inp.sigmoid()?;
    let hit = target.mul(&p.log()?)?;
    let miss = target.affine(-1.0, 1.0)?.mul(&p.affine(-1.0, 1.0)?.log()?)?;
    hit.add(&miss)?.neg()?.mean_all()
}

/// The mean of d²/2 where |d| ≤ delta, else of delta·(|d| − delta/2), for d = inp − target (Huber 1964).
///
/// # Errors
/// When shapes or dtypes differ.
#[track_caller]
pub fn huber(inp: &Tensor, target: &Tensor, delta: f64) -> Result<Tensor> {
    let diff = inp.sub(target)?;
    let abs = diff.abs()?;
    let near = diff.sqr()?.affine(0.5, 0.0)?;
    let far = abs.affine(delta, -0.5 * delta * delta)?;
    abs.le(delta)?.where_cond(&near, &far)?.mean_all()
}
