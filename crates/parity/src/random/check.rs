//! Judging a random graph.

use super::{Program, Step};
use crate::compare::same_bits;
use crate::reference::Arr;
use crate::value::to_arr;
use crate::{eager, Result};
use candle_core::{DType, Tensor};
use candle_lazy_exec::{run::eval_all_with, EvalOptions, LazyTensor};
use candle_lazy_graph::Op;
use std::panic::{catch_unwind, AssertUnwindSafe};

/// The factor of eager Candle's error that a graph may have.
pub(super) const EAGER_FACTOR: f64 = 4.0;

/// What a graph may always be off by, in units in the last place at one and the root's largest number: a chain of nodes rounds
/// often, each time differently by up to 2 units at a row's scale that may be larger than the root's, where eager Candle's own
/// error can be zero (a composite of its is one rounding of ours, and in f64 it is the measure itself).
const FLOOR_ULP: f64 = 16.0;

/// The same in f16 and bf16, whose units are so large that a few nodes' matter only.
const HALF_FLOOR_ULP: f64 = 8.0;

fn evaluate(program: &Program, leaves: &[Option<Tensor>], options: &EvalOptions) -> Result<Vec<Tensor>> {
    let roots = program.record(leaves)?;
    let roots: Vec<&LazyTensor> = roots.iter().collect();
    let (values, report) = eval_all_with(&roots, &EvalOptions { validate: true, ..options.clone() })?;
    let ours = report.fallbacks.is_empty() && report.replayed.is_empty();
    if !ours && !options.replay {
        let (fallbacks, replayed) = (report.fallbacks, report.replayed);
        return Err(crate::Error::NoTwin(format!("Candle's own ops ran: {fallbacks:?} {replayed:?}")));
    }
    Ok(values)
}

/// The roots step by step with eager Candle, floats in `dtype`.
fn eagerly(program: &Program, leaves: &[Option<Tensor>], dtype: DType) -> Result<Vec<Arr>> {
    let wide = |t: Tensor| {
        if t.dtype().is_float() {
            t.to_dtype(dtype)
        } else {
            Ok(t)
        }
    };
    let mut values: Vec<Tensor> = Vec::new();
    for (step, leaf) in program.steps.iter().zip(leaves) {
        let value = match (step, leaf) {
            (Step::Op { op, scalars, inputs }, _) => {
                let inputs: Vec<Tensor> = inputs.iter().map(|&i| values[i].clone()).collect();
                // a cast rounds the number that the program's dtype holds, which an exact node does exactly
                let inputs = match op {
                    Op::Cast(_) => {
                        inputs.iter().map(|t| t.to_dtype(program.dtype)).collect::<candle_core::Result<_>>()?
                    }
                    _ => inputs,
                };
                wide(eager::run(op, scalars, &inputs)?)?
            }
            (Step::Leaf(_), Some(leaf)) => wide(leaf.clone())?,
            (Step::Leaf(_), None) => return Err(crate::Error::NoTwin("a leaf without a tensor".into())),
        };
        values.push(value);
    }
    program.roots.iter().map(|&r| to_arr(&values[r])).collect()
}

pub(super) fn largest_error(got: &Arr, want: &Arr) -> f64 {
    let off = |(g, w): (&f64, &f64)| if g == w { 0.0 } else { (g - w).abs() };
    got.data.iter().zip(&want.data).map(off).fold(0.0, |m, e| if e.is_nan() || e > m { e } else { m })
}

/// What is wrong with the graph's evaluation, if anything.
///
/// # Errors
/// When an evaluation fails.
pub fn check(program: &Program) -> Result<Option<String>> {
    for options in [EvalOptions::default(), EvalOptions::default()] {
        if let Some(text) = check_options(program, &options)? {
            return Ok(Some(text));
        }
    }
    if let Some(text) = check_together(program)? {
        return Ok(Some(text));
    }
    check_numbers(program)
}

/// What differs between the graph evaluated alone and in one batch with itself on another first leaf, if anything.
///
/// # Errors
/// When an evaluation fails.
pub fn check_together(program: &Program) -> Result<Option<String>> {
    let ours = program.leaves()?;
    let mut theirs = ours.clone();
    let drawn = Program { seed: program.seed ^ 1, ..program.clone() }.leaves()?;
    if let Some((first, other)) = theirs.iter_mut().zip(drawn).find(|(leaf, _)| leaf.is_some()) {
        *first = other;
    }
    let alone = |leaves: &[Option<Tensor>]| evaluate(program, leaves, &EvalOptions::no_passes());
    let plain = [alone(&ours)?, alone(&theirs)?];
    let requests = [program.record(&ours)?, program.record(&theirs)?];
    for (got, plain) in crate::modes::together(&requests)?.into_iter().zip(plain) {
        let got = got?;
        for (i, &root) in program.roots.iter().enumerate() {
            if let Err(text) = same_bits(&format!("root %{root} in a batch"), &got[i], &plain[i])? {
                return Ok(Some(text));
            }
        }
    }
    Ok(None)
}

/// What differs between an evaluation with these options and one without passes, if anything.
///
/// # Errors
/// When an evaluation fails.
pub fn check_options(program: &Program, options: &EvalOptions) -> Result<Option<String>> {
    let leaves = program.leaves()?;
    let plain = evaluate(program, &leaves, &EvalOptions::no_passes())?;
    let got = evaluate(program, &leaves, options)?;
    for (i, &root) in program.roots.iter().enumerate() {
        if let Err(text) = same_bits(&format!("root %{root} against no passes"), &got[i], &plain[i])? {
            return Ok(Some(text));
        }
    }
    Ok(None)
}

/// What a graph's root may always be off by, as a share of one and its largest number.
pub(super) fn floor(dtype: DType) -> f64 {
    let units = match dtype {
        DType::F16 | DType::BF16 => HALF_FLOOR_ULP,
        _ => FLOOR_ULP,
    };
    units * crate::value::ulp(dtype, 1.0)
}

/// Eager Candle's numbers in the program's dtype, and in f64 with exact constants; what it refused where it did, which is a
/// failure: the graphs are made of what Candle can run.
pub(super) fn measures<T>(
    eagerly: impl Fn(DType, bool) -> Result<T>,
    dtype: DType,
) -> std::result::Result<(T, T), String> {
    let run = |dtype, precise| match catch_unwind(AssertUnwindSafe(|| eagerly(dtype, precise))) {
        Ok(Ok(values)) => Ok(values),
        Ok(Err(e)) => Err(format!("eager Candle fails: {e}")),
        Err(_) => Err("eager Candle panics".to_string()),
    };
    Ok((run(dtype, false)?, run(DType::F64, true)?))
}

/// What is wrong with the numbers of an evaluation and of a replay, measured by f64 and eager Candle, if anything.
///
/// # Errors
/// When an evaluation fails.
pub fn check_numbers(program: &Program) -> Result<Option<String>> {
    let leaves = program.leaves()?;
    let all = evaluate(program, &leaves, &EvalOptions::default())?;
    let (eager, wide) = match measures(|dtype, _| eagerly(program, &leaves, dtype), program.dtype) {
        Ok(both) => both,
        Err(text) => return Ok(Some(text)),
    };
    let replay = match evaluate(program, &leaves, &EvalOptions { replay: true, ..EvalOptions::default() }) {
        Ok(replay) => replay,
        Err(e) => return Ok(Some(format!("replay: {e}"))),
    };
    for (i, &root) in program.roots.iter().enumerate() {
        let floor = floor(program.dtype) * (1.0 + wide[i].max_abs());
        let eager_off = largest_error(&eager[i], &wide[i]);
        let limit = floor.max(EAGER_FACTOR * eager_off);
        for (what, got) in [("", &all), ("replayed, ", &replay)] {
            let got = to_arr(&got[i])?;
            if got.dims != wide[i].dims {
                return Ok(Some(format!("{what}root %{root} is {:?} instead of {:?}", got.dims, wide[i].dims)));
            }
            let off = largest_error(&got, &wide[i]);
            if off.is_nan() || off > limit {
                return Ok(Some(format!("{what}root %{root} is off by {off:e}, eager Candle by {eager_off:e}")));
            }
        }
    }
    Ok(None)
}
