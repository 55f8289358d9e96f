//! Parts of a decoder: rotary embedding, attention, feed-forward block. Each call records one graph and evaluates it; gradients reach
//! the input and, where they are variables, the weights.

use crate::error::{Error, ModelError, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::VarBuilder;
use candle_lazy_nn::{linear, linear_no_bias, CausalSelfAttention, Mlp, Module, Positions, RopeScaling, RopeTable};

/// Cosines and sines for the positions from 0 on (Su et al. 2021, arXiv:2104.09864); a clone shares them.
///
/// Dims i and i + head_dim/2 of a head make a pair ("half-split", as GPT-NeoX and Llama have it), turned at position p by
/// p·theta^(−2i/head_dim). The tables are f32 and converted to the dtype of what is turned.
#[derive(Debug, Clone)]
pub struct RotaryEmbedding {
    table: RopeTable,
}

impl RotaryEmbedding {
    /// The tables of `max_seq_len` positions.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] where `head_dim` is odd or 0, or there is no memory.
    pub fn new(head_dim: usize, max_seq_len: usize, theta: f64, device: &Device) -> Result<Self> {
        let table = RopeTable::new(head_dim, theta as f32, &RopeScaling::None, max_seq_len, DType::F32, device);
        Ok(Self { table: table.map_err(config_error)? })
    }

    /// `x` (batch, seq_len, heads, head_dim) with each position turned by its angle, the first by that of position 0.
    ///
    /// # Errors
    /// Where `x` has another shape, or the tables end before `seq_len`.
    #[track_caller]
    pub fn apply_rotary_emb(&self, x: &Tensor, seq_len: usize) -> Result<Tensor> {
        let xs = LazyTensor::from(x);
        let (_, positions, _, _) = xs.dims4()?;
        if positions != seq_len {
            let (expected, actual) = (vec![seq_len], x.dims().to_vec());
            return Err(ModelError::ShapeMismatch { expected, actual }.into());
        }
        let at = self.positions(0, seq_len, x.dtype())?;
        let turned = xs.transpose(1, 2)?.rope(&at.cos, &at.sin)?.transpose(1, 2)?;
        Ok(turned.contiguous()?.eval()?)
    }

    /// The rows of `len` positions from `start` on.
    #[track_caller]
    pub(crate) fn positions(&self, start: usize, len: usize, dtype: DType) -> Result<Positions> {
        let (cos, sin) = self.table.slice(start, len)?;
        Ok(Positions { cos: cos.to_dtype(dtype)?, sin: sin.to_dtype(dtype)? })
    }

    /// Number of positions.
    pub(crate) fn max_seq_len(&self) -> usize {
        self.table.positions()
    }
}

/// Sizes that make no model.
fn config_error(error: candle_lazy_nn::Error) -> Error {
    match error {
        candle_lazy_nn::Error::Config { message, .. } => ModelError::InvalidConfig { reason: message }.into(),
        other => other.into(),
    }
}

/// The mask as a leaf, in the dtype of what it is added to.
#[track_caller]
pub(crate) fn additive(mask: Option<&Tensor>, dtype: DType) -> Result<Option<LazyTensor>> {
    match mask {
        Some(mask) => Ok(Some(LazyTensor::from(mask).to_dtype(dtype)?)),
        None => Ok(None),
    }
}

/// Self-attention with rotary positions and grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245).
#[derive(Debug)]
pub struct Attention {
    projections: CausalSelfAttention,
    rope: RotaryEmbedding,
    head_dim: usize,
}

impl Attention {
    /// From `q_proj`, `k_proj` and `v_proj` (weight and bias) and `o_proj` (weight) of the builder. `None` key/value heads: as many as
    /// query heads.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] where the heads do not divide `hidden_size`, the key/value heads the heads, or a head's width is
    /// odd; Candle's error where a tensor is missing or has another shape.
    #[track_caller]
    pub fn new(
        hidden_size: usize,
        num_heads: usize,
        num_kv_heads: Option<usize>,
        max_seq_len: usize,
        rope_theta: f64,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let kv_heads = num_kv_heads.unwrap_or(num_heads);
        let divides = num_heads > 0
            && kv_heads > 0
            && hidden_size.is_multiple_of(num_heads)
            && num_heads.is_multiple_of(kv_heads);
        if !divides {
            let reason = format!(
                "{num_heads} heads over {kv_heads} key/value heads do not divide a hidden size of {hidden_size}"
            );
            return Err(ModelError::InvalidConfig { reason }.into());
        }
        let head_dim = hidden_size / num_heads;
        let rope = RotaryEmbedding::new(head_dim, max_seq_len, rope_theta, vb.device())?;
        let kv_width = kv_heads * head_dim;
        let projections = CausalSelfAttention::new(
            linear(hidden_size, hidden_size, vb.pp("q_proj"))?,
            linear(hidden_size, kv_width, vb.pp("k_proj"))?,
            linear(hidden_size, kv_width, vb.pp("v_proj"))?,
            linear_no_bias(hidden_size, hidden_size, vb.pp("o_proj"))?,
            num_heads,
            kv_heads,
        )?;
        Ok(Self { projections, rope, head_dim })
    }

    /// Width of a head.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// softmax(q·kᵀ/√head_dim + mask)·v through the output projection: `x` (batch, s, hidden) gives (batch, s, hidden).
    ///
    /// The mask is added to the scores, (batch, heads, s, s) by broadcasting. Without one every position sees every other: `None` is
    /// not causal.
    ///
    /// # Errors
    /// Where `x` or the mask have another shape, or there are more positions than the tables have.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        let xs = LazyTensor::from(x);
        let (_, s, _) = xs.dims3()?;
        let at = self.rope.positions(0, s, x.dtype())?;
        let mask = additive(attention_mask, x.dtype())?;
        Ok(self.projections.forward_masked(&xs, &at, mask.as_ref())?.eval()?)
    }
}

/// The feed-forward block down(silu(gate(x))·up(x)) (SwiGLU, Shazeer 2020, arXiv:2002.05202).
#[derive(Debug)]
pub struct MLP {
    inner: Mlp,
}

impl MLP {
    /// From the weights `gate_proj`, `up_proj` and `down_proj` of the builder.
    ///
    /// # Errors
    /// Candle's error where a tensor is missing or has another shape.
    #[track_caller]
    pub fn new(hidden_size: usize, intermediate_size: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self { inner: Mlp::load(hidden_size, intermediate_size, false, vb.clone())? })
    }

    /// The block applied to `x` (…, hidden): (…, hidden).
    ///
    /// # Errors
    /// Where `x` has another width or dtype.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.inner.forward(&LazyTensor::from(x))?.eval()?)
    }
}
