//! Attention with an online softmax over fixed blocks of keys.
//!
//! A query's bits depend on its own row, its keys and its mask only: not on how many queries run together,
//! not on threads. Keys are taken in blocks of 64 at fixed absolute positions, so that prefill, chunked prefill and decode
//! agree bit for bit. No matrix of scores is ever stored.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod loops;

use super::{check_float, check_out, team};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::math::Real;
use crate::view::{each_dtype, Slice, SliceMut, Strided, View};
use loops::{accumulate, scaled, weigh, Scores};

const OP: &str = "attention";
/// Keys per block. Part of the numbers that attention gives.
const BLOCK: usize = 64;
/// Queries that share a converted block of keys.
const QUERIES: usize = 32;
/// Queries that share a pass over a block's keys and values.
const GROUP: usize = 4;

/// How scores become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Factor on q·k, usually 1/√d.
    pub scale: f64,
    /// Query i of sq sees keys up to skv - sq + i.
    pub causal: bool,
    /// Scores become cap·tanh(score/cap), before the mask.
    pub softcap: Option<f64>,
    /// Query i, at position p = skv - sq + i, sees keys with |p - key| < window.
    pub window: Option<usize>,
}

impl AttentionParams {
    /// Plain attention with this scale.
    pub fn new(scale: f64) -> Self {
        Self { scale, causal: false, softcap: None, window: None }
    }

    /// The same with the causal rule.
    pub fn causal(self) -> Self {
        Self { causal: true, ..self }
    }
}

/// Range of keys that query `i` sees.
pub(crate) fn visible(p: &AttentionParams, i: usize, sq: usize, skv: usize) -> (usize, usize) {
    // Positions relative to key 0 can be negative when there are fewer keys than queries.
    let at = i as i128 + skv as i128 - sq as i128;
    let mut end = skv as i128;
    let mut start = 0i128;
    if p.causal {
        end = end.min(at + 1 + fault::one_if("attention.causal") as i128);
    }
    if let Some(w) = p.window {
        start = start.max(at - w as i128 + 1 - fault::one_if("attention.window") as i128);
        end = end.min(at + w as i128);
    }
    let end = usize::try_from(end).unwrap_or(0);
    let start = usize::try_from(start).unwrap_or(0).min(end);
    (start, end)
}

struct Shape {
    h: usize,
    group: usize,
    sq: usize,
    skv: usize,
    d: usize,
    dv: usize,
}

/// `softmax(q·kᵀ·scale + mask)·v` for q `(b, h, sq, d)`, k `(b, hk, skv, d)`, v `(b, hk, skv, dv)`, `h % hk == 0`
/// (query head i uses key head i / (h / hk)); the output is `(b, h, sq, dv)`. `mask` is additive, a float of any type,
/// and broadcasts to `(b, h, sq, skv)`.
///
/// f16 and bf16 compute in f32 and round once, f64 computes in f64. A query that sees no key gives
/// NaN, as an eager softmax over -∞ does.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `Unsupported` (not a float), `OutOfBounds`.
pub fn attention(
    q: &View<'_>,
    k: &View<'_>,
    v: &View<'_>,
    mask: Option<&View<'_>>,
    params: &AttentionParams,
    out: &mut SliceMut<'_>,
) -> Result<()> {
    for t in [Some(q), Some(k), Some(v), mask].into_iter().flatten() {
        t.check()?;
        check_float(OP, t.dtype())?;
    }
    for (what, t) in [("k", k), ("v", v)] {
        if t.dtype() != q.dtype() {
            return Err(Error::dtypes(OP, what, q.dtype(), t.dtype()));
        }
    }
    let bad = || {
        Error::shape(
            OP,
            format!("q {:?}, k {:?}, v {:?}, mask {:?}", q.dims(), k.dims(), v.dims(), mask.map(|m| m.dims())),
        )
    };
    let (&[b, h, sq, d], &[kb, hk, skv, kd], &[vb, vh, vs, dv]) = (q.dims(), k.dims(), v.dims()) else {
        return Err(bad());
    };
    let grouped = hk != 0 && h % hk == 0 || h == 0 && hk == 0;
    if kb != b || vb != b || vh != hk || vs != skv || kd != d || !grouped {
        return Err(bad());
    }
    let mask = match mask.filter(|_| !fault::active("attention.mask")) {
        None => None,
        Some(m) => {
            let layout = m.layout.broadcast_to(&[b, h, sq, skv]).map_err(|_| bad())?;
            Some((m.data, layout))
        }
    };
    let len = [h, sq, dv].iter().fold(b, |a, &x| a.saturating_mul(x));
    check_out(OP, out, q.dtype(), len)?;
    if len == 0 {
        return Ok(());
    }
    let shape = Shape { h, group: h / hk.max(1), sq, skv, d, dv };
    let job = Job { shape, params, q: &q.layout, k: &k.layout, v: &v.layout, mask };
    match (q.data, k.data, v.data, out) {
        (Slice::F64(q), Slice::F64(k), Slice::F64(v), SliceMut::F64(o)) => {
            job.run::<f64, _>(q, k, v, o);
        }
        (Slice::F32(q), Slice::F32(k), Slice::F32(v), SliceMut::F32(o)) => {
            job.run::<f32, _>(q, k, v, o);
        }
        (Slice::F16(q), Slice::F16(k), Slice::F16(v), SliceMut::F16(o)) => {
            job.run::<f32, _>(q, k, v, o);
        }
        (Slice::BF16(q), Slice::BF16(k), Slice::BF16(v), SliceMut::BF16(o)) => {
            job.run::<f32, _>(q, k, v, o);
        }
        _ => return Err(Error::unsupported(OP, "this mix of dtypes")),
    }
    Ok(())
}

struct Job<'a> {
    shape: Shape,
    params: &'a AttentionParams,
    q: &'a Strided,
    k: &'a Strided,
    v: &'a Strided,
    mask: Option<(Slice<'a>, Strided)>,
}

/// Rows of keys or values in the arithmetic type: in place, or converted.
fn block<'b, T: Real, E: Element>(
    src: &'b [E],
    layout: &Strided,
    base: usize,
    rows: usize,
    buffer: &'b mut Vec<T>,
    view: &Slice<'b>,
) -> (&'b [T], usize) {
    let (step, inner, cols) = (layout.strides[2], layout.strides[3], layout.dims[3]);
    if let (Some(direct), true) = (T::of(view), inner == 1 || cols == 1) {
        return (direct.get(base..).unwrap_or_default(), step);
    }
    buffer.resize(rows * cols, T::ZERO);
    if cols > 0 {
        for (r, row) in buffer.chunks_exact_mut(cols).enumerate() {
            read_row(src, base + r * step, inner, row);
        }
    }
    (buffer, cols)
}

fn read_row<T: Real, E: Element>(src: &[E], base: usize, stride: usize, row: &mut [T]) {
    if stride == 1 {
        T::read(&src[base..base + row.len()], row);
    } else {
        for (j, d) in row.iter_mut().enumerate() {
            *d = T::get(src[base + j * stride]);
        }
    }
}

/// Running state of one query.
struct Query<T> {
    max: T,
    sum: T,
    start: usize,
    end: usize,
}

/// One thread's scratch.
#[derive(Default)]
struct Scratch<T> {
    q: Vec<T>,
    acc: Vec<T>,
    keys: Vec<T>,
    values: Vec<T>,
    mask: Vec<T>,
    state: Vec<Query<T>>,
}

impl Job<'_> {
    fn run<T: Scores, E: Element>(&self, q: &[E], k: &[E], v: &[E], out: &mut [E])
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let s = &self.shape;
        let head = s.sq * s.dv;
        let work = [s.skv, s.d + s.dv, out.len() / head.max(1)].into_iter().fold(s.sq, usize::saturating_mul);
        let threads = if work < 1 << 18 { 1 } else { team::threads() };
        let mut tiles = Vec::new();
        for (bh, head) in out.chunks_mut(head).enumerate() {
            tiles.extend(head.chunks_mut(QUERIES * s.dv).enumerate().map(|(t, tile)| (bh, t * QUERIES, tile)));
        }
        team::each_group(tiles, threads, |group| {
            let mut sc = Scratch::<T>::default();
            for (bh, first, tile) in group {
                self.tile(q, k, v, bh, first, tile, &mut sc);
            }
        });
    }

    /// Queries `first..` of batch and head `bh`, as many as `out` has rows for.
    #[allow(clippy::too_many_arguments)] // operands, position, destination, scratch: nothing to bundle that is used twice
    fn tile<T: Scores, E: Element>(
        &self,
        q: &[E],
        k: &[E],
        v: &[E],
        bh: usize,
        first: usize,
        out: &mut [E],
        sc: &mut Scratch<T>,
    ) where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let s = &self.shape;
        let (b, h) = (bh / s.h, bh % s.h);
        let hk = if fault::active("attention.group") { h % (s.h / s.group.max(1)) } else { h / s.group.max(1) };
        let n = out.len() / s.dv;
        let start_of = |l: &Strided, head: usize| l.offset + b * l.strides[0] + head * l.strides[1];
        let (q0, k0, v0) = (start_of(self.q, h), start_of(self.k, hk), start_of(self.v, hk));
        sc.q.resize(n * s.d, T::ZERO);
        sc.acc.clear();
        sc.acc.resize(n * s.dv, T::ZERO);
        sc.state.clear();
        for i in 0..n {
            let row = &mut sc.q[i * s.d..(i + 1) * s.d];
            read_row(q, q0 + (first + i) * self.q.strides[2], self.q.strides[3], row);
            let (start, end) = visible(self.params, first + i, s.sq, s.skv);
            let end = end - fault::one_if("attention.last_key").min(end - start);
            sc.state.push(Query { max: T::NEG_INF, sum: T::ZERO, start, end });
        }
        let from = sc.state.iter().map(|s| s.start).min().unwrap_or(0) / BLOCK * BLOCK;
        let to = sc.state.iter().map(|s| s.end).max().unwrap_or(0);
        for key in (from..to).step_by(BLOCK) {
            let rows = BLOCK.min(to - key);
            let (ks, vs) = (self.k.strides[2], self.v.strides[2]);
            let place = if fault::active("attention.block") { key % BLOCK } else { key };
            let (keys, kp) = block(k, self.k, k0 + key * ks, rows, &mut sc.keys, &k.into());
            let (values, vp) = block(v, self.v, v0 + place * vs, rows, &mut sc.values, &v.into());
            for (group, states) in sc.state.chunks_mut(GROUP).enumerate() {
                let queries = &sc.q[group * GROUP * s.d..][..states.len() * s.d];
                let first = first + group * GROUP;
                let seen = |s: &Query<T>| (s.start.max(key) - key, (s.end.min(key + BLOCK)).saturating_sub(key));
                if states.iter().map(seen).all(|(lo, hi)| lo >= hi) {
                    continue;
                }
                let mut weights = [[T::ZERO; BLOCK]; GROUP];
                T::scores((queries, states.len(), s.d), (keys, rows, kp), weights.as_flattened_mut());
                let accs = &mut sc.acc[group * GROUP * s.dv..];
                let mut whole = states.len() == GROUP;
                for (i, (state, scores)) in states.iter_mut().zip(&mut weights).enumerate() {
                    let (lo, hi) = seen(state);
                    if lo >= hi {
                        whole = false;
                        continue;
                    }
                    whole &= lo == 0 && hi == rows;
                    // Keys outside a query's range are at -∞, weight 0, so that the order of the sum is the block's own.
                    scores[..lo].fill(T::NEG_INF);
                    scores[hi..].fill(T::NEG_INF);
                    self.adjust(b, h, first + i, key, (lo, hi), scores, &mut sc.mask);
                    weigh(state, scores, &mut accs[i * s.dv..(i + 1) * s.dv]);
                }
                if whole {
                    T::accumulate_group(&weights, rows, values, vp, &mut accs[..GROUP * s.dv]);
                    continue;
                }
                for ((state, weights), acc) in states.iter().zip(&weights).zip(accs.chunks_mut(s.dv)) {
                    let (lo, hi) = seen(state);
                    if lo < hi {
                        accumulate(&weights[lo..hi], &values[lo * vp..], vp, acc);
                    }
                }
            }
        }
        for ((row, acc), state) in out.chunks_exact_mut(s.dv).zip(sc.acc.chunks_exact_mut(s.dv)).zip(&sc.state) {
            for a in acc.iter_mut() {
                *a = *a / state.sum;
            }
            T::write(acc, row);
        }
        if let (true, Some(last)) = (fault::active("attention.tail"), out.last_mut()) {
            let mut one = [T::get(*last)];
            one[0] = fault::nudged(one[0]);
            T::write(&one, std::slice::from_mut(last));
        }
    }

    /// Scale, softcap and mask on the visible scores of one block.
    #[allow(clippy::too_many_arguments)] // a position has four coordinates here
    fn adjust<T: Real>(
        &self,
        b: usize,
        h: usize,
        i: usize,
        key: usize,
        (lo, hi): (usize, usize),
        scores: &mut [T; BLOCK],
        mask: &mut Vec<T>,
    ) {
        let scale = if fault::active("attention.scale") { 1.0 } else { self.params.scale };
        let scores = &mut scores[lo..hi];
        match self.params.softcap.filter(|_| !fault::active("attention.softcap")) {
            Some(cap) => scores.iter_mut().for_each(|x| *x = x.softcap(scale / cap, cap)),
            None => scaled(scores, T::from_f64(scale)),
        }
        if let Some((data, l)) = &self.mask {
            let st = &l.strides;
            let h = if fault::active("attention.mask_head") { 0 } else { h };
            let i = if fault::active("attention.mask_row") { 0 } else { i };
            let base = l.offset + b * st[0] + h * st[1] + i * st[2] + (key + lo) * st[3];
            mask.resize(scores.len(), T::ZERO);
            each_dtype!(Slice, data, m => read_row(m, base, st[3], mask));
            for (x, &m) in scores.iter_mut().zip(mask.iter()) {
                *x = *x + m;
            }
        }
    }
}

macro_rules! slice_from {
    ($($t:ty => $v:ident),*) => {
        $(impl<'a> From<&'a [$t]> for Slice<'a> {
            fn from(v: &'a [$t]) -> Self {
                Slice::$v(v)
            }
        })*
    };
}
slice_from!(half::bf16 => BF16, half::f16 => F16, f32 => F32, f64 => F64);
