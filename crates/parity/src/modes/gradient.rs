//! Gradients through Candle's autograd.
//!
//! The loss is Σ y·w with fixed weights w. The rule for results holds: eager's bits, or an error of at most the larger
//! of 1.5 × eager's in the same dtype and 2 units in the last place at the row's scale. The measure is the gradient of the eager
//! twin in f64 (with gelu composed: the constants of Candle's own backward for it have six digits), the scale the sum of the
//! absolute terms ([`super::magnitude`]). In f64 the measure is no better than what it measures, so it may be off as well, and
//! [`F64_ULP`] units are allowed.

use super::magnitude::magnitudes;
use super::{differences, Cell, Outcome, Subject};
use crate::case::{Case, InputSpec};
use crate::compare::{same_bits, Verdict, Worst, ALLOWED_ULP, EAGER_FACTOR};
use crate::reference::{self, Arr, NormShape};
use crate::rng::Rng;
use crate::value::{overflows, to_arr, to_tensor, ulp};
use crate::{eager, lazy, unsupported, Error, Result};
use candle_core::{DType, Tensor, Var};
use candle_lazy_exec::{eval_all_with_report, vjp, LazyTensor};
use candle_lazy_graph::{BinaryOp, Op, ReduceOp, ScatterOp};
use std::collections::BTreeMap;

/// What a gradient in f64 may always be off by where its measure is composed in f64: [`ALLOWED_ULP`] for ours and as much for the
/// measure.
const F64_ULP: f64 = 2.0 * ALLOWED_ULP;

/// The gradient of each input; `None` for inputs that are not tracked or that the loss does not reach.
pub type Gradients = Vec<Option<Tensor>>;

/// The weights of a loss over `count` results; few digits, so that they are the same number in every dtype.
pub(super) fn weights(dims: &[usize], count: usize) -> Arr {
    let mut rng = Rng::named(count as u64, "loss weights");
    Arr { dims: dims.to_vec(), data: (0..count).map(|_| rng.below(9) as f64 / 4.0 - 1.0).collect() }
}

/// The gradients of Σ y·w by Candle's autograd.
///
/// # Errors
/// When Candle has no backward for an op.
pub fn gradients(y: &Tensor, vars: &[Option<Var>]) -> Result<Gradients> {
    let w = to_tensor(&weights(y.dims(), y.elem_count()), y.dtype())?;
    let grads = (y * w)?.sum_all()?.backward()?;
    Ok(vars.iter().map(|v| v.as_ref().and_then(|v| grads.get(v.as_tensor()).cloned())).collect())
}

/// How a gradient comes from the input, which may be a view, to the leaf that it is a view of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fold {
    /// Candle's autograd, in the input's dtype.
    Candle,
    /// A sum in f64, rounded once.
    Exact,
}

/// Gradients of the eager twin in the case's own dtypes.
fn eager_gradients(subject: &Subject, fold: Fold) -> Result<Gradients> {
    let case = &subject.case;
    super::contained(|| {
        if fold == Fold::Candle {
            let (vars, inputs) = case.tracked_inputs(subject.seed)?;
            return gradients(&eager::run_case(case, &inputs)?, &vars);
        }
        let (vars, inputs) = alone(case, &subject.inputs)?;
        let found = gradients(&eager::run_case(case, &inputs)?, &vars)?;
        let storages = case.storages(subject.seed)?;
        let folded = |(i, g): (usize, Option<Tensor>)| g.map(|g| folded(case, &storages[i], i, &g)).transpose();
        found.into_iter().enumerate().map(folded).collect()
    })
}

/// The same numbers with every tracked input a variable of its own: gradients before a broadcast sums them. Variables (`None` for integers)
/// and inputs.
fn alone(case: &Case, inputs: &[Tensor]) -> Result<(Vec<Option<Var>>, Vec<Tensor>)> {
    let (mut vars, mut own) = (Vec::new(), Vec::new());
    for (input, spec) in inputs.iter().zip(&case.inputs) {
        let var = spec.is_tracked().then(|| Var::from_tensor(&input.detach().contiguous()?)).transpose()?;
        own.push(var.as_ref().map_or_else(|| input.clone(), |v| v.as_tensor().clone()));
        vars.push(var);
    }
    Ok((vars, own))
}

/// The gradient of the leaf `storage` that input `i` is a view of, summed in f64 and rounded once.
fn folded(case: &Case, storage: &Tensor, i: usize, gradient: &Tensor) -> Result<Tensor> {
    let var = Var::from_tensor(&storage.to_dtype(DType::F64)?)?;
    let sum = through_view(&case.inputs[i], &var, &gradient.to_dtype(DType::F64)?)?;
    Ok(sum.to_dtype(gradient.dtype())?)
}

/// What the gradient of an input is measured by.
struct Measure {
    /// The gradient, in f64.
    gradient: Arr,
    /// Per element the scale.
    scale: Arr,
    /// Whether the gradient is a reference's, more precise than f64.
    precise: bool,
}

/// The gradients of the composites whose long sums f64 would round: one per input, before a broadcast of the input adds them up.
fn references(case: &Case, inputs: &[Tensor], g: &Arr) -> Result<Option<Vec<Arr>>> {
    let x = inputs.iter().map(to_arr).collect::<Result<Vec<_>>>()?;
    let norm = |shape: NormShape, weight: bool, bias: bool| {
        let [dx, dw, db] = reference::norm_gradient(&x[0], weight.then(|| &x[1]), g, shape);
        let all = [Some(dx), weight.then_some(dw), bias.then_some(db)];
        Some(all.into_iter().flatten().collect())
    };
    let last = x.first().and_then(|x| x.dims.last()).copied().unwrap_or(1);
    let rows = |centred| NormShape { width: last, channels: last, behind: 1, centred, eps: case.scalars[0] };
    Ok(match &case.op {
        Op::Softmax { dim } => Some(vec![reference::softmax_gradient(&x[0], g, usize::from(*dim))]),
        Op::LogSoftmax { dim } => Some(vec![reference::log_softmax_gradient(&x[0], g, usize::from(*dim))]),
        Op::Reduce { op: ReduceOp::LogSumExp, axes, .. } => {
            Some(vec![reference::log_sum_exp_gradient(&x[0], g, *axes)])
        }
        Op::Reduce { op: ReduceOp::Var, axes, .. } => Some(vec![reference::variance_gradient(&x[0], g, *axes)]),
        Op::Binary(BinaryOp::Pow) => Some(reference::power_gradient(&x[0], &x[1], g).into()),
        Op::CrossEntropy => Some(vec![reference::cross_entropy_gradient(&x[0], &x[1], g.data[0])]),
        Op::RmsNorm { weight } => norm(rows(false), *weight, false),
        Op::LayerNorm { weight, bias } => norm(rows(true), *weight, *bias),
        Op::GroupNorm { groups, weight, bias } => {
            let (channels, behind) = (x[0].dims[1], x[0].dims[2..].iter().product());
            let width = channels * behind / groups;
            norm(NormShape { width, channels, behind, centred: true, eps: case.scalars[0] }, *weight, *bias)
        }
        _ => None,
    })
}

/// The gradient of `var` from that of the view: what shares a number adds up.
fn through_view(spec: &InputSpec, var: &Var, gradient: &Tensor) -> Result<Tensor> {
    let grads = (spec.view(var.as_tensor())? * gradient)?.sum_all()?.backward()?;
    Ok(grads.get(var.as_tensor()).map_or_else(|| var.zeros_like(), |t| Ok(t.clone()))?)
}

/// The dim along which the elements of a row lie.
fn row(case: &Case, rank: usize) -> Option<usize> {
    match case.op {
        Op::Softmax { dim } | Op::LogSoftmax { dim } => Some(usize::from(dim)),
        _ => rank.checked_sub(1),
    }
}

fn measure(subject: &Subject) -> Result<Vec<Option<Measure>>> {
    let case = &subject.case;
    let (mut vars, mut inputs) = (Vec::new(), Vec::new());
    for (storage, spec) in case.storages(subject.seed)?.iter().zip(&case.inputs) {
        let storage = if spec.dtype.is_float() { storage.to_dtype(DType::F64)? } else { storage.clone() };
        let var = spec.is_tracked().then(|| Var::from_tensor(&storage)).transpose()?;
        inputs.push(spec.view(var.as_ref().map_or(&storage, |v| v.as_tensor()))?);
        vars.push(var);
    }
    let (own, plain) = alone(case, &inputs)?;
    let y = eager::run_case_precisely(case, &inputs)?;
    let exact = gradients(&y, &vars)?;
    let detached: Vec<Tensor> = plain.iter().map(Tensor::detach).collect();
    let w = weights(y.dims(), y.elem_count());
    let precise = references(case, &detached, &w)?.unwrap_or_default();
    let mut terms = magnitudes(case, &detached, &to_tensor(&w.map(f64::abs), DType::F64)?)?;
    let alone = gradients(&eager::run_case_precisely(case, &plain)?, &own)?;
    terms.resize(alone.len(), None);
    let mut measures = Vec::new();
    for (i, ((exact, terms), alone)) in exact.into_iter().zip(terms).zip(alone).enumerate() {
        let (Some(exact), Some(var), Some(alone)) = (exact, &vars[i], alone) else {
            measures.push(None);
            continue;
        };
        let spec = &case.inputs[i];
        let mut terms = match terms {
            Some(terms) => alone.abs()?.maximum(&terms)?,
            None => alone.abs()?,
        };
        if let (Some(dim), true) = (row(case, terms.rank()), terms.elem_count() > 0) {
            terms = terms.max_keepdim(dim)?.broadcast_as(terms.shape())?.contiguous()?;
        }
        let scale = to_arr(&through_view(spec, var, &terms)?)?;
        let (gradient, precise) = match precise.get(i) {
            Some(precise) => (through_view(spec, var, &to_tensor(precise, DType::F64)?)?, true),
            None => (exact, false),
        };
        measures.push(Some(Measure { gradient: to_arr(&gradient)?, scale, precise }));
    }
    Ok(measures)
}

/// The largest error of `got`, in units in the last place at the scale; a NaN or infinity counts where the measure has none and is
/// within the dtype's range.
fn worst(got: &Arr, measure: &Measure, dtype: DType) -> Worst {
    let mut worst = Worst::default();
    for (at, ((&g, &e), &scale)) in got.data.iter().zip(&measure.gradient.data).zip(&measure.scale.data).enumerate() {
        let beyond = g.is_infinite() && overflows(dtype, e) && g.signum() == e.signum();
        let error = if g == e || (g.is_nan() && e.is_nan()) || beyond {
            0.0
        } else if g.is_finite() && e.is_finite() {
            (g - e).abs() / ulp(dtype, scale)
        } else {
            f64::INFINITY
        };
        if error > worst.ulp {
            worst = Worst { ulp: error, at };
        }
    }
    worst
}

/// Judges gradients: every gradient that eager gives must be there and near enough, and no other may differ from zero.
///
/// # Errors
/// When a tensor cannot be read, or the twin has no gradient and the table of unsupported cells no reason.
pub fn judge_gradients(subject: &Subject, ours: Result<Gradients>, fold: Fold) -> Result<Cell> {
    let failed = |what: String| Ok(Cell::of(Outcome::Failed(what)));
    let mut cell = Cell::of(Outcome::Passed);
    let same = match (eager_gradients(subject, fold), unsupported::no_gradient(&subject.case)) {
        (Ok(same), None) => same,
        (Ok(_), Some(why)) => return failed(format!("the twin has a gradient, the table says that {why}")),
        (Err(_), Some(why)) => {
            cell.without_gradient = Some(why);
            return Ok(cell);
        }
        (Err(e), None) => return Err(Error::NoTwin(format!("the twin has no gradient and the table no reason: {e}"))),
    };
    let ours = match ours {
        Ok(ours) => ours,
        Err(e) => return failed(format!("no backward: {e}")),
    };
    let mut pairs = Vec::new();
    for (i, (ours, same)) in ours.iter().zip(&same).enumerate() {
        let zero = |t: &Tensor| -> Result<bool> { Ok(to_arr(t)?.data.iter().all(|&g| g == 0.0)) };
        match (ours, same) {
            (Some(ours), Some(same)) => {
                match same_bits(&format!("the gradient of input {i} against eager's"), ours, same)? {
                    Ok(()) => {}
                    Err(what) if ours.dims() != same.dims() || ours.dtype() != same.dtype() => return failed(what),
                    Err(_) => match unsupported::fold_stalls(&subject.case.inputs[i]) {
                        Some(why) if fold == Fold::Candle => cell.without_gradient = Some(why),
                        _ => pairs.push((i, ours, same)),
                    },
                }
            }
            (None, None) => {}
            (Some(ours), None) if zero(ours)? => {}
            (None, Some(same)) if zero(same)? => {}
            (Some(_), None) => return failed(format!("input {i} has a gradient, eager's has none")),
            (None, Some(_)) => return failed(format!("the gradient of input {i} is missing")),
        }
    }
    if pairs.is_empty() {
        return Ok(cell);
    }
    let measures = measure(subject)?;
    for (i, ours, same) in pairs {
        let Some(Some(measure)) = measures.get(i) else {
            return failed(format!("eager has a gradient of input {i}, but none in f64"));
        };
        let (dtype, got) = (ours.dtype(), to_arr(ours)?);
        let (off, eager) = (worst(&got, measure, dtype), worst(&to_arr(same)?, measure, dtype));
        // one product behind another rounds twice
        let products = if matches!(subject.case.op, Op::Lora { .. } | Op::LoraSegments { .. }) { 2.0 } else { 1.0 };
        let floor = products * if dtype == DType::F64 && !measure.precise { F64_ULP } else { ALLOWED_ULP };
        let limit = if eager.ulp.is_finite() { (eager.ulp * EAGER_FACTOR).max(floor) } else { floor };
        let wrong = (off.ulp > limit).then(|| {
            format!(
                "the gradient of input {i}, element {}, is {:?} instead of {:?}: {:.2} ulp, allowed {limit:.2} (eager {:.2})",
                off.at, got.data[off.at], measure.gradient.data[off.at], off.ulp, eager.ulp
            )
        });
        let verdict = Verdict { ours: off, eager: Some(eager), limit, floor, wrong, gradient: Some(i) };
        if verdict.wrong.is_some() || verdict.share() >= cell.share {
            cell.judged_by(verdict);
        } else {
            cell.measured.push(verdict);
        }
        if matches!(cell.outcome, Outcome::Failed(_)) {
            break;
        }
    }
    Ok(cell)
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
    let mut cell = subject.verdict("tracked", &got)?;
    cell.kernels = report.kernels;
    if matches!(cell.outcome, Outcome::Passed) && got.dtype().is_float() {
        cell.and(judge_ours(subject, gradients(&got, &vars), Fold::Candle)?);
    }
    Ok(Some(cell))
}

/// Gradients, the result's dtype and the kernels that ran.
type Recorded = (Gradients, DType, BTreeMap<&'static str, usize>);

/// The gradients that the graph transform records, through the views of `storages` that the inputs are; `None` for a result without any.
pub(super) fn recorded(case: &Case, storages: &[Tensor]) -> Result<Option<Recorded>> {
    let mut leaves = Vec::new();
    for (input, spec) in case.views(storages)?.iter().zip(&case.inputs) {
        let leaf = LazyTensor::from(input);
        leaves.push(if spec.is_tracked() { leaf.variable()? } else { leaf });
    }
    let y = lazy::record_case(case, &leaves)?;
    if !y.dtype().is_float() {
        return Ok(None);
    }
    let w = LazyTensor::from(to_tensor(&weights(y.dims(), y.elem_count()), y.dtype())?);
    let variables: Vec<&LazyTensor> = leaves.iter().filter(|leaf| leaf.is_variable()).collect();
    let found = vjp(&[&y], &[&w], &variables)?;
    let (values, report) = eval_all_with_report(&found.iter().flatten().collect::<Vec<_>>())?;
    let (mut found, mut values) = (found.into_iter(), values.into_iter());
    let mut gradients = Vec::new();
    for (i, leaf) in leaves.iter().enumerate() {
        let there = leaf.is_variable() && found.next().is_some_and(|g| g.is_some());
        gradients.push(match there.then(|| values.next()).flatten() {
            Some(g) if g.dims() != leaf.dims() || g.dtype() != leaf.dtype() => {
                return Err(Error::NoTwin(format!("a gradient of {g:?} for {leaf:?}")))
            }
            Some(g) => Some(folded(case, &storages[i], i, &g)?),
            None => None,
        });
    }
    Ok(Some((gradients, y.dtype(), report.kernels)))
}

/// The gradients of the ops whose backward Candle has wrong, or only for some shapes: gather, scatter and scatter-add.
fn placed(case: &Case, inputs: &[Tensor]) -> Result<Option<Vec<Option<Arr>>>> {
    let (Op::Gather { dim } | Op::Scatter { dim, .. }) = case.op else {
        return Ok(None);
    };
    let (x, ids, dim) = (to_arr(&inputs[0])?, to_arr(&inputs[1])?, usize::from(dim));
    Ok(Some(match &case.op {
        Op::Scatter { op, .. } => {
            let g = weights(&x.dims, x.data.len());
            let [dx, dsrc] = reference::scatter_gradient(&ids, &g, dim, *op == ScatterOp::Add);
            vec![Some(dx), None, Some(dsrc)]
        }
        _ => {
            let g = weights(&ids.dims, ids.data.len());
            vec![Some(reference::gather_gradient(&x.dims, &ids, &g, dim)), None]
        }
    }))
}

/// Judges gradients by references alone. The weights have few digits, so that their sums are exact.
fn judge_placed(subject: &Subject, ours: Result<Gradients>, references: Vec<Option<Arr>>) -> Result<Cell> {
    let case = &subject.case;
    let failed = |what: String| Ok(Cell::of(Outcome::Failed(what)));
    let ours = match ours {
        Ok(ours) => ours,
        Err(e) => return failed(format!("no backward: {e}")),
    };
    for (i, (ours, reference)) in ours.into_iter().zip(references).enumerate() {
        let (spec, storage) = (&case.inputs[i], &case.storages(subject.seed)?[i]);
        match (ours, reference.filter(|_| spec.is_tracked())) {
            (Some(ours), Some(reference)) => {
                let var = Var::from_tensor(&storage.to_dtype(DType::F64)?)?;
                let reference = through_view(spec, &var, &to_tensor(&reference, DType::F64)?)?;
                if to_arr(&ours)? != to_arr(&reference)? {
                    return failed(format!("the gradient of input {i} is {ours} instead of {reference}"));
                }
            }
            (None, None) => {}
            (ours, _) => {
                return failed(format!(
                    "input {i}: a gradient is {}",
                    if ours.is_some() { "too much" } else { "missing" }
                ))
            }
        }
    }
    Ok(Cell::of(Outcome::Passed))
}

/// Judges gradients by the graph transform, by references alone where Candle's are wrong.
fn judge_ours(subject: &Subject, ours: Result<Gradients>, fold: Fold) -> Result<Cell> {
    match placed(&subject.case, &subject.inputs)? {
        Some(references) => judge_placed(subject, ours, references),
        None => match unsupported::eager_is_wrong(&subject.case) {
            Some(why) if ours.is_ok() => Ok(Cell::of(Outcome::Skipped(why.into()))),
            _ => judge_gradients(subject, ours, fold),
        },
    }
}

/// Gradients by the graph transform.
pub(super) fn check_recorded(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    if case.is_special() || !case.inputs.iter().any(|i| i.dtype.is_float()) {
        return Ok(None);
    }
    let (ours, kernels) = match recorded(case, &case.storages(subject.seed)?) {
        Ok(None) => return Ok(None),
        Ok(Some((ours, _, kernels))) => (Ok(ours), kernels),
        Err(error) => (Err(error), BTreeMap::new()),
    };
    let mut cell = judge_ours(subject, ours, Fold::Exact)?;
    cell.kernels = kernels;
    if matches!(cell.outcome, Outcome::Passed | Outcome::Skipped(_)) {
        if let Some(what) = differences::disagreement(subject)? {
            cell.outcome = Outcome::Failed(what);
        }
    }
    Ok(Some(cell))
}
