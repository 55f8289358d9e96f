//! Derivatives of products.

use super::elementwise::unbroadcast;
use super::movement::full;
use super::{Call, Parts, Ref, R};
use crate::error::{Error, ErrorKind, Result};
use crate::node::{Node, Value};
use crate::op::{Dims, Op};
use crate::recorder::Recorder;

/// All rows of `x` (…, n) as one matrix.
fn rows(r: &mut R<'_, '_>, x: &Ref) -> Result<Ref> {
    let dims = r.0.dims(x);
    let width = dims.last().copied().unwrap_or(1);
    let count = dims.iter().rev().skip(1).product();
    r.reshape(x, &[count, width])
}

/// aᵀ·b of all rows of both: (…, m) and (…, n) give (m, n).
fn outer(r: &mut R<'_, '_>, a: &Ref, b: &Ref) -> Result<Ref> {
    let (a, b) = (rows(r, a)?, rows(r, b)?);
    let a = r.swap_last(&a)?;
    r.matmul(&a, &b)
}

pub(super) fn apply(call: &Call<'_>, r: &mut R<'_, '_>) -> Result<Parts> {
    let mut parts = call.none();
    let g = call.g;
    match &call.expr.op {
        Op::Matmul => {
            let (a, b) = (call.x(0), call.x(1));
            if call.needs(0) {
                let bt = r.swap_last(b)?;
                let full = r.matmul(g, &bt)?;
                parts[0] = Some(unbroadcast(r, &full, a.dims())?);
            }
            if call.needs(1) {
                // a matrix that serves every batch: one product of all rows instead of one per batch and a sum
                let full = if b.shape().rank() == 2 {
                    outer(r, a, g)?
                } else {
                    let at = r.swap_last(a)?;
                    r.matmul(&at, g)?
                };
                parts[1] = Some(unbroadcast(r, &full, b.dims())?);
            }
        }
        Op::Linear { .. } => {
            if call.needs(0) {
                parts[0] = Some(r.product(g, call.x(1))?);
            }
            if call.needs(1) {
                parts[1] = Some(outer(r, g, call.x(0))?);
            }
            if call.needs(2) {
                parts[2] = Some(unbroadcast(r, g, call.x(2).dims())?);
            }
        }
        Op::Lora { .. } => {
            let needs = [0, 1, 2].map(|i| call.needs(i));
            let [x, a, b] = lora(r, [call.x(0), call.x(1), call.x(2)], (g, call.expr.scalars[0]), needs)?;
            (parts[0], parts[1], parts[2]) = (x, a, b);
            if call.needs(3) {
                parts[3] = Some(call.g.clone());
            }
        }
        Op::LoraSegments { rows } => segments(call, r, rows, &mut parts)?,
        Op::QMatmul if call.needs(0) => {
            // no kernel multiplies with a quantised weight from its other side
            let Some(Value::Quantized(weight)) = call.x(1).value() else {
                let detail = "its weight is no quantised leaf".to_string();
                return Err(Error::new("qmatmul", ErrorKind::Invalid(detail)));
            };
            let unpacked = weight.dequantize(&r.0.device).and_then(|w| w.to_dtype(g.dtype()));
            let unpacked = unpacked.map_err(|e| Error::new("qmatmul", ErrorKind::Unsupported(e.to_string())))?;
            let weight = Node::leaf(unpacked, call.y.site().clone());
            parts[0] = Some(r.product(g, &weight)?);
        }
        _ => {}
    }
    Ok(parts)
}

/// The gradients of x, A and B of (x·A·B)·scale, those that are needed.
fn lora(
    r: &mut R<'_, '_>,
    [x, a, b]: [&Ref; 3],
    (g, scale): (&Ref, f64),
    needs: [bool; 3],
) -> Result<[Option<Ref>; 3]> {
    let mut parts = [None, None, None];
    if needs == [false; 3] {
        return Ok(parts);
    }
    let g = r.affine(g, scale, 0.0)?;
    if needs[2] {
        let hidden = r.product(x, a)?;
        parts[2] = Some(outer(r, &hidden, &g)?);
    }
    if needs[0] || needs[1] {
        let bt = r.swap_last(b)?;
        let dh = r.product(&g, &bt)?;
        if needs[1] {
            parts[1] = Some(outer(r, x, &dh)?);
        }
        if needs[0] {
            let at = r.swap_last(a)?;
            parts[0] = Some(r.product(&dh, &at)?);
        }
    }
    Ok(parts)
}

/// Each segment's adapter gets its gradient from the segment's rows; rows of no segment pass none to x.
fn segments(call: &Call<'_>, r: &mut R<'_, '_>, segments: &[usize], parts: &mut Parts) -> Result<()> {
    let (x, g) = (call.x(0), call.g);
    let Some(dim) = x.dims().len().checked_sub(2) else { return Ok(()) };
    let all = x.dims()[dim];
    let zeros = |r: &mut R<'_, '_>, rows: usize| {
        let mut dims = Dims::from_slice(x.dims());
        dims[dim] = rows;
        full(r, 0.0, &dims, x.dtype())
    };
    let mut of_x = Vec::new();
    let mut start = 0;
    for (i, (sizes, &scale)) in segments.chunks_exact(2).zip(&call.expr.scalars).enumerate() {
        let (gap, rows, at) = (sizes[0], sizes[1], 2 + 2 * i);
        let needs = [call.needs(0), call.needs(at), call.needs(at + 1)];
        if needs[0] && gap > 0 {
            of_x.push(zeros(r, gap)?);
        }
        start += gap;
        let (rows_x, rows_g) = (r.narrow(x, dim, start, rows)?, r.narrow(g, dim, start, rows)?);
        let [dx, da, db] = lora(r, [&rows_x, call.x(at), call.x(at + 1)], (&rows_g, scale), needs)?;
        of_x.extend(dx.filter(|_| rows > 0));
        (parts[at], parts[at + 1]) = (da, db);
        start += rows;
    }
    if call.needs(0) {
        if start < all || of_x.is_empty() {
            of_x.push(zeros(r, all - start)?);
        }
        parts[0] = Some(r.cat(&of_x, dim)?);
    }
    if call.needs(1) {
        parts[1] = Some(g.clone());
    }
    Ok(())
}
