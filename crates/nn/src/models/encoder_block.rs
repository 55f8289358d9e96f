//! The block that BERT and MPNet have in common: attention, then a feed-forward block, each added to its input and normalised.

use super::encoder;
use crate::activation::Activation;
use crate::error::Result;
use crate::linear::{linear, Linear};
use crate::mlp::FeedForward;
use crate::module::Module;
use crate::norm::{layer_norm, LayerNorm};
use crate::scope;
use candle_lazy_exec::{AttentionOptions, LazyTensor};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// Sizes and constants of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockSizes {
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) heads: usize,
    pub(super) eps: f64,
    pub(super) activation: Activation,
}

/// What a kind of encoder calls the parts of attention, below the block; the rest has the same names in both.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionNames {
    pub(super) query: &'static str,
    pub(super) key: &'static str,
    pub(super) value: &'static str,
    pub(super) out: &'static str,
    pub(super) norm: &'static str,
}

/// One block.
#[derive(Debug, Clone)]
pub(super) struct EncoderBlock {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_out: Linear,
    attention_norm: LayerNorm,
    feed_forward: FeedForward,
    norm: LayerNorm,
    heads: usize,
    path: Arc<str>,
}

impl EncoderBlock {
    /// So many blocks from `stack`, which must not have more.
    #[track_caller]
    pub(super) fn load_all(
        stack: &VarBuilder<'_>,
        count: usize,
        sizes: BlockSizes,
        names: &AttentionNames,
    ) -> Result<Vec<Self>> {
        let mut blocks = Vec::new();
        for index in 0..count {
            blocks.push(Self::load(sizes, names, &stack.pp(index))?);
        }
        encoder::check_layers(stack, count)?;
        Ok(blocks)
    }

    #[track_caller]
    fn load(sizes: BlockSizes, names: &AttentionNames, vb: &VarBuilder<'_>) -> Result<Self> {
        let BlockSizes { hidden, ffn, heads, eps, activation } = sizes;
        let up = linear(hidden, ffn, vb.pp("intermediate").pp("dense"))?;
        let down = linear(ffn, hidden, vb.pp("output").pp("dense"))?;
        Ok(Self {
            query: linear(hidden, hidden, vb.pp(names.query))?,
            key: linear(hidden, hidden, vb.pp(names.key))?,
            value: linear(hidden, hidden, vb.pp(names.value))?,
            attention_out: linear(hidden, hidden, vb.pp(names.out))?,
            attention_norm: layer_norm(hidden, eps, vb.pp(names.norm))?,
            feed_forward: FeedForward::new(up, activation, down),
            norm: layer_norm(hidden, eps, vb.pp("output").pp("LayerNorm"))?,
            heads,
            path: vb.prefix().into(),
        })
    }

    /// `bias` is added to the scores, broadcast to (batch, heads, s, s).
    #[track_caller]
    pub(super) fn forward(&self, xs: &LazyTensor, bias: Option<&LazyTensor>) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let (b, s, hidden) = xs.dims3()?;
        let head_dim = hidden.checked_div(self.heads).unwrap_or(hidden);
        let split = (b, s, self.heads, head_dim);
        let q = self.query.forward(xs)?.reshape(split)?.transpose(1, 2)?;
        let k = self.key.forward(xs)?.reshape(split)?.transpose(1, 2)?;
        let v = self.value.forward(xs)?.reshape(split)?.transpose(1, 2)?;
        let options =
            AttentionOptions { scale: 1. / (head_dim as f64).sqrt(), causal: false, softcap: None, window: None };
        let y = LazyTensor::attention(&q, &k, &v, bias, &options)?;
        let y = y.transpose(1, 2)?.reshape((b, s, hidden))?;
        let xs = self.attention_norm.forward(&self.attention_out.forward(&y)?.add(xs)?)?;
        self.norm.forward(&self.feed_forward.forward(&xs)?.add(&xs)?)
    }
}
