//! Steps of an optimiser over a tree of parameters.

use super::non_finite::{self, NonFiniteOrigin, NonFinitePart};
use super::rules::{Numbers, Rule};
use super::{clip, LrSchedule};
use crate::error::{Error, Result};
use crate::params::{copied, quoted, Glob, Gradients, Param, Params};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::config::without_pending_budget;
use candle_lazy_exec::{materialize, without_grad, EvalReport, LazyTensor, NodeId};
use std::collections::BTreeMap;

/// What differs for some parameters: the first group whose pattern names a parameter is its group.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamGroup {
    /// The parameters, as [`Params::matching`] reads it.
    pub pattern: String,
    /// What the learning rate is multiplied by.
    pub lr_scale: f64,
    /// λ instead of the rule's.
    pub weight_decay: Option<f64>,
}

impl ParamGroup {
    /// The parameters of a pattern, without anything that differs yet.
    #[must_use]
    pub fn new(pattern: impl Into<String>) -> Self {
        Self { pattern: pattern.into(), lr_scale: 1.0, weight_decay: None }
    }
}

/// What a step does where the gradients' norm or the loss is NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnNonFinite {
    /// It is an error; everything is as before the step.
    #[default]
    Stop,
    /// Everything is as before the step, which does not count; the report says so.
    Skip,
    /// Neither is looked at, which saves the norm where nothing is clipped.
    Apply,
}

/// How an optimiser goes about its steps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OptimizerOptions {
    /// Parameters that differ from the rest.
    pub groups: Vec<ParamGroup>,
    /// The largest norm of all gradients together; larger ones are scaled by max/(norm + 1e-6), as PyTorch's `clip_grad_norm_` does
    /// (Pascanu et al. 2013, arXiv:1211.5063).
    pub clip_norm: Option<f64>,
    /// What happens where a gradient or the loss is not finite.
    pub on_non_finite: OnNonFinite,
    /// The learning rate by the steps taken, instead of the rule's.
    pub schedule: Option<LrSchedule>,
}

/// A parameter and what is kept of it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) param: Param,
    lr_scale: f64,
    weight_decay: f64,
    /// As [`Rule::kept`] names them, in [`compute_dtype`]; none before the first update.
    pub(super) kept: Vec<LazyTensor>,
    /// Updates so far: the t of a bias correction.
    pub(super) updates: u64,
}

/// What a step did.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StepReport {
    /// Steps taken, with this one if it was.
    pub step: u64,
    /// The learning rate, before what groups make of it.
    pub lr: f64,
    /// The norm of all gradients before clipping; `None` where nothing asked for it.
    pub norm: Option<f64>,
    /// What is not finite, where the step was skipped for that.
    pub skipped: Option<NonFinitePart>,
    /// What the engine did.
    pub eval: EvalReport,
}

/// Moves the parameters of a tree that are not frozen.
///
/// A step is recorded: the new values are lazy tensors made of the old ones, what is kept of them and the gradients, and all are
/// evaluated with the gradients as one plan, each parameter and what is kept of it as one elementwise program. The numbers that change
/// from step to step are scalars of nodes, so that the plan is found again. The optimiser holds no handle on an old value while the plan
/// runs, and these programs write over what nobody else holds: in place, unless somebody has a handle on the old value, or something that
/// may fail comes behind ([`OnNonFinite::Apply`] without clipping moves a parameter while other gradients are made). Where a step fails,
/// everything is as it was before.
///
/// It is computed in f32, for parameters of f64 in f64. A parameter of f16 or bf16 is rounded to its dtype after each step, in which small
/// updates are lost: train in f32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_lazy_nn::optim::{Optimizer, OptimizerOptions, Rule, Sgd};
/// use candle_lazy_nn::params::Params;
///
/// # fn main() -> candle_lazy_nn::Result<()> {
/// let mut params = Params::new();
/// let x = params.insert("x", Tensor::new(&[4f32], &Device::Cpu)?)?;
/// let rule = Rule::Sgd(Sgd { lr: 0.25, ..Sgd::default() });
/// let mut optimizer = Optimizer::new(&params, rule, OptimizerOptions::default())?;
/// for _ in 0..2 {
///     let loss = x.value().sqr()?.sum_all()?;
///     // a loss that keeps what it was made of lets a step that fails name where it became a NaN; with `loss.detach()` instead, and `loss`
///     // dropped, the parameters are written in place
///     optimizer.step(params.grad(&loss)?, &[&loss])?;
///     assert!(loss.eval()?.to_scalar::<f32>()? > 0.0);
/// }
/// assert_eq!(x.value().to_vec1::<f32>()?, [1.0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Optimizer {
    pub(super) rule: Rule,
    pub(super) slots: Vec<Slot>,
    pub(super) steps: u64,
    clip_norm: Option<f64>,
    on_non_finite: OnNonFinite,
    schedule: Option<LrSchedule>,
}

/// The dtype that an update is computed and its state kept in.
pub(super) fn compute_dtype(param: &Param) -> DType {
    match param.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

impl Optimizer {
    /// For all parameters of a tree, frozen ones too: they may be unfrozen later. The values of those that are not frozen are copied into
    /// the engine's memory; memory for what is kept of them is taken at the first step.
    ///
    /// # Errors
    /// [`Error::Config`] as [`Rule::validate`] and [`LrSchedule::validate`], and for a norm to clip at, a factor of a rate or a decay that
    /// means nothing; [`Error::Params`] for a tree without parameters and a group whose pattern names none; where a value cannot be computed.
    #[track_caller]
    pub fn new(params: &Params, rule: Rule, options: OptimizerOptions) -> Result<Self> {
        rule.validate()?;
        let OptimizerOptions { groups, clip_norm, on_non_finite, schedule } = options;
        if let Some(schedule) = &schedule {
            schedule.validate()?;
        }
        let refuse = |what: &str, value: f64, wanted: &str| {
            Err(Error::config("the optimizer", format_args!("{what} must be {wanted}, got {value}")))
        };
        if let Some(norm) = clip_norm.filter(|norm| !(*norm > 0.0 && norm.is_finite())) {
            return refuse("the largest norm", norm, "finite and above 0");
        }
        if params.is_empty() {
            return Err(Error::params("there are none to optimize"));
        }
        let mut patterns = Vec::with_capacity(groups.len());
        for group in groups {
            params.matching(&group.pattern)?;
            let not_below_0 = |value: f64| value >= 0.0 && value.is_finite();
            if !not_below_0(group.lr_scale) {
                return refuse("a group's factor of the rate", group.lr_scale, "finite and not below 0");
            }
            if let Some(decay) = group.weight_decay.filter(|decay| !not_below_0(*decay)) {
                return refuse("a group's weight decay", decay, "finite and not below 0");
            }
            patterns.push((Glob::new(&group.pattern)?, group));
        }
        params.copy_into_engine()?;
        let slots = params.iter().map(|param| {
            let group = patterns.iter().find(|(glob, _)| glob.matches(param.name())).map(|(_, group)| group);
            Slot {
                param: param.clone(),
                lr_scale: group.map_or(1.0, |group| group.lr_scale),
                weight_decay: group.and_then(|group| group.weight_decay).unwrap_or(rule.weight_decay()),
                kept: Vec::new(),
                updates: 0,
            }
        });
        Ok(Self { slots: slots.collect(), rule, steps: 0, clip_norm, on_non_finite, schedule })
    }

    /// The rule.
    #[must_use]
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Steps taken.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The learning rate of the next step: the schedule's, or the rule's.
    #[must_use]
    pub fn lr(&self) -> f64 {
        match &self.schedule {
            Some(schedule) => schedule.lr(usize::try_from(self.steps).unwrap_or(usize::MAX)),
            None => self.rule.lr(),
        }
    }

    /// One step. `also` is evaluated with it, as part of the same plan: the loss. Where the first of it is a scalar of floats, it is taken for the loss
    /// of these gradients: where it is not finite, that is as if a gradient were not.
    ///
    /// Handles on gradients that the caller still has are computed and kept; without them the gradients' memory is free as soon as it was
    /// used.
    ///
    /// # Errors
    /// [`Error::Params`] where a parameter that is not frozen has no gradient, or a gradient has no such parameter;
    /// [`Error::NonFiniteStep`] as asked ([`OnNonFinite::Stop`]), which names the first op or leaf with such a number and its line where
    /// `also` has the loss that the gradients are of, not detached; and where the evaluation fails. Parameters and optimiser are as before
    /// the step then.
    #[track_caller]
    pub fn step(&mut self, grads: Gradients, also: &[&LazyTensor]) -> Result<StepReport> {
        self.check(&grads)?;
        self.begin()?;
        let lr = self.lr();
        // all of it is evaluated below, as one plan; and the new values are no functions of the old ones that gradients pass, which may
        // then be written over
        let (unbounded, constant) = (without_pending_budget(), without_grad());
        let loss = non_finite::loss(also);
        let (moves, norm) = self.record(grads, loss, lr)?;
        drop((constant, unbounded));
        let moved: Vec<usize> = moves.iter().map(|change| change.at).collect();
        let eval = self.run(moves, norm.as_ref(), also)?;
        let (norm, broken) = match &norm {
            Some(norm) => norm.values(loss)?,
            None => (None, None),
        };
        match (broken, norm, self.on_non_finite) {
            (Some(what), Some(norm), OnNonFinite::Stop) => {
                let origin = NonFiniteOrigin::of(loss);
                Err(Error::non_finite_step(self.steps, what, norm, origin))
            }
            (Some(what), _, OnNonFinite::Skip) => {
                Ok(StepReport { step: self.steps, lr, norm, skipped: Some(what), eval })
            }
            _ => {
                self.steps += 1;
                for at in moved {
                    if let Some(slot) = self.slots.get_mut(at) {
                        slot.updates += 1;
                    }
                }
                Ok(StepReport { step: self.steps, lr, norm, skipped: None, eval })
            }
        }
    }

    /// What a step changes, and the norm of the gradients if it is asked for.
    #[track_caller]
    fn record(&self, mut grads: Gradients, loss: Option<&LazyTensor>, lr: f64) -> Result<(Vec<Move>, Option<Norm>)> {
        let norm = match self.clip_norm.is_some() || self.on_non_finite != OnNonFinite::Apply {
            true => Some(Norm::record(&grads)?),
            false => None,
        };
        let factor = match (&norm, self.clip_norm) {
            (Some(norm), Some(largest)) => Some(norm.factor(largest)?),
            _ => None,
        };
        let finite = match &norm {
            Some(norm) if self.on_non_finite != OnNonFinite::Apply => Some(norm.is_finite(loss)?),
            _ => None,
        };
        let mut moves = Vec::new();
        for (at, slot) in self.slots.iter().enumerate() {
            if let Some(grad) = grads.remove(slot.param.name()) {
                let (theta, kept) = slot.record(&self.rule, lr, &grad, factor.as_ref(), finite.as_ref())?;
                moves.push(Move { at, theta, kept });
            }
        }
        // what is still held would be computed and kept: gradients, factor and comparison end here
        Ok((moves, norm))
    }

    /// Zeros for what is kept of parameters that make their first step: values of the engine, as later steps find them, so that the
    /// first step's plan is theirs too.
    #[track_caller]
    fn begin(&mut self) -> Result<()> {
        let mut zeros = Vec::new();
        for (at, slot) in self.slots.iter().enumerate() {
            if slot.kept.is_empty() && slot.param.is_trainable() {
                let param = &slot.param;
                let mut kept = Vec::new();
                for _ in self.rule.kept() {
                    // copies of different tensors: recorded zeros of one shape would be one value
                    let zero = Tensor::zeros(param.shape(), compute_dtype(param), param.device())?;
                    kept.push(copied(&zero.into())?);
                }
                zeros.push((at, kept));
            }
        }
        materialize(&zeros.iter().flat_map(|(_, kept)| kept).collect::<Vec<_>>())?;
        for (at, kept) in zeros {
            if let Some(slot) = self.slots.get_mut(at) {
                slot.kept = kept;
            }
        }
        Ok(())
    }

    /// Refuses gradients that are not exactly those of the parameters that are not frozen.
    #[track_caller]
    fn check(&self, grads: &Gradients) -> Result<()> {
        let trainable = || self.slots.iter().map(|slot| &slot.param).filter(|param| param.is_trainable());
        let without: Vec<&str> = trainable().map(Param::name).filter(|name| grads.get(name).is_none()).collect();
        if !without.is_empty() {
            return Err(Error::params(format_args!("{} have no gradient", quoted(without))));
        }
        for (name, grad) in grads.iter() {
            match self.slots.iter().find(|slot| slot.param.name() == name) {
                Some(slot) if slot.param.is_trainable() => slot.param.grad_fits(grad)?,
                Some(_) => return Err(Error::params(format_args!("a gradient for `{name}`, which is frozen"))),
                None => return Err(Error::params(format_args!("a gradient for `{name}`, which is no parameter here"))),
            }
        }
        Ok(())
    }

    /// Evaluates what a step recorded. The parameters have their new values before it runs, so that nobody holds the old ones but the
    /// graph; a failure gives them back.
    fn run(&mut self, moves: Vec<Move>, norm: Option<&Norm>, also: &[&LazyTensor]) -> Result<EvalReport> {
        let mut before = Vec::with_capacity(moves.len());
        for Move { at, theta, kept } in moves {
            if let Some(slot) = self.slots.get_mut(at) {
                let theta = Before::of(slot.param.replace(theta)?);
                let kept = std::mem::replace(&mut slot.kept, kept).into_iter().map(Before::of).collect::<Vec<_>>();
                before.push((at, theta, kept));
            }
        }
        let values: Vec<LazyTensor> = before
            .iter()
            .filter_map(|(at, ..)| self.slots.get(*at))
            .flat_map(|slot| std::iter::once(slot.param.value()).chain(slot.kept.iter().cloned()))
            .collect();
        let mut roots: Vec<&LazyTensor> = values.iter().chain(also.iter().copied()).collect();
        if let Some(norm) = norm {
            roots.push(&norm.all);
        }
        let ran = materialize(&roots);
        if ran.is_err() {
            let ids =
                before.iter().flat_map(|(_, theta, kept)| std::iter::once(theta).chain(kept)).filter_map(Before::id);
            let found = LazyTensor::find(&roots, ids);
            for (at, theta, kept) in before {
                // what somebody has evaluated meanwhile stands, with all that belongs to it
                let kept = kept.into_iter().map(|value| value.back(&found)).collect::<Option<Vec<_>>>();
                if let (Some(slot), Some(theta), Some(kept)) = (self.slots.get_mut(at), theta.back(&found), kept) {
                    slot.param.put_back(theta);
                    slot.kept = kept;
                }
            }
        }
        Ok(ran?)
    }
}

/// What a step recorded of a parameter.
struct Move {
    at: usize,
    theta: LazyTensor,
    kept: Vec<LazyTensor>,
}

/// A value that a step replaces.
enum Before {
    /// The graph holds it, and nobody else need: it may be written in place.
    InGraph(NodeId),
    /// A part of the graph was evaluated early, and nobody else holds it.
    Held(LazyTensor),
}

impl Before {
    fn of(value: LazyTensor) -> Self {
        if value.is_sole() {
            return Self::Held(value);
        }
        Self::InGraph(value.id())
    }

    fn id(&self) -> Option<NodeId> {
        match self {
            Self::InGraph(id) => Some(*id),
            Self::Held(_) => None,
        }
    }

    /// The value, among those that were found in the graph.
    fn back(self, found: &BTreeMap<NodeId, LazyTensor>) -> Option<LazyTensor> {
        match self {
            Self::InGraph(id) => found.get(&id).cloned(),
            Self::Held(value) => Some(value),
        }
    }
}

impl Slot {
    /// The parameter and what is kept of it after this step.
    ///
    /// Handles on what lies between end here: the engine would keep such values.
    #[track_caller]
    fn record(
        &self,
        rule: &Rule,
        lr: f64,
        grad: &LazyTensor,
        factor: Option<&LazyTensor>,
        finite: Option<&LazyTensor>,
    ) -> Result<(LazyTensor, Vec<LazyTensor>)> {
        let dtype = compute_dtype(&self.param);
        let theta = self.param.value().to_dtype(dtype)?;
        let mut g = grad.to_dtype(dtype)?;
        if let Some(factor) = factor {
            g = g.broadcast_mul(&factor.to_dtype(dtype)?)?;
        }
        let numbers = Numbers { lr: lr * self.lr_scale, weight_decay: self.weight_decay, t: self.updates + 1 };
        let (mut new, mut new_kept) = rule.update(&theta, &g, &self.kept, &numbers)?;
        if let Some(finite) = finite {
            new = finite.where_cond(&new, &theta)?;
            for (new, old) in new_kept.iter_mut().zip(&self.kept) {
                *new = finite.where_cond(new, old)?;
            }
        }
        Ok((new.to_dtype(self.param.dtype())?, new_kept))
    }
}

/// The value of what has one element.
pub(crate) fn scalar(value: &LazyTensor) -> Result<f64> {
    let value = value.eval()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(value.reshape(())?.to_scalar::<f64>()?)
}

/// The norm of gradients, recorded.
struct Norm {
    /// Σ g² of each.
    squares: Vec<(String, LazyTensor)>,
    all: LazyTensor,
}

impl Norm {
    #[track_caller]
    fn record(grads: &Gradients) -> Result<Self> {
        let mut squares = Vec::with_capacity(grads.len());
        for (name, grad) in grads.iter() {
            squares.push((name.to_string(), clip::square(grad)?));
        }
        let each: Vec<&LazyTensor> = squares.iter().map(|(_, square)| square).collect();
        let all = match each.as_slice() {
            [] => Tensor::zeros((), DType::F32, &Device::Cpu)?.into(),
            each => LazyTensor::stack(each, 0)?.sum_all()?.sqrt()?,
        };
        Ok(Self { squares, all })
    }

    /// What makes the norm at most `largest`.
    #[track_caller]
    fn factor(&self, largest: f64) -> Result<LazyTensor> {
        Ok(self.all.affine(1.0, clip::EPSILON)?.recip()?.affine(largest, 0.0)?.minimum(1.0)?)
    }

    /// Whether the norm and the loss are finite.
    #[track_caller]
    fn is_finite(&self, loss: Option<&LazyTensor>) -> Result<LazyTensor> {
        let mut all = self.all.clone();
        if let Some(loss) = loss {
            // 0·x is a NaN where x is no number or infinite, and a NaN is not below ∞; not every device has every dtype
            let zero = loss.reshape(())?.affine(0.0, 0.0)?;
            all = all.add(&zero.to_dtype(all.dtype())?.to_device(all.device())?)?;
        }
        Ok(all.lt(f64::INFINITY)?)
    }

    /// The norm, and what is not finite: the first such gradient, or the loss.
    fn values(&self, loss: Option<&LazyTensor>) -> Result<(Option<f64>, Option<NonFinitePart>)> {
        let norm = scalar(&self.all)?;
        if norm.is_finite() {
            if let Some(loss) = loss {
                if !scalar(loss)?.is_finite() {
                    return Ok((Some(norm), Some(NonFinitePart::Loss)));
                }
            }
            return Ok((Some(norm), None));
        }
        for (name, square) in &self.squares {
            if !scalar(square)?.is_finite() {
                return Ok((Some(norm), Some(NonFinitePart::Gradient(name.clone()))));
            }
        }
        // each is finite, their sum is not
        let first = self.squares.first().map_or_else(String::new, |(name, _)| name.clone());
        Ok((Some(norm), Some(NonFinitePart::Gradient(first))))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that fails says so

    use super::*;
    use crate::optim::ParamsAdamW;

    #[test]
    fn a_step_keeps_no_history() {
        let mut params = Params::new();
        let x = params.insert("x", Tensor::new(&[1f32, 2.], &Device::Cpu).unwrap()).unwrap();
        let options = OptimizerOptions { clip_norm: Some(1.0), ..OptimizerOptions::default() };
        let mut optimizer = Optimizer::new(&params, Rule::AdamW(ParamsAdamW::default()), options).unwrap();
        for _ in 0..2 {
            let loss = x.value().sqr().unwrap().sqr().unwrap().sum_all().unwrap();
            let grads = params.grad(&loss).unwrap();
            assert!(loss.is_traced());
            optimizer.step(grads, &[&loss]).unwrap();
            assert!(optimizer.slots.iter().flat_map(|slot| &slot.kept).all(|kept| !kept.is_traced()));
            assert!(x.value().is_variable());
        }
    }
}
