//! The cross entropy of a language model's logits, recorded.

use crate::data::IGNORE_INDEX;
use crate::error::{Error, Result};
use crate::module::Module;
use candle_core::{DType, Device};
use candle_lazy_exec::LazyTensor;

const NAME: &str = "token_cross_entropy";
const LINEAR: &str = "linear_cross_entropy";
/// Numbers of classes up to which f32 tells one from the next.
const CLASSES: usize = 1 << 24;
/// Logits of a piece of [`linear_cross_entropy`]: 32 MiB of f32, a small part of what a step takes, and enough rows at the usual numbers of
/// classes for the product to be bound by arithmetic.
const PIECE: usize = 1 << 23;
/// What the number of rows is rounded up to where some positions are left out: buffers are kept for the next step, which has other
/// positions, and serve it again where the sizes are the same.
const ALIKE: usize = 16;
/// What the rows of a piece are a multiple of, where there are that many.
const WHOLE: usize = 64;

/// What is left out, and how sure the targets are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLossOptions {
    /// The target of positions that are left out.
    pub ignore_index: i64,
    /// ε, 0 ≤ ε < 1: the target has the probability 1 − ε, and ε is spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567,
    /// §7; PyTorch's `label_smoothing`).
    pub label_smoothing: f64,
}

impl Default for TokenLossOptions {
    /// −100 is left out; no smoothing.
    fn default() -> Self {
        Self { ignore_index: IGNORE_INDEX, label_smoothing: 0.0 }
    }
}

/// A loss as a sum and what it is to be divided by, so that parts of a batch add up: the mean of all is Σ sum / Σ weight.
#[derive(Debug, Clone)]
pub struct TokenLoss {
    /// A scalar of f32, of f64 for logits of f64.
    pub sum: LazyTensor,
    /// The weights of what was not left out, together; without weights, how many positions.
    pub weight: f64,
}

impl TokenLoss {
    /// The mean: a scalar, to take gradients of. The weight is a scalar of its node: another one makes no new plan.
    ///
    /// # Errors
    /// None in practice.
    #[track_caller]
    pub fn mean(&self) -> Result<LazyTensor> {
        Ok(self.sum.affine(1.0 / self.weight, 0.0)?)
    }
}

/// Σ w·(log Σⱼ exp xⱼ − (1 − ε)·x\[target\] − ε·mean x) over the positions that are not left out: logits x (…, classes) of any float dtype,
/// targets (…) of i64, weights w (…) of f32 (1 without). It is computed in f32, for logits of f64 in f64.
///
/// Logits are read once, in one program, and nothing of their size is kept. Targets and weights are read now: they are data.
///
/// # Errors
/// [`Error::Module`] where shapes or dtypes do not fit, a target is no class, a weight is negative or not finite, and where every position
/// is left out or has the weight 0; [`Error::Config`] for an ε outside of 0 ≤ ε < 1.
#[track_caller]
pub fn token_cross_entropy(
    logits: &LazyTensor,
    targets: &LazyTensor,
    weights: Option<&LazyTensor>,
    options: &TokenLossOptions,
) -> Result<TokenLoss> {
    let (n, classes) = check(NAME, "logits", logits, targets, options)?;
    let (ids, weights) = kept(NAME, targets, weights, classes, options.ignore_index)?;
    let weight = weights.iter().sum();
    let x = logits.reshape((n, classes))?;
    let sum = summed(&x, ids, weights, options.label_smoothing)?;
    Ok(TokenLoss { sum: sum.to_dtype(loss_dtype(logits))?, weight })
}

/// [`token_cross_entropy`] of the logits of `head` on `hidden`, without ever holding all of them: hidden (…, width) of any float dtype,
/// targets and weights (…), and `head` from rows (rows, width) to their logits (rows, classes), each row by itself.
///
/// Positions that are left out get no logits, but for a few that round the number of rows up. The others' are made in pieces of some 2²³
/// logits (at least one row), and in a plan with the gradient each piece's gradient is taken before the next piece is made, so that the
/// logits of one piece and their gradient are held at once. A head that is trained has a gradient of its own size for each piece. (Liger's
/// fused linear cross entropy, Hsu et al. 2024, arXiv:2410.10989, §3.2, has the same aim.) The pieces' sums are added from the first to the last.
///
/// The number of pieces is part of the plan's key, the number of positions in them is not.
///
/// # Errors
/// As [`token_cross_entropy`], and where `head` fails or does not give `classes` logits for each row.
#[track_caller]
pub fn linear_cross_entropy(
    hidden: &LazyTensor,
    head: &impl Module,
    classes: usize,
    targets: &LazyTensor,
    weights: Option<&LazyTensor>,
    options: &TokenLossOptions,
) -> Result<TokenLoss> {
    let (n, width) = check(LINEAR, "hidden", hidden, targets, options)?;
    let (mut ids, mut weights) = kept(LINEAR, targets, weights, classes, options.ignore_index)?;
    let weight = weights.iter().sum();
    let mut rows = hidden.reshape((n, width))?;
    let mut chosen: Vec<u32> = (0..).zip(&weights).filter(|(_, weight)| **weight != 0.0).map(|(row, _)| row).collect();
    let count = chosen.len().next_multiple_of(ALIKE);
    if count < n {
        let of =
            |values: &[f64]| chosen.iter().filter_map(|row| values.get(*row as usize).copied()).collect::<Vec<_>>();
        (ids, weights) = (of(&ids), of(&weights));
        // what fills up is a row like the others, of weight 0
        ids.resize(count, 0.0);
        weights.resize(count, 0.0);
        let filler = chosen.first().copied().unwrap_or(0);
        chosen.resize(count, filler);
        rows = rows.index_select(&LazyTensor::from_vec(chosen, count, hidden.device())?, 0)?;
    }
    let count = rows.dims()[0];
    let piece = match PIECE / classes.max(1) {
        few if few < WHOLE => few.max(1),
        many => many / WHOLE * WHOLE,
    };
    let (mut sum, mut dtype): (Option<LazyTensor>, _) = (None, DType::F32);
    for start in (0..count).step_by(piece) {
        let len = piece.min(count - start);
        let part = if len == count { rows.clone() } else { rows.narrow(0, start, len)? };
        let logits = head.forward(&part)?;
        if logits.dims() != [len, classes] || !logits.dtype().is_float() {
            let (found, dtype) = (logits.shape(), logits.dtype());
            let message = format_args!("the head made {found:?} of {dtype:?} for {len} rows of {classes} classes");
            return Err(Error::module(LINEAR, "", message));
        }
        let (ids, weights) = (ids[start..start + len].to_vec(), weights[start..start + len].to_vec());
        dtype = loss_dtype(&logits);
        let part = summed(&logits, ids, weights, options.label_smoothing)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => sum.add(&part)?,
        });
    }
    match sum {
        Some(sum) => Ok(TokenLoss { sum: sum.to_dtype(dtype)?, weight }),
        // what keeps no position was refused
        None => Err(Error::module(LINEAR, "", format_args!("no position"))),
    }
}

/// The number of positions and the last dimension of what is at them.
#[track_caller]
fn check(
    name: &'static str,
    what: &str,
    values: &LazyTensor,
    targets: &LazyTensor,
    options: &TokenLossOptions,
) -> Result<(usize, usize)> {
    let smoothing = options.label_smoothing;
    if !(0.0..1.0).contains(&smoothing) {
        return Err(Error::config("the loss", format_args!("a label smoothing of {smoothing}: needs 0 ≤ ε < 1")));
    }
    let sizes = match values.dims() {
        [lead @ .., last] if lead == targets.dims() && values.elem_count() > 0 => (targets.elem_count(), *last),
        found => {
            let targets = targets.dims();
            let last = if what == "logits" { "classes" } else { "width" };
            let message = format_args!(
                "expected {what} (…, {last}) and targets (…), none empty, found {what} {found:?} and targets {targets:?}"
            );
            return Err(Error::module(name, "", message));
        }
    };
    if !values.dtype().is_float() {
        return Err(Error::float_expected(name, "", what, values.dtype()));
    }
    if targets.dtype() != DType::I64 {
        return Err(Error::module(name, "", format_args!("targets must be I64, found {:?}", targets.dtype())));
    }
    Ok(sizes)
}

fn loss_dtype(logits: &LazyTensor) -> DType {
    match logits.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The weighted sum over rows of logits (n, classes), whose classes and weights are given, as f64: a row's loss is rounded to its dtype, the
/// sum of many is not rounded on the way.
#[track_caller]
fn summed(logits: &LazyTensor, ids: Vec<f64>, weights: Vec<f64>, smoothing: f64) -> Result<LazyTensor> {
    let (n, classes) = (ids.len(), logits.dim(1)?);
    let (dtype, device) = (loss_dtype(logits), logits.device());
    let x = logits.to_dtype(dtype)?;
    let column = |values: Vec<f64>| match dtype {
        DType::F64 => LazyTensor::from_vec(values, (n, 1), device),
        _ => LazyTensor::from_vec(values.into_iter().map(|value| value as f32).collect::<Vec<_>>(), (n, 1), device),
    };
    let (ids, weights) = (column(ids)?, column(weights)?);
    // a comparison with each class, not a gather: it and its gradient are part of the program that reads the logits
    let numbers = LazyTensor::arange_recorded(0.0, 1.0, classes, dtype, device)?;
    let zero = LazyTensor::filled(0.0, (), dtype, device)?;
    let chosen = numbers.reshape((1, classes))?.broadcast_eq(&ids)?.where_cond(&x, &zero)?.sum_keepdim(1)?;
    let mut rows = x.log_sum_exp_keepdim(1)?.sub(&chosen.affine(1.0 - smoothing, 0.0)?)?;
    if smoothing > 0.0 {
        rows = rows.sub(&x.mean_keepdim(1)?.affine(smoothing, 0.0)?)?;
    }
    Ok(rows.mul(&weights)?.to_dtype(DType::F64)?.sum_all()?)
}

/// The class and the weight of each position; a position that is left out has the weight 0 and class 0.
#[track_caller]
fn kept(
    name: &'static str,
    targets: &LazyTensor,
    weights: Option<&LazyTensor>,
    classes: usize,
    ignored: i64,
) -> Result<(Vec<f64>, Vec<f64>)> {
    if classes > CLASSES {
        return Err(Error::module(name, "", format_args!("{classes} classes: {CLASSES} at most")));
    }
    let targets = targets.flatten_all()?.eval()?.to_device(&Device::Cpu)?.to_vec1::<i64>()?;
    let given = match weights {
        None => vec![1f32; targets.len()],
        Some(given) if given.elem_count() == targets.len() && given.dtype() == DType::F32 => {
            given.flatten_all()?.eval()?.to_device(&Device::Cpu)?.to_vec1::<f32>()?
        }
        Some(given) => {
            let (shape, dtype, n) = (given.shape(), given.dtype(), targets.len());
            return Err(Error::module(name, "", format_args!("weights {shape:?} of {dtype:?} for {n} targets")));
        }
    };
    let (mut ids, mut weights) = (Vec::with_capacity(targets.len()), Vec::with_capacity(targets.len()));
    for ((position, target), weight) in targets.iter().enumerate().zip(given) {
        if *target == ignored {
            ids.push(0.0);
            weights.push(0.0);
            continue;
        }
        if !usize::try_from(*target).is_ok_and(|class| class < classes) {
            let message = format_args!("target {target} at position {position} is not one of {classes} classes");
            return Err(Error::module(name, "", message));
        }
        if !(weight >= 0.0 && weight.is_finite()) {
            let message = format_args!("the weight {weight} at position {position} is negative or no number");
            return Err(Error::module(name, "", message));
        }
        ids.push(*target as f64);
        weights.push(f64::from(weight));
    }
    if weights.iter().all(|weight| *weight == 0.0) {
        let n = weights.len();
        return Err(Error::module(
            name,
            "",
            format_args!("none of {n} positions counts: all are ignored or weigh nothing"),
        ));
    }
    Ok((ids, weights))
}
