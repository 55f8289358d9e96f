//! Gradients through Candle's autograd.
//!
//! The loss is Σ y·w with fixed weights w. The measure is the gradient of the eager twin in f64 (with gelu composed: the
//! constants of Candle's own backward for it have six digits); ours may be off by the larger of 1.5 × what eager's is in the
//! same dtype, and [`GRADIENT_ULP`] units in the last place at the case's largest gradient. (The rule for results measures at
//! a row's scale of Σ|aᵢ·bᵢ|. A gradient's inner sums are not visible from outside: some cancel to zero by structure, as
//! those of a query whose keys are all equal. So the scale is that of the largest gradient of any input, taken before the sum
//! over a broadcast, and the allowance is larger.)

use super::{quietly, Cell, Outcome, Subject};
use crate::case::Domain;
use crate::reference::Arr;
use crate::rng::Rng;
use crate::value::{to_arr, to_tensor, ulp};
use crate::{eager, lazy, unsupported, Result};
use candle_core::{DType, Tensor, Var};
use candle_lazy_exec::LazyTensor;
use candle_lazy_graph::Op;

/// What a gradient may always be off by, in units in the last place at the case's largest gradient.
pub const GRADIENT_ULP: f64 = 16.0;

/// The same in f32, whose backwards are chains in f32 itself (those of f16 and bf16 round once, from f32).
pub const GRADIENT_ULP_F32: f64 = 32.0;

/// The same in f64, where the measure itself is a composed f64 gradient and no better than what it measures: 2¹² units are
/// 10⁻¹² of the largest gradient.
pub const GRADIENT_ULP_F64: f64 = 4096.0;

/// The gradient of each input; `None` for inputs that are not tracked or that the loss does not reach.
pub type Gradients = Vec<Option<Tensor>>;

/// The gradients of Σ y·w by Candle's autograd.
///
/// # Errors
/// When Candle has no backward for an op.
pub fn gradients(y: &Tensor, vars: &[Option<Var>]) -> Result<Gradients> {
    let mut rng = Rng::named(y.elem_count() as u64, "loss weights");
    // few digits: the weights are the same number in every dtype
    let data = (0..y.elem_count()).map(|_| rng.below(9) as f64 / 4.0 - 1.0).collect();
    let w = to_tensor(&Arr { dims: y.dims().to_vec(), data }, y.dtype())?;
    let grads = (y * w)?.sum_all()?.backward()?;
    Ok(vars.iter().map(|v| v.as_ref().and_then(|v| grads.get(v.as_tensor()).cloned())).collect())
}

/// Gradients of the eager twin in the case's own dtypes.
fn eager_gradients(subject: &Subject) -> Option<Gradients> {
    quietly(|| {
        let case = &subject.case;
        let (vars, inputs) = case.tracked_inputs(subject.seed)?;
        gradients(&eager::run_case(case, &inputs)?, &vars)
    })
}

/// What gradients are measured by.
struct Measure {
    /// The gradients, in f64.
    gradients: Gradients,
    /// The largest |gradient| of any input's element, times the number of elements that share it.
    scale: f64,
}

fn measure(subject: &Subject) -> Option<Measure> {
    let case = &subject.case;
    let wide = |t: &Tensor| {
        if t.dtype().is_float() {
            t.to_dtype(DType::F64)
        } else {
            Ok(t.clone())
        }
    };
    let run = |inputs: &[Tensor], vars: &[Option<Var>]| gradients(&eager::run_case_precisely(case, inputs)?, vars);
    quietly(|| {
        let mut vars = Vec::new();
        let mut inputs = Vec::new();
        let mut repeats = Vec::new();
        for (storage, spec) in case.storages(subject.seed)?.iter().zip(&case.inputs) {
            let storage = &wide(storage)?;
            let var = spec.is_tracked().then(|| Var::from_tensor(storage)).transpose()?;
            let input = spec.view(var.as_ref().map_or(storage, |v| v.as_tensor()))?;
            repeats.push((input.elem_count() as f64 / storage.elem_count().max(1) as f64).max(1.0));
            inputs.push(input);
            vars.push(var);
        }
        let gradients = run(&inputs, &vars)?;
        // the same inputs, each a variable of its own: gradients before a broadcast sums them
        let mut own = Vec::new();
        let mut plain = Vec::new();
        for (input, spec) in inputs.iter().zip(&case.inputs) {
            let var = spec.is_tracked().then(|| Var::from_tensor(&input.detach().contiguous()?)).transpose()?;
            plain.push(var.as_ref().map_or_else(|| input.clone(), |v| v.as_tensor().clone()));
            own.push(var);
        }
        let mut scale = 0.0f64;
        for (gradient, repeats) in run(&plain, &own)?.iter().zip(repeats) {
            if let Some(gradient) = gradient {
                scale = scale.max(to_arr(gradient)?.max_abs() * repeats);
            }
        }
        // y·(g − Σ g·y) of a saturated softmax is a difference of nearly equal terms; each is at most 1, as the weights are
        if case.inputs.iter().any(|i| i.domain == Domain::Large) {
            scale = scale.max(1.0);
        }
        Ok(Measure { gradients, scale })
    })
}

/// Judges gradients: every gradient that eager gives must be there and near enough, and no other may differ from zero.
///
/// # Errors
/// When a tensor cannot be read.
pub fn judge_gradients(subject: &Subject, ours: Result<Gradients>) -> Result<Outcome> {
    if let Some(why) = unsupported::no_gradient(&subject.case) {
        return Ok(Outcome::Skipped(why.into()));
    }
    let Some(same) = eager_gradients(subject) else {
        return Ok(Outcome::Skipped("Candle has no gradient for the eager twin".into()));
    };
    let ours = match ours {
        Ok(ours) => ours,
        Err(e) => return Ok(Outcome::Failed(format!("no backward: {e}"))),
    };
    let Some(measure) = measure(subject) else {
        return Ok(Outcome::Skipped("Candle has no gradient for the eager twin in f64".into()));
    };
    for gradient in measure.gradients.iter().flatten() {
        if to_arr(gradient)?.data.iter().any(|g| g.is_nan()) {
            return Ok(Outcome::Skipped("a row whose every key is masked has no gradient".into()));
        }
    }
    for (i, ((ours, same), exact)) in ours.iter().zip(&same).zip(&measure.gradients).enumerate() {
        let zero = |t: &Tensor| -> Result<bool> { Ok(to_arr(t)?.data.iter().all(|&g| g == 0.0)) };
        let (ours, same, exact) = match (ours, same, exact) {
            (Some(ours), Some(same), Some(exact)) => (ours, same, exact),
            (None, None, _) => continue,
            (Some(ours), None, _) if zero(ours)? => continue,
            (Some(_), _, _) => return Ok(Outcome::Failed(format!("input {i} has a gradient, eager's has none"))),
            (None, Some(same), _) if zero(same)? => continue,
            (None, Some(_), _) => return Ok(Outcome::Failed(format!("the gradient of input {i} is missing"))),
        };
        if ours.dims() != same.dims() || ours.dtype() != same.dtype() {
            return Ok(Outcome::Failed(format!(
                "the gradient of input {i} is {} {:?} instead of {} {:?}",
                ours.dtype().as_str(),
                ours.dims(),
                same.dtype().as_str(),
                same.dims()
            )));
        }
        let (got, same, exact) = (to_arr(ours)?, to_arr(same)?, to_arr(exact)?);
        let unit = ulp(ours.dtype(), exact.max_abs().max(measure.scale));
        let error = |x: &Arr| {
            let errors = x.data.iter().zip(&exact.data).map(|(g, e)| {
                if g == e || !e.is_finite() {
                    0.0
                } else if g.is_finite() {
                    (g - e).abs() / unit
                } else {
                    f64::INFINITY
                }
            });
            errors.enumerate().fold((0.0, 0), |worst, (at, e)| if e > worst.0 { (e, at) } else { worst })
        };
        let ((off, at), (eager_off, _)) = (error(&got), error(&same));
        let limit = (eager_off * crate::compare::EAGER_FACTOR).max(match ours.dtype() {
            DType::F64 => GRADIENT_ULP_F64,
            DType::F32 => GRADIENT_ULP_F32,
            _ => GRADIENT_ULP,
        });
        if off > limit {
            return Ok(Outcome::Failed(format!(
                "the gradient of input {i}, element {at}, is {:?} instead of {:?}: {off:.1} ulp, allowed {limit:.1} (eager {eager_off:.1})",
                got.data[at], exact.data[at]
            )));
        }
    }
    Ok(Outcome::Passed)
}

/// Lazy evaluation of tracked leaves: the result as declared, and the gradients through it.
pub(super) fn check(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    if case.is_special() || !case.inputs.iter().any(|i| i.dtype.is_float()) {
        return Ok(None);
    }
    let (vars, inputs) = case.tracked_inputs(subject.seed)?;
    let leaves: Vec<LazyTensor> = inputs.iter().map(LazyTensor::from).collect();
    let (got, report) = lazy::record_case(case, &leaves)?.eval_with_report()?;
    let mut cell = match case.op {
        // a tracked input meets the dequantised weight instead of Candle's quantised kernel
        Op::QMatmul => subject.verdict_against("tracked", &got, &eager::run_case(case, &inputs)?)?,
        _ => subject.verdict("tracked", &got)?,
    };
    cell.kernels = report.kernels;
    if matches!(cell.outcome, Outcome::Passed) && got.dtype().is_float() {
        cell.outcome = judge_gradients(subject, gradients(&got, &vars))?;
    }
    Ok(Some(cell))
}
