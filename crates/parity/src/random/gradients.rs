//! Gradients of a graph through Candle's autograd: lazy evaluation of tracked leaves against the same ops run eagerly.
//!
//! The loss is Σ over the float roots of Σ y·w with fixed weights. Ours may differ from eager's by 4 × eager's own error against f64, or
//! by the floor of [`super::check_numbers`] at the largest gradient of a leaf: below a tracked leaf both run Candle's own ops, only the
//! composites are taken apart differently. Where a gradient jumps, at equal operands of a minimum say, nothing is compared.

use super::check::{floor, largest_error, measures, EAGER_FACTOR};
use super::{Program, Step};
use crate::modes::gradients;
use crate::reference::Arr;
use crate::rng::Rng;
use crate::value::{to_arr, to_tensor};
use crate::{eager, Result};
use candle_core::{DType, Tensor, Var};
use candle_lazy_exec::run::eval_all;
use candle_lazy_exec::LazyTensor;
use candle_lazy_graph::Op;

/// Per step a variable (`None` for integers and for ops), and its tensor (`None` for ops).
type Leaves = (Vec<Option<Var>>, Vec<Option<Tensor>>);

/// How far leaves are moved to see whether a gradient jumps there, as a share of each number.
const NUDGE: f64 = 1e-9;

/// What a smooth gradient does not move by when the leaves move by [`NUDGE`]; a difference below it is never excused.
const JUMP: f64 = 1e-5;

/// The leaves as variables, floats in `dtype`; with a `nudge`, moved by up to [`NUDGE`].
fn variables(program: &Program, dtype: DType, nudge: Option<u64>) -> Result<Leaves> {
    let (mut vars, mut leaves) = (Vec::new(), Vec::new());
    let mut rng = nudge.map(Rng::new);
    for leaf in program.leaves()? {
        let var = match &leaf {
            Some(leaf) if leaf.dtype().is_float() => {
                let mut leaf = leaf.to_dtype(dtype)?.contiguous()?;
                if let Some(rng) = &mut rng {
                    let mut moved = to_arr(&leaf)?;
                    moved.data.iter_mut().for_each(|x| *x *= 1.0 + NUDGE * rng.range(-1.0, 1.0));
                    leaf = to_tensor(&moved, dtype)?;
                }
                Some(Var::from_tensor(&leaf)?)
            }
            _ => None,
        };
        leaves.push(var.as_ref().map(|v| v.as_tensor().clone()).or(leaf));
        vars.push(var);
    }
    Ok((vars, leaves))
}

/// One loss over all float roots, as one tensor whose gradients are asked for.
fn joined(roots: &[Tensor]) -> Result<Option<Tensor>> {
    let flat: Vec<Tensor> =
        roots.iter().filter(|t| t.dtype().is_float()).map(Tensor::flatten_all).collect::<candle_core::Result<_>>()?;
    match flat.is_empty() {
        true => Ok(None),
        false => Ok(Some(Tensor::cat(&flat, 0)?)),
    }
}

/// The gradients of the program run step by step by Candle, with exact constants where `precise`.
fn eagerly(program: &Program, dtype: DType, precise: bool, nudge: Option<u64>) -> Result<Vec<Option<Tensor>>> {
    let (vars, leaves) = variables(program, dtype, nudge)?;
    let mut values: Vec<Tensor> = Vec::new();
    for (step, leaf) in program.steps.iter().zip(leaves) {
        values.push(match (step, leaf) {
            (Step::Op { op, scalars, inputs }, _) => {
                let inputs: Vec<Tensor> = inputs.iter().map(|&i| values[i].clone()).collect();
                let run = if precise { eager::run_precisely } else { eager::run };
                let y = run(op, scalars, &inputs)?;
                match op {
                    // a program in f64 stands for one in `program.dtype`
                    Op::Cast(to) if to.is_float() && *to == program.dtype => y.to_dtype(dtype)?,
                    _ => y,
                }
            }
            (Step::Leaf(_), Some(leaf)) => leaf,
            (Step::Leaf(_), None) => return Err(crate::Error::NoTwin("a leaf without a tensor".into())),
        });
    }
    let roots: Vec<Tensor> = program.roots.iter().map(|&r| values[r].clone()).collect();
    match joined(&roots)? {
        Some(y) => gradients(&y, &vars),
        None => Ok(vec![None; vars.len()]),
    }
}

/// Whether the gradient of leaf `i` jumps where the leaves are: numbers that differ by less than a rounding (x and the mean of
/// equal x) may be equal for one order of summation and not for another, and the gradient of their minimum with them. Eager
/// Candle's own gradient in f64 then moves by a good part of `off` when the leaves move by a billionth.
fn jumps(program: &Program, i: usize, wide: &Arr, off: f64) -> Result<bool> {
    for nudge in 0..4 {
        let moved = eagerly(program, DType::F64, true, Some(nudge))?;
        let by =
            moved.get(i).and_then(Option::as_ref).map(to_arr).transpose()?.map_or(0.0, |m| largest_error(&m, wide));
        if by >= off / 4.0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What is wrong with the gradients of a lazy evaluation, if anything. `None` too without a float root.
///
/// # Errors
/// When the evaluation fails.
pub fn check_gradients(program: &Program) -> Result<Option<String>> {
    let (same, wide) = match measures(|dtype, precise| eagerly(program, dtype, precise, None), program.dtype) {
        Ok(both) => both,
        Err(text) => return Ok(Some(text)),
    };
    let (vars, leaves) = variables(program, program.dtype, None)?;
    let roots = program.record(&leaves)?;
    let values = eval_all(&roots.iter().collect::<Vec<&LazyTensor>>())?;
    let Some(y) = joined(&values)? else {
        return Ok(None);
    };
    let ours = gradients(&y, &vars)?;
    let mut scale = 0.0f64;
    for gradient in wide.iter().flatten() {
        scale = scale.max(to_arr(gradient)?.max_abs());
    }
    for (i, ((ours, same), wide)) in ours.iter().zip(&same).zip(&wide).enumerate() {
        let (ours, same, wide) = match (ours, same, wide) {
            (Some(ours), Some(same), Some(wide)) => (to_arr(ours)?, to_arr(same)?, to_arr(wide)?),
            (None, Some(same), _) if to_arr(same)?.max_abs() > 0.0 => {
                return Ok(Some(format!("the gradient of leaf %{i} is missing")))
            }
            _ => continue,
        };
        let off = largest_error(&ours, &same);
        let eager_off = largest_error(&same, &wide);
        let limit = (floor(program.dtype) * (1.0 + scale)).max(EAGER_FACTOR * eager_off);
        // a NaN on either side is no agreement
        let within = off <= limit;
        if within || off > JUMP && jumps(program, i, &wide, off)? {
            continue;
        }
        return Ok(Some(format!("the gradient of leaf %{i} is off by {off:e}, {limit:e} allowed")));
    }
    Ok(None)
}
