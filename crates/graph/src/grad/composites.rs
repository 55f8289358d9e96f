//! Derivatives of composites, from their own formulas where those are shorter than what their parts would give.
//!
//! f16 and bf16 are computed in f32 and rounded once, as their kernels do.

use super::elementwise::{derivative, mul, unbroadcast, wide_result};
use super::movement::full;
use super::{Call, Parts, Ref, Walk, R};
use crate::decompose::decompose;
use crate::error::Result;
use crate::op::{BinaryOp, Op, ReduceOp, ScatterOp, UnaryOp};
use crate::recorder::Recorder;
use smallvec::smallvec;

pub(super) fn apply(call: &Call<'_>, r: &mut R<'_, '_>) -> Result<Parts> {
    let mut parts = match &call.expr.op {
        Op::Softmax { dim } => {
            // y·(g − Σ g·y)
            let (y, g) = (wide_result(call, r)?, r.widen(call.g)?);
            let weighted = mul(r, &g, &y)?;
            let sum = r.reduce(ReduceOp::Sum, &weighted, usize::from(*dim))?;
            let rest = r.binary(BinaryOp::Sub, &g, &sum)?;
            one(mul(r, &y, &rest)?)
        }
        Op::LogSoftmax { dim } => {
            // g − eʸ·Σ g
            let (y, g) = (wide_result(call, r)?, r.widen(call.g)?);
            let sum = r.reduce(ReduceOp::Sum, &g, usize::from(*dim))?;
            let p = r.unary(UnaryOp::Exp, &y)?;
            let part = mul(r, &p, &sum)?;
            one(r.binary(BinaryOp::Sub, &g, &part)?)
        }
        Op::RmsNorm { weight } => norm(call, *weight, false, false, r)?,
        Op::LayerNorm { weight, bias } => norm(call, *weight, *bias, true, r)?,
        Op::Glu { act } => {
            let (gate, up, g) = (r.widen(call.x(0))?, r.widen(call.x(1))?, r.widen(call.g)?);
            let acted = r.unary(*act, &gate)?;
            let mut parts = call.none();
            if call.needs(0) {
                if let Some(slope) = derivative(r, *act, &gate, &acted)? {
                    let through = mul(r, &g, &up)?;
                    parts[0] = Some(mul(r, &through, &slope)?);
                }
            }
            if call.needs(1) {
                parts[1] = Some(mul(r, &g, &acted)?);
            }
            parts
        }
        // a rotation is undone by the opposite one; tables that need a gradient get it from the parts
        Op::Rope { interleaved } if !call.needs(1) && !call.needs(2) => {
            let back = r.affine(call.x(2), -1.0, 0.0)?;
            let rope = Op::Rope { interleaved: *interleaved };
            one(r.0.push(rope, smallvec![], &[call.g.clone(), call.x(1).clone(), back])?)
        }
        Op::CrossEntropy => {
            // (softmax(logits) − 1 at the target)·g/n
            let logits = r.widen(call.x(0))?;
            let n = r.0.dims(&logits)[0];
            // of the forward pass' own log-softmax, which is the same node once both are captured
            let log = r.0.push(Op::LogSoftmax { dim: 1 }, smallvec![], &[logits])?;
            let p = r.unary(UnaryOp::Exp, &log)?;
            let targets = r.reshape(call.x(1), &[n, 1])?;
            let minus = full(r, -1.0, &[n, 1], p.dtype())?;
            let scatter = Op::Scatter { op: ScatterOp::Add, dim: 1 };
            let distance = r.0.push(scatter, smallvec![], &[p, targets, minus])?;
            let g = r.widen(call.g)?;
            let g = r.affine(&g, 1.0 / n as f64, 0.0)?;
            let mut parts = call.none();
            parts[0] = Some(mul(r, &distance, &g)?);
            parts
        }
        // a mask that needs one gets its gradient from the parts
        Op::Attention { mask, causal, softcap, window } if !call.needs(3) => {
            let op = Op::AttentionBackward { mask: *mask, causal: *causal, softcap: *softcap, window: *window };
            attention(call, op, r)?
        }
        _ => through_parts(call, r)?,
    };
    for (part, x) in parts.iter_mut().zip(&call.expr.inputs) {
        if let Some(gradient) = part.take() {
            *part = Some(r.cast(&gradient, x.dtype())?);
        }
    }
    Ok(parts)
}

fn one(part: Ref) -> Parts {
    smallvec![Some(part)]
}

/// Of x̂·w + b over the last dim, where x̂ is x over its root mean square, or its distance from the mean over the deviation: with gw = g·w,
/// dx = (gw − mean(gw) − x̂·mean(gw·x̂))/deviation, without the first mean where none was taken out.
fn norm(call: &Call<'_>, weight: bool, bias: bool, centred: bool, r: &mut R<'_, '_>) -> Result<Parts> {
    let (x, g) = (r.widen(call.x(0))?, r.widen(call.g)?);
    let last = r.0.dims(&x).len().saturating_sub(1);
    let distance = if centred {
        let mean = r.reduce(ReduceOp::Mean, &x, last)?;
        r.binary(BinaryOp::Sub, &x, &mean)?
    } else {
        x
    };
    let square = r.unary(UnaryOp::Sqr, &distance)?;
    let mean = r.reduce(ReduceOp::Mean, &square, last)?;
    let mean = r.affine(&mean, 1.0, call.expr.scalars[0])?;
    let deviation = r.unary(UnaryOp::Sqrt, &mean)?;
    let normal = r.binary(BinaryOp::Div, &distance, &deviation)?;
    let mut parts = call.none();
    if call.needs(0) {
        let gw = if weight {
            let w = r.widen(call.x(1))?;
            mul(r, &g, &w)?
        } else {
            g.clone()
        };
        let along = mul(r, &gw, &normal)?;
        let along = r.reduce(ReduceOp::Mean, &along, last)?;
        let along = mul(r, &normal, &along)?;
        let mut rest = r.binary(BinaryOp::Sub, &gw, &along)?;
        if centred {
            let mean = r.reduce(ReduceOp::Mean, &gw, last)?;
            rest = r.binary(BinaryOp::Sub, &rest, &mean)?;
        }
        parts[0] = Some(r.binary(BinaryOp::Div, &rest, &deviation)?);
    }
    if weight && call.needs(1) {
        let full = mul(r, &g, &normal)?;
        parts[1] = Some(unbroadcast(r, &full, call.x(1).dims())?);
    }
    let b = 1 + usize::from(weight);
    if bias && call.needs(b) {
        parts[b] = Some(unbroadcast(r, &g, call.x(b).dims())?);
    }
    Ok(parts)
}

/// Those of q, k and v, which one op makes behind one another.
fn attention(call: &Call<'_>, backward: Op, r: &mut R<'_, '_>) -> Result<Parts> {
    let mut inputs = call.expr.inputs.clone();
    inputs.insert(3, call.g.clone());
    let all = r.0.push(backward, call.expr.scalars.clone(), &inputs)?;
    let (mut parts, mut from) = (call.none(), 0);
    for (i, part) in parts.iter_mut().enumerate().take(3) {
        let dims = r.0.dims(call.x(i));
        let len = dims.iter().product();
        if call.needs(i) {
            let row = r.narrow(&all, 0, from, len)?;
            *part = Some(r.reshape(&row, &dims)?);
        }
        from += len;
    }
    Ok(parts)
}

/// The gradients that the parts of the composite give.
fn through_parts(call: &Call<'_>, r: &mut R<'_, '_>) -> Result<Parts> {
    // nodes of its own in the place of the inputs, since one node may be several inputs, and one input may be made from another
    let mut own = Vec::with_capacity(call.expr.inputs.len());
    for (i, x) in call.expr.inputs.iter().enumerate() {
        let same = Op::Reshape { shape: r.0.dims(x) };
        own.push(if call.needs(i) { r.0.push(same, smallvec![], std::slice::from_ref(x))? } else { x.clone() });
    }
    let y = decompose(&call.expr.op, &call.expr.scalars, &own, r.0)?;
    let wrt: Vec<Ref> = own.iter().enumerate().filter(|(i, _)| call.needs(*i)).map(|(_, x)| x.clone()).collect();
    let outputs = [y];
    let gradients =
        Walk::new(&outputs, &wrt, true).backward(&outputs, std::slice::from_ref(call.g), &wrt, r.0.change)?;
    let mut parts = call.none();
    let needed = parts.iter_mut().enumerate().filter(|(i, _)| call.needs(*i)).map(|(_, part)| part);
    for (part, gradient) in needed.zip(gradients) {
        *part = gradient;
    }
    Ok(parts)
}
