//! Evaluation that is not alone: behind the caller's back, and in one batch with others. A value's bits depend on neither.

use super::lazy_modes::{baseline, record};
use super::{Cell, Mode, Outcome, Subject};
use crate::compare::same_bits;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_lazy_exec::batch::{BatchExecutor, BatchOptions, MaxWait, SubmitOptions, Window};
use candle_lazy_exec::{EvalOptions, LazyTensor};
use std::sync::Mutex;
use std::time::Duration;

/// How many requests are one batch.
const TOGETHER: usize = 4;

/// The values of requests that are one batch: at most four, each of one or several tensors. The order of arrival is turned round every
/// other time.
///
/// # Errors
/// Each request's own.
pub fn together(requests: &[Vec<LazyTensor>]) -> Result<Vec<candle_lazy_exec::Result<Vec<Tensor>>>> {
    static EXECUTOR: Mutex<Option<(BatchExecutor, usize)>> = Mutex::new(None);
    // one batch at a time: its window closes when it is full
    let mut held = EXECUTOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (executor, turn) = match &mut *held {
        Some(there) => there,
        None => {
            let window = Window { max_batch: TOGETHER, max_wait: MaxWait::Fixed(Duration::from_secs(60)) };
            let executor = BatchExecutor::with_options(&BatchOptions { window, ..BatchOptions::default() })?;
            held.insert((executor, 0))
        }
    };
    *turn += 1;
    let filler: Vec<LazyTensor> = (requests.len()..TOGETHER)
        .map(|i| LazyTensor::full(i as f32, 3, &Device::Cpu)?.exp())
        .collect::<candle_lazy_exec::Result<_>>()?;
    let mut all: Vec<Vec<&LazyTensor>> = requests.iter().map(|roots| roots.iter().collect()).collect();
    all.extend(filler.iter().map(|x| vec![x]));
    let backwards = *turn % 2 == 0;
    if backwards {
        all.reverse();
    }
    let how = SubmitOptions::default();
    let asked =
        all.iter().map(|roots| executor.submit_all(roots, &how)).collect::<candle_lazy_exec::Result<Vec<_>>>()?;
    let mut values: Vec<_> = asked.into_iter().map(candle_lazy_exec::batch::SubmissionAll::wait).collect();
    if backwards {
        values.reverse();
    }
    values.truncate(requests.len());
    Ok(values)
}

fn one(mut values: Vec<Tensor>) -> Result<Tensor> {
    values.pop().ok_or_else(|| Error::NoTwin("no result for a root".into()))
}

pub(super) fn check(subject: &mut Subject, mode: Mode) -> Result<Option<Cell>> {
    let tensor = record(&subject.case, &subject.inputs)?;
    if tensor.is_ready() {
        return Ok(None);
    }
    let want = baseline(subject)?;
    let mut cell = Cell::of(Outcome::Passed);
    if mode == Mode::Async {
        let got = tensor.eval_async().wait()?;
        if let Err(text) = same_bits("evaluated behind the caller's back, against no passes", &got, &want)? {
            cell.outcome = Outcome::Failed(text);
        }
        return Ok(Some(cell));
    }
    // a neighbour with rows of its own and the same weights
    let mut theirs = subject.inputs.clone();
    let drawn = subject.case.inputs(subject.seed ^ 1)?;
    if let (Some(first), Some(other)) = (theirs.first_mut(), drawn.into_iter().next()) {
        *first = other;
    }
    let want_theirs = super::evaluate(&record(&subject.case, &theirs)?, &EvalOptions::no_passes())?.0;
    let again = record(&subject.case, &theirs)?;
    let other = match subject.case.at_other_sizes() {
        Some(other) => {
            let inputs = other.inputs(subject.seed)?;
            let alone = record(&other, &inputs)?;
            let alone = (!alone.is_ready()).then(|| alone.eval()).transpose()?;
            Some((record(&other, &inputs)?, alone))
        }
        None => None,
    };
    let mut requests = vec![vec![tensor], vec![again]];
    requests.extend(other.iter().map(|(other, _)| vec![other.clone()]));
    let wants = [Some(&want), Some(&want_theirs), other.as_ref().and_then(|(_, alone)| alone.as_ref())];
    for (i, (got, want)) in together(&requests)?.into_iter().zip(wants).enumerate() {
        let (got, Some(want)) = (one(got?)?, want) else { continue };
        if let Err(text) = same_bits(&format!("request {i} of a batch"), &got, want)? {
            cell.outcome = Outcome::Failed(text);
            break;
        }
    }
    Ok(Some(cell))
}
