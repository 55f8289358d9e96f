//! Trainable adapters on the linear maps of a decoder.

use super::{compute_dtype, LoraConfig, LoraWeights, StepKey};
use crate::error::{Error, Result};
use crate::models::CausalLm;
use crate::params::{quoted, Params};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::{eval_all, LazyTensor, RandomKey};
use std::sync::Arc;

/// A linear map that gets an adapter.
pub(super) struct Target {
    pub(super) path: String,
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) dtype: DType,
    pub(super) device: Device,
}

impl Target {
    /// The names and shapes that PEFT gives the factors: (r, in) and (out, r).
    pub(super) fn factors(&self, rank: usize) -> [(String, (usize, usize)); 2] {
        let name = |factor: &str| format!("base_model.model.{}.{factor}.weight", self.path);
        [(name("lora_A"), (rank, self.input)), (name("lora_B"), (self.output, rank))]
    }
}

/// A trainable adapter on a model: its parameters, under PEFT's names and in PEFT's shapes, and whether dropout acts.
///
/// The model reads the parameters whenever it records: what is recorded after an optimiser's step has the new values. Clones of the model
/// have the same adapter.
#[derive(Debug)]
pub struct LoraAdapter {
    pub(super) params: Params,
    pub(super) config: LoraConfig,
    pub(super) paths: Vec<String>,
    step: StepKey,
}

impl LoraAdapter {
    /// Puts a new adapter on the maps that the config names, in the place of any that the model has. It adds zeros until it is trained:
    /// A (r, in) is uniform over ±1/√in, which is Kaiming's rule with a = √5 as PEFT has it, and B (out, r) is zero. On a model of f16 or
    /// bf16 the adapter is of f32, else of the model's dtype. The same seed gives the same numbers.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`], and [`Error::Config`] where the targets match no map of the model.
    #[track_caller]
    pub fn attach(model: &mut CausalLm, config: &LoraConfig, seed: u64) -> Result<Self> {
        let targets = targets(model, config)?;
        let mut factors = Vec::with_capacity(targets.len());
        for (target, key) in targets.iter().zip(RandomKey::new(seed).split(targets.len())) {
            let bound = 1.0 / (target.input.max(1) as f64).sqrt();
            let [(_, a), _] = target.factors(config.rank);
            factors.push(LazyTensor::rand(key, -bound, bound, a, target.dtype, &target.device)?);
        }
        let factors = eval_all(&factors.iter().collect::<Vec<_>>())?;
        let mut tensors = Vec::with_capacity(targets.len());
        for (target, a) in targets.iter().zip(factors) {
            let [_, (_, b)] = target.factors(config.rank);
            tensors.push([a, Tensor::zeros(b, target.dtype, &target.device)?]);
        }
        Self::with_factors(model, config, &targets, tensors)
    }

    /// Puts these factors on the model.
    #[track_caller]
    pub(super) fn with_factors(
        model: &mut CausalLm,
        config: &LoraConfig,
        targets: &[Target],
        factors: Vec<[Tensor; 2]>,
    ) -> Result<Self> {
        let (mut params, step) = (Params::new(), StepKey::default());
        let mut adapters = Vec::with_capacity(targets.len());
        for ((map, target), [a, b]) in (0u64..).zip(targets).zip(factors) {
            let [(a_name, _), (b_name, _)] = target.factors(config.rank);
            let (a, b) = (params.insert(a_name, a)?, params.insert(b_name, b)?);
            let weights = LoraWeights::from_params(&a, &b, config.scale())?;
            adapters.push(weights.with_step_dropout(config.dropout, Arc::clone(&step), map));
        }
        model.clear_lora()?;
        for (target, adapter) in targets.iter().zip(adapters) {
            model.set_lora(&target.path, Some(adapter))?;
        }
        let paths = targets.iter().map(|target| target.path.clone()).collect();
        Ok(Self { params, config: config.clone(), paths, step })
    }

    /// The factors on a model of the sizes that this one was made for, in the place of any that it has: the same parameters, so an
    /// optimiser's step shows on both.
    ///
    /// # Errors
    /// [`Error::Module`] where the model has no such maps, or of other widths; it then has what it had.
    #[track_caller]
    pub fn put_on(&self, model: &mut CausalLm) -> Result<()> {
        let mut adapted = model.clone();
        adapted.clear_lora()?;
        for (map, path) in (0u64..).zip(&self.paths) {
            let factor = |name: &str| self.params.get(&format!("base_model.model.{path}.{name}.weight"));
            let (Some(a), Some(b)) = (factor("lora_A"), factor("lora_B")) else {
                return Err(Error::module("lora", path, "the adapter has no factors for it"));
            };
            let weights = LoraWeights::from_params(a, b, self.config.scale())?;
            let weights = weights.with_step_dropout(self.config.dropout, Arc::clone(&self.step), map);
            adapted.set_lora(path, Some(weights))?;
        }
        *model = adapted;
        Ok(())
    }

    /// The factors: `base_model.model.<path>.lora_A.weight` (r, in) and `….lora_B.weight` (out, r).
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// What it was made with.
    #[must_use]
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The paths of the adapted maps, in the model's order.
    #[must_use]
    pub fn paths(&self) -> &[String] {
        &self.paths
    }

    /// From now on, elements of the maps' inputs are dropped as the config says, by this key: each step needs its own
    /// (`key.fold_in(step)`). Each map drops others. A key is a leaf: another one makes no new plan.
    pub fn train(&self, key: RandomKey) {
        *self.step.lock() = Some(key);
    }

    /// From now on nothing is dropped; so in a new adapter.
    pub fn eval(&self) {
        *self.step.lock() = None;
    }
}

/// The maps that a config names, in the model's order.
#[track_caller]
pub(super) fn targets(model: &mut CausalLm, config: &LoraConfig) -> Result<Vec<Target>> {
    config.validate()?;
    let matcher = config.targets.matcher()?;
    let (paths, device) = (model.projection_paths(), model.device().clone());
    let mut targets = Vec::new();
    for path in paths.iter().filter(|path| matcher.matches(path)) {
        if let Some(projection) = model.projection_mut(path) {
            let base = projection.base();
            targets.push(Target {
                path: path.clone(),
                input: base.in_features(),
                output: base.out_features(),
                dtype: compute_dtype(base.weight().dtype()),
                device: device.clone(),
            });
        }
    }
    if targets.is_empty() {
        let (wanted, has) = (&config.targets, quoted(&paths));
        return Err(Error::config(
            "the adapter",
            format_args!("{wanted} match no linear map of the model, which has {has}"),
        ));
    }
    Ok(targets)
}

impl std::fmt::Display for super::LoraTargets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AllLinear => f.write_str("all linear maps"),
            Self::Names(names) => write!(f, "the targets {}", quoted(names)),
            Self::Pattern(pattern) => write!(f, "targets by the pattern `{pattern}`"),
        }
    }
}
