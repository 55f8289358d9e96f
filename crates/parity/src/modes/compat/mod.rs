//! The calls of metal-candle 1.x through the façade, against v1's formulas.
//!
//! A formula is written once, in Candle's ops. In the inputs' dtype it is what v1 computed, in f64 it is the reference, and Candle's
//! autograd on it gives the reference's gradients. A call of several roundings may be off by two units for each of them at the scale of
//! its last sum, or by 1.5 × what v1's way is; a gradient the same at the scale of its largest element. Factors of low-rank layers are
//! random on both sides: with a B of zeros every formula holds.

mod inference;
mod layers;
mod models;
mod ops;
mod training;

use super::{Cell, Mode, Outcome};
use crate::case::{Domain, InputSpec, Layout};
use crate::cases::FLOATS;
use crate::compare::{rounding, Verdict};
use crate::referee::Judged;
use crate::reference::Arr;
use crate::rng::Rng;
use crate::value::{to_arr, to_tensor};
use crate::verify::{caught, Options, Summary};
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};

type Ours = fn(&[Tensor]) -> candle_lazy_compat::Result<Vec<Tensor>>;
/// The results, and what the rounding of each is measured by; its own elements where nothing is given.
type Formula = fn(&[Tensor]) -> candle_core::Result<(Vec<Tensor>, Vec<Tensor>)>;

/// In which dtypes a call is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dtypes {
    /// In every float.
    Floats,
    /// In f32, which is all that v1 had there.
    F32,
}

struct Call {
    /// As a user of v1 would write it.
    name: &'static str,
    /// The first is the input, which comes in every layout.
    inputs: &'static [&'static [usize]],
    dtypes: Dtypes,
    ours: Ours,
    formula: Formula,
    roundings: f64,
    /// Whether gradients reach every input.
    gradients: bool,
}

/// The calls in tables, one per module of the façade.
const TABLES: &[&[Call]] = &[ops::CALLS, layers::CALLS, training::CALLS, models::CALLS, inference::CALLS];

fn values(call: &Call, dtype: DType, layout: Layout, seed: u64) -> Result<Vec<Tensor>> {
    let mut rng = Rng::named(seed, call.name);
    let mut inputs = Vec::new();
    for (i, dims) in call.inputs.iter().enumerate() {
        let layout = if i == 0 { layout } else { Layout::Contiguous };
        let spec = InputSpec::new(dims, dtype, layout, Domain::Any);
        let (stored, limit) = (spec.storage_dims(), if i == 0 { 2.0 } else { 0.7 });
        let data = (0..stored.iter().product()).map(|_| rng.range(-limit, limit)).collect();
        inputs.push(spec.view(&to_tensor(&Arr { dims: stored, data }, dtype)?)?);
    }
    Ok(inputs)
}

fn wide(inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    Ok(inputs.iter().map(|x| x.to_dtype(DType::F64)).collect::<candle_core::Result<_>>()?)
}

/// In f64 the reference is rounded as often as the result.
fn own_roundings(dtype: DType) -> f64 {
    if dtype == DType::F64 {
        2.0
    } else {
        1.0
    }
}

/// The verdict on one tensor.
fn judged(
    what: &str,
    got: &Tensor,
    eager: &Tensor,
    exact: &Tensor,
    by: Option<&Tensor>,
    steps: f64,
) -> Result<Verdict> {
    let value = to_arr(exact)?;
    let magnitude = by.map_or_else(|| Ok(value.map(f64::abs)), to_arr)?;
    let judged = Judged { row: value.dims.len().saturating_sub(1), value, magnitude };
    rounding(what, got, Some(eager), &judged, steps)
}

/// The call on plain inputs.
fn check(call: &Call, dtype: DType, layout: Layout, seed: u64) -> Result<Option<Cell>> {
    let inputs = values(call, dtype, layout, seed)?;
    let got = (call.ours)(&inputs).map_err(|e| Error::NoTwin(e.to_string()))?;
    let (eager, _) = (call.formula)(&inputs)?;
    let (exact, magnitudes) = (call.formula)(&wide(&inputs)?)?;
    let steps = call.roundings * own_roundings(dtype);
    let mut cell = Cell::of(Outcome::Passed);
    if got.len() != exact.len() {
        cell.outcome = Outcome::Failed(format!("{} results instead of {}", got.len(), exact.len()));
        return Ok(Some(cell));
    }
    for (i, got) in got.iter().enumerate() {
        if got.dtype() != eager[i].dtype() {
            cell.outcome = Outcome::Failed(format!("{:?} instead of {:?}", got.dtype(), eager[i].dtype()));
            return Ok(Some(cell));
        }
        let verdict = judged(call.name, got, &eager[i], &exact[i], magnitudes.get(i), steps)?;
        take(&mut cell, verdict);
    }
    Ok(Some(cell))
}

/// Keeps the worst verdict.
fn take(cell: &mut Cell, verdict: Verdict) {
    if verdict.share() > cell.share {
        (cell.share, cell.ulp) = (verdict.share(), verdict.ours.ulp);
    }
    if let (Outcome::Passed, Some(wrong)) = (&cell.outcome, verdict.wrong) {
        cell.outcome = Outcome::Failed(wrong);
    }
}

/// Σ of all results times fixed weights, and the gradient of every input.
fn gradients(
    inputs: &[Tensor],
    weights: &[Tensor],
    run: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<Vec<Option<Tensor>>> {
    let vars = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let tracked: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let mut loss: Option<Tensor> = None;
    for (result, weight) in run(&tracked)?.iter().zip(weights) {
        let part = (result * weight.to_dtype(result.dtype())?)?.sum_all()?;
        loss = Some(match loss {
            Some(loss) => (loss + part)?,
            None => part,
        });
    }
    let loss = loss.ok_or_else(|| Error::NoTwin("no result".into()))?;
    let store = loss.backward()?;
    Ok(vars.iter().map(|var| store.get(var).cloned()).collect())
}

/// The gradients of the call, of contiguous inputs.
fn check_gradients(call: &Call, dtype: DType, seed: u64) -> Result<Option<Cell>> {
    let inputs = values(call, dtype, Layout::Contiguous, seed)?;
    let mut rng = Rng::named(seed, "weights of results");
    let mut weights = Vec::new();
    for result in (call.formula)(&inputs)?.0 {
        let dims = result.dims().to_vec();
        let data = (0..dims.iter().product()).map(|_| rng.range(-1.5, 1.5)).collect();
        weights.push(to_tensor(&Arr { dims, data }, dtype)?);
    }
    let formula = |x: &[Tensor]| -> Result<Vec<Tensor>> { Ok((call.formula)(x)?.0) };
    let ours = gradients(&inputs, &weights, |x| (call.ours)(x).map_err(|e| Error::NoTwin(e.to_string())))?;
    let eager = gradients(&inputs, &weights, formula)?;
    let exact = gradients(&wide(&inputs)?, &weights, formula)?;
    let steps = 2.0 * call.roundings * own_roundings(dtype);
    let mut cell = Cell::of(Outcome::Passed);
    for (i, exact) in exact.iter().enumerate() {
        let (Some(ours), Some(eager), Some(exact)) = (&ours[i], &eager[i], exact) else {
            cell.outcome = Outcome::Failed(format!("no gradient of input {i}"));
            return Ok(Some(cell));
        };
        let largest = exact.abs()?.max_all()?.broadcast_as(exact.shape())?;
        let what = format!("the gradient of input {i} of {}", call.name);
        let verdict = judged(&what, ours, eager, exact, Some(&largest), steps)?;
        take(&mut cell, verdict);
    }
    Ok(Some(cell))
}

/// Runs every call in every dtype and layout that it has.
pub(crate) fn run(options: &Options, modes: &[Mode], summary: &mut Summary) {
    if !modes.contains(&Mode::Compat) {
        return;
    }
    for dtype in FLOATS.into_iter().filter(|d| options.dtype.is_none_or(|only| only == *d)) {
        for call in TABLES.iter().copied().flatten().filter(|c| c.dtypes == Dtypes::Floats || dtype == DType::F32) {
            let mut count = |name: String, cell: Option<Cell>| {
                if let Some(cell) = cell {
                    summary.count("v1", &name, &Mode::Compat.name(), &cell);
                }
            };
            for layout in Layout::ALL {
                let cell = caught(|| check(call, dtype, layout, options.seed));
                count(format!("{}, {} {}", call.name, dtype.as_str(), layout.name()), cell);
            }
            if call.gradients {
                let cell = caught(|| check_gradients(call, dtype, options.seed));
                count(format!("{}, {} gradient", call.name, dtype.as_str()), cell);
            }
        }
    }
}
