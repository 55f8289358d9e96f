//! Losses: of lazy tensors ([`token_cross_entropy`], [`linear_cross_entropy`]), and on plain Candle tensors, differentiable on Candle's tape.

mod token;

pub use token::{linear_cross_entropy, token_cross_entropy, TokenLoss, TokenLossOptions};

use crate::error::{Error, Result};
use candle_core::{DType, Tensor, D};

/// The target of a position that is left out, in the ids that the kernel gets: it picks no class there.
const NO_CLASS: u32 = u32::MAX;

/// The mean of −log softmax(logits)\[target\] over the positions whose target is not `ignore_index`: logits (n, classes) of any float
/// dtype, targets (n) of u8, u32 or i64; a scalar of the logits' dtype. f16 and bf16 are computed in f32.
///
/// # Errors
/// [`Error::Module`] where shapes or dtypes do not fit, a target is no class, or every position is left out.
#[track_caller]
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, ignore_index: Option<u32>) -> Result<Tensor> {
    const NAME: &str = "cross_entropy";
    let (n, classes) = match (logits.dims(), targets.dims()) {
        (&[n, classes], &[m]) if n == m && n > 0 && classes > 0 => (n, classes),
        (logits, targets) => {
            let message = format_args!(
                "expected logits (n, classes) and targets (n), none empty, found logits {logits:?} and targets {targets:?}"
            );
            return Err(Error::module(NAME, "", message));
        }
    };
    if !logits.dtype().is_float() {
        return Err(Error::float_expected(NAME, "", "logits", logits.dtype()));
    }
    if !targets.dtype().is_int() {
        return Err(Error::module(NAME, "", format_args!("targets must be integers, found {:?}", targets.dtype())));
    }
    let mut ids = Vec::with_capacity(n);
    let mut kept = 0usize;
    for (position, target) in targets.to_dtype(DType::I64)?.to_vec1::<i64>()?.into_iter().enumerate() {
        if ignore_index.is_some_and(|ignored| target == i64::from(ignored)) {
            ids.push(NO_CLASS);
            continue;
        }
        match u32::try_from(target) {
            Ok(id) if (id as usize) < classes => ids.push(id),
            _ => {
                let message = format_args!("target {target} at position {position} is not one of {classes} classes");
                return Err(Error::module(NAME, "", message));
            }
        }
        kept += 1;
    }
    if kept == 0 {
        let ignored = ignore_index.unwrap_or_default();
        return Err(Error::module(NAME, "", format_args!("all {n} targets are the ignored index {ignored}")));
    }
    let ids = Tensor::from_vec(ids, n, logits.device())?;
    let mean = candle_lazy_ops::cross_entropy(&wide(logits)?, &ids)?;
    // the kernel's mean is over all n, to which the ignored ones give 0
    let mean = if kept == n { mean } else { mean.affine(n as f64 / kept as f64, 0.0)? };
    Ok(mean.to_dtype(logits.dtype())?)
}

/// The mean of −log softmax(logits) over all classes and all positions, which is the cross entropy against a uniform distribution: what
/// label smoothing adds (Szegedy et al. 2016, arXiv:1512.00567). Logits (…, classes) of any float dtype; a scalar of the same dtype.
///
/// # Errors
/// [`Error::Module`] for logits that are empty or no floats.
#[track_caller]
pub fn uniform_cross_entropy(logits: &Tensor) -> Result<Tensor> {
    const NAME: &str = "uniform_cross_entropy";
    if logits.rank() == 0 || logits.elem_count() == 0 {
        let message = format_args!("expected logits (…, classes), not empty, found {:?}", logits.shape());
        return Err(Error::module(NAME, "", message));
    }
    if !logits.dtype().is_float() {
        return Err(Error::float_expected(NAME, "", "logits", logits.dtype()));
    }
    let rows = candle_lazy_ops::log_softmax(&wide(logits)?, D::Minus1)?.mean(D::Minus1)?;
    Ok(rows.mean_all()?.neg()?.to_dtype(logits.dtype())?)
}

/// f16 and bf16 as f32.
fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    })
}
