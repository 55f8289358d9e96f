//! Derivatives of views, and of ops that move data.

use super::elementwise::{broadcast, unbroadcast};
use super::{Call, Parts, Ref, R};
use crate::error::Result;
use crate::op::{CmpOp, Dims, Op, ScatterOp};
use crate::recorder::Recorder;
use candle_core::DType;
use smallvec::{smallvec, SmallVec};

pub(super) fn full(r: &mut R<'_, '_>, value: f64, dims: &[usize], dtype: DType) -> Result<Ref> {
    r.0.push(Op::Full { shape: Dims::from_slice(dims), dtype }, smallvec![value], &[])
}

/// `part` in zeros of the shape `dims`, from `start` of `dim` on.
fn padded(r: &mut R<'_, '_>, part: &Ref, dim: u8, start: usize, dims: &[usize]) -> Result<Ref> {
    if r.0.dims(part).as_slice() == dims {
        return Ok(part.clone());
    }
    let zeros = full(r, 0.0, dims, part.dtype())?;
    r.0.push(Op::SliceAssign { dim, start }, smallvec![], &[zeros, part.clone()])
}

pub(super) fn apply(call: &Call<'_>, r: &mut R<'_, '_>) -> Result<Parts> {
    let mut parts = call.none();
    let g = call.g;
    let first = call.expr.inputs.first().map(|x| Dims::from_slice(x.dims())).unwrap_or_default();
    match &call.expr.op {
        Op::Reshape { .. } => parts[0] = Some(r.reshape(g, &first)?),
        Op::Permute { perm } => {
            let mut inverse: SmallVec<[u8; 8]> = smallvec![0; perm.len()];
            for (to, &from) in perm.iter().enumerate() {
                inverse[usize::from(from)] = to as u8;
            }
            parts[0] = Some(r.0.push(Op::Permute { perm: inverse }, smallvec![], std::slice::from_ref(g))?);
        }
        Op::Narrow { dim, start, .. } => parts[0] = Some(padded(r, g, *dim, *start, &first)?),
        Op::Stride { dim, start, len, step } => {
            let places = Op::Arange { len: *len, dtype: DType::U32 };
            let places = r.0.push(places, smallvec![*start as f64, *step as f64], &[])?;
            let zeros = full(r, 0.0, &first, g.dtype())?;
            parts[0] = Some(r.0.push(Op::IndexAdd { dim: *dim }, smallvec![], &[zeros, places, g.clone()])?);
        }
        Op::Broadcast { .. } => parts[0] = Some(unbroadcast(r, g, &first)?),
        Op::Contiguous => parts[0] = Some(g.clone()),
        Op::ToDevice => {
            r.0.device = call.x(0).device().clone();
            parts[0] = Some(r.0.push(Op::ToDevice, smallvec![], std::slice::from_ref(g))?);
        }
        Op::Concat { dim } => {
            let mut start = 0;
            for (i, part) in parts.iter_mut().enumerate() {
                let len = call.x(i).dims()[usize::from(*dim)];
                if call.needs(i) {
                    *part = Some(r.narrow(g, usize::from(*dim), start, len)?);
                }
                start += len;
            }
        }
        Op::IndexSelect { dim } => {
            let zeros = full(r, 0.0, &first, g.dtype())?;
            let inputs = [zeros, call.x(1).clone(), g.clone()];
            parts[0] = Some(r.0.push(Op::IndexAdd { dim: *dim }, smallvec![], &inputs)?);
        }
        Op::Embedding => {
            let ids = r.reshape(call.x(1), &[call.x(1).elem_count()])?;
            let rows = r.reshape(g, &[r.0.dims(&ids)[0], first[1]])?;
            let zeros = full(r, 0.0, &first, g.dtype())?;
            parts[0] = Some(r.0.push(Op::IndexAdd { dim: 0 }, smallvec![], &[zeros, ids, rows])?);
        }
        Op::Gather { dim } => {
            // the ids may be smaller than x outside `dim`: there the gradient fills the corner that they reach
            let ids = call.x(1);
            let mut reached = Dims::from_slice(ids.dims());
            reached[usize::from(*dim)] = first[usize::from(*dim)];
            let zeros = full(r, 0.0, &reached, g.dtype())?;
            let scatter = Op::Scatter { op: ScatterOp::Add, dim: *dim };
            let mut part = r.0.push(scatter, smallvec![], &[zeros, ids.clone(), g.clone()])?;
            for d in 0..first.len() {
                reached[d] = first[d];
                part = padded(r, &part, d as u8, 0, &reached)?;
            }
            parts[0] = Some(part);
        }
        Op::Scatter { op, dim } => return scatter(call, *op, *dim, r),
        Op::IndexAdd { dim } => {
            parts[0] = call.needs(0).then(|| g.clone());
            if call.needs(2) {
                let inputs = [g.clone(), call.x(1).clone()];
                parts[2] = Some(r.0.push(Op::IndexSelect { dim: *dim }, smallvec![], &inputs)?);
            }
        }
        Op::SliceAssign { dim, start } => {
            let src = Dims::from_slice(call.x(1).dims());
            if call.needs(0) {
                let zeros = full(r, 0.0, &src, g.dtype())?;
                let op = Op::SliceAssign { dim: *dim, start: *start };
                parts[0] = Some(r.0.push(op, smallvec![], &[g.clone(), zeros])?);
            }
            if call.needs(1) {
                parts[1] = Some(r.narrow(g, usize::from(*dim), *start, src[usize::from(*dim)])?);
            }
        }
        _ => {}
    }
    Ok(parts)
}

fn scatter(call: &Call<'_>, op: ScatterOp, dim: u8, r: &mut R<'_, '_>) -> Result<Parts> {
    let mut parts = call.none();
    let (g, ids) = (call.g, call.x(1));
    let dims = Dims::from_slice(ids.dims());
    if call.needs(0) {
        parts[0] = Some(match op {
            ScatterOp::Add => g.clone(),
            // what was replaced has no part in the result
            ScatterOp::Set => {
                let zeros = full(r, 0.0, &dims, g.dtype())?;
                let op = Op::Scatter { op: ScatterOp::Set, dim };
                r.0.push(op, smallvec![], &[g.clone(), ids.clone(), zeros])?
            }
        });
    }
    if call.needs(2) {
        let gathered = r.0.push(Op::Gather { dim }, smallvec![], &[g.clone(), ids.clone()])?;
        parts[2] = Some(match op {
            ScatterOp::Add => gathered,
            ScatterOp::Set => {
                // of several sources for one place the last one counts: each writes its number, and who finds its own has won
                let along = dims[usize::from(dim)];
                let numbers = r.0.push(Op::Arange { len: along, dtype: DType::U32 }, smallvec![0.0, 1.0], &[])?;
                let mut line: Dims = SmallVec::from_elem(1, dims.len());
                line[usize::from(dim)] = along;
                let numbers = r.reshape(&numbers, &line)?;
                let numbers = broadcast(r, &numbers, &dims)?;
                let numbers = r.0.push(Op::Contiguous, smallvec![], &[numbers])?;
                let board = full(r, 0.0, call.x(0).dims(), DType::U32)?;
                let op = Op::Scatter { op: ScatterOp::Set, dim };
                let board = r.0.push(op, smallvec![], &[board, ids.clone(), numbers.clone()])?;
                let last = r.0.push(Op::Gather { dim }, smallvec![], &[board, ids.clone()])?;
                let won = r.0.push(Op::Compare(CmpOp::Eq), smallvec![], &[last, numbers])?;
                let zeros = full(r, 0.0, &dims, g.dtype())?;
                r.0.push(Op::Where, smallvec![], &[won, gathered, zeros])?
            }
        });
    }
    Ok(parts)
}
