//! Keys and values of the positions already seen, in buffers that never move.

use crate::error::{Error, Result};
use candle_lazy_exec::LazyTensor;

/// The keys and values of one attention block.
///
/// Two buffers (batch, kv heads, capacity, head dim) are made at the first [`KvCache::append`], once, at the capacity the
/// caller asked for. An append gives the old handle away (`slice_set_owned`), so the engine writes the new rows in place
/// as long as nobody else holds the buffer; a copy would be counted in the report of the evaluation.
///
/// The cache keeps handles, not values: evaluate them with the step's result (see `CausalLm::generate`), so that the
/// graph of one step does not grow into the next.
#[derive(Debug)]
pub struct KvCache {
    capacity: usize,
    len: usize,
    buffers: Option<(LazyTensor, LazyTensor)>,
    lost: bool,
}

impl KvCache {
    /// A cache for up to `capacity` positions. Nothing is allocated before the first append.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, len: 0, buffers: None, lost: false }
    }

    /// Number of positions held.
    pub fn current_seq_len(&self) -> usize {
        self.len
    }

    /// Number of positions there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions. The buffers stay for the next sequence; call it with the same batch size again.
    pub fn reset(&mut self) {
        self.len = 0;
        if self.lost {
            self.buffers = None;
            self.lost = false;
        }
    }

    /// Forgets the positions from `len` on; a length beyond the current one changes nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes room for `capacity` positions in all, by new buffers that what is held is copied into; no more than there is changes nothing.
    ///
    /// # Errors
    /// Where there is no memory for them, or an append failed before; the cache is as it was.
    #[track_caller]
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        if self.lost {
            return Err(Error::cache("an earlier append failed while it wrote; reset the cache and start over"));
        }
        if let Some((k, v)) = &self.buffers {
            let (k, v) = (wider(k, self.len, capacity)?, wider(v, self.len, capacity)?);
            candle_lazy_exec::materialize(&[&k, &v])?;
            self.buffers = Some((k, v));
        }
        self.capacity = capacity;
        Ok(())
    }

    /// The handles of both buffers, to be evaluated together with what was computed from them.
    pub fn handles(&self) -> impl Iterator<Item = &LazyTensor> {
        self.buffers.iter().flat_map(|(k, v)| [k, v])
    }

    /// Adds the keys and values of `s` more positions and returns views of all positions so far.
    ///
    /// `k` and `v` have shape (batch, kv heads, s, head dim); the results (batch, kv heads, len, head dim).
    ///
    /// # Errors
    /// [`Error::CacheFull`] (naming position and capacity) where `s` more positions do not fit, [`Error::Cache`] where
    /// shape or dtype differ from what the cache holds. After either the cache is as it was.
    #[track_caller]
    pub fn append(&mut self, k: &LazyTensor, v: &LazyTensor) -> Result<(LazyTensor, LazyTensor)> {
        let (b, h, s, d) = k.dims4()?;
        let (bv, hv, sv, dv) = v.dims4()?;
        if (b, h, s) != (bv, hv, sv) || k.dtype() != v.dtype() {
            return Err(Error::cache(format_args!(
                "keys {:?} ({:?}) and values {:?} ({:?}) differ in batch, heads, length or dtype",
                k.shape(),
                k.dtype(),
                v.shape(),
                v.dtype()
            )));
        }
        let new_len = match self.len.checked_add(s) {
            Some(new_len) if new_len <= self.capacity => new_len,
            _ => return Err(Error::cache_full(self.len, s, self.capacity)),
        };
        if self.lost {
            return Err(Error::cache("an earlier append failed while it wrote; reset the cache and start over"));
        }
        if let Some((held_k, held_v)) = &self.buffers {
            let fits = held_k.dims() == [b, h, self.capacity, d]
                && held_v.dims() == [b, h, self.capacity, dv]
                && held_k.dtype() == k.dtype();
            if !fits {
                return Err(Error::cache(format_args!(
                    "holds keys {:?} ({:?}), cannot take {:?} ({:?}); make a new cache for another batch size or model",
                    held_k.shape(),
                    held_k.dtype(),
                    k.shape(),
                    k.dtype()
                )));
            }
        }
        // The handles are moved out: while this cache held on to them, the engine could not write in place.
        let (held_k, held_v) = match self.buffers.take() {
            Some(buffers) => buffers,
            None => (empty((b, h, self.capacity, d), k)?, empty((b, h, self.capacity, dv), v)?),
        };
        self.lost = true;
        let new_k = held_k.slice_set_owned(k, 2, self.len)?;
        let new_v = held_v.slice_set_owned(v, 2, self.len)?;
        let views = (new_k.narrow(2, 0, new_len)?, new_v.narrow(2, 0, new_len)?);
        self.buffers = Some((new_k, new_v));
        self.len = new_len;
        self.lost = false;
        Ok(views)
    }
}

/// The first `len` positions of `held` in a buffer for `capacity`.
#[track_caller]
fn wider(held: &LazyTensor, len: usize, capacity: usize) -> Result<LazyTensor> {
    let (b, h, _, d) = held.dims4()?;
    let buffer = empty((b, h, capacity, d), held)?;
    if len == 0 {
        return Ok(buffer);
    }
    Ok(buffer.slice_set_owned(&held.narrow(2, 0, len)?, 2, 0)?)
}

/// A buffer of zeros of the dtype and on the device of `like`.
///
/// It is made now, not recorded: recorded, the equal buffers of all blocks would be one node, written to by all of them,
/// and all but one would have to copy it.
#[track_caller]
fn empty(shape: (usize, usize, usize, usize), like: &LazyTensor) -> Result<LazyTensor> {
    let buffer = LazyTensor::zeros(shape, like.dtype(), like.device())?;
    candle_lazy_exec::materialize(&[&buffer])?;
    Ok(buffer)
}
