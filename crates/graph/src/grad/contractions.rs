//! Derivatives of products.

use super::elementwise::unbroadcast;
use super::{Call, Parts, Ref, R};
use crate::error::{Error, ErrorKind, Result};
use crate::node::{Node, Value};
use crate::op::Op;
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
            let (x, a, b) = (call.x(0), call.x(1), call.x(2));
            let g = r.affine(g, call.expr.scalars[0], 0.0)?;
            if call.needs(2) {
                let hidden = r.product(x, a)?;
                parts[2] = Some(outer(r, &hidden, &g)?);
            }
            if call.needs(0) || call.needs(1) {
                let bt = r.swap_last(b)?;
                let dh = r.product(&g, &bt)?;
                if call.needs(1) {
                    parts[1] = Some(outer(r, x, &dh)?);
                }
                if call.needs(0) {
                    let at = r.swap_last(a)?;
                    parts[0] = Some(r.product(&dh, &at)?);
                }
            }
            if call.needs(3) {
                parts[3] = Some(call.g.clone());
            }
        }
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
