//! What the models take from candle-transformers' `models::with_tracing`, over the lazy layers; spans are left out.

use candle_lazy::candle::{Module, Result, Tensor};
use candle_lazy::candle_nn::{self, VarBuilder};

pub use candle_lazy::candle_nn::{layer_norm, LayerNorm};

#[derive(Debug, Clone)]
pub struct Linear(candle_nn::Linear);

impl Linear {
    pub fn from_weights(weights: Tensor, bias: Option<Tensor>) -> Self {
        Self(candle_nn::Linear::new(weights, bias))
    }
}

impl Module for Linear {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}

pub fn linear(d1: usize, d2: usize, vb: VarBuilder) -> Result<Linear> {
    candle_nn::linear(d1, d2, vb).map(Linear)
}

pub fn linear_no_bias(d1: usize, d2: usize, vb: VarBuilder) -> Result<Linear> {
    candle_nn::linear_no_bias(d1, d2, vb).map(Linear)
}

#[derive(Debug, Clone)]
pub struct RmsNorm(candle_nn::RmsNorm);

impl RmsNorm {
    pub fn new(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        candle_nn::rms_norm(size, eps, vb).map(Self)
    }
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}
