//! One low-rank layer (Hu et al. 2021, arXiv:2106.09685): (x·A)·B·(alpha/rank).

use crate::eager;
use crate::error::{Result, TrainingError};
#[cfg(feature = "graph")]
use crate::graph::LazyTensor;
use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

/// The numbers of a low-rank layer.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct LoRAConfig {
    /// The inner size, at least 1. 8 by default.
    pub rank: usize,
    /// The result is multiplied by `alpha / rank`; above 0. 16 by default.
    pub alpha: f32,
    /// The probability that an element of x·A is dropped in training, 0 ≤ `dropout` < 1. 0 by default.
    pub dropout: f32,
}

impl Default for LoRAConfig {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, dropout: 0.0 }
    }
}

impl LoRAConfig {
    /// `alpha / rank`.
    #[must_use]
    pub fn scaling(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Whether the numbers mean something.
    ///
    /// # Errors
    /// [`TrainingError::InvalidConfig`] for a rank of 0, an alpha that is not finite and above 0, a dropout outside of
    /// 0 ≤ `dropout` < 1.
    pub fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(TrainingError::config("LoRA rank must be greater than 0").into());
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            let alpha = self.alpha;
            return Err(TrainingError::config(format_args!("LoRA alpha must be greater than 0, got {alpha}")).into());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let dropout = self.dropout;
            return Err(TrainingError::config(format_args!("LoRA dropout must be in [0, 1), got {dropout}")).into());
        }
        Ok(())
    }
}

/// A low-rank layer: what it returns is to be added to the result of the weight that it adapts.
///
/// A (in, rank) and B (rank, out) are f32 variables. B is not pre-scaled. A new layer is in training mode.
#[derive(Debug)]
pub struct LoRALayer {
    lora_a: Var,
    lora_b: Var,
    config: LoRAConfig,
    in_features: usize,
    out_features: usize,
    training: bool,
}

impl LoRALayer {
    /// A layer whose A is normal with a standard deviation of 1/√rank and whose B is zero: it returns zeros until it is trained.
    ///
    /// # Errors
    /// [`TrainingError::InvalidConfig`] for what [`LoRAConfig::validate`] refuses, and a rank above either width.
    pub fn new(in_features: usize, out_features: usize, config: &LoRAConfig, device: &Device) -> Result<Self> {
        config.validate()?;
        let rank = config.rank;
        if rank > in_features.min(out_features) {
            let reason = format_args!(
                "LoRA rank {rank} exceeds the smaller of in_features {in_features} and out_features {out_features}"
            );
            return Err(TrainingError::config(reason).into());
        }
        let lora_a = Var::randn(0f32, 1.0 / (rank as f32).sqrt(), (in_features, rank), device)?;
        let lora_b = Var::zeros((rank, out_features), DType::F32, device)?;
        Ok(Self { lora_a, lora_b, config: *config, in_features, out_features, training: true })
    }

    /// Another layer on the same two variables.
    pub(crate) fn sharing_variables(&self) -> Self {
        Self { lora_a: self.lora_a.clone(), lora_b: self.lora_b.clone(), ..*self }
    }

    /// (x·A)·B·scaling for x (…, in) of f32: (…, out). x, A and B get their gradients.
    ///
    /// In training mode x·A goes through dropout, where the config has one.
    ///
    /// # Errors
    /// For an input of another width, dtype or device.
    #[track_caller]
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.lora_a.as_tensor(), self.lora_b.as_tensor());
        let dropout = self.config.dropout;
        if self.training && dropout > 0.0 {
            return Ok(eager::lora_with_dropout(input, a, b, self.config.scaling(), dropout)?);
        }
        Ok(eager::lora(input, a, b, self.config.scaling())?)
    }

    /// The same without dropout, recorded in the input's graph, of which A and B become inputs.
    ///
    /// # Errors
    /// As [`LoRALayer::forward`].
    #[cfg(feature = "graph")]
    #[track_caller]
    pub fn forward_lazy(&self, input: &LazyTensor) -> Result<LazyTensor> {
        // in graphs of their own: they are copied into the input's once the shapes are known to fit
        let a = LazyTensor::from_tensor(self.lora_a.as_tensor().clone())?;
        let b = LazyTensor::from_tensor(self.lora_b.as_tensor().clone())?;
        let scaling = self.config.scaling();
        #[cfg(feature = "custom-metal")]
        return Ok(input.lora_fused(&a, &b, scaling)?);
        #[cfg(not(feature = "custom-metal"))]
        return Ok(input.matmul(&a)?.matmul(&b)?.mul_scalar(scaling)?);
    }

    /// rank·(in + out).
    #[must_use]
    pub const fn num_parameters(&self) -> usize {
        self.config.rank * (self.in_features + self.out_features)
    }

    /// Switches dropout on or off.
    pub fn set_training(&mut self, training: bool) {
        self.training = training;
    }

    /// Switches dropout off.
    pub fn eval(&mut self) {
        self.training = false;
    }

    /// Whether dropout acts; true in a new layer.
    #[must_use]
    pub const fn is_training(&self) -> bool {
        self.training
    }

    /// A, (in, rank).
    #[must_use]
    pub const fn lora_a(&self) -> &Var {
        &self.lora_a
    }

    /// B, (rank, out).
    #[must_use]
    pub const fn lora_b(&self) -> &Var {
        &self.lora_b
    }

    /// A, (in, rank).
    #[must_use]
    pub fn lora_a_tensor(&self) -> &Tensor {
        self.lora_a.as_tensor()
    }

    /// B, (rank, out).
    #[must_use]
    pub fn lora_b_tensor(&self) -> &Tensor {
        self.lora_b.as_tensor()
    }

    /// A and B.
    #[must_use]
    pub fn trainable_variables(&self) -> Vec<&Var> {
        vec![&self.lora_a, &self.lora_b]
    }

    /// The numbers that the layer was made with.
    #[must_use]
    pub const fn config(&self) -> &LoRAConfig {
        &self.config
    }

    /// The width of the input.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }

    /// The width of the result.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.out_features
    }
}
