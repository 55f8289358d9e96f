//! Inference of composites and of products with special weights.

use super::{broadcast_shapes, elem_count, out, Ctx, OutMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::op::{Dims, Op};

pub(super) fn group_norm(ctx: &Ctx<'_>, groups: usize, weight: bool, bias: bool) -> Result<OutMeta> {
    let dtype = ctx.float(0)?;
    let [_, channels, _, ..] = ctx.dims(0) else {
        return ctx.shape(format!("input {:?}: needs (batch, channels, …), three dims or more", ctx.dims(0)));
    };
    if groups == 0 || channels % groups != 0 {
        return ctx.shape(format!("{channels} channels of {:?} do not split into {groups} groups", ctx.dims(0)));
    }
    let names = [weight.then_some("the weight"), bias.then_some("the bias")];
    for (i, name) in names.into_iter().flatten().enumerate() {
        if ctx.dims(i + 1) != [*channels] {
            return ctx.shape(format!(
                "{name} has shape {:?}, the input {:?} needs [{channels}]",
                ctx.dims(i + 1),
                ctx.dims(0)
            ));
        }
        ctx.same_dtype_pair(i + 1, name)?;
    }
    Ok(out(ctx.dims(0), dtype))
}

/// The weight is a quantised leaf: it has a shape, and a dtype that says nothing.
pub(super) fn qmatmul(ctx: &Ctx<'_>) -> Result<OutMeta> {
    let dtype = ctx.float(0)?;
    let ([batch @ .., k], [n, k2]) = (ctx.dims(0), ctx.dims(1)) else {
        return ctx.shape(format!("input {:?} and weight {:?}: needs (…, in) and (out, in)", ctx.dims(0), ctx.dims(1)));
    };
    if k != k2 {
        return ctx.shape(format!("input {:?} has {k} features, the weight {:?} takes {k2}", ctx.dims(0), ctx.dims(1)));
    }
    let mut dims = Dims::from_slice(batch);
    dims.push(*n);
    Ok(out(dims, dtype))
}

pub(super) fn norm(op: &Op, ctx: &Ctx<'_>) -> Result<OutMeta> {
    let dtype = ctx.float(0)?;
    if ctx.dims(0).is_empty() {
        return ctx.shape("needs at least one dim, got a scalar");
    }
    let names: &[&str] = match op {
        Op::LayerNorm { weight: false, bias: true } => &["the bias"],
        Op::LayerNorm { bias: true, .. } => &["the weight", "the bias"],
        _ => &["the weight"],
    };
    for (i, name) in (1..ctx.inputs.len()).zip(names) {
        ctx.last_dim_vector(i, name)?;
    }
    Ok(out(ctx.dims(0), dtype))
}

pub(super) fn linear(ctx: &Ctx<'_>, bias: bool) -> Result<OutMeta> {
    ctx.float(0)?;
    let dtype = ctx.same_dtype(0..ctx.inputs.len())?;
    let ([batch @ .., k], [n, k2]) = (ctx.dims(0), ctx.dims(1)) else {
        return ctx.shape(format!("input {:?} and weight {:?}: needs (…, in) and (out, in)", ctx.dims(0), ctx.dims(1)));
    };
    if k != k2 {
        let hint = if k == n { "; the weight is (out, in): transposed it would fit: .t()" } else { "" };
        let (x, w) = (ctx.dims(0), ctx.dims(1));
        return ctx.shape(format!("input {x:?} has {k} features, the weight {w:?} takes {k2}{hint}"));
    }
    if bias && ctx.dims(2) != [*n] {
        return ctx.shape(format!("the bias has shape {:?}, the weight {:?} needs [{n}]", ctx.dims(2), ctx.dims(1)));
    }
    let mut dims = Dims::from_slice(batch);
    dims.push(*n);
    Ok(out(dims, dtype))
}

pub(super) fn lora(ctx: &Ctx<'_>, base: bool) -> Result<OutMeta> {
    ctx.float(0)?;
    let dtype = ctx.same_dtype(0..ctx.inputs.len())?;
    let (x, a, b) = (ctx.dims(0), ctx.dims(1), ctx.dims(2));
    let fits = match (x, a, b) {
        ([.., k], [k2, r], [r2, _]) => k == k2 && r == r2,
        _ => false,
    };
    if !fits {
        return ctx.shape(format!("input {x:?}, A {a:?}, B {b:?}: needs (…, in), (in, rank), (rank, out)"));
    }
    let mut dims = Dims::from_slice(&x[..x.len() - 1]);
    dims.push(b[1]);
    if base && ctx.dims(3) != dims.as_slice() {
        return ctx.shape(format!("the base has shape {:?}, the product {:?}", ctx.dims(3), dims.as_slice()));
    }
    Ok(out(dims, dtype))
}

pub(super) fn lora_segments(ctx: &Ctx<'_>, segments: &[usize]) -> Result<OutMeta> {
    ctx.float(0)?;
    let dtype = ctx.same_dtype(0..ctx.inputs.len())?;
    let (x, base) = (ctx.dims(0), ctx.dims(1));
    let ([lead @ .., n, k], [base_lead @ .., base_n, out_width]) = (x, base) else {
        return ctx.shape(format!("input {x:?}, base {base:?}: needs (…, rows, in) and (…, rows, out)"));
    };
    if lead != base_lead || n != base_n {
        return ctx.shape(format!("input {x:?} and base {base:?} differ in their rows"));
    }
    if segments.is_empty() || !segments.len().is_multiple_of(2) {
        return ctx.shape("needs two sizes for each segment, and at least one segment");
    }
    let all = segments.iter().fold(0usize, |sum, &size| sum.saturating_add(size));
    if all > *n {
        return ctx.range(format!("the segments have {all} rows, the input {x:?} has {n}"));
    }
    for i in (2..ctx.inputs.len()).step_by(2) {
        let (a, b) = (ctx.dims(i), ctx.dims(i + 1));
        if !matches!((a, b), ([ka, r], [rb, nb]) if ka == k && r == rb && nb == out_width) {
            let adapter = i / 2 - 1;
            return ctx.shape(format!(
                "A {a:?} and B {b:?} of adapter {adapter}: input {x:?} and base {base:?} need ({k}, rank) and (rank, {out_width})"
            ));
        }
    }
    Ok(out(base, dtype))
}

pub(super) fn rope(ctx: &Ctx<'_>) -> Result<OutMeta> {
    ctx.float(0)?;
    let dtype = ctx.same_dtype(0..3)?;
    let [b, _, s, d] = ctx.dims(0) else {
        return ctx.shape(format!("input {:?}: needs (batch, heads, positions, head dim)", ctx.dims(0)));
    };
    if d % 2 != 0 {
        return ctx.shape(format!("input {:?}: the head dim must be even", ctx.dims(0)));
    }
    for i in 1..3 {
        let t = ctx.dims(i);
        if t != [*s, d / 2] && t != [*b, *s, d / 2] {
            return ctx.shape(format!(
                "input {:?} needs cos and sin of shape [{s}, {}] or [{b}, {s}, {}], got {t:?}",
                ctx.dims(0),
                d / 2,
                d / 2
            ));
        }
    }
    if ctx.dims(1) != ctx.dims(2) {
        return ctx.shape(format!("cos {:?} and sin {:?} differ", ctx.dims(1), ctx.dims(2)));
    }
    Ok(out(ctx.dims(0), dtype))
}

/// `mask` is the mask's place among the inputs, where there is one.
pub(super) fn attention(ctx: &Ctx<'_>, mask: Option<usize>, causal: bool, window: Option<usize>) -> Result<OutMeta> {
    ctx.float(0)?;
    let dtype = ctx.same_dtype(0..ctx.inputs.len())?;
    let (q, k, v) = (ctx.dims(0), ctx.dims(1), ctx.dims(2));
    let ([b, h, s, d], [bk, hk, t, dk], [bv, hv, tv, dv]) = (q, k, v) else {
        return ctx
            .shape(format!("q {q:?}, k {k:?}, v {v:?}: each needs four dims (batch, heads, positions, head dim)"));
    };
    if (b, hk, t) != (bk, hv, tv) || bk != bv || d != dk {
        return ctx.shape(format!("q {q:?}, k {k:?}, v {v:?} do not fit each other"));
    }
    if *hk == 0 || h % hk != 0 {
        return ctx.shape(format!("{h} query heads cannot share {hk} key heads (q {q:?}, k {k:?})"));
    }
    if causal && s > t {
        return ctx.shape(format!("causal with {s} queries and only {t} keys (q {q:?}, k {k:?})"));
    }
    if window.is_some() && !causal {
        return Err(Error::new(ctx.op, ErrorKind::Unsupported("a sliding window without causal".into())));
    }
    if window == Some(0) {
        return ctx.range("a sliding window of zero keys");
    }
    let scores = [*b, *h, *s, *t];
    if let Some(mask) = mask.map(|at| ctx.dims(at)) {
        if broadcast_shapes(mask, &scores).as_deref() != Some(&scores[..]) {
            return ctx.shape(format!("the mask {mask:?} does not broadcast to {scores:?}"));
        }
    }
    Ok(out(Dims::from_slice(&[*b, *h, *s, *dv]), dtype))
}

pub(super) fn attention_backward(ctx: &Ctx<'_>, mask: bool, causal: bool, window: Option<usize>) -> Result<OutMeta> {
    let result = attention(ctx, mask.then_some(4), causal, window)?;
    if ctx.dims(3) != result.dims.as_slice() {
        return ctx.shape(format!("the gradient {:?} of a result of {:?}", ctx.dims(3), result.dims.as_slice()));
    }
    let parts = [ctx.dims(0), ctx.dims(1), ctx.dims(2)];
    let all = parts.iter().try_fold(0usize, |sum, dims| sum.checked_add(elem_count(dims)?));
    match all {
        Some(all) => Ok(out(Dims::from_slice(&[all]), result.dtype)),
        None => ctx.shape(format!("the gradients of {parts:?} have too many elements")),
    }
}
