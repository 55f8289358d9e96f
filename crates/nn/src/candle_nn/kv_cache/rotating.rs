//! Caches of a fixed length, in which new positions take the place of the oldest.

use super::{refuse, Buffer};
use crate::candle::{Device, Result, Tensor};

/// A ring of positions.
#[derive(Debug, Clone)]
pub struct RotatingCache {
    buffer: Buffer,
    dim: usize,
    /// Where the next position is written.
    offset: usize,
    /// Positions seen, also those that are gone.
    seen: usize,
    capacity: usize,
}

impl RotatingCache {
    /// Along `dim`, keeping `max_seq_len` positions.
    #[must_use]
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { buffer: Buffer::default(), dim, offset: 0, seen: 0, capacity: max_seq_len }
    }

    /// Where the next position is written.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The dim of positions.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Positions seen, also those that are gone.
    #[must_use]
    pub fn current_seq_len(&self) -> usize {
        self.seen
    }

    /// Positions kept.
    #[must_use]
    pub fn max_seq_len(&self) -> usize {
        self.capacity
    }

    /// The whole buffer.
    #[must_use]
    pub fn all_data(&self) -> &Option<Tensor> {
        &self.buffer.data
    }

    /// The positions held, in the order of the ring.
    ///
    /// # Errors
    /// When recording fails.
    #[track_caller]
    pub fn current_data(&self) -> Result<Option<Tensor>> {
        self.buffer.part(self.dim, self.seen.min(self.capacity))
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.offset = 0;
        self.seen = 0;
        self.buffer = Buffer::default();
    }

    /// Adds positions and returns what a query of them attends to: what is held in the order of the ring, or `src` itself
    /// where it is as long as the ring.
    ///
    /// # Errors
    /// When `src` has another shape or dtype than what is held, or the cache was made for no position.
    #[track_caller]
    pub fn append(&mut self, src: &Tensor) -> Result<Tensor> {
        if self.capacity == 0 {
            return refuse("made for 0 positions".into());
        }
        let added = src.dim(self.dim)?;
        self.buffer.ready(src, self.dim, self.capacity)?;
        if added >= self.capacity {
            let newest = src.narrow(self.dim, added - self.capacity, self.capacity)?;
            self.buffer.write(&newest, self.dim, 0)?;
            self.offset = 0;
            self.seen += added;
            return Ok(src.clone());
        }
        let before_the_end = added.min(self.capacity - self.offset);
        for (from, len, to) in [(0, before_the_end, self.offset), (before_the_end, added - before_the_end, 0)] {
            if len > 0 {
                self.buffer.write(&src.narrow(self.dim, from, len)?, self.dim, to)?;
            }
        }
        self.offset = (self.offset + added) % self.capacity;
        self.seen += added;
        match self.current_data()? {
            Some(data) => Ok(data),
            None => refuse("nothing is held after an append".into()),
        }
    }

    /// The positions of what [`RotatingCache::append`] will return for `seq_len` more positions.
    #[must_use]
    pub fn positions(&self, seq_len: usize) -> Vec<usize> {
        let total = self.seen + seq_len;
        if seq_len > self.capacity || self.capacity == 0 {
            return (self.seen..total).collect();
        }
        let next = (self.offset + seq_len) % self.capacity;
        // slot i was written i − next positions after the newest one's successor, one round ago where it lies behind it
        let position =
            |slot: usize| if slot < next { total + slot - next } else { total + slot - next - self.capacity };
        (0..total.min(self.capacity)).map(position).collect()
    }

    /// The mask for `seq_len` more positions: u8 (seq_len, keys), 1 where a query must not see a key; `None` for one position.
    ///
    /// # Errors
    /// When Candle cannot make the tensor.
    #[track_caller]
    pub fn attn_mask(&self, seq_len: usize, device: &Device) -> Result<Option<Tensor>> {
        if seq_len == 1 {
            return Ok(None);
        }
        let keys =
            if seq_len < self.capacity { self.positions(seq_len) } else { (self.seen..self.seen + seq_len).collect() };
        let hidden = |query: usize, key: usize| key > query || key + self.capacity < query;
        let mask: Vec<u8> = (self.seen..self.seen + seq_len)
            .flat_map(|query| keys.iter().map(move |&key| u8::from(hidden(query, key))))
            .collect();
        Ok(Some(Tensor::from_vec(mask, (seq_len, keys.len()), device)?))
    }
}

/// Keys and values in two [`RotatingCache`]s.
#[derive(Debug, Clone)]
pub struct RotatingKvCache {
    k: RotatingCache,
    v: RotatingCache,
}

impl RotatingKvCache {
    /// Along `dim`, keeping `max_seq_len` positions.
    #[must_use]
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { k: RotatingCache::new(dim, max_seq_len), v: RotatingCache::new(dim, max_seq_len) }
    }

    /// The keys' cache.
    #[must_use]
    pub fn k_cache(&self) -> &RotatingCache {
        &self.k
    }

    /// The values' cache.
    #[must_use]
    pub fn v_cache(&self) -> &RotatingCache {
        &self.v
    }

    /// The keys' cache.
    pub fn k_cache_mut(&mut self) -> &mut RotatingCache {
        &mut self.k
    }

    /// The values' cache.
    pub fn v_cache_mut(&mut self) -> &mut RotatingCache {
        &mut self.v
    }

    /// The keys held.
    ///
    /// # Errors
    /// As [`RotatingCache::current_data`].
    #[track_caller]
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.k.current_data()
    }

    /// The values held.
    ///
    /// # Errors
    /// As [`RotatingCache::current_data`].
    #[track_caller]
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.v.current_data()
    }

    /// Adds positions; see [`RotatingCache::append`].
    ///
    /// # Errors
    /// As [`RotatingCache::append`].
    #[track_caller]
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.k.append(k)?, self.v.append(v)?))
    }

    /// Where the next position is written.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.k.offset()
    }

    /// Positions seen, also those that are gone.
    #[must_use]
    pub fn current_seq_len(&self) -> usize {
        self.k.current_seq_len()
    }

    /// See [`RotatingCache::attn_mask`].
    ///
    /// # Errors
    /// As [`RotatingCache::attn_mask`].
    #[track_caller]
    pub fn attn_mask(&self, seq_len: usize, device: &Device) -> Result<Option<Tensor>> {
        self.k.attn_mask(seq_len, device)
    }

    /// See [`RotatingCache::positions`].
    #[must_use]
    pub fn positions(&self, seq_len: usize) -> Vec<usize> {
        self.k.positions(seq_len)
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.k.reset();
        self.v.reset();
    }
}
