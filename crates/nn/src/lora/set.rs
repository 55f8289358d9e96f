//! The factors of one adapter for all linear maps of a decoder, apart from the model.

use super::LoraWeights;
use crate::error::Result;
use crate::models::{CausalLm, PROJECTIONS};

/// What one adapter adds to the linear maps of a decoder: factors for some of them, frozen, without dropout.
///
/// A model carries one adapter at a time ([`CausalLm::set_lora`]); sets let rows of one step have different ones
/// ([`PackedDecoder`](crate::models::PackedDecoder)).
#[derive(Debug, Clone)]
pub struct LoraSet {
    blocks: Vec<[Option<LoraWeights>; PROJECTIONS.len()]>,
}

impl LoraSet {
    /// The adapters that a model carries, as they are now: later steps of an optimiser do not change the set.
    ///
    /// # Errors
    /// Where a factor that is not computed yet cannot be computed.
    #[track_caller]
    pub fn of(model: &CausalLm) -> Result<Self> {
        let mut blocks = Vec::new();
        for block in model.blocks() {
            let mut maps = [const { None }; PROJECTIONS.len()];
            for (map, projection) in maps.iter_mut().zip(block.projections()) {
                if let Some(adapter) = projection.adapter() {
                    *map = Some(adapter.frozen()?);
                }
            }
            blocks.push(maps);
        }
        Ok(Self { blocks })
    }

    /// Whether it adds nothing to any map.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().flatten().all(Option::is_none)
    }

    /// With these factors for a map, computed or not.
    #[cfg(test)]
    pub(crate) fn with(mut self, block: usize, map: usize, weights: LoraWeights) -> Self {
        self.blocks[block][map] = Some(weights);
        self
    }

    /// Number of blocks of the model that it was made of.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The factors for a map of a block, by the map's place in [`PROJECTIONS`].
    pub(crate) fn weights(&self, block: usize, map: usize) -> Option<&LoraWeights> {
        self.blocks.get(block)?.get(map)?.as_ref()
    }
}
