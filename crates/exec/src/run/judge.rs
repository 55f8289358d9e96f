//! Judging one node: Candle's own op, and the same op in f64, on the very inputs that the plan gave it.

use super::inspect::{index_of, numbers};
use super::slots::rebased;
use super::{candle, failure};
use crate::error::{Difference, Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_graph::decompose::is_composite;
use candle_lazy_graph::{
    decompose, describe, infer, BinaryOp, Dims, Error as GraphError, ErrorKind, Exactness, Expr, Meta, Node, Op,
    Recorder, ReduceOp, Scalars, UnaryOp,
};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// The factor of eager's error that a rounding op may have.
const EAGER_FACTOR: f64 = 1.5;

/// The error that a rounding op may always have, in units in the last place at the row's scale.
const ALLOWED_ULP: f64 = 2.0;

/// What is wrong with `planned`, if anything.
pub(super) fn judge(node: &Node, expr: &Expr, inputs: &[Tensor], planned: &Tensor) -> Result<Option<Difference>> {
    let dtype = planned.dtype();
    let failed = |source: Error| Error::Run {
        op: expr.op.name(),
        operands: failure::described(node).map(|(_, o)| format!("({o})")).unwrap_or_default(),
        site: Box::new(node.site().clone()),
        members: Vec::new(),
        source: Box::new(source),
    };
    let metas: Vec<Meta<'_>> = expr.inputs.iter().map(|n| n.meta()).collect();
    let difference = |index, planned, eager, exact, ulp| Difference {
        op: expr.op.to_string(),
        operands: describe(&metas),
        dims: node.dims().to_vec(),
        dtype,
        site: node.site().clone(),
        index,
        planned,
        eager,
        exact,
        ulp,
    };
    let eager = Parts::run(expr, inputs, node.device(), false).map_err(failed)?.0;
    if planned.dims() != eager.dims() || dtype != eager.dtype() {
        let shape = |t: &Tensor| format!("{} {:?}", t.dtype().as_str(), t.dims());
        let message = format!("the plan gave {}, eager execution {}", shape(planned), shape(&eager));
        return Err(failed(Error::Internal(message)));
    }
    let exact = match expr.op.exactness() {
        // other numbers in another dtype: both sides make them with one generator
        _ if matches!(expr.op, Op::Random { .. }) => true,
        Exactness::Exact => true,
        Exactness::ExactWide => matches!(dtype, DType::F32 | DType::F64),
        _ => false,
    };
    if exact || !dtype.is_float() {
        return Ok(different_bits(planned, &eager)?.map(|(index, p, e)| difference(index, p, e, None, None)));
    }
    let (value, magnitude) = Parts::run(expr, inputs, node.device(), true).map_err(failed)?;
    let row = match &expr.op {
        Op::Softmax { dim } | Op::LogSoftmax { dim } => usize::from(*dim),
        _ => value.rank().saturating_sub(1),
    };
    let want = numbers(&value)?;
    let scales = scales(&want, &numbers(&magnitude)?, value.dims(), row);
    let (got, eager) = (numbers(planned)?, numbers(&eager)?);
    let theirs = worst(&eager, &want, &scales, &eager, dtype).0;
    let (ours, at) = worst(&got, &want, &scales, &eager, dtype);
    let limit = if theirs.is_finite() { (theirs * EAGER_FACTOR).max(ALLOWED_ULP) } else { ALLOWED_ULP };
    if ours <= limit {
        return Ok(None);
    }
    let of = |list: &[f64]| list.get(at).copied().unwrap_or(f64::NAN);
    let index = index_of(value.dims(), at);
    Ok(Some(difference(index, of(&got), of(&eager), Some(of(&want)), Some((ours, limit)))))
}

/// The bits of every element; every NaN has the same, −0 and +0 have different ones.
fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let flat = rebased(tensor.detach()).to_device(&Device::Cpu)?.contiguous()?.flatten_all()?;
    Ok(match flat.dtype() {
        DType::I64 => flat.to_vec1::<i64>()?.into_iter().map(|x| x as u64).collect(),
        // every other dtype fits into f64
        _ => numbers(&flat)?.into_iter().map(|x| if x.is_nan() { u64::MAX } else { x.to_bits() }).collect(),
    })
}

/// The element that is furthest off among those whose bits differ: its index and both numbers.
pub(super) fn different_bits(got: &Tensor, want: &Tensor) -> Result<Option<(Vec<usize>, f64, f64)>> {
    let (g, w) = (bits(got)?, bits(want)?);
    if g == w {
        return Ok(None);
    }
    let (gn, wn) = (numbers(got)?, numbers(want)?);
    let mut found: Option<(usize, f64)> = None;
    for (i, _) in g.iter().zip(&w).enumerate().filter(|(_, (a, b))| a != b) {
        let off = match (gn.get(i), wn.get(i)) {
            (Some(a), Some(b)) if (a - b).is_finite() => (a - b).abs(),
            _ => f64::INFINITY,
        };
        if found.is_none_or(|(_, largest)| off > largest) {
            found = Some((i, off));
        }
    }
    let at = found.map_or(0, |(i, _)| i);
    let of = |list: &[f64]| list.get(at).copied().unwrap_or(f64::NAN);
    Ok(Some((index_of(want.dims(), at), of(&gn), of(&wn))))
}

/// The scale of every element: the largest magnitude along `row`.
fn scales(values: &[f64], magnitudes: &[f64], dims: &[usize], row: usize) -> Vec<f64> {
    let own = values.iter().zip(magnitudes).map(|(v, m)| match (m.is_finite(), v.is_finite()) {
        (true, _) => m.abs(),
        (false, true) => v.abs(),
        (false, false) => 0.0,
    });
    let own: Vec<f64> = own.collect();
    let (n, step) = match dims.get(row) {
        Some(&n) if n > 0 => (n, dims.iter().skip(row + 1).product::<usize>().max(1)),
        _ => return own,
    };
    let start = |at: usize| at - at / step % n * step;
    let mut largest = vec![0.0f64; own.len()];
    for (at, &m) in own.iter().enumerate() {
        let row = &mut largest[start(at)];
        *row = row.max(m);
    }
    (0..own.len()).map(|at| largest[start(at)]).collect()
}

/// One unit in the last place of a number of about this size.
fn ulp(dtype: DType, size: f64) -> f64 {
    let (digits, smallest) = match dtype {
        DType::F16 => (10, -14),
        DType::BF16 => (7, -126),
        DType::F32 => (23, -126),
        _ => (52, -1022),
    };
    let exponent = if size > 0.0 { size.log2().floor() as i32 } else { smallest };
    2f64.powi(exponent.max(smallest) - digits)
}

fn overflows(dtype: DType, x: f64) -> bool {
    let largest = match dtype {
        DType::F16 => 65504.0,
        DType::BF16 => 3.3895e38,
        DType::F32 => f64::from(f32::MAX),
        _ => f64::MAX,
    };
    x.abs() > largest
}

/// The largest error in units in the last place and where it is. An infinity or NaN that eager has too is no error, nor is
/// one beyond the dtype's range.
fn worst(got: &[f64], want: &[f64], scales: &[f64], eager: &[f64], dtype: DType) -> (f64, usize) {
    let mut worst = (0.0, 0);
    for (at, (&g, &w)) in got.iter().zip(want).enumerate() {
        let e = eager.get(at).copied().unwrap_or(f64::NAN);
        let same = g == w || (g.is_nan() && w.is_nan());
        let excused = !g.is_finite() && (e == g || (e.is_nan() && g.is_nan()) || (overflows(dtype, w) && g * w > 0.0));
        let off = if same || excused {
            0.0
        } else if !g.is_finite() || !w.is_finite() {
            f64::INFINITY
        } else {
            (g - w).abs() / ulp(dtype, scales.get(at).copied().unwrap_or(0.0))
        };
        if off > worst.0 {
            worst = (off, at);
        }
    }
    worst
}

/// An op run part by part with Candle's own ops.
struct Parts<'a> {
    values: Vec<Tensor>,
    /// In f64: how large what was rounded on the way was, per element of each value.
    magnitudes: Vec<Tensor>,
    device: &'a Device,
    wide: bool,
    failure: Option<Error>,
}

impl<'a> Parts<'a> {
    /// The result of the op, and in f64 its magnitudes (the value itself otherwise).
    fn run(expr: &Expr, inputs: &[Tensor], device: &'a Device, wide: bool) -> Result<(Tensor, Tensor)> {
        let mut parts = Self { values: Vec::new(), magnitudes: Vec::new(), device, wide, failure: None };
        for input in inputs {
            // Candle panics on some strided views, and what is asked is the op's numbers
            let input = rebased(input.detach()).force_contiguous()?;
            let input = if wide && input.dtype().is_float() { input.to_dtype(DType::F64)? } else { input };
            // what comes in is taken as exact
            parts.magnitudes.push(zeros(input.dims(), device)?);
            parts.values.push(input);
        }
        let refs: Vec<usize> = (0..inputs.len()).collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| parts.push(expr.op.clone(), expr.scalars.clone(), &refs)));
        let id = match outcome {
            Ok(Ok(id)) => id,
            Ok(Err(error)) => return Err(parts.failure.take().unwrap_or_else(|| error.into())),
            Err(panic) => {
                let message = failure::message_of(panic.as_ref());
                return Err(Error::Internal(format!("eager execution panicked: {message}")));
            }
        };
        match (parts.values.get(id), parts.magnitudes.get(id)) {
            (Some(value), Some(magnitude)) => Ok((value.clone(), magnitude.clone())),
            _ => Err(Error::Internal("no result of eager execution".into())),
        }
    }

    fn apply(&mut self, op: &Op, scalars: &[f64], inputs: &[usize], dims: &[usize]) -> Result<usize> {
        let of = |list: &[Tensor]| inputs.iter().filter_map(|&i| list.get(i).cloned()).collect::<Vec<_>>();
        let (x, m) = (of(&self.values), of(&self.magnitudes));
        let value = candle::apply(op, scalars, &x, dims, self.device)?.detach();
        let magnitude = match self.wide && value.dtype() == DType::F64 {
            true => finite(&magnitude(op, scalars, &x, &m, &value, dims, self.device)?)?,
            false => zeros(dims, self.device)?,
        };
        self.values.push(value);
        self.magnitudes.push(magnitude);
        Ok(self.values.len() - 1)
    }
}

fn zeros(dims: &[usize], device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(dims, DType::F64, device)?)
}

/// The magnitudes with 0 for what is no number: the −∞ of a mask is exact and must not spread over its row.
fn finite(magnitude: &Tensor) -> Result<Tensor> {
    let kept = numbers(magnitude)?.into_iter().map(|m| if m.is_finite() { m } else { 0.0 }).collect::<Vec<_>>();
    Ok(Tensor::from_vec(kept, magnitude.dims(), &Device::Cpu)?.to_device(magnitude.device())?)
}

/// The op in f64: whatever it makes as a float, it makes as f64.
fn widened(op: Op) -> Op {
    let wide = |dtype: DType| if dtype.is_float() { DType::F64 } else { dtype };
    match op {
        Op::Full { shape, dtype } => Op::Full { shape, dtype: wide(dtype) },
        Op::CausalMask { queries, keys, window, dtype } => Op::CausalMask { queries, keys, window, dtype: wide(dtype) },
        Op::Cast(dtype) => Op::Cast(wide(dtype)),
        Op::Arange { len, dtype } => Op::Arange { len, dtype: wide(dtype) },
        other => other,
    }
}

impl Recorder for Parts<'_> {
    type Ref = usize;

    fn dims(&self, node: &usize) -> Dims {
        self.values.get(*node).map_or_else(Dims::new, |t| Dims::from_slice(t.dims()))
    }

    fn dtype(&self, node: &usize) -> DType {
        self.values.get(*node).map_or(DType::F32, Tensor::dtype)
    }

    fn push(&mut self, op: Op, scalars: Scalars, inputs: &[usize]) -> candle_lazy_graph::Result<usize> {
        let op = if self.wide { widened(op) } else { op };
        if is_composite(&op) {
            return decompose(&op, &scalars, inputs, self);
        }
        let dims: Vec<Dims> = inputs.iter().map(|i| self.dims(i)).collect();
        let metas: Vec<Meta<'_>> =
            dims.iter().zip(inputs).map(|(dims, i)| Meta { dims, dtype: self.dtype(i) }).collect();
        let out = infer(&op, &metas)?;
        self.apply(&op, &scalars, inputs, &out.dims).map_err(|error| {
            let marker = GraphError::new(op.name(), ErrorKind::Invalid(error.to_string()));
            self.failure = Some(error);
            marker
        })
    }
}

/// How large the roundings of a result may be: its own, which goes with what was added up, and those of its inputs (`m`)
/// carried on by the derivative.
fn magnitude(
    op: &Op,
    scalars: &[f64],
    x: &[Tensor],
    m: &[Tensor],
    value: &Tensor,
    dims: &[usize],
    device: &Device,
) -> Result<Tensor> {
    let own = value.abs()?;
    let again = |inputs: &[Tensor]| candle::apply(op, scalars, inputs, dims, device);
    let scalar = |i: usize| scalars.get(i).copied().unwrap_or(0.0);
    Ok(match (op, x, m) {
        (Op::Unary(f), [x, ..], [m, ..]) => {
            let (slope, own) = match f {
                UnaryOp::Recip => (value.sqr()?, own),
                UnaryOp::Sqr => ((x.abs()? * 2.0)?, own),
                UnaryOp::Sqrt => ((value.recip()? * 0.5)?, own),
                UnaryOp::Rsqrt => (((value.sqr()? * value)? * 0.5)?, own),
                UnaryOp::Exp => (own.clone(), own),
                UnaryOp::Log => (x.abs()?.recip()?, own),
                // x/2·(1 + f): a sum of |x| that cancels below zero; no slope of these is above 1.13
                UnaryOp::Gelu | UnaryOp::GeluErf => ((own.ones_like()? * 1.13)?, own.maximum(&x.abs()?)?),
                UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round | UnaryOp::Sign => (own.zeros_like()?, own),
                _ => ((own.ones_like()? * 1.13)?, own),
            };
            // an infinite slope at a value without error carries nothing
            let carried = (slope * m)?;
            let carried = m.eq(0.0)?.where_cond(&m.zeros_like()?, &carried)?;
            (own + carried)?
        }
        (Op::Binary(f), [a, b, ..], [ma, mb, ..]) => {
            let carried = match f {
                BinaryOp::Mul => (ma.broadcast_mul(&b.abs()?)? + mb.broadcast_mul(&a.abs()?)?)?,
                BinaryOp::Div => {
                    let from_b = own.broadcast_mul(mb)?;
                    ma.broadcast_add(&from_b)?.broadcast_div(&b.abs()?)?
                }
                _ => ma.broadcast_add(mb)?,
            };
            (own + carried)?
        }
        (Op::Affine, [x, ..], [m, ..]) => {
            let (mul, add) = (scalar(0).abs(), scalar(1).abs());
            (x.abs()?.affine(mul, add)? + (m * mul)?)?
        }
        (Op::Powf, [x, ..], [m, ..]) => {
            let slope = ((value / x)?.abs()? * scalar(0).abs())?;
            let carried = m.eq(0.0)?.where_cond(&m.zeros_like()?, &(slope * m)?)?;
            (own + carried)?
        }
        (Op::Reduce { op: ReduceOp::Sum | ReduceOp::Mean, .. }, [x, ..], [m, ..]) => again(&[(x.abs()? + m)?])?,
        (Op::Reduce { op: ReduceOp::Var, axes, keepdim }, [x, ..], [m, ..]) => {
            // (d + e)² is off by 2de + e², where e is a rounding of what was subtracted: in units of f32, the coarsest arithmetic
            let reduced = |op, keepdim, x: &Tensor, dims: &[usize]| {
                let op = Op::Reduce { op, axes: *axes, keepdim };
                candle::apply(&op, &[], std::slice::from_ref(x), dims, device)
            };
            let kept: Vec<usize> =
                x.dims().iter().enumerate().map(|(d, &n)| if axes & (1 << d) != 0 { 1 } else { n }).collect();
            let mean = reduced(ReduceOp::Mean, true, x, &kept)?;
            let spread = (x.abs()?.broadcast_add(&mean.abs()?)? + m)?;
            let linear = (x.broadcast_sub(&mean)?.abs()? * &spread)?;
            let errors = ((linear * 2.0)? + (spread.sqr()? * 2f64.powi(-23))?)?;
            let count = x.elem_count() / kept.iter().product::<usize>().max(1);
            (own + (reduced(ReduceOp::Sum, *keepdim, &errors, dims)? / (count as f64 - 1.0))?)?
        }
        (Op::Reduce { .. }, _, [m, ..]) => (own + again(std::slice::from_ref(m))?)?,
        (Op::Matmul, [a, b, ..], [ma, mb, ..]) => {
            let (a, b) = (a.abs()?, b.abs()?);
            let carried = (again(&[ma.clone(), b.clone()])? + again(&[a.clone(), mb.clone()])?)?;
            (again(&[a, b])? + carried)?
        }
        (Op::Where, [choice, ..], [_, a, b, ..]) => again(&[choice.clone(), a.clone(), b.clone()])?,
        (Op::IndexSelect { .. } | Op::Gather { .. }, [_, ids, ..], [m, ..]) => again(&[m.clone(), ids.clone()])?,
        (Op::Scatter { .. } | Op::IndexAdd { .. }, [_, ids, ..], [to, _, from]) => {
            (own + again(&[to.clone(), ids.clone(), from.clone()])?)?
        }
        (
            Op::Reshape { .. }
            | Op::Stride { .. }
            | Op::Permute { .. }
            | Op::Narrow { .. }
            | Op::Broadcast { .. }
            | Op::Contiguous
            | Op::Detach
            | Op::Barrier
            | Op::Checkpoint { .. }
            | Op::Concat { .. }
            | Op::SliceAssign { .. },
            _,
            m,
        ) => again(m)?,
        _ => own,
    })
}
