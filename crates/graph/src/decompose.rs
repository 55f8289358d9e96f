//! What each composite means, in primitives and simpler composites: its specification, and what runs where no kernel serves.
//!
//! f16 and bf16 composites compute in f32 inside and round once at the end, so their decompositions begin and end with
//! a cast; `linear` and `lora` round like the products they are made of.

use crate::error::{Error, ErrorKind, Result};
use crate::op::{BinaryOp, Dims, Op, OpClass, ReduceOp, UnaryOp};
use crate::recorder::{Rec, Recorder};
use smallvec::{smallvec, SmallVec};

mod attention;

/// Whether `op` decomposes.
#[must_use]
pub fn is_composite<S>(op: &Op<S>) -> bool {
    op.class() == OpClass::Composite
}

fn invalid<T>(op: &Op, detail: &str) -> Result<T> {
    Err(Error::new(op.name(), ErrorKind::Invalid(detail.into())))
}

/// Records the decomposition of the composite `op` applied to `inputs` and returns its result.
///
/// # Errors
/// When `op` is no composite or its inputs do not fit it.
pub fn decompose<R: Recorder>(op: &Op, scalars: &[f64], inputs: &[R::Ref], into: &mut R) -> Result<R::Ref> {
    if op.arity() != Some(inputs.len()) || op.scalar_count() != scalars.len() {
        return invalid(op, "wrong number of inputs or scalars");
    }
    let mut r = Rec(into);
    match op {
        Op::Softmax { dim } => {
            let (x, dtype) = (r.widen(&inputs[0])?, r.0.dtype(&inputs[0]));
            let e = shifted(&mut r, &x, usize::from(*dim))?;
            let e = r.unary(UnaryOp::Exp, &e)?;
            let sum = r.reduce(ReduceOp::Sum, &e, usize::from(*dim))?;
            let y = r.binary(BinaryOp::Div, &e, &sum)?;
            r.cast(&y, dtype)
        }
        Op::LogSoftmax { dim } => {
            let (x, dtype) = (r.widen(&inputs[0])?, r.0.dtype(&inputs[0]));
            let d = shifted(&mut r, &x, usize::from(*dim))?;
            let e = r.unary(UnaryOp::Exp, &d)?;
            let sum = r.reduce(ReduceOp::Sum, &e, usize::from(*dim))?;
            let log = r.unary(UnaryOp::Log, &sum)?;
            let y = r.binary(BinaryOp::Sub, &d, &log)?;
            r.cast(&y, dtype)
        }
        Op::RmsNorm { weight } => {
            let (x, dtype) = (r.widen(&inputs[0])?, r.0.dtype(&inputs[0]));
            let last = r.0.dims(&x).len() - 1;
            let sqr = r.unary(UnaryOp::Sqr, &x)?;
            let mut y = scaled_by_root_mean(&mut r, &x, &sqr, last, scalars[0])?;
            if *weight {
                let w = r.widen(&inputs[1])?;
                y = r.binary(BinaryOp::Mul, &y, &w)?;
            }
            r.cast(&y, dtype)
        }
        Op::LayerNorm { weight, bias } => {
            let (x, dtype) = (r.widen(&inputs[0])?, r.0.dtype(&inputs[0]));
            let last = r.0.dims(&x).len() - 1;
            let mean = r.reduce(ReduceOp::Mean, &x, last)?;
            let d = r.binary(BinaryOp::Sub, &x, &mean)?;
            let sqr = r.unary(UnaryOp::Sqr, &d)?;
            let mut y = scaled_by_root_mean(&mut r, &d, &sqr, last, scalars[0])?;
            let mut rest = inputs[1..].iter();
            if let (true, Some(w)) = (*weight, rest.next()) {
                let w = r.widen(w)?;
                y = r.binary(BinaryOp::Mul, &y, &w)?;
            }
            // without a weight the bias is the first of the rest
            let b = if *weight { rest.next() } else { inputs.get(1) };
            if let (true, Some(b)) = (*bias, b) {
                let b = r.widen(b)?;
                y = r.binary(BinaryOp::Add, &y, &b)?;
            }
            r.cast(&y, dtype)
        }
        Op::Linear { bias } => {
            let w = r.swap_last(&inputs[1])?;
            let y = r.product(&inputs[0], &w)?;
            if *bias {
                return r.binary(BinaryOp::Add, &y, &inputs[2]);
            }
            Ok(y)
        }
        Op::Lora { base } => {
            let hidden = r.product(&inputs[0], &inputs[1])?;
            let y = r.product(&hidden, &inputs[2])?;
            let y = r.affine(&y, scalars[0], 0.0)?;
            if *base {
                return r.binary(BinaryOp::Add, &inputs[3], &y);
            }
            Ok(y)
        }
        Op::LoraSegments { rows } => lora_segments(&mut r, rows, scalars, inputs),
        Op::Glu { act } => {
            let dtype = r.0.dtype(&inputs[0]);
            let (gate, up) = (r.widen(&inputs[0])?, r.widen(&inputs[1])?);
            let gate = r.unary(*act, &gate)?;
            let y = r.binary(BinaryOp::Mul, &gate, &up)?;
            r.cast(&y, dtype)
        }
        Op::Rope { interleaved } => rope(&mut r, inputs, *interleaved),
        Op::Attention { .. } => attention::forward(&mut r, op, scalars, inputs),
        Op::AttentionBackward { .. } => attention::backward(&mut r, op, scalars, inputs),
        Op::Embedding => {
            let (table, ids) = (r.0.dims(&inputs[0]), r.0.dims(&inputs[1]));
            let flat = r.reshape(&inputs[1], &[ids.iter().product()])?;
            let rows = r.0.push(Op::IndexSelect { dim: 0 }, smallvec![], &[inputs[0].clone(), flat])?;
            let mut dims = ids;
            dims.push(table[1]);
            r.reshape(&rows, &dims)
        }
        Op::GroupNorm { groups, weight, bias } => group_norm(&mut r, scalars[0], inputs, *groups, *weight, *bias),
        Op::CrossEntropy => {
            let dtype = r.0.dtype(&inputs[0]);
            let logits = r.widen(&inputs[0])?;
            let n = r.0.dims(&logits)[0];
            let log = r.0.push(Op::LogSoftmax { dim: 1 }, smallvec![], &[logits])?;
            let targets = r.reshape(&inputs[1], &[n, 1])?;
            let chosen = r.0.push(Op::Gather { dim: 1 }, smallvec![], &[log, targets])?;
            let sum = Op::Reduce { op: ReduceOp::Sum, axes: 0b11, keepdim: false };
            let sum = r.0.push(sum, smallvec![], &[chosen])?;
            let y = r.affine(&sum, -1.0 / n as f64, 0.0)?;
            r.cast(&y, dtype)
        }
        other => invalid(other, "no composite"),
    }
}

/// The rows of a base in pieces: those of a segment with what its adapter adds, the others as they are.
fn lora_segments<R: Recorder>(
    r: &mut Rec<'_, R>,
    segments: &[usize],
    scales: &[f64],
    inputs: &[R::Ref],
) -> Result<R::Ref> {
    let [x, base, adapters @ ..] = inputs else {
        return Err(Error::new("lora_segments", ErrorKind::Invalid("no input".into())));
    };
    let dims = r.0.dims(base);
    let (dim, all) = (dims.len() - 2, dims[dims.len() - 2]);
    let mut pieces = Vec::new();
    let mut start = 0;
    for ((sizes, adapter), &scale) in segments.chunks_exact(2).zip(adapters.chunks_exact(2)).zip(scales) {
        let (gap, rows) = (sizes[0], sizes[1]);
        if gap > 0 {
            pieces.push(r.narrow(base, dim, start, gap)?);
        }
        start += gap;
        if rows > 0 {
            let (x, base) = (r.narrow(x, dim, start, rows)?, r.narrow(base, dim, start, rows)?);
            let inputs = [x, adapter[0].clone(), adapter[1].clone(), base];
            pieces.push(r.0.push(Op::Lora { base: true }, smallvec![scale], &inputs)?);
        }
        start += rows;
    }
    if start < all || pieces.is_empty() {
        pieces.push(r.narrow(base, dim, start, all - start)?);
    }
    r.cat(&pieces, dim)
}

fn group_norm<R: Recorder>(
    r: &mut Rec<'_, R>,
    eps: f64,
    inputs: &[R::Ref],
    groups: usize,
    weight: bool,
    bias: bool,
) -> Result<R::Ref> {
    let (x, dtype) = (r.widen(&inputs[0])?, r.0.dtype(&inputs[0]));
    let dims = r.0.dims(&x);
    let width: usize = dims[1..].iter().product::<usize>() / groups;
    let rows = r.reshape(&x, &[dims[0], groups, width])?;
    let rows = r.0.push(Op::LayerNorm { weight: false, bias: false }, smallvec![eps], &[rows])?;
    let mut y = r.reshape(&rows, &dims)?;
    // weight and bias belong to channels: dim 1
    let mut channels: Dims = SmallVec::from_elem(1, dims.len() - 1);
    channels[0] = dims[1];
    let steps = [weight.then_some(BinaryOp::Mul), bias.then_some(BinaryOp::Add)];
    for (op, vector) in steps.into_iter().flatten().zip(&inputs[1..]) {
        let vector = r.widen(vector)?;
        let vector = r.reshape(&vector, &channels)?;
        y = r.binary(op, &y, &vector)?;
    }
    r.cast(&y, dtype)
}

/// x − max(x) along `dim`.
fn shifted<R: Recorder>(r: &mut Rec<'_, R>, x: &R::Ref, dim: usize) -> Result<R::Ref> {
    // the largest element of an empty row does not exist, and nothing needs it
    if r.0.dims(x)[dim] == 0 {
        return Ok(x.clone());
    }
    let max = r.reduce(ReduceOp::Max, x, dim)?;
    r.binary(BinaryOp::Sub, x, &max)
}

/// x/√(mean(sqr) + eps) along `dim`.
fn scaled_by_root_mean<R: Recorder>(
    r: &mut Rec<'_, R>,
    x: &R::Ref,
    sqr: &R::Ref,
    dim: usize,
    eps: f64,
) -> Result<R::Ref> {
    let mean = r.reduce(ReduceOp::Mean, sqr, dim)?;
    let mean = r.affine(&mean, 1.0, eps)?;
    let root = r.unary(UnaryOp::Sqrt, &mean)?;
    r.binary(BinaryOp::Div, x, &root)
}

fn rope<R: Recorder>(r: &mut Rec<'_, R>, inputs: &[R::Ref], interleaved: bool) -> Result<R::Ref> {
    let dtype = r.0.dtype(&inputs[0]);
    let x = r.widen(&inputs[0])?;
    let dims = r.0.dims(&x);
    let (b, h, s, half) = (dims[0], dims[1], dims[2], dims[3] / 2);
    let mut tables = Vec::with_capacity(2);
    for table in &inputs[1..3] {
        let table = r.widen(table)?;
        let batched = r.0.dims(&table).len() == 3;
        let table = if batched { r.reshape(&table, &[b, 1, s, half])? } else { table };
        tables.push(table);
    }
    let (cos, sin) = (&tables[0], &tables[1]);
    let (x1, x2) = if interleaved {
        let pairs = r.reshape(&x, &[b, h, s, half, 2])?;
        let first = r.narrow(&pairs, 4, 0, 1)?;
        let second = r.narrow(&pairs, 4, 1, 1)?;
        (r.reshape(&first, &[b, h, s, half])?, r.reshape(&second, &[b, h, s, half])?)
    } else {
        (r.narrow(&x, 3, 0, half)?, r.narrow(&x, 3, half, half)?)
    };
    let (a, c) = (r.binary(BinaryOp::Mul, &x1, cos)?, r.binary(BinaryOp::Mul, &x2, sin)?);
    let y1 = r.binary(BinaryOp::Sub, &a, &c)?;
    let (a, c) = (r.binary(BinaryOp::Mul, &x1, sin)?, r.binary(BinaryOp::Mul, &x2, cos)?);
    let y2 = r.binary(BinaryOp::Add, &a, &c)?;
    let y = if interleaved {
        let y1 = r.reshape(&y1, &[b, h, s, half, 1])?;
        let y2 = r.reshape(&y2, &[b, h, s, half, 1])?;
        let pairs = r.0.push(Op::Concat { dim: 4 }, smallvec![], &[y1, y2])?;
        r.reshape(&pairs, &dims)?
    } else {
        r.0.push(Op::Concat { dim: 3 }, smallvec![], &[y1, y2])?
    };
    r.cast(&y, dtype)
}
