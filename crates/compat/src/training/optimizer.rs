//! AdamW.

use crate::error::{Result, TrainingError};
use candle_core::{Tensor, TensorId, Var};
use candle_lazy_nn::optim::{validate_adamw, Moments, ParamsAdamW};
use std::collections::HashMap;

/// The numbers of [`AdamW`].
#[derive(Debug, Clone, Copy)]
pub struct AdamWConfig {
    /// Above 0. 1e-4 by default.
    pub learning_rate: f32,
    /// How much of the mean of gradients stays, 0 ≤ β < 1. 0.9 by default.
    pub beta1: f32,
    /// How much of the mean of their squares stays, 0 ≤ β < 1. 0.999 by default.
    pub beta2: f32,
    /// Added to the root that is divided by; above 0. 1e-8 by default.
    pub epsilon: f32,
    /// λ of the decay, not below 0. 0.01 by default.
    pub weight_decay: f32,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamWConfig {
    /// Whether the numbers mean something.
    ///
    /// # Errors
    /// [`TrainingError::InvalidConfig`] for one that is not in the range that is named at it.
    pub fn validate(&self) -> Result<()> {
        if self.learning_rate == 0.0 {
            return Err(TrainingError::config("AdamW: the learning rate must be greater than 0").into());
        }
        validate_adamw(&self.params()).map_err(TrainingError::refused)
    }

    fn params(&self) -> ParamsAdamW {
        ParamsAdamW {
            lr: self.learning_rate.into(),
            beta1: self.beta1.into(),
            beta2: self.beta2.into(),
            eps: self.epsilon.into(),
            weight_decay: self.weight_decay.into(),
        }
    }
}

/// Adam with decoupled weight decay: θ ← θ − lr·m̂/(√v̂ + ε) − lr·λ·θ, with bias-corrected means of the gradient (m̂) and its square (v̂).
///
/// A parameter is a variable or has a name. Each has means in f32 and counts its own steps for the bias correction.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    named: HashMap<String, Moments>,
    variables: HashMap<TensorId, Moments>,
    step_count: usize,
}

impl AdamW {
    /// An optimiser without state.
    ///
    /// # Errors
    /// As [`AdamWConfig::validate`].
    pub fn new(config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        let (named, variables) = (HashMap::new(), HashMap::new());
        Ok(Self { config, named, variables, step_count: 0 })
    }

    /// Starts the state of a parameter for [`AdamW::step`]; one that has this name starts anew.
    ///
    /// # Errors
    /// None here.
    pub fn add_parameter(&mut self, name: impl Into<String>, param: &Tensor) -> Result<()> {
        self.named.insert(name.into(), Moments::new(param.shape(), param.device()));
        Ok(())
    }

    /// The new value of a parameter.
    ///
    /// # Errors
    /// [`TrainingError::StateError`] for a name that was not added, [`TrainingError::Gradient`] where parameter, gradient and state do
    /// not fit, [`TrainingError::InvalidConfig`] for a learning rate that [`AdamW::set_lr`] was given and that is not finite or below 0.
    #[track_caller]
    pub fn step(&mut self, name: &str, param: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let params = self.config.params();
        let Some(moments) = self.named.get_mut(name) else {
            return Err(TrainingError::state(format_args!("parameter '{name}' not found: it was not added")).into());
        };
        let value = moments.adamw(param, grad, &params).map_err(TrainingError::gradient_refused)?;
        self.step_count += 1;
        Ok(value)
    }

    /// Sets a variable to its new value. Its state belongs to the variable, wherever that is moved or cloned to.
    ///
    /// # Errors
    /// As [`AdamW::step`].
    #[track_caller]
    pub fn step_var(&mut self, var: &Var, grad: &Tensor) -> Result<()> {
        let params = self.config.params();
        let new = || Moments::new(var.shape(), var.device());
        let moments = self.variables.entry(var.as_tensor().id()).or_insert_with(new);
        let value = moments.adamw(var, grad, &params).map_err(TrainingError::gradient_refused)?;
        var.set(&value)?;
        self.step_count += 1;
        Ok(())
    }

    /// Sets the learning rate of the steps that follow. 0 is allowed: means are updated, parameters stay.
    pub fn set_lr(&mut self, learning_rate: f32) {
        self.config.learning_rate = learning_rate;
    }

    /// The learning rate.
    #[must_use]
    pub const fn learning_rate(&self) -> f32 {
        self.config.learning_rate
    }

    /// Updates of single parameters since the start or [`AdamW::reset_state`].
    #[must_use]
    pub const fn step_count(&self) -> usize {
        self.step_count
    }

    /// The numbers.
    #[must_use]
    pub const fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// Starts all state anew. Names stay known.
    pub fn reset_state(&mut self) {
        self.variables.clear();
        for moments in self.named.values_mut() {
            moments.reset();
        }
        self.step_count = 0;
    }
}
