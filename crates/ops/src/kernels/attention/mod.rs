//! Attention with an online softmax over fixed blocks of keys.
//!
//! A query's bits depend on its own row, its keys and its mask only: not on how many queries run together, not on threads. Keys are
//! taken in blocks of 64 and in segments of 1024 at fixed absolute positions, so that prefill, chunked prefill and decode agree bit for
//! bit. A block's values are summed on their own before they join what came before, as are a segment's: of long
//! texts that loses less. No matrix of scores is ever stored, and the heads that share keys go through them together.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod backward;
mod loops;
mod tile;

pub use backward::attention_backward;
pub(crate) use backward::extra_bytes as backward_extra_bytes;

use super::{check_float, check_out};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::math::Real;
use crate::view::{Slice, SliceMut, Strided, View};

const OP: &str = "attention";
/// Keys per block. Part of the numbers that attention gives.
const BLOCK: usize = 64;
/// Keys per segment, a whole number of blocks. Part of the numbers too.
const SEGMENT: usize = 1024;
/// The most queries that share a turned block of keys.
const QUERIES: usize = 64;
/// The least that are worth turning one, where there are more.
const FEWEST: usize = 16;
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

/// The most bytes that attention of so many queries takes beside its result, over all threads: `(d, dv)`, and `size` of its numbers.
pub(crate) fn extra_bytes(queries: usize, skv: usize, (d, dv): (usize, usize), size: usize) -> usize {
    let threads = crate::kernels::team::threads();
    let query = d.saturating_add(64);
    let found = dv.saturating_mul(size).saturating_add(32);
    // a thread's tile: its queries, what they found before and just now, a block of keys twice and of values
    let tile = QUERIES * (query * size + 2 * found) + size * (BLOCK * (2 * d + dv + 1) + GROUP * dv);
    // where segments are tasks, all tiles are held at once, and each segment's findings; there are few queries then
    let held = queries.min((2 * threads + 1) * QUERIES);
    let segments = skv / SEGMENT + 2;
    let apart = held.saturating_mul(query.saturating_mul(size).saturating_add(segments.saturating_mul(found)));
    threads.saturating_mul(tile).saturating_add(apart)
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
    let (job, b) = Job::checked(OP, q, k, v, mask, params)?;
    let Shape { h, sq, dv, .. } = job.shape;
    let len = [h, sq, dv].iter().fold(b, |a, &x| a.saturating_mul(x));
    check_out(OP, out, q.dtype(), len)?;
    if len == 0 {
        return Ok(());
    }
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

impl<'a> Job<'a> {
    /// The job of these operands, and how many batches there are.
    fn checked(
        op: &'static str,
        q: &'a View<'_>,
        k: &'a View<'_>,
        v: &'a View<'_>,
        mask: Option<&'a View<'_>>,
        params: &'a AttentionParams,
    ) -> Result<(Self, usize)> {
        for t in [Some(q), Some(k), Some(v), mask].into_iter().flatten() {
            t.check()?;
            check_float(op, t.dtype())?;
        }
        for (what, t) in [("k", k), ("v", v)] {
            if t.dtype() != q.dtype() {
                return Err(Error::dtypes(op, what, q.dtype(), t.dtype()));
            }
        }
        let bad = || {
            Error::shape(
                op,
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
        let shape = Shape { h, group: h / hk.max(1), sq, skv, d, dv };
        Ok((Self { shape, params, q: &q.layout, k: &k.layout, v: &v.layout, mask }, b))
    }
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
