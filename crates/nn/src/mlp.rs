//! The two feed-forward blocks of transformers.

use crate::activation::Activation;
use crate::error::Result;
use crate::linear::{linear_b, Linear};
use crate::lora::{AdaptedRows, LoraLinear};
use crate::module::Module;
use crate::scope;
use candle_lazy_exec::LazyTensor;
use candle_nn::VarBuilder;
use std::sync::Arc;

/// SwiGLU: `down(silu(gate(x)) · up(x))` (Shazeer 2020, arXiv:2002.05202), the block of Llama, Mistral and Qwen2.
#[derive(Debug, Clone)]
pub struct Mlp {
    gate: LoraLinear,
    up: LoraLinear,
    down: LoraLinear,
    path: Arc<str>,
}

impl Mlp {
    /// From its three maps: `gate` and `up` (ffn, hidden), `down` (hidden, ffn).
    #[track_caller]
    pub fn new(gate: Linear, up: Linear, down: Linear) -> Self {
        Self { gate: gate.into(), up: up.into(), down: down.into(), path: "".into() }
    }

    /// From `gate_proj`, `up_proj` and `down_proj` of the builder.
    ///
    /// # Errors
    /// Where a tensor is missing or has another shape.
    #[track_caller]
    pub fn load(hidden: usize, ffn: usize, bias: bool, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            gate: linear_b(hidden, ffn, bias, vb.pp("gate_proj"))?.into(),
            up: linear_b(hidden, ffn, bias, vb.pp("up_proj"))?.into(),
            down: linear_b(ffn, hidden, bias, vb.pp("down_proj"))?.into(),
            path: vb.prefix().into(),
        })
    }

    /// The same module on the same memory, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a weight that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        let (gate, up, down) = (self.gate.detached()?, self.up.detached()?, self.down.detached()?);
        Ok(Self { gate, up, down, path: Arc::clone(&self.path) })
    }

    /// The map called `name` in checkpoints (`gate_proj`, `up_proj`, `down_proj`).
    pub fn projection_mut(&mut self, name: &str) -> Option<&mut LoraLinear> {
        match name {
            "gate_proj" => Some(&mut self.gate),
            "up_proj" => Some(&mut self.up),
            "down_proj" => Some(&mut self.down),
            _ => None,
        }
    }

    /// The maps in the order `gate_proj`, `up_proj`, `down_proj`.
    pub(crate) fn projections(&self) -> [&LoraLinear; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// The block of rows `xs` (1, rows, hidden) whose stretches have adapters of their own, by map.
    #[track_caller]
    pub(crate) fn forward_packed(&self, xs: &LazyTensor, adapters: [&[AdaptedRows<'_>]; 3]) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let [of_gate, of_up, of_down] = adapters;
        let gate = self.gate.forward_packed(xs, of_gate)?;
        let up = self.up.forward_packed(xs, of_up)?;
        self.down.forward_packed(&gate.silu_mul(&up)?, of_down)
    }
}

impl Module for Mlp {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let gate = self.gate.forward(xs)?;
        let up = self.up.forward(xs)?;
        self.down.forward(&gate.silu_mul(&up)?)
    }
}

/// `down(activation(up(x)))`, the block of BERT and of the first transformers.
#[derive(Debug, Clone)]
pub struct FeedForward {
    up: Linear,
    activation: Activation,
    down: Linear,
}

impl FeedForward {
    /// From its two maps: `up` (ffn, hidden), `down` (hidden, ffn).
    #[track_caller]
    pub fn new(up: Linear, activation: Activation, down: Linear) -> Self {
        Self { up, activation, down }
    }
}

impl Module for FeedForward {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        let hidden = self.activation.forward(&self.up.forward(xs)?)?;
        self.down.forward(&hidden)
    }
}
