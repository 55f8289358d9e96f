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

/// Positions that there is room for at first: a short text must not take the memory of a long one.
const FIRST_ROOM: usize = 64;

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

    /// Makes room for `len` more positions in every layer: a quarter more than is needed, so that a text of n tokens copies
    /// some 5·n, and what the old room took goes back to the system: the engine would keep it for results of that size.
    fn reserve(&mut self, len: usize) -> Result<()> {
        let (position, max_len) = (self.position, self.rope.max_seq_len());
        let Some(end) = position.checked_add(len).filter(|&end| end <= max_len) else {
            return Err(InferenceError::CacheFull { position, max_len }.into());
        };
        let room = end.saturating_add((end / 4).max(FIRST_ROOM)).min(max_len);
        for cache in self.caches.iter_mut().filter(|cache| end > cache.capacity()) {
            cache.grow(room)?;
            candle_lazy_exec::buffer::trim();
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Shape};
    use candle_lazy_nn::models::CausalLmConfig;
    use candle_lazy_nn::{embedding, linear_no_bias, rms_norm, VarBuilder};

    const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 7, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 1000, "rms_norm_eps": 1e-5}"#;

    fn session() -> Result<QwenSession> {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let config = CausalLmConfig::from_json(CONFIG)?;
        let mut blocks = Vec::new();
        for _ in 0..2 {
            blocks.push(DecoderBlock::load(&config, vb.clone())?);
        }
        let parts = (embedding(7, 8, vb.clone())?, rms_norm(8, 1e-5, vb.clone())?, linear_no_bias(8, 7, vb)?);
        Ok(QwenSession::new(blocks, parts, RotaryEmbedding::new(4, 1000, 1e4, &Device::Cpu)?, Device::Cpu))
    }

    /// A step must not copy what is held: else a text of n tokens takes n² time.
    #[test]
    fn a_step_writes_keys_and_values_in_place() -> Result<()> {
        let mut session = session()?;
        session.advance(&[1; 63])?;
        for grown in [64, 65, 66] {
            session.reserve(1)?;
            drop(session.record(&[3])?);
            let handles: Vec<&LazyTensor> = session.caches.iter().flat_map(KvCache::handles).collect();
            let report = candle_lazy_exec::materialize(&handles)?;
            assert_eq!((report.in_place, report.copies), (4, 0), "{grown}: {report}");
            session.position += 1;
            assert_eq!(session.position, grown);
        }
        let rooms: Vec<(Shape, usize)> =
            session.caches.iter().flat_map(|c| c.handles().map(|h| (h.shape().clone(), c.capacity()))).collect();
        assert_eq!(rooms, vec![(Shape::from((1, 2, 129, 4)), 129); 4]);
        Ok(())
    }

    #[test]
    fn room_ends_with_the_positions() -> Result<()> {
        let mut session = session()?;
        session.advance(&[2; 999])?;
        assert_eq!(session.caches.iter().map(KvCache::capacity).collect::<Vec<_>>(), [1000, 1000]);
        session.advance(&[2])?;
        assert!(session.advance(&[2]).is_err());
        Ok(())
    }
}
