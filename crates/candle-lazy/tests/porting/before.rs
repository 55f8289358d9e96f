//! The module of docs/porting.md as it is written for Candle.

use candle_core::{IndexOp, Module, Result, Tensor, D};
use candle_nn::{Linear, RmsNorm, VarBuilder};

/// A gated block whose output is the last position's.
pub struct Gate {
    norm: RmsNorm,
    gate: Linear,
    up: Linear,
}

impl Gate {
    pub fn new(width: usize, hidden: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            norm: candle_nn::rms_norm(width, 1e-5, vb.pp("norm"))?,
            gate: candle_nn::linear_no_bias(width, hidden, vb.pp("gate"))?,
            up: candle_nn::linear(width, hidden, vb.pp("up"))?,
        })
    }
}

impl Module for Gate {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (_batch, len, _width) = xs.dims3()?;
        if len == 0 {
            candle_core::bail!("no positions in {:?}", xs.shape())
        }
        let xs = xs.apply(&self.norm)?;
        let ys = (candle_nn::ops::silu(&xs.apply(&self.gate)?)? * xs.apply(&self.up)?)?;
        candle_nn::ops::softmax(&(ys / 2.0)?, D::Minus1)?.i((.., len - 1, ..))
    }
}
