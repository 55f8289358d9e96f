//! One step of a decoder for several texts at once, each with a cache and an adapter of its own.
//!
//! The rows of all texts stand one after the other in one matrix, without padding: each linear map reads its weights once for all of
//! them. Attention is each text's own, over its own cache; so are the rows' adapters. A row's bits do not depend on the others: a text
//! gets the logits that [`CausalLm::forward`] gives it alone.

use super::causal_lm::{Cache, CausalLm, Rope};
use crate::attention::Positions;
use crate::error::{Error, Result};
use crate::kv_cache::KvCache;
use crate::lora::{AdaptedRows, LoraSet};
use crate::module::Module;
use crate::scope;
use candle_lazy_exec::LazyTensor;

/// A text's part of a step.
#[derive(Debug)]
pub struct Segment<'a> {
    /// Ids of the positions that the step adds.
    pub ids: &'a [u32],
    /// What the text has so far; made for one text of the model.
    pub cache: &'a mut Cache,
    /// The text's adapter; without one it has the model's, where that carries one.
    pub adapter: Option<&'a LoraSet>,
    /// Whether the logits after the last of the ids are wanted.
    pub logits: bool,
}

/// A decoder that computes steps of several texts.
#[derive(Debug)]
pub struct PackedDecoder {
    model: CausalLm,
    rope: Rope,
}

impl PackedDecoder {
    /// On the memory of the model.
    #[must_use]
    pub fn new(model: CausalLm) -> Self {
        let rope = model.rope();
        Self { model, rope }
    }

    /// The model below.
    #[must_use]
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// Logits (texts that want them, vocab), in the order of the segments; `None` where no text wants any. Neighbours with one adapter
    /// share its products: put them side by side.
    ///
    /// Evaluate the result together with the handles of all caches ([`Cache::handles`]).
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for no segments or one without ids, [`Error::TokenOutOfRange`], [`Error::CacheFull`] where a cache has no
    /// room, [`Error::Cache`] and [`Error::Module`] where a cache or an adapter belongs to another model. After an error the caches hold
    /// what they held before.
    #[track_caller]
    pub fn forward(&mut self, segments: &mut [Segment<'_>]) -> Result<Option<LazyTensor>> {
        let (mut ids, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        let mut end = 0;
        for segment in segments.iter() {
            let start = self.check(segment)?;
            end = end.max(start + segment.ids.len());
            ids.extend_from_slice(segment.ids);
            positions.extend((start..start + segment.ids.len()).filter_map(|at| u32::try_from(at).ok()));
            if segment.logits {
                wanted.extend(u32::try_from(ids.len().saturating_sub(1)));
            }
        }
        if segments.is_empty() {
            return Err(Error::empty_prompt());
        }
        let rows = ids.len();
        let device = self.model.device();
        let ids = LazyTensor::from_vec(ids, (1, rows), device)?;
        let positions = LazyTensor::from_vec(positions, rows, device)?;
        let context = self.model.config().max_position_embeddings;
        let (cos, sin) = self.rope.up_to(end, context)?.select(&positions)?;
        let before: Vec<usize> = segments.iter().map(|segment| segment.cache.position()).collect();
        let hidden = self.blocks(&ids, &Positions { cos, sin }, segments);
        if hidden.is_err() {
            for (segment, position) in segments.iter_mut().zip(before) {
                segment.cache.truncate(position);
            }
        }
        let hidden = hidden?.squeeze(0)?;
        if wanted.is_empty() {
            return Ok(None);
        }
        let count = wanted.len();
        let last = if count == rows {
            hidden
        } else {
            hidden.embedding(&LazyTensor::from_vec(wanted, count, self.model.device())?)?
        };
        self.model.logits(&last).map(Some)
    }

    /// Refuses what would fail for all because of one; gives the position at which the segment begins.
    #[track_caller]
    fn check(&self, segment: &Segment<'_>) -> Result<usize> {
        let (blocks, config) = (self.model.blocks().len(), self.model.config());
        if segment.ids.is_empty() {
            return Err(Error::empty_prompt());
        }
        if let Some(&id) = segment.ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(Error::token_out_of_range(id, config.vocab_size));
        }
        let (position, capacity) = (segment.cache.position(), segment.cache.capacity());
        if position.checked_add(segment.ids.len()).is_none_or(|end| end > capacity) {
            return Err(Error::cache_full(position, segment.ids.len(), capacity));
        }
        if let Some(made) = segment.adapter.map(LoraSet::blocks).filter(|&made| made != blocks) {
            let message = format_args!("made for {made} blocks, the model has {blocks}");
            return Err(Error::module("lora", "model", message));
        }
        let made = segment.cache.layers();
        if made != blocks {
            return Err(Error::cache(format_args!("made for {made} blocks, the model has {blocks}")));
        }
        Ok(position)
    }

    /// The residual stream (1, rows, hidden) after all blocks.
    #[track_caller]
    fn blocks(&self, ids: &LazyTensor, at: &Positions, segments: &mut [Segment<'_>]) -> Result<LazyTensor> {
        let _scope = scope::enter("model");
        let stretches = stretches(segments);
        let counts: Vec<usize> = segments.iter().map(|segment| segment.ids.len()).collect();
        let mut caches: Vec<_> = segments.iter_mut().map(|segment| segment.cache.blocks_mut().iter_mut()).collect();
        let mut xs = self.model.embed().forward(ids)?;
        for (index, block) in self.model.blocks().iter().enumerate() {
            let mut of_block: Vec<&mut KvCache> = Vec::with_capacity(caches.len());
            of_block.extend(caches.iter_mut().filter_map(Iterator::next));
            let adapters = std::array::from_fn(|map| merged(&stretches, index, map));
            xs = block.forward_packed(&xs, at, counts.iter().copied().zip(of_block), &adapters)?;
        }
        Ok(xs)
    }
}

/// Rows side by side with one adapter, or none.
type Stretch<'a> = (usize, Option<&'a LoraSet>);

fn stretches<'a>(segments: &[Segment<'a>]) -> Vec<Stretch<'a>> {
    let mut stretches: Vec<Stretch<'a>> = Vec::new();
    for segment in segments {
        let same = |of: Option<&LoraSet>| match (of, segment.adapter) {
            (None, None) => true,
            (Some(a), Some(b)) => std::ptr::eq(a, b),
            _ => false,
        };
        match stretches.last_mut() {
            Some((rows, of)) if same(*of) => *rows += segment.ids.len(),
            _ => stretches.push((segment.ids.len(), segment.adapter)),
        }
    }
    stretches
}

/// The stretches as one map of one block sees them: those that have no factors for it are as those without an adapter.
fn merged<'a>(stretches: &[Stretch<'a>], block: usize, map: usize) -> Vec<AdaptedRows<'a>> {
    let mut merged: Vec<AdaptedRows<'a>> = Vec::with_capacity(stretches.len());
    for (rows, set) in stretches {
        let weights = set.and_then(|set| set.weights(block, map));
        match merged.last_mut() {
            Some((before, None)) if weights.is_none() => *before += rows,
            _ => merged.push((*rows, weights)),
        }
    }
    merged
}
