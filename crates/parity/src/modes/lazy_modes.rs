//! Lazy evaluation with one set of options or another.

use super::{Cell, Mode, Outcome, Subject};
use crate::case::{Case, Layout};
use crate::compare::{rounding, same_bits};
use crate::referee::{judge, Judged};
use crate::reference::{self, Arr, Reduction};
use crate::value::to_arr;
use crate::{eager, lazy, opaque, unsupported, Error, Result};
use candle_core::{DType, Tensor};
use candle_lazy_exec::{materialize, run::eval_all_with, EvalOptions, EvalReport, LazyTensor};
use candle_lazy_graph::{Exactness, Op, OpClass};

/// Evaluates one tensor.
///
/// # Errors
/// When evaluation fails.
pub fn evaluate(tensor: &LazyTensor, options: &EvalOptions) -> Result<(Tensor, EvalReport)> {
    let (mut tensors, report) = eval_all_with(&[tensor], options)?;
    match tensors.pop() {
        Some(tensor) => Ok((tensor, report)),
        None => Err(Error::NoTwin("no result for a root".into())),
    }
}

pub(super) fn record(case: &Case, inputs: &[Tensor]) -> Result<LazyTensor> {
    let leaves: Vec<LazyTensor> = inputs.iter().map(LazyTensor::from).collect();
    lazy::record_case(case, &leaves)
}

/// What is wrong with the kernels that ran, if anything: Candle's op where a kernel of ours is declared.
#[must_use]
pub fn expected_kernels(case: &Case, report: &EvalReport) -> Option<String> {
    if let Op::QMatmul = case.op {
        let candles = report.fallbacks.keys().eq(["qmatmul"].iter()) && report.replayed.is_empty();
        return (!candles).then(|| format!("fell back to {:?}, replayed {:?}", report.fallbacks, report.replayed));
    }
    if unsupported::candle_runs(case).is_some() {
        return None;
    }
    if !report.fallbacks.is_empty() {
        return Some(format!("fell back to Candle's {:?}", report.fallbacks));
    }
    (!report.replayed.is_empty()).then(|| format!("replayed Candle's {:?}", report.replayed))
}

fn options(mode: Mode) -> EvalOptions {
    match mode {
        Mode::NoPasses => EvalOptions::no_passes(),
        Mode::OnlyPass(name) => EvalOptions::only_pass(name),
        Mode::Decomposed => EvalOptions { decompose: true, ..EvalOptions::default() },
        Mode::Replay => EvalOptions { replay: true, ..EvalOptions::default() },
        Mode::Cold => EvalOptions { cache: false, ..EvalOptions::default() },
        _ => EvalOptions::default(),
    }
}

/// The options with the graph validated after every pass.
fn checked(options: EvalOptions) -> EvalOptions {
    EvalOptions { validate: true, ..options }
}

/// The result without passes: what every other plan of ours equals bit for bit.
pub(super) fn baseline(subject: &mut Subject) -> Result<Tensor> {
    if let Some(tensor) = &subject.baseline {
        return Ok(tensor.clone());
    }
    let (tensor, _) = evaluate(&record(&subject.case, &subject.inputs)?, &checked(options(Mode::NoPasses)))?;
    subject.baseline = Some(tensor.clone());
    Ok(tensor)
}

pub(super) fn check(subject: &mut Subject, mode: Mode) -> Result<Option<Cell>> {
    match mode {
        Mode::Chain => return chain(subject),
        Mode::RoundsOnce => return rounds_once(subject),
        Mode::OtherSizes => return other_sizes(subject),
        Mode::OtherScalars => return other_scalars(subject),
        Mode::Eval => return eval(subject),
        Mode::InPlace => return in_place(subject),
        Mode::Decomposed if subject.case.op.class() != OpClass::Composite => return Ok(None),
        _ => {}
    }
    let tensor = record(&subject.case, &subject.inputs)?;
    if mode == Mode::Warm {
        if tensor.is_ready() {
            return Ok(None);
        }
        evaluate(&record(&subject.case, &subject.inputs)?, &options(mode))?;
    }
    let computed = !tensor.is_ready();
    let (got, report) = evaluate(&tensor, &checked(options(mode)))?;
    let mut cell = subject.verdict(&mode.name(), &got)?;
    cell.kernels.clone_from(&report.kernels);
    if cell.outcome != Outcome::Passed {
        return Ok(Some(cell));
    }
    if mode == Mode::Replay {
        // a custom op is its own replay
        let custom = matches!(subject.case.op, Op::Custom { .. }) && report.kernels.keys().eq(["custom"].iter());
        if !report.kernels.is_empty() && !custom {
            cell.outcome = Outcome::Failed(format!("a replay ran our kernels {:?}", report.kernels));
        }
        return Ok(Some(cell));
    }
    if let Some(text) = expected_kernels(&subject.case, &report) {
        cell.outcome = Outcome::Failed(text);
    }
    if mode != Mode::Decomposed {
        let want = baseline(subject)?;
        if let Err(text) = same_bits(&format!("{} against no passes", mode.name()), &got, &want)? {
            cell.outcome = Outcome::Failed(text);
        }
    }
    let hit_expected = match mode {
        Mode::Warm => Some(true),
        Mode::Cold => Some(false),
        _ => None,
    };
    if computed && hit_expected.is_some_and(|want| want != report.cache_hit) {
        cell.outcome = Outcome::Failed(format!("cache hit {}, which is wrong when {}", report.cache_hit, mode.name()));
    }
    Ok(Some(cell))
}

/// A value of the engine's own with these bits: two signs give them back.
fn own(tensor: &Tensor) -> Result<LazyTensor> {
    let value = LazyTensor::from(tensor).neg()?.neg()?;
    materialize(&[&value])?;
    Ok(value)
}

/// An elementwise op on values that were given away writes over the first that has the result's dims and dtype, with the bits of a result
/// beside it.
fn in_place(subject: &mut Subject) -> Result<Option<Cell>> {
    let (case, inputs) = (&subject.case, &subject.inputs);
    if case.op.class() != OpClass::Elementwise || unsupported::candle_runs(case).is_some() {
        return Ok(None);
    }
    let floats = |t: &Tensor| t.dtype().is_float();
    let leaves = inputs.iter().map(|t| if floats(t) { own(t) } else { Ok(LazyTensor::from(t)) });
    let leaves: Vec<LazyTensor> = leaves.collect::<Result<_>>()?;
    let tensor = lazy::record_case(case, &leaves)?;
    let fits = |t: &&Tensor| floats(t) && t.dims() == tensor.dims() && t.dtype() == tensor.dtype();
    let expected = usize::from(!tensor.is_ready() && inputs.iter().any(|t| fits(&t)));
    drop(leaves);
    let (got, report) = evaluate(&tensor, &checked(options(Mode::InPlace)))?;
    let mut cell = subject.verdict("in-place", &got)?;
    cell.kernels.clone_from(&report.kernels);
    let want = baseline(subject)?;
    if let Err(text) = same_bits("in place against no passes", &got, &want)? {
        cell.outcome = Outcome::Failed(text);
    } else if report.in_place != expected {
        cell.outcome = Outcome::Failed(format!("{} results in place, {expected} expected", report.in_place));
    }
    Ok(Some(cell))
}

/// `eval()` has the bits of a plan.
fn eval(subject: &mut Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    let direct = matches!(
        case.op,
        Op::Unary(_)
            | Op::Binary(_)
            | Op::Affine
            | Op::Lora { .. }
            | Op::Softmax { .. }
            | Op::LogSoftmax { .. }
            | Op::RmsNorm { .. }
            | Op::LayerNorm { .. }
            | Op::Glu { .. }
    );
    if !direct || case.infer()?.dtype != DType::F32 {
        return Ok(None);
    }
    let got = record(case, &subject.inputs)?.eval()?;
    let mut cell = subject.verdict("eval", &got)?;
    let want = baseline(subject)?;
    if let Err(text) = same_bits("eval against no passes", &got, &want)? {
        cell.outcome = Outcome::Failed(text);
    }
    Ok(Some(cell))
}

/// A plan made at one set of sizes, bound at another by a guard, equals a plan made there.
fn other_sizes(subject: &Subject) -> Result<Option<Cell>> {
    let Some(other) = subject.case.at_other_sizes() else {
        return Ok(None);
    };
    let here = record(&subject.case, &subject.inputs)?;
    let inputs = other.inputs(subject.seed)?;
    let there = record(&other, &inputs)?;
    if here.is_ready() || there.is_ready() {
        return Ok(None);
    }
    let (want, _) = evaluate(&record(&other, &inputs)?, &checked(options(Mode::Cold)))?;
    evaluate(&here, &options(Mode::AllPasses))?;
    // twice, so that a guard knows the graph
    evaluate(&record(&subject.case, &subject.inputs)?, &options(Mode::AllPasses))?;
    let (got, report) = evaluate(&there, &checked(options(Mode::AllPasses)))?;
    let mut cell = Cell::of(Outcome::Passed);
    cell.kernels.clone_from(&report.kernels);
    if let Err(text) = same_bits(&format!("bound at {}", other.name()), &got, &want)? {
        cell.outcome = Outcome::Failed(text);
    } else if !report.cache_hit {
        cell.outcome = Outcome::Failed(format!("the plan was not found again at other sizes: {}", other.name()));
    } else if let Some(text) = expected_kernels(&other, &report) {
        cell.outcome = Outcome::Failed(text);
    }
    Ok(Some(cell))
}

/// What is computed in f32 and rounded once has the bits of the same op on the same numbers in f32, rounded.
fn rounds_once(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    let half = |d: DType| matches!(d, DType::F16 | DType::BF16);
    let dtype = case.infer()?.dtype;
    let halves = case.inputs.iter().all(|i| half(i.dtype) || !i.dtype.is_float());
    let dense = case.inputs.iter().all(|i| i.layout == Layout::Contiguous);
    let twice = match case.op {
        // the product is rounded before the bias is added; f16 products are the library's own; which kernel sums, and in which
        // order, depends on how the operands lie, and those in f32 are dense
        Op::Linear { bias } => bias || dtype == DType::F16 || !dense,
        Op::Matmul => dtype == DType::F16 || !dense,
        // other bits in another dtype
        Op::Random { .. } => true,
        _ => false,
    };
    if case.op.exactness() != Exactness::Rounds || !half(dtype) || !halves || twice {
        return Ok(None);
    }
    let wide = |t: &Tensor| if half(t.dtype()) { t.to_dtype(DType::F32)?.contiguous() } else { Ok(t.clone()) };
    let inputs = subject.inputs.iter().map(wide).collect::<candle_core::Result<Vec<_>>>()?;
    let (got, report) = evaluate(&record(case, &subject.inputs)?, &checked(options(Mode::AllPasses)))?;
    let (want, _) = evaluate(&record(case, &inputs)?, &checked(options(Mode::AllPasses)))?;
    let mut cell = Cell::of(Outcome::Passed);
    cell.kernels = report.kernels;
    if let Err(text) = same_bits("against f32, rounded once", &got, &want.to_dtype(dtype)?)? {
        cell.outcome = Outcome::Failed(text);
    }
    Ok(Some(cell))
}

/// A plan made with one set of scalars, bound with another by a guard, equals a plan made there.
fn other_scalars(subject: &Subject) -> Result<Option<Cell>> {
    let Some(other) = subject.case.with_other_scalars() else {
        return Ok(None);
    };
    let here = record(&subject.case, &subject.inputs)?;
    let there = record(&other, &subject.inputs)?;
    if here.is_ready() || there.is_ready() {
        return Ok(None);
    }
    let (want, _) = evaluate(&record(&other, &subject.inputs)?, &checked(options(Mode::Cold)))?;
    evaluate(&here, &options(Mode::AllPasses))?;
    // twice, so that a guard knows the graph
    evaluate(&record(&subject.case, &subject.inputs)?, &options(Mode::AllPasses))?;
    let (got, report) = evaluate(&there, &checked(options(Mode::AllPasses)))?;
    let mut cell = Cell::of(Outcome::Passed);
    cell.kernels.clone_from(&report.kernels);
    if let Err(text) = same_bits(&format!("bound with {:?}", other.scalars), &got, &want)? {
        cell.outcome = Outcome::Failed(text);
    } else if let Some(text) = expected_kernels(&other, &report) {
        cell.outcome = Outcome::Failed(text);
    }
    Ok(Some(cell))
}

/// x/2, the op, times two, the sum over the last dim. Halving and doubling are exact, so that only the op and the sum round.
fn chain(subject: &Subject) -> Result<Option<Cell>> {
    let case = &subject.case;
    let dtype = case.infer()?.dtype;
    if !case.inputs.first().is_some_and(|i| i.dtype.is_float()) || case.is_special() {
        return Ok(None);
    }
    // the op's row, reduced; u8 results (comparisons) are summed as f32
    let float = if dtype.is_float() { dtype } else { DType::F32 };
    let last = subject.judged.value.dims.len().checked_sub(1);
    let build = || -> Result<LazyTensor> {
        let mut leaves: Vec<LazyTensor> = subject.inputs.iter().map(LazyTensor::from).collect();
        leaves[0] = leaves[0].affine(0.5, 0.0)?;
        let y = lazy::record_case(case, &leaves)?.to_dtype(float)?.affine(2.0, 0.0)?;
        Ok(match last {
            Some(d) => y.sum_keepdim(d)?,
            None => y,
        })
    };
    let eager = super::contained(|| {
        let mut inputs = subject.inputs.clone();
        inputs[0] = (&inputs[0] * 0.5)?;
        let y = (eager::run_case(case, &inputs)?.to_dtype(float)? * 2.0)?;
        Ok(match last {
            Some(d) => y.sum_keepdim(d)?,
            None => y,
        })
    });
    let (got, report) = evaluate(&build()?, &checked(options(Mode::AllPasses)))?;
    let (want, _) = evaluate(&build()?, &checked(options(Mode::NoPasses)))?;
    let mut cell = Cell::of(Outcome::Passed);
    cell.kernels.clone_from(&report.kernels);
    if let Err(text) = same_bits("a chain against no passes", &got, &want)? {
        cell.outcome = Outcome::Failed(text);
        return Ok(Some(cell));
    }
    if let Some(text) = expected_kernels(case, &report) {
        cell.outcome = Outcome::Failed(text);
        return Ok(Some(cell));
    }
    let judged = chain_reference(subject, float, last)?;
    let eager = match unsupported::without_eager(case) {
        None => Some(eager?),
        Some(_) => None,
    };
    // the op, and the sum of n numbers; equal numbers all round the same way, which a tree of depth log₂ n keeps below that
    let n = last.and_then(|d| subject.judged.value.dims.get(d)).map_or(1.0, |&n| (n.max(1)) as f64);
    cell.judged_by(rounding("a chain", &got, eager.as_ref(), &judged, 2.0 + n.log2())?);
    Ok(Some(cell))
}

/// The chain's reference. Every element of the op may be off by 2 units at its row's scale, so the sum of a row is measured by
/// the sum of those scales.
fn chain_reference(subject: &Subject, dtype: DType, last: Option<usize>) -> Result<Judged> {
    let case = &subject.case;
    let mut arrays = opaque::arrays(case, &subject.inputs)?;
    arrays[0] = arrays[0].map(|x| x * 0.5);
    let mut op = judge(&case.op, &case.held_scalars()?, &arrays.iter().collect::<Vec<_>>(), case.infer()?.dtype)?;
    // a cast rounds (f16 of an f32 value): where it is exact by declaration, take what was really rounded
    if let (Op::Cast(_), Exactness::Exact) = (&case.op, case.op.exactness()) {
        let rounded = eager::run(&case.op, &case.scalars, &[(&subject.inputs[0] * 0.5)?])?.to_dtype(dtype)?;
        op.value = to_arr(&rounded)?;
    }
    let scales = Arr { dims: op.value.dims.clone(), data: op.scales() }.map(|s| 2.0 * s);
    let value = op.value.map(|x| 2.0 * x);
    let Some(d) = last else {
        return Ok(Judged { row: 0, value, magnitude: scales });
    };
    let sum = reference::reduce(Reduction::Sum, &value, 1 << d, true)?;
    let magnitude = reference::reduce(Reduction::Sum, &scales, 1 << d, true)?;
    Ok(Judged { row: d, value: sum.value, magnitude: magnitude.value })
}
