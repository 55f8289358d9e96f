//! Keys and values of the positions already seen, with Candle's types.
//!
//! The buffers hold handles. An append gives the old handle away, so the engine writes in place where nobody else holds it;
//! the report of the evaluation counts in-place writes and copies. What a cache holds becomes ready with the step that
//! computes from it. A clone shares the buffers until one of the two appends, and then that one copies.

mod rotating;

use crate::candle::{Error, Result, Tensor};
pub use rotating::{RotatingCache, RotatingKvCache};

/// An error at the caller's line.
#[track_caller]
fn refuse<T>(message: String) -> Result<T> {
    Err(Error::Msg(format!("kv cache: {message}")).at_caller())
}

/// Zeros of `like`'s shape with `len` along `dim`. Made now, not recorded: recorded, the equal buffers of all layers would be
/// one node, and all but one of the layers would have to copy it.
#[track_caller]
fn zeros(like: &Tensor, dim: usize, len: usize) -> Result<Tensor> {
    let mut shape = like.dims().to_vec();
    match shape.get_mut(dim) {
        Some(size) => *size = len,
        None => return Err(Tensor::shape_error("kv cache", format!("there is no dim {dim}"), &[like])),
    }
    let buffer = Tensor::zeros(shape, like.dtype(), like.device())?;
    candle_lazy_exec::materialize(&[&buffer])?;
    Ok(buffer)
}

/// Whether `src` fits into `buffer` but for its length along `dim`.
#[track_caller]
fn check(buffer: &Tensor, src: &Tensor, dim: usize) -> Result<()> {
    let other_dims = |t: &Tensor| t.dims().iter().enumerate().filter(|(d, _)| *d != dim).map(|(_, n)| *n).collect();
    let (held, new): (Vec<usize>, Vec<usize>) = (other_dims(buffer), other_dims(src));
    if buffer.dtype() != src.dtype() {
        let (held, got) = (buffer.dtype().as_str(), src.dtype().as_str());
        return refuse(format!("holds {held}, got {got} {:?}: add .to_dtype(DType::{:?})", src.dims(), buffer.dtype()));
    }
    if held != new {
        let detail = format!("it holds {:?}, which differs elsewhere than in dim {dim}", buffer.dims());
        return Err(Tensor::shape_error("kv cache", detail, &[src]));
    }
    Ok(())
}

/// A buffer that is written in place, or lost when a write failed.
#[derive(Debug, Clone, Default)]
struct Buffer {
    data: Option<Tensor>,
    lost: bool,
}

impl Buffer {
    /// The buffer, made with room for `len` if there is none yet.
    #[track_caller]
    fn ready(&mut self, src: &Tensor, dim: usize, len: usize) -> Result<&Tensor> {
        if self.lost {
            return refuse("an earlier append failed while it wrote; reset the cache and start over".into());
        }
        let buffer = match self.data.take() {
            Some(buffer) => buffer,
            None => zeros(src, dim, len)?,
        };
        let buffer = self.data.insert(buffer);
        check(buffer, src, dim)?;
        Ok(buffer)
    }

    #[track_caller]
    fn write(&mut self, src: &Tensor, dim: usize, at: usize) -> Result<()> {
        // the handle is moved out: while this cache held on to it, the engine could not write in place
        let Some(buffer) = self.data.take() else {
            return refuse("no buffer".into());
        };
        self.lost = true;
        self.data = Some(buffer.slice_set_owned(src, dim, at)?);
        self.lost = false;
        Ok(())
    }

    #[track_caller]
    fn part(&self, dim: usize, len: usize) -> Result<Option<Tensor>> {
        self.data.as_ref().map(|data| data.narrow(dim, 0, len)).transpose()
    }
}

/// One buffer that grows in steps of its first length.
#[derive(Debug, Clone)]
pub struct Cache {
    buffer: Buffer,
    dim: usize,
    len: usize,
    grow_by: usize,
    capacity: usize,
}

impl Cache {
    /// Along `dim`, with room for `max_seq_len` positions at first. Nothing is allocated before the first append.
    #[must_use]
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { buffer: Buffer::default(), dim, len: 0, grow_by: max_seq_len, capacity: max_seq_len }
    }

    /// The dim of positions.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Positions held.
    #[must_use]
    pub fn current_seq_len(&self) -> usize {
        self.len
    }

    /// Positions that there is room for.
    #[must_use]
    pub fn max_seq_len(&self) -> usize {
        self.capacity
    }

    /// The whole buffer.
    #[must_use]
    pub fn all_data(&self) -> &Option<Tensor> {
        &self.buffer.data
    }

    /// The positions held.
    ///
    /// # Errors
    /// When recording fails.
    #[track_caller]
    pub fn current_data(&self) -> Result<Option<Tensor>> {
        self.buffer.part(self.dim, self.len)
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.len = 0;
        self.buffer = Buffer::default();
    }

    /// Adds positions, growing the buffer where they do not fit.
    ///
    /// # Errors
    /// When `src` has another shape or dtype than what is held, or the cache was made with no room.
    #[track_caller]
    pub fn append(&mut self, src: &Tensor) -> Result<()> {
        let added = src.dim(self.dim)?;
        self.buffer.ready(src, self.dim, self.capacity)?;
        if self.len + added > self.capacity {
            if self.grow_by == 0 {
                return refuse("made for 0 positions".into());
            }
            let more = (self.len + added - self.capacity).div_ceil(self.grow_by) * self.grow_by;
            let tail = zeros(src, self.dim, more)?;
            if let Some(data) = self.buffer.data.take() {
                self.buffer.data = Some(Tensor::cat(&[&data, &tail], self.dim)?);
            }
            self.capacity += more;
        }
        if added > 0 {
            self.buffer.write(src, self.dim, self.len)?;
        }
        self.len += added;
        Ok(())
    }
}

/// Keys and values in two [`Cache`]s.
#[derive(Debug, Clone)]
pub struct KvCache {
    k: Cache,
    v: Cache,
}

impl KvCache {
    /// Along `dim`, with room for `max_seq_len` positions at first.
    #[must_use]
    pub fn new(dim: usize, max_seq_len: usize) -> Self {
        Self { k: Cache::new(dim, max_seq_len), v: Cache::new(dim, max_seq_len) }
    }

    /// The keys' cache.
    #[must_use]
    pub fn k_cache(&self) -> &Cache {
        &self.k
    }

    /// The values' cache.
    #[must_use]
    pub fn v_cache(&self) -> &Cache {
        &self.v
    }

    /// The keys' cache.
    pub fn k_cache_mut(&mut self) -> &mut Cache {
        &mut self.k
    }

    /// The values' cache.
    pub fn v_cache_mut(&mut self) -> &mut Cache {
        &mut self.v
    }

    /// The keys held.
    ///
    /// # Errors
    /// As [`Cache::current_data`].
    #[track_caller]
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.k.current_data()
    }

    /// The values held.
    ///
    /// # Errors
    /// As [`Cache::current_data`].
    #[track_caller]
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.v.current_data()
    }

    /// Adds positions and returns all keys and values so far.
    ///
    /// # Errors
    /// As [`Cache::append`].
    #[track_caller]
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.k.append(k)?;
        self.v.append(v)?;
        match (self.k.current_data()?, self.v.current_data()?) {
            (Some(k), Some(v)) => Ok((k, v)),
            _ => refuse("nothing is held after an append".into()),
        }
    }

    /// Positions held.
    #[must_use]
    pub fn current_seq_len(&self) -> usize {
        self.k.current_seq_len()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.k.reset();
        self.v.reset();
    }
}

/// Keys and values that are concatenated at every append; no buffer, no limit.
#[derive(Debug, Clone)]
pub struct ConcatKvCache {
    held: Option<(Tensor, Tensor)>,
    dim: usize,
}

impl ConcatKvCache {
    /// Along `dim`.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        Self { held: None, dim }
    }

    /// Positions held.
    #[must_use]
    pub fn current_seq_len(&self) -> usize {
        self.k().and_then(|k| k.dims().get(self.dim).copied()).unwrap_or(0)
    }

    /// Whether nothing was appended yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_none()
    }

    /// The dim of positions.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Adds positions and returns all keys and values so far, without gradients, as Candle.
    ///
    /// # Errors
    /// When shapes or dtypes do not fit what is held.
    #[track_caller]
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = match &self.held {
            None => (k.detach(), v.detach()),
            Some((held_k, held_v)) => {
                let k = Tensor::cat(&[held_k, &k.detach()], self.dim)?;
                (k, Tensor::cat(&[held_v, &v.detach()], self.dim)?)
            }
        };
        self.held = Some((k.clone(), v.clone()));
        Ok((k, v))
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.held = None;
    }

    /// The keys held.
    #[must_use]
    pub fn k(&self) -> Option<&Tensor> {
        self.held.as_ref().map(|(k, _)| k)
    }

    /// The values held.
    #[must_use]
    pub fn v(&self) -> Option<&Tensor> {
        self.held.as_ref().map(|(_, v)| v)
    }

    /// The keys held.
    pub fn k_mut(&mut self) -> Option<&mut Tensor> {
        self.held.as_mut().map(|(k, _)| k)
    }

    /// The values held.
    pub fn v_mut(&mut self) -> Option<&mut Tensor> {
        self.held.as_mut().map(|(_, v)| v)
    }

    /// Keys and values.
    #[must_use]
    pub fn into_inner(self) -> Option<(Tensor, Tensor)> {
        self.held
    }
}
