//! Causal self-attention with rotary positions, grouped key/value heads and a cache.

use crate::error::{Error, Result};
use crate::kv_cache::KvCache;
use crate::linear::{linear_b, Linear};
use crate::lora::{AdaptedRows, LoraLinear};
use crate::module::Module;
use crate::scope;
use candle_lazy_exec::{AttentionOptions, LazyTensor};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// Cosines and sines of the positions that a call adds, (s, head_dim / 2) each; one slice of a [`crate::RopeTable`].
#[derive(Debug, Clone)]
pub struct Positions {
    /// Cosines.
    pub cos: LazyTensor,
    /// Sines.
    pub sin: LazyTensor,
}

/// The attention block of Llama-like decoders.
#[derive(Debug, Clone)]
pub struct CausalSelfAttention {
    q: LoraLinear,
    k: LoraLinear,
    v: LoraLinear,
    o: LoraLinear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    path: Arc<str>,
}

/// Sizes of a [`CausalSelfAttention`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionSizes {
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) qkv_bias: bool,
    pub(crate) out_bias: bool,
    pub(crate) window: Option<usize>,
}

impl CausalSelfAttention {
    /// From its four maps: `q` (heads·d, hidden), `k` and `v` (kv_heads·d, hidden), `o` (hidden, heads·d).
    ///
    /// # Errors
    /// Where the widths do not divide into the heads, or `heads` is no multiple of `kv_heads`.
    #[track_caller]
    pub fn new(q: Linear, k: Linear, v: Linear, o: Linear, heads: usize, kv_heads: usize) -> Result<Self> {
        let width = q.out_features();
        let grouped = heads > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads) && width.is_multiple_of(heads);
        let head_dim = if grouped { width / heads } else { 0 };
        let kv_width = kv_heads.checked_mul(head_dim);
        let fits = grouped
            && Some(k.out_features()) == kv_width
            && Some(v.out_features()) == kv_width
            && o.in_features() == width;
        if !fits {
            return Err(Error::module(
                "attention",
                "",
                format_args!(
                    "{heads} heads over {kv_heads} key/value heads do not fit q {:?}, k {:?}, v {:?}, o {:?}",
                    q.weight().shape(),
                    k.weight().shape(),
                    v.weight().shape(),
                    o.weight().shape()
                ),
            ));
        }
        Ok(Self {
            q: q.into(),
            k: k.into(),
            v: v.into(),
            o: o.into(),
            heads,
            kv_heads,
            head_dim,
            window: None,
            path: "".into(),
        })
    }

    /// From `q_proj`, `k_proj`, `v_proj` and `o_proj` of the builder. The caller has checked that the sizes multiply.
    #[track_caller]
    pub(crate) fn load(sizes: AttentionSizes, vb: VarBuilder<'_>) -> Result<Self> {
        let AttentionSizes { hidden, heads, kv_heads, head_dim, qkv_bias, out_bias, window } = sizes;
        let width = heads.saturating_mul(head_dim);
        let kv_width = kv_heads.saturating_mul(head_dim);
        Ok(Self {
            q: linear_b(hidden, width, qkv_bias, vb.pp("q_proj"))?.into(),
            k: linear_b(hidden, kv_width, qkv_bias, vb.pp("k_proj"))?.into(),
            v: linear_b(hidden, kv_width, qkv_bias, vb.pp("v_proj"))?.into(),
            o: linear_b(width, hidden, out_bias, vb.pp("o_proj"))?.into(),
            heads,
            kv_heads,
            head_dim,
            window,
            path: vb.prefix().into(),
        })
    }

    /// The map called `name` in checkpoints (`q_proj`, `k_proj`, `v_proj`, `o_proj`).
    pub fn projection_mut(&mut self, name: &str) -> Option<&mut LoraLinear> {
        match name {
            "q_proj" => Some(&mut self.q),
            "k_proj" => Some(&mut self.k),
            "v_proj" => Some(&mut self.v),
            "o_proj" => Some(&mut self.o),
            _ => None,
        }
    }

    /// The maps in the order `q_proj`, `k_proj`, `v_proj`, `o_proj`.
    pub(crate) fn projections(&self) -> [&LoraLinear; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    /// As [`CausalSelfAttention::forward`] for several texts at once: the rows of `xs` (1, rows, hidden) are new positions of one text
    /// after the other, `caches` has each text's number of rows and its cache, and `at` each row's own place. Rows see their own text
    /// alone. `adapters` names the rows' adapters of each map, as [`CausalSelfAttention::projections`] orders them.
    #[track_caller]
    pub(crate) fn forward_packed<'c>(
        &self,
        xs: &LazyTensor,
        at: &Positions,
        caches: impl Iterator<Item = (usize, &'c mut KvCache)>,
        adapters: [&[AdaptedRows<'_>]; 4],
    ) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let [of_q, of_k, of_v, of_o] = adapters;
        let (q, k, v) =
            (self.q.forward_packed(xs, of_q)?, self.k.forward_packed(xs, of_k)?, self.v.forward_packed(xs, of_v)?);
        let (q, k, v) = self.turned(&q, &k, &v, at)?;
        let options = AttentionOptions { causal: true, window: self.window, ..self.options() };
        let mut results = Vec::new();
        let mut start = 0;
        for (rows, cache) in caches {
            let (q, k, v) = (q.narrow(2, start, rows)?, k.narrow(2, start, rows)?, v.narrow(2, start, rows)?);
            let (k, v) = cache.append(&k, &v)?;
            results.push(LazyTensor::attention(&q, &k, &v, None, &options)?);
            start += rows;
        }
        let y = LazyTensor::cat(&results, 2)?;
        let (b, _, s, _) = y.dims4()?;
        self.o.forward_packed(&y.transpose(1, 2)?.reshape((b, s, self.heads * self.head_dim))?, of_o)
    }

    /// Attention of the new positions `xs` (batch, s, hidden) over themselves and what `cache` holds.
    ///
    /// The query at new position `i` sees the keys `0..=held + i`. The result has shape (batch, s, hidden).
    ///
    /// # Errors
    /// [`Error::CacheFull`] where the cache has no room, and as its ops.
    #[track_caller]
    pub fn forward(&self, xs: &LazyTensor, at: &Positions, cache: &mut KvCache) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let (q, k, v) = self.heads(xs, at)?;
        let (k, v) = cache.append(&k, &v)?;
        let options = AttentionOptions { causal: true, window: self.window, ..self.options() };
        self.joined(&LazyTensor::attention(&q, &k, &v, None, &options)?)
    }

    /// Attention of the positions `xs` (batch, s, hidden) over themselves and those before them, without a cache: what training wants.
    /// A window of the model's is kept to. The result has shape (batch, s, hidden).
    ///
    /// # Errors
    /// As its ops.
    #[track_caller]
    pub fn forward_causal(&self, xs: &LazyTensor, at: &Positions) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let (q, k, v) = self.heads(xs, at)?;
        let options = AttentionOptions { causal: true, window: self.window, ..self.options() };
        self.joined(&LazyTensor::attention(&q, &k, &v, None, &options)?)
    }

    /// Attention of the positions `xs` (batch, s, hidden) over one another, without a cache.
    ///
    /// Every query sees every key, later ones too, but for what `mask` says: it is added to the scores, to (batch, heads, s, s) by
    /// broadcasting ([`LazyTensor::causal_mask`] is one), in the dtype of `xs`. A window of the model's is left to the mask too. The
    /// result has shape (batch, s, hidden).
    ///
    /// # Errors
    /// As its ops.
    #[track_caller]
    pub fn forward_masked(&self, xs: &LazyTensor, at: &Positions, mask: Option<&LazyTensor>) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        let (q, k, v) = self.heads(xs, at)?;
        self.joined(&LazyTensor::attention(&q, &k, &v, mask, &self.options())?)
    }

    /// The same module on the same memory, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a weight that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        let (q, k, v, o) = (self.q.detached()?, self.k.detached()?, self.v.detached()?, self.o.detached()?);
        Ok(Self { q, k, v, o, path: Arc::clone(&self.path), ..*self })
    }

    /// Queries (batch, heads, s, head dim), keys and values (batch, kv heads, s, head dim) of `xs`, turned by their positions.
    #[track_caller]
    fn heads(&self, xs: &LazyTensor, at: &Positions) -> Result<(LazyTensor, LazyTensor, LazyTensor)> {
        self.turned(&self.q.forward(xs)?, &self.k.forward(xs)?, &self.v.forward(xs)?, at)
    }

    /// The maps' results (batch, s, heads · head dim) as heads, queries and keys turned by their positions.
    #[track_caller]
    fn turned(
        &self,
        q: &LazyTensor,
        k: &LazyTensor,
        v: &LazyTensor,
        at: &Positions,
    ) -> Result<(LazyTensor, LazyTensor, LazyTensor)> {
        let (b, s, _) = q.dims3()?;
        let q = q.reshape((b, s, self.heads, self.head_dim))?.transpose(1, 2)?;
        let k = k.reshape((b, s, self.kv_heads, self.head_dim))?.transpose(1, 2)?;
        let v = v.reshape((b, s, self.kv_heads, self.head_dim))?.transpose(1, 2)?;
        Ok((q.rope(&at.cos, &at.sin)?, k.rope(&at.cos, &at.sin)?, v))
    }

    fn options(&self) -> AttentionOptions {
        AttentionOptions::new(1. / (self.head_dim as f64).sqrt())
    }

    /// The heads' results (batch, heads, s, head dim) side by side, through the output map.
    #[track_caller]
    fn joined(&self, y: &LazyTensor) -> Result<LazyTensor> {
        let (b, _, s, _) = y.dims4()?;
        self.o.forward(&y.transpose(1, 2)?.reshape((b, s, self.heads * self.head_dim))?)
    }
}
