//! Attention and its gradients, in primitives: with a matrix of scores.

use super::invalid;
use crate::error::Result;
use crate::op::{BinaryOp, Dims, Op, ReduceOp, UnaryOp};
use crate::recorder::{Rec, Recorder};
use candle_core::DType;
use smallvec::smallvec;

/// Sizes: batch, query heads, key heads, queries, keys, head dim, value dim.
struct Sizes {
    b: usize,
    h: usize,
    hk: usize,
    s: usize,
    t: usize,
    d: usize,
    dv: usize,
}

/// What both passes begin with, in the dtype of the arithmetic; heads that share keys and values are a dim of their own,
/// (b, hk, h/hk, s, …), and k and v are (b, hk, 1, t, …), broadcast and not repeated.
struct Parts<X> {
    sizes: Sizes,
    dtype: DType,
    q: X,
    k: X,
    v: X,
    /// tanh(score/cap), where there is a softcap.
    tanh: Option<X>,
    /// softmax(scores), (b, hk, h/hk, s, t).
    weights: X,
}

/// `mask` is the mask's place among the inputs.
fn parts<R: Recorder>(
    r: &mut Rec<'_, R>,
    (causal, softcap, window): (bool, bool, Option<usize>),
    scalars: &[f64],
    inputs: &[R::Ref],
    mask: Option<usize>,
) -> Result<Parts<R::Ref>> {
    let dtype = r.0.dtype(&inputs[0]);
    let (q, k, v) = (r.widen(&inputs[0])?, r.widen(&inputs[1])?, r.widen(&inputs[2])?);
    let (qd, kd, vd) = (r.0.dims(&q), r.0.dims(&k), r.0.dims(&v));
    let (b, h, s, d, hk, t, dv) = (qd[0], qd[1], qd[2], qd[3], kd[1], kd[2], vd[3]);
    let group = h / hk;
    let q = r.reshape(&q, &[b, hk, group, s, d])?;
    let k = r.reshape(&k, &[b, hk, 1, t, d])?;
    let v = r.reshape(&v, &[b, hk, 1, t, dv])?;
    let kt = r.swap_last(&k)?;
    let scores = r.matmul(&q, &kt)?;
    let mut scores = r.affine(&scores, scalars[0], 0.0)?;
    let mut tanh = None;
    if softcap {
        let x = r.affine(&scores, 1.0 / scalars[1], 0.0)?;
        let x = r.unary(UnaryOp::Tanh, &x)?;
        scores = r.affine(&x, scalars[1], 0.0)?;
        tanh = Some(x);
    }
    let wide = r.0.dtype(&scores);
    if let Some(mask) = mask {
        let m = r.cast(&inputs[mask], wide)?;
        let shape: Dims = Dims::from_slice(&[b, h, s, t]);
        let m = r.0.push(Op::Broadcast { shape }, smallvec![], &[m])?;
        let m = r.reshape(&m, &[b, hk, group, s, t])?;
        scores = r.binary(BinaryOp::Add, &scores, &m)?;
    }
    if causal {
        let op = Op::CausalMask { queries: s, keys: t, window, dtype: wide };
        let m = r.0.push(op, smallvec![], &[])?;
        scores = r.binary(BinaryOp::Add, &scores, &m)?;
    }
    let weights = r.0.push(Op::Softmax { dim: 4 }, smallvec![], &[scores])?;
    Ok(Parts { sizes: Sizes { b, h, hk, s, t, d, dv }, dtype, q, k, v, tanh, weights })
}

pub(super) fn forward<R: Recorder>(r: &mut Rec<'_, R>, op: &Op, scalars: &[f64], inputs: &[R::Ref]) -> Result<R::Ref> {
    let Op::Attention { mask, causal, softcap, window } = op else {
        return invalid(op, "no attention");
    };
    let p = parts(r, (*causal, *softcap, *window), scalars, inputs, mask.then_some(3))?;
    let y = r.matmul(&p.weights, &p.v)?;
    let y = r.reshape(&y, &[p.sizes.b, p.sizes.h, p.sizes.s, p.sizes.dv])?;
    r.cast(&y, p.dtype)
}

pub(super) fn backward<R: Recorder>(r: &mut Rec<'_, R>, op: &Op, scalars: &[f64], inputs: &[R::Ref]) -> Result<R::Ref> {
    let Op::AttentionBackward { mask, causal, softcap, window } = op else {
        return invalid(op, "no gradients of attention");
    };
    let p = parts(r, (*causal, *softcap, *window), scalars, inputs, mask.then_some(4))?;
    let Sizes { b, h, hk, s, t, d, dv } = p.sizes;
    let group = h / hk;
    let g = r.widen(&inputs[3])?;
    let g = r.reshape(&g, &[b, hk, group, s, dv])?;
    // dS = P·(dP − Σ P·dP), through the cap and the scale
    let vt = r.swap_last(&p.v)?;
    let through = r.matmul(&g, &vt)?;
    let weighted = r.binary(BinaryOp::Mul, &p.weights, &through)?;
    let sum = r.reduce(ReduceOp::Sum, &weighted, 4)?;
    let rest = r.binary(BinaryOp::Sub, &through, &sum)?;
    let mut scores = r.binary(BinaryOp::Mul, &p.weights, &rest)?;
    if let Some(tanh) = &p.tanh {
        let square = r.unary(UnaryOp::Sqr, tanh)?;
        let slope = r.affine(&square, -1.0, 1.0)?;
        scores = r.binary(BinaryOp::Mul, &scores, &slope)?;
    }
    let scores = r.affine(&scores, scalars[0], 0.0)?;
    let dq = r.matmul(&scores, &p.k)?;
    // the queries of all heads of a group are rows of one product
    let rows = |r: &mut Rec<'_, R>, x: &R::Ref, width: usize| r.reshape(x, &[b, hk, group * s, width]);
    let (scores, q) = (rows(r, &scores, t)?, rows(r, &p.q, d)?);
    let scores = r.swap_last(&scores)?;
    let dk = r.matmul(&scores, &q)?;
    let (weights, g) = (rows(r, &p.weights, t)?, rows(r, &g, dv)?);
    let weights = r.swap_last(&weights)?;
    let dv = r.matmul(&weights, &g)?;
    let mut all = Vec::with_capacity(3);
    for part in [dq, dk, dv] {
        let len = r.0.dims(&part).iter().product();
        all.push(r.reshape(&part, &[len])?);
    }
    let all = r.0.push(Op::Concat { dim: 0 }, smallvec![], &all)?;
    r.cast(&all, p.dtype)
}
