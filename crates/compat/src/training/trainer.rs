//! The training loop.

use super::{cross_entropy_loss, AdamW, AdamWConfig, LRScheduler, LoRAAdapter, LoRAAdapterConfig};
use crate::error::{Error, Result, TrainingError};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::optim::clip_grad_norm;

/// Targets of this value do not count in the loss.
const IGNORED: u32 = u32::MAX;

/// How to train.
#[derive(Debug, Clone)]
pub struct TrainingConfig {
    /// How often the data is gone through. 3 by default.
    pub num_epochs: usize,
    /// The learning rate of each step. Constant 1e-4 by default.
    pub lr_scheduler: LRScheduler,
    /// The optimiser; its own learning rate does not count.
    pub optimizer_config: AdamWConfig,
    /// Gradients are scaled down to this norm, that of all of them together. `None`, 0 and less, and infinity leave them as they are.
    /// 1 by default.
    pub max_grad_norm: Option<f32>,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            num_epochs: 3,
            lr_scheduler: LRScheduler::constant(1e-4),
            optimizer_config: AdamWConfig::default(),
            max_grad_norm: Some(1.0),
        }
    }
}

/// What a step did.
#[derive(Debug, Clone)]
pub struct StepMetrics {
    /// The loss before the update.
    pub loss: f32,
    /// Which step it was, from 1.
    pub step: usize,
    /// The learning rate of the update.
    pub learning_rate: f32,
}

/// Whether a loss may leave the adapter out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// A loss that nothing trainable led to is measured, and changes nothing.
    Optional,
    /// Every loss has to depend on the adapter.
    Required,
}

/// Updates the adapter from the loss of one batch.
fn update(
    adapter: &LoRAAdapter,
    optimizer: &mut AdamW,
    logits: &Tensor,
    targets: &Tensor,
    max_grad_norm: Option<f32>,
    reach: Reach,
) -> Result<f32> {
    let loss = cross_entropy_loss(logits, targets, Some(IGNORED))?;
    let value = loss.to_dtype(DType::F32)?.to_scalar::<f32>()?;
    if reach == Reach::Optional && !loss.track_op() {
        return Ok(value);
    }
    if !value.is_finite() {
        return Err(TrainingError::Failed { reason: format!("the loss is {value}: nothing was updated") }.into());
    }
    let store = loss.backward()?;
    let (mut vars, mut grads) = (Vec::new(), Vec::new());
    for var in adapter.layers().flat_map(|(_, layer)| layer.trainable_variables()) {
        if let Some(grad) = store.get(var) {
            vars.push(var);
            grads.push(grad.clone());
        }
    }
    if vars.is_empty() && reach == Reach::Optional {
        return Ok(value);
    }
    if vars.is_empty() {
        let reason =
            "the loss depends on no variable of the adapter: add what the adapter's forward returns in the model's \
                      forward pass (train_adapter hands the adapter to it)";
        return Err(TrainingError::Gradient { reason: reason.to_string() }.into());
    }
    if let Some(max_norm) = max_grad_norm.filter(|norm| *norm > 0.0 && norm.is_finite()) {
        clip_grad_norm(&mut grads, max_norm.into()).map_err(TrainingError::gradient_refused)?;
    }
    for (var, grad) in vars.into_iter().zip(&grads) {
        optimizer.step_var(var, grad)?;
    }
    Ok(value)
}

/// Trains a LoRA adapter of its own.
pub struct Trainer {
    adapter: LoRAAdapter,
    optimizer: AdamW,
    config: TrainingConfig,
    global_step: usize,
}

impl Trainer {
    /// A trainer with a new adapter, as [`LoRAAdapter::new`] makes it. [`Trainer::lora_adapter_mut`] takes another.
    ///
    /// # Errors
    /// As [`LoRAAdapter::new`] and [`AdamW::new`], and [`TrainingError::InvalidConfig`] for a `max_grad_norm` that is no number. Any
    /// schedule is taken: [`LRScheduler::validate`] says whether it means something.
    pub fn new(
        hidden_size: usize,
        intermediate_size: usize,
        num_layers: usize,
        lora_config: &LoRAAdapterConfig,
        training_config: TrainingConfig,
        device: &Device,
    ) -> Result<Self> {
        if training_config.max_grad_norm.is_some_and(f32::is_nan) {
            return Err(TrainingError::config("max_grad_norm is NaN").into());
        }
        let optimizer = AdamW::new(training_config.optimizer_config)?;
        let adapter = LoRAAdapter::new(hidden_size, intermediate_size, num_layers, lora_config, device)?;
        Ok(Self { adapter, optimizer, config: training_config, global_step: 0 })
    }

    /// Goes `num_epochs` times through pairs of input and targets (batch, seq), one step each: `forward_fn` makes logits
    /// (batch, seq, vocab) of the input, and their cross entropy is reduced. Targets of `u32::MAX` do not count.
    ///
    /// `forward_fn` is not handed the adapter: it has to hold the adapter's variables, as a clone of [`Trainer::lora_adapter`] does.
    /// Logits that depend on no variable of the adapter are measured only. [`Trainer::train_adapter`] hands the adapter over.
    ///
    /// # Errors
    /// What `forward_fn` returns; as [`cross_entropy_loss`]; [`TrainingError::Failed`] for a loss that is not finite;
    /// [`TrainingError::Gradient`] for gradients that are not finite.
    pub fn train<F, E>(&mut self, dataset: &[(Tensor, Tensor)], forward_fn: F) -> Result<Vec<StepMetrics>>
    where
        F: Fn(&Tensor) -> std::result::Result<Tensor, E>,
        E: Into<Error>,
    {
        self.run(dataset, |_, input| forward_fn(input), Reach::Optional)
    }

    /// As [`Trainer::train`] with a `forward_fn` that is handed the adapter. Every loss has to depend on it.
    ///
    /// # Errors
    /// As [`Trainer::train`]; [`TrainingError::Gradient`] wherever logits depend on no variable of the adapter.
    pub fn train_adapter<F, E>(&mut self, dataset: &[(Tensor, Tensor)], forward_fn: F) -> Result<Vec<StepMetrics>>
    where
        F: Fn(&LoRAAdapter, &Tensor) -> std::result::Result<Tensor, E>,
        E: Into<Error>,
    {
        self.run(dataset, forward_fn, Reach::Required)
    }

    fn run<F, E>(&mut self, dataset: &[(Tensor, Tensor)], forward_fn: F, reach: Reach) -> Result<Vec<StepMetrics>>
    where
        F: Fn(&LoRAAdapter, &Tensor) -> std::result::Result<Tensor, E>,
        E: Into<Error>,
    {
        let mut metrics = Vec::new();
        for _ in 0..self.config.num_epochs {
            for (input, targets) in dataset {
                let learning_rate = self.config.lr_scheduler.get_lr(self.global_step);
                self.optimizer.set_lr(learning_rate);
                let logits = forward_fn(&self.adapter, input).map_err(Into::into)?;
                let clip = self.config.max_grad_norm;
                let loss = update(&self.adapter, &mut self.optimizer, &logits, targets, clip, reach)?;
                self.global_step += 1;
                metrics.push(StepMetrics { loss, step: self.global_step, learning_rate });
            }
        }
        Ok(metrics)
    }

    /// The adapter that is trained.
    #[must_use]
    pub const fn lora_adapter(&self) -> &LoRAAdapter {
        &self.adapter
    }

    /// The adapter that is trained, to fill or replace it.
    pub fn lora_adapter_mut(&mut self) -> &mut LoRAAdapter {
        &mut self.adapter
    }

    /// Steps taken.
    #[must_use]
    pub const fn global_step(&self) -> usize {
        self.global_step
    }
}

/// Single steps, for loops of one's own.
#[derive(Debug, Default)]
pub struct TrainingStep {
    step: usize,
}

impl TrainingStep {
    /// No step taken.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One update of `lora_adapter` without clipping: `forward_fn` makes logits (batch, seq, vocab) of `input_ids`, and their cross
    /// entropy against `target_ids` (batch, seq) is reduced. Targets of `u32::MAX` do not count; logits that depend on no variable of
    /// the adapter are measured only.
    ///
    /// # Errors
    /// As [`Trainer::train`]; [`TrainingError::InvalidConfig`] for a learning rate that is not finite or below 0. No step is counted then.
    pub fn execute<F>(
        &mut self,
        input_ids: &Tensor,
        target_ids: &Tensor,
        lora_adapter: &LoRAAdapter,
        optimizer: &mut AdamW,
        learning_rate: f32,
        forward_fn: F,
    ) -> Result<StepMetrics>
    where
        F: Fn(&Tensor) -> Result<Tensor>,
    {
        if !(learning_rate >= 0.0 && learning_rate.is_finite()) {
            let reason = format_args!("the learning rate must be finite and not below 0, got {learning_rate}");
            return Err(TrainingError::config(reason).into());
        }
        optimizer.set_lr(learning_rate);
        let logits = forward_fn(input_ids)?;
        let loss = update(lora_adapter, optimizer, &logits, target_ids, None, Reach::Optional)?;
        self.step += 1;
        Ok(StepMetrics { loss, step: self.step, learning_rate })
    }

    /// Steps taken.
    #[must_use]
    pub const fn step(&self) -> usize {
        self.step
    }

    /// Counts from 0 again.
    pub fn reset(&mut self) {
        self.step = 0;
    }
}
