//! What the rounding of attention's gradients is measured by, and of the gradients of these.

use super::{softmax, Magnitudes};
use crate::case::Case;
use crate::{eager, Result};
use candle_core::{DType, Tensor, D};
use candle_lazy_graph::Op;

/// What both begin with; each key head stands there as often as query heads use it.
struct Parts {
    /// |q|, |k| and |v|.
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// The weights, with their signs (they have none).
    p: Tensor,
    /// By how much more than others a row's weights are inexact: a score is a sum of products, and what it is off by is the relative
    /// error of its weight.
    inexact: Tensor,
    /// 1 + tanh² where there is a softcap, since 1 − tanh² is a difference; else 1.
    slope: Tensor,
    /// |tanh| where there is a softcap.
    tanh: Option<Tensor>,
}

/// A key head's part as often as query heads use it.
fn repeated(x: &Tensor, h: usize) -> Result<Tensor> {
    let (b, hk, t, d) = x.dims4()?;
    Ok(x.unsqueeze(2)?.broadcast_as((b, hk, h / hk, t, d))?.contiguous()?.reshape((b, h, t, d))?)
}

/// The sum over the query heads of each of `hk` key heads.
fn grouped(x: &Tensor, hk: usize) -> Result<Tensor> {
    let (b, h, t, d) = x.dims4()?;
    Ok(x.contiguous()?.reshape((b, hk, h / hk, t, d))?.sum(2)?)
}

/// The sum over the dims that a mask of `dims` is broadcast over.
fn to_mask(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let mut sum = x.clone();
    let extra = sum.rank() - dims.len();
    for (d, &n) in dims.iter().enumerate() {
        if n == 1 {
            sum = sum.sum_keepdim(d + extra)?;
        }
    }
    for _ in 0..extra {
        sum = sum.sum(0)?;
    }
    Ok(sum)
}

fn turned(x: &Tensor) -> Result<Tensor> {
    Ok(x.t()?.contiguous()?)
}

fn parts(case: &Case, x: &[Tensor], mask: Option<&Tensor>, factor: f64) -> Result<Option<Parts>> {
    let (Op::Attention { causal, softcap, window, .. } | Op::AttentionBackward { causal, softcap, window, .. }) =
        case.op
    else {
        return Ok(None);
    };
    if x.iter().any(|x| x.elem_count() == 0) {
        return Ok(None);
    }
    let s = &case.scalars;
    let ((_, h, queries, _), (_, _, keys, _)) = (x[0].dims4()?, x[1].dims4()?);
    let (q, k, v) = (x[0].contiguous()?, repeated(&x[1], h)?, repeated(&x[2], h)?);
    let mut scores = (q.matmul(&k.t()?)? * s[0])?;
    let sums = (q.abs()?.matmul(&k.abs()?.t()?)? * s[0].abs())?;
    let widest = sums.max_keepdim(3)?.maximum(1.0)?;
    let (mut slope, mut tanh) = (scores.ones_like()?, None);
    if softcap {
        let t = (scores / s[1])?.tanh()?;
        slope = (t.sqr()? + 1.0)?;
        tanh = Some(t.abs()?);
        scores = (t * s[1])?;
    }
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask)?;
    }
    if causal {
        let hidden = eager::run(&Op::CausalMask { queries, keys, window, dtype: DType::F64 }, &[], &[])?;
        scores = scores.broadcast_add(&hidden)?;
    }
    let p = candle_nn::ops::softmax(&scores, D::Minus1)?;
    let inexact = (widest * factor)?.maximum(1.0)?;
    Ok(Some(Parts { q: q.abs()?, k: k.abs()?, v: v.abs()?, p, inexact, slope, tanh }))
}

/// The gradients of attention: dP = g·vᵀ, dS = P·(dP − Σ P·dP), and the products of dS.
pub(super) fn once(case: &Case, x: &[Tensor], g: &Tensor, factor: f64) -> Result<Magnitudes> {
    let Some(parts) = parts(case, x, x.get(3), factor)? else {
        return Ok(vec![None; x.len()]);
    };
    let Parts { q, k, v, p, inexact, slope, .. } = parts;
    let (g, hk) = (g.contiguous()?, x[1].dim(1)?);
    let ds = softmax(&p, &g.matmul(&turned(&v)?)?, 3)?.broadcast_mul(&inexact)?;
    let slid = ((&ds * slope)? * case.scalars[0].abs())?;
    let mut magnitudes = vec![
        Some(slid.matmul(&k)?),
        Some(grouped(&turned(&slid)?.matmul(&q)?, hk)?),
        Some(grouped(&turned(&p.broadcast_mul(&inexact)?)?.matmul(&g)?, hk)?),
    ];
    if let Some(mask) = x.get(3) {
        magnitudes.push(Some(to_mask(&ds, mask.dims())?));
    }
    Ok(magnitudes)
}

/// The gradients of those gradients, given that of the three of them behind one another: the adjoint of each step of their computation,
/// from the last to the first, every term without its sign.
pub(super) fn twice(case: &Case, x: &[Tensor], given: &Tensor, factor: f64) -> Result<Magnitudes> {
    let Some(parts) = parts(case, x, x.get(4), factor)? else {
        return Ok(vec![None; x.len()]);
    };
    let Parts { q, k, v, p, inexact, slope, tanh } = parts;
    let (h, hk, scale) = (x[0].dim(1)?, x[1].dim(1)?, case.scalars[0].abs());
    let g = x[3].contiguous()?.abs()?;
    let lens = [x[0].elem_count(), x[1].elem_count(), x[2].elem_count()];
    let part = |from: usize, i: usize| -> Result<Tensor> { Ok(given.narrow(0, from, lens[i])?.reshape(x[i].shape())?) };
    let (to_dq, to_dk) = (part(0, 0)?, repeated(&part(lens[0], 1)?, h)?);
    let to_dv = repeated(&part(lens[0] + lens[1], 2)?, h)?;
    // the first pass: dP, dP + ΣP·dP, dS
    let dp = g.matmul(&turned(&v)?)?;
    let both = dp.broadcast_add(&(&p * &dp)?.sum_keepdim(3)?)?;
    let unscaled = (&p * &both)?;
    let ds = ((&unscaled * &slope)? * scale)?;
    // dq = dS·k, dk = dSᵀ·q, dv = Pᵀ·g
    let to_ds = ((to_dq.matmul(&turned(&k)?)? + q.matmul(&turned(&to_dk)?)?)? * scale)?;
    let sloped = (&to_ds * &slope)?;
    let along = (&p * &sloped)?.sum_keepdim(3)?;
    let mut to_p = (g.matmul(&turned(&to_dv)?)? + (&sloped * &both)?)?;
    to_p = (to_p + dp.broadcast_mul(&along)?)?;
    let to_dp = sloped.broadcast_add(&along)?.mul(&p)?.broadcast_mul(&inexact)?;
    let to_masked = softmax(&p, &to_p, 3)?.broadcast_mul(&inexact)?;
    let mut to_scores = (&to_masked * &slope)?;
    if let (Some(tanh), Some(cap)) = (tanh, case.scalars.get(1)) {
        let bend = ((tanh * &slope)? * (2.0 / cap))?;
        to_scores = (to_scores + ((to_ds * unscaled)? * bend)?.broadcast_mul(&inexact)?)?;
    }
    let to_scores = (to_scores * scale)?;
    let (ds, p) = (ds.broadcast_mul(&inexact)?, p.broadcast_mul(&inexact)?);
    let mut magnitudes = vec![
        Some((ds.matmul(&to_dk)? + to_scores.matmul(&k)?)?),
        Some(grouped(&(turned(&ds)?.matmul(&to_dq)? + turned(&to_scores)?.matmul(&q)?)?, hk)?),
        Some(grouped(&turned(&to_dp)?.matmul(&g)?, hk)?),
        Some((p.matmul(&to_dv)? + to_dp.matmul(&v)?)?),
    ];
    if let Some(mask) = x.get(4) {
        magnitudes.push(Some(to_mask(&to_masked, mask.dims())?));
    }
    Ok(magnitudes)
}
