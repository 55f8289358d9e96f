//! Decoding with a key/value cache.

use super::transformer::RotaryEmbedding;
use super::DecodingSession;
use crate::error::{InferenceError, Result};
use candle_core::{Device, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::models::DecoderBlock;
use candle_lazy_nn::{Embedding, KvCache, Linear, Module, RmsNorm};

/// Positions that are computed at once: bounds the memory of a long prompt.
const CHUNK: usize = 512;

/// Positions that there is room for at first.
const FIRST_ROOM: usize = 256;

/// A text and what the layers keep of it.
pub(super) struct QwenSession {
    embed_tokens: Embedding,
    blocks: Vec<DecoderBlock>,
    norm: RmsNorm,
    lm_head: Linear,
    rope: RotaryEmbedding,
    caches: Vec<KvCache>,
    position: usize,
    device: Device,
}

impl QwenSession {
    /// A session without text. The modules must carry no gradient: a cache would keep every step's tape alive.
    pub(super) fn new(
        blocks: Vec<DecoderBlock>,
        (embed_tokens, norm, lm_head): (Embedding, RmsNorm, Linear),
        rope: RotaryEmbedding,
        device: Device,
    ) -> Self {
        let room = FIRST_ROOM.min(rope.max_seq_len());
        let caches = blocks.iter().map(|_| KvCache::new(room)).collect();
        Self { embed_tokens, blocks, norm, lm_head, rope, caches, position: 0, device }
    }

    /// Makes room for `len` more positions in every layer.
    fn reserve(&mut self, len: usize) -> Result<()> {
        let (position, max_len) = (self.position, self.rope.max_seq_len());
        let Some(end) = position.checked_add(len).filter(|&end| end <= max_len) else {
            return Err(InferenceError::CacheFull { position, max_len }.into());
        };
        for cache in &mut self.caches {
            if end > cache.capacity() {
                cache.grow(end.saturating_mul(2).min(max_len))?;
            }
        }
        Ok(())
    }

    /// Records `ids` through all layers; the residual stream (1, s, hidden).
    fn record(&mut self, ids: &[u32]) -> Result<LazyTensor> {
        let mut xs = self.embed_tokens.forward(&LazyTensor::from_slice(ids, (1, ids.len()), &self.device)?)?;
        let at = self.rope.positions(self.position, ids.len(), xs.dtype())?;
        for (block, cache) in self.blocks.iter().zip(&mut self.caches) {
            xs = block.forward(&xs, &at, cache)?;
        }
        Ok(xs)
    }

    /// Computes the positions of `ids`, and where `wanted` the logits after the last.
    fn compute(&mut self, ids: &[u32], wanted: bool) -> Result<Option<Tensor>> {
        let xs = self.record(ids)?;
        let logits = if wanted {
            let (_, s, width) = xs.dims3()?;
            let last = xs.narrow(1, s.saturating_sub(1), 1)?.reshape((1, width))?;
            Some(self.lm_head.forward(&self.norm.forward(&last)?)?.flatten_all()?)
        } else {
            None
        };
        drop(xs);
        let roots: Vec<&LazyTensor> = self.caches.iter().flat_map(KvCache::handles).chain(&logits).collect();
        candle_lazy_exec::materialize(&roots)?;
        self.position += ids.len();
        match logits {
            Some(logits) => Ok(Some(logits.eval()?)),
            None => Ok(None),
        }
    }
}

impl DecodingSession for QwenSession {
    fn advance(&mut self, ids: &[u32]) -> Result<Tensor> {
        let vocab = self.embed_tokens.embeddings().dims().first().copied().unwrap_or(0);
        if let Some(id) = ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocab)) {
            let reason = format!("token id {id} is outside of the vocabulary of {vocab}");
            return Err(InferenceError::Failed { reason }.into());
        }
        self.reserve(ids.len())?;
        let mut logits = None;
        let mut left = ids;
        while !left.is_empty() {
            let (piece, rest) = left.split_at(CHUNK.min(left.len()));
            logits = self.compute(piece, rest.is_empty())?;
            left = rest;
        }
        logits.ok_or_else(|| InferenceError::Failed { reason: "there are no tokens to continue with".into() }.into())
    }
}
