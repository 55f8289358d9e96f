//! Keys and values of the positions that attention has seen.

use crate::error::{InferenceError, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

/// Sizes of a [`KVCache`].
#[derive(Debug, Clone)]
pub struct KVCacheConfig {
    /// Positions that each layer has room for.
    pub max_seq_len: usize,
    /// Number of layers; not checked.
    pub num_layers: usize,
    /// Number of heads; not checked.
    pub num_heads: usize,
    /// Width of a head; not checked.
    pub head_dim: usize,
    /// Number of sequences; not checked.
    pub batch_size: usize,
}

impl Default for KVCacheConfig {
    fn default() -> Self {
        Self { max_seq_len: 2048, num_layers: 24, num_heads: 14, head_dim: 64, batch_size: 1 }
    }
}

/// Keys or values of one layer: a buffer with room to grow.
#[derive(Debug)]
struct Side {
    buffer: Tensor,
    room: usize,
}

impl Side {
    /// What `held` positions and those of `new` are, in place where the buffer has room. What was handed out earlier ends before the
    /// place that is written to.
    ///
    /// Candle's autograd does not see what is written in place, so tensors that it tracks are concatenated instead.
    fn extended(held: Option<(&Self, usize)>, new: &Tensor, limit: usize) -> candle_core::Result<Self> {
        let added = new.dim(2)?;
        let Some((side, len)) = held else {
            return Ok(Self { buffer: new.clone(), room: added });
        };
        if new.track_op() || side.buffer.track_op() || added == 0 {
            let buffer = Tensor::cat(&[&side.buffer.narrow(2, 0, len)?, new], 2)?;
            return Ok(Self { buffer, room: len + added });
        }
        let needed = len + added;
        if needed <= side.room {
            side.buffer.slice_set(&new.contiguous()?, 2, len)?;
            return Ok(Self { buffer: side.buffer.clone(), room: side.room });
        }
        // twice as much as is needed: n tokens copy fewer than 2·n positions in all
        let room = needed.saturating_mul(2).min(limit.max(needed));
        let mut shape = new.dims().to_vec();
        if let Some(positions) = shape.get_mut(2) {
            *positions = room;
        }
        let buffer = Tensor::zeros(shape, new.dtype(), new.device())?;
        buffer.slice_set(&side.buffer.narrow(2, 0, len)?.contiguous()?, 2, 0)?;
        buffer.slice_set(&new.contiguous()?, 2, len)?;
        Ok(Self { buffer, room })
    }
}

/// One layer's positions.
#[derive(Debug)]
struct Layer {
    key: Side,
    value: Side,
    /// Views of the positions that are held.
    views: (Tensor, Tensor),
    len: usize,
}

/// The keys and values of every layer, up to `max_seq_len` positions each.
///
/// A step appends the new positions of one layer and gets all of them back. Buffers are made with room to grow, so a step writes its own
/// positions only; what it gives back are views, not always contiguous.
#[derive(Debug)]
pub struct KVCache {
    layers: BTreeMap<usize, Layer>,
    config: KVCacheConfig,
}

fn failed(reason: String) -> crate::Error {
    InferenceError::Failed { reason }.into()
}

impl KVCache {
    /// An empty cache. Nothing is allocated; the tensors that are appended say where they live.
    ///
    /// # Errors
    /// None here.
    pub fn new(config: KVCacheConfig, _device: &Device) -> Result<Self> {
        Ok(Self { layers: BTreeMap::new(), config })
    }

    /// Number of positions held: those of the layer that has most. A layer that a step has not reached yet has fewer.
    #[must_use]
    pub fn position(&self) -> usize {
        self.layers.values().map(|layer| layer.len).max().unwrap_or(0)
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.position() == 0
    }

    /// Positions that each layer has room for.
    #[must_use]
    pub fn max_seq_len(&self) -> usize {
        self.config.max_seq_len
    }

    /// Forgets everything. Tensors that were handed out stay as they are.
    pub fn clear(&mut self) {
        self.layers.clear();
    }

    /// Appends `key` and `value`, (batch, heads, new positions, head dim) each, to layer `layer_idx` and returns all that it holds:
    /// (batch, heads, positions, head dim).
    ///
    /// Only dim 2 has a meaning here: it is that of the positions, and there may be any number of other dims. Keys and values may differ in
    /// all else.
    ///
    /// # Errors
    /// [`InferenceError::CacheFull`] where the layer has no room for all of them, [`InferenceError::Failed`] where a tensor has no dim 2,
    /// keys and values differ in it, or they do not fit what the layer holds. The cache is as it was then.
    pub fn update(&mut self, layer_idx: usize, key: &Tensor, value: &Tensor) -> Result<(Tensor, Tensor)> {
        let added = match (key.dims(), value.dims()) {
            (&[_, _, keys, ..], &[_, _, values, ..]) if keys == values => keys,
            (key, value) => {
                return Err(failed(format!(
                    "KV cache: keys and values must have a dim 2 with as many positions in both, got {key:?} and {value:?}"
                )));
            }
        };
        let held = self.layers.get(&layer_idx);
        let position = held.map_or(0, |layer| layer.len);
        let max_len = self.config.max_seq_len;
        let len = position.checked_add(added).filter(|&len| len <= max_len);
        let Some(len) = len else {
            return Err(InferenceError::CacheFull { position, max_len }.into());
        };
        if let Some(layer) = held {
            fits("keys", &layer.views.0, key, layer_idx)?;
            fits("values", &layer.views.1, value, layer_idx)?;
        }
        let key = Side::extended(held.map(|layer| (&layer.key, position)), key, max_len)?;
        let value = Side::extended(held.map(|layer| (&layer.value, position)), value, max_len)?;
        let views = (key.buffer.narrow(2, 0, len)?, value.buffer.narrow(2, 0, len)?);
        self.layers.insert(layer_idx, Layer { key, value, views: views.clone(), len });
        Ok(views)
    }

    /// What layer `layer_idx` holds, where it holds something.
    #[must_use]
    pub fn get(&self, layer_idx: usize) -> Option<&(Tensor, Tensor)> {
        self.layers.get(&layer_idx).map(|layer| &layer.views)
    }

    /// Number of layers that hold something.
    #[must_use]
    pub fn num_cached_layers(&self) -> usize {
        self.layers.len()
    }
}

/// Refuses what differs from what is held in more than its number of positions.
fn fits(what: &str, held: &Tensor, new: &Tensor, layer: usize) -> Result<()> {
    let others =
        |tensor: &Tensor| tensor.dims().iter().enumerate().filter(|(at, _)| *at != 2).map(|(_, n)| *n).collect();
    let (was, is): (Vec<usize>, Vec<usize>) = (others(held), others(new));
    let same_dims = was == is;
    if same_dims && held.dtype() == new.dtype() && held.device().same_device(new.device()) {
        return Ok(());
    }
    Err(failed(format!(
        "KV cache: layer {layer} holds {what} {:?} ({:?}), cannot take {:?} ({:?})",
        held.dims(),
        held.dtype(),
        new.dims(),
        new.dtype()
    )))
}
