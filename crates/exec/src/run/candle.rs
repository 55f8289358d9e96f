//! Candle's own op for every primitive: what runs where no kernel of ours serves, and what keeps Candle's gradients.
//!
//! Composites never arrive here: capture replaced them by their decomposition. Every op used is one that Candle
//! differentiates where it can be differentiated at all; none of its `no_bwd` fused ops is.

use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use candle_lazy_graph::{BinaryOp, CmpOp, Op, ReduceOp, UnaryOp};
use candle_lazy_ops::fault;

/// The values of an additive causal mask (queries, keys), row-major.
pub(super) fn causal_mask_values(dims: &[usize], window: Option<usize>) -> Vec<f32> {
    let (queries, keys) = match dims {
        [queries, keys] => (*queries, *keys),
        _ => (0, 0),
    };
    let mut values = Vec::with_capacity(queries * keys);
    for i in 0..queries {
        // inference checked that there are at least as many keys as queries
        let last = keys - queries + i;
        let first = window.filter(|_| !fault::active("replay.window")).map_or(0, |w| (last + 1).saturating_sub(w));
        values.extend((0..keys).map(|j| if (first..=last).contains(&j) { 0.0 } else { f32::NEG_INFINITY }));
    }
    values
}

pub(super) fn apply(op: &Op, scalars: &[f64], x: &[Tensor], dims: &[usize], device: &Device) -> Result<Tensor> {
    let at = |i: usize| x.get(i).ok_or_else(|| Error::Internal(format!("{} lacks input {i}", op.name())));
    let scalar =
        |i: usize| scalars.get(i).copied().ok_or_else(|| Error::Internal(format!("{} lacks scalar {i}", op.name())));
    Ok(match op {
        Op::Full { dtype, .. } => Tensor::full(scalar(0)?, dims, device)?.to_dtype(*dtype)?,
        Op::CausalMask { window, dtype, .. } => {
            Tensor::from_vec(causal_mask_values(dims, *window), dims, device)?.to_dtype(*dtype)?
        }
        Op::Unary(f) => unary(*f, at(0)?)?,
        Op::Binary(f) => binary(*f, at(0)?, at(1)?)?,
        Op::Compare(f) => compare(*f, at(0)?, at(1)?)?,
        Op::CompareScalar(f) => {
            let rhs = Tensor::full(scalar(0)?, (), device)?.to_dtype(at(0)?.dtype())?;
            compare(*f, at(0)?, &rhs.broadcast_as(at(0)?.shape())?)?
        }
        Op::Affine if fault::active("replay.affine") => at(0)?.affine(scalar(0)?, 0.0)?,
        Op::Affine => at(0)?.affine(scalar(0)?, scalar(1)?)?,
        Op::Powf => at(0)?.powf(scalar(0)?)?,
        Op::Where => {
            let wide = |t: &Tensor| t.broadcast_as(dims);
            wide(at(0)?)?.where_cond(&wide(at(1)?)?, &wide(at(2)?)?)?
        }
        Op::Cast(dtype) => at(0)?.to_dtype(*dtype)?,
        Op::Reduce { op, axes, keepdim } => reduce(*op, at(0)?, *axes, *keepdim)?,
        Op::Matmul => matmul(at(0)?, at(1)?, dims)?,
        Op::Reshape { .. } => at(0)?.reshape(dims)?,
        Op::Permute { perm } => at(0)?.permute(perm.iter().map(|&d| usize::from(d)).collect::<Vec<_>>())?,
        Op::Narrow { dim, start, len } => at(0)?.narrow(usize::from(*dim), *start, *len)?,
        Op::Broadcast { .. } => at(0)?.broadcast_as(dims)?,
        Op::Contiguous => at(0)?.contiguous()?,
        Op::Detach => at(0)?.detach(),
        Op::Concat { dim } => Tensor::cat(x, usize::from(*dim))?,
        Op::IndexSelect { dim } => at(0)?.contiguous()?.index_select(&at(1)?.contiguous()?, usize::from(*dim))?,
        Op::SliceAssign { dim, start } => at(0)?.slice_scatter(at(1)?, usize::from(*dim), *start)?,
        other => return Err(Error::Internal(format!("{} was not decomposed", other.name()))),
    })
}

/// Candle's matmul takes at most two batch dims, and only such that one stride walks through both.
fn matmul(a: &Tensor, b: &Tensor, dims: &[usize]) -> candle_core::Result<Tensor> {
    let (Some(batch), [.., m, k], [.., n]) = (dims.len().checked_sub(2), a.dims(), b.dims()) else {
        return a.matmul(b);
    };
    let (m, k, n) = (*m, *k, *n);
    if b.rank() == 2 && batch > 0 {
        // one product of all rows, instead of one copy of b per batch
        let rows = dims[..batch].iter().product::<usize>() * m;
        return a.reshape((rows, k))?.matmul(b)?.reshape(dims);
    }
    let operand = |t: &Tensor, rows: usize, cols: usize| {
        let mut shape = dims[..batch].to_vec();
        shape.extend([rows, cols]);
        let t = if t.dims() == shape.as_slice() { t.clone() } else { t.broadcast_as(shape)? };
        match batch {
            0 | 1 => Ok(t),
            _ => t.reshape((dims[..batch].iter().product::<usize>(), rows, cols)),
        }
    };
    operand(a, m, k)?.matmul(&operand(b, k, n)?)?.reshape(dims)
}

fn unary(f: UnaryOp, x: &Tensor) -> candle_core::Result<Tensor> {
    match f {
        UnaryOp::Neg => x.neg(),
        UnaryOp::Abs => x.abs(),
        UnaryOp::Recip => x.recip(),
        UnaryOp::Sqr => x.sqr(),
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Rsqrt => x.sqrt()?.recip(),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Log => x.log(),
        UnaryOp::Sin => x.sin(),
        UnaryOp::Cos => x.cos(),
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Erf => x.erf(),
        UnaryOp::Gelu => x.gelu(),
        UnaryOp::GeluErf => x.gelu_erf(),
        UnaryOp::Relu => x.relu(),
        UnaryOp::Silu => x.silu(),
        UnaryOp::Sigmoid if fault::active("replay.detached") => sigmoid(&x.detach()),
        UnaryOp::Sigmoid => sigmoid(x),
        UnaryOp::Floor => x.floor(),
        UnaryOp::Ceil => x.ceil(),
        UnaryOp::Round => x.round(),
        UnaryOp::Sign => x.sign(),
    }
}

/// 1/(1 + e⁻ˣ) for x ≥ 0, eˣ/(1 + eˣ) below: no exponential overflows, whose gradient would be 0·∞.
fn sigmoid(x: &Tensor) -> candle_core::Result<Tensor> {
    let e = x.abs()?.neg()?.exp()?;
    let above = x.ge(&x.zeros_like()?)?;
    above.where_cond(&e.ones_like()?, &e)?.div(&(&e + 1.0)?)
}

fn binary(f: BinaryOp, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    match f {
        BinaryOp::Add => a.broadcast_add(b),
        BinaryOp::Sub if fault::active("replay.sub") => b.broadcast_sub(a),
        BinaryOp::Sub => a.broadcast_sub(b),
        BinaryOp::Mul => a.broadcast_mul(b),
        BinaryOp::Div => a.broadcast_div(b),
        BinaryOp::Maximum => a.broadcast_maximum(b),
        BinaryOp::Minimum => a.broadcast_minimum(b),
    }
}

fn compare(f: CmpOp, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    match f {
        CmpOp::Eq => a.broadcast_eq(b),
        CmpOp::Ne => a.broadcast_ne(b),
        CmpOp::Lt => a.broadcast_lt(b),
        CmpOp::Le => a.broadcast_le(b),
        CmpOp::Gt => a.broadcast_gt(b),
        CmpOp::Ge => a.broadcast_ge(b),
    }
}

fn reduce(f: ReduceOp, x: &Tensor, axes: u32, keepdim: bool) -> candle_core::Result<Tensor> {
    let dims: Vec<usize> = (0..x.rank()).filter(|d| axes & (1 << d) != 0).collect();
    if dims.is_empty() {
        return Ok(x.clone());
    }
    if x.elem_count() == 0 && matches!(f, ReduceOp::Max | ReduceOp::Min) {
        // Candle refuses; inference only lets results without elements through
        let keep = |d: &usize| {
            if dims.contains(d) {
                keepdim.then_some(1)
            } else {
                Some(x.dims()[*d])
            }
        };
        let shape: Vec<usize> = (0..x.rank()).filter_map(|d| keep(&d)).collect();
        return Tensor::zeros(shape, x.dtype(), x.device());
    }
    // Candle divides by strides when it reduces
    let x = if x.stride().contains(&0) { &x.force_contiguous()? } else { x };
    match (f, keepdim) {
        (ReduceOp::Sum, true) => x.sum_keepdim(dims),
        (ReduceOp::Sum, false) => x.sum(dims),
        (ReduceOp::Mean, true) => x.mean_keepdim(dims),
        (ReduceOp::Mean, false) => x.mean(dims),
        (ReduceOp::Max | ReduceOp::Min, _) => {
            // Candle reduces one dim at a time; from the last one, so that earlier indices stay
            let mut y = x.clone();
            let dims = &dims[fault::one_if("replay.extreme").min(dims.len())..];
            for &d in dims.iter().rev() {
                y = match (f, keepdim) {
                    (ReduceOp::Max, true) => y.max_keepdim(d)?,
                    (ReduceOp::Max, false) => y.max(d)?,
                    (_, true) => y.min_keepdim(d)?,
                    (_, false) => y.min(d)?,
                };
            }
            Ok(y)
        }
    }
}
