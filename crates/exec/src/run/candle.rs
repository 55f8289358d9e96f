//! Candle's own op for every primitive: what runs where no kernel of ours serves, and what keeps Candle's gradients.
//!
//! Of the composites only those arrive that `ops` has a function for with a backward of its own, where Candle's autograd tracks them;
//! capture replaced the others by their decomposition. Every op used is one that Candle differentiates where it can be differentiated
//! at all; none of its `no_bwd` fused ops is.

use crate::error::{Error, Result};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use candle_lazy_graph::{ArgOp, BinaryOp, CmpOp, CustomOp, Distribution, Op, ReduceOp, ScatterOp, UnaryOp};
use candle_lazy_ops::view::SliceMut;
use candle_lazy_ops::{fault, kernels};
use smallvec::SmallVec;

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
        Op::Full { dtype, .. } => full(scalar(0)?, *dtype, device)?.broadcast_as(dims)?.contiguous()?,
        Op::CausalMask { window, dtype, .. } => {
            Tensor::from_vec(causal_mask_values(dims, *window), dims, device)?.to_dtype(*dtype)?
        }
        Op::Unary(f) => unary(*f, at(0)?)?,
        Op::Binary(f) => binary(*f, at(0)?, at(1)?)?,
        Op::Compare(f) => compare(*f, at(0)?, at(1)?)?,
        Op::CompareScalar(f) => {
            let rhs = full(scalar(0)?, at(0)?.dtype(), device)?;
            compare(*f, at(0)?, &rhs.broadcast_as(at(0)?.shape())?)?
        }
        Op::Affine if fault::active("replay.affine") => at(0)?.affine(scalar(0)?, 0.0)?,
        Op::Affine => at(0)?.affine(scalar(0)?, scalar(1)?)?,
        Op::Powf => at(0)?.powf(scalar(0)?)?,
        Op::Elu => at(0)?.elu(scalar(0)?)?,
        Op::Clamp => at(0)?.clamp(scalar(0)?, scalar(1)?)?,
        Op::Arange { len, dtype } => {
            let mut values = vec![0f64; *len];
            kernels::arange(&mut SliceMut::F64(&mut values), scalar(0)?, scalar(1)?).map_err(kernel_error)?;
            Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(*dtype)?.to_device(device)?
        }
        Op::Random { dist, dtype, .. } => random(at(0)?, *dist, [scalar(0)?, scalar(1)?], dims, *dtype, device)?,
        Op::ArgReduce { op, dim, keepdim } => {
            let (x, dim) = (dense(&at(0)?.contiguous()?)?, usize::from(*dim));
            match (op, keepdim) {
                (ArgOp::Max, true) => x.argmax_keepdim(dim)?,
                (ArgOp::Max, false) => x.argmax(dim)?,
                (ArgOp::Min, true) => x.argmin_keepdim(dim)?,
                (ArgOp::Min, false) => x.argmin(dim)?,
            }
        }
        Op::Stride { dim, start, len, step } => {
            let ids: Vec<u32> = (0..*len).map(|i| (start + i * step) as u32).collect();
            let ids = Tensor::from_vec(ids, *len, device)?;
            at(0)?.contiguous()?.index_select(&ids, usize::from(*dim))?
        }
        Op::ToDevice => at(0)?.to_device(device)?,
        Op::Gather { dim } => gather(at(0)?, at(1)?, usize::from(*dim))?,
        Op::Scatter { op, dim } => {
            let (ids, src) = (at(1)?.contiguous()?, at(2)?.contiguous()?);
            match op {
                ScatterOp::Set => at(0)?.contiguous()?.scatter(&ids, &src, usize::from(*dim))?,
                ScatterOp::Add => at(0)?.contiguous()?.scatter_add(&ids, &src, usize::from(*dim))?,
            }
        }
        Op::IndexAdd { dim } => {
            at(0)?.contiguous()?.index_add(&at(1)?.contiguous()?, &at(2)?.contiguous()?, usize::from(*dim))?
        }
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
        Op::Barrier | Op::Checkpoint { .. } => at(0)?.clone(),
        Op::Concat { dim } => Tensor::cat(x, usize::from(*dim))?,
        Op::IndexSelect { dim } => at(0)?.contiguous()?.index_select(&at(1)?.contiguous()?, usize::from(*dim))?,
        // Candle transposes twice where dim is not 0, and a result of an op is row-major
        Op::SliceAssign { dim, start } => at(0)?.slice_scatter(at(1)?, usize::from(*dim), *start)?.contiguous()?,
        other => return Err(Error::Internal(format!("{} was not decomposed", other.name()))),
    })
}

/// One number, made on the CPU: Metal has no f64 to make it of.
fn full(value: f64, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    Tensor::full(value, (), &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

fn kernel_error(error: candle_lazy_ops::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

/// The same numbers on every device: they are made on the CPU.
fn random(
    key: &Tensor,
    dist: Distribution,
    [a, b]: [f64; 2],
    dims: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let key = key.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let key = key.first().copied().unwrap_or(0) as u64;
    let dist = match dist {
        Distribution::Uniform => kernels::Distribution::Uniform,
        Distribution::Normal => kernels::Distribution::Normal,
    };
    let count = dims.iter().product();
    macro_rules! make {
        ($variant:ident, $zero:expr) => {{
            let mut values = vec![$zero; count];
            kernels::random(key, dist, a, b, &mut SliceMut::$variant(&mut values)).map_err(kernel_error)?;
            Tensor::from_vec(values, dims, device)?
        }};
    }
    Ok(match dtype {
        DType::F64 => make!(F64, 0f64),
        DType::F16 => make!(F16, half::f16::ZERO),
        DType::BF16 => make!(BF16, half::bf16::ZERO),
        _ => make!(F32, 0f32),
    })
}

/// Candle's gather reads wrong elements where an index dim other than `dim` is smaller than the source's: cut the source first.
fn gather(x: &Tensor, ids: &Tensor, dim: usize) -> candle_core::Result<Tensor> {
    let mut x = x.clone();
    for d in (0..x.rank()).filter(|&d| d != dim) {
        x = x.narrow(d, 0, ids.dim(d)?)?;
    }
    x.contiguous()?.gather(&ids.contiguous()?, dim)
}

/// x·wᵀ by Candle's quantised kernel.
pub(super) fn qmatmul(x: &[Tensor], weight: &QTensor, dims: &[usize]) -> Result<Tensor> {
    let [x] = x else {
        return Err(Error::Internal("qmatmul takes one tensor and one quantised weight".into()));
    };
    let dtype = x.dtype();
    let native = match dtype {
        DType::F32 | DType::F16 => dtype,
        _ => DType::F32,
    };
    let x = x.to_dtype(native)?.contiguous()?;
    let x = if x.rank() == 1 { x.unsqueeze(0)? } else { x };
    if dims.contains(&0) {
        return Ok(Tensor::zeros(dims, dtype, x.device())?);
    }
    Ok(x.apply_op1_no_bwd(weight)?.reshape(dims)?.to_dtype(dtype)?)
}

/// A custom op, differentiable if it has a backward.
pub(super) fn custom(customs: &[CustomOp], params: &[f64], x: &[Tensor]) -> Result<Tensor> {
    let op = params.first().and_then(|&i| customs.get(i as usize));
    // Which layout an input has depends on the plan; whether an op takes it must not.
    let x = x.iter().map(Tensor::contiguous).collect::<candle_core::Result<SmallVec<[Tensor; 3]>>>()?;
    match (op, x.as_slice()) {
        (Some(CustomOp::One(op)), [a]) => Ok(a.apply_op1_arc(op.clone())?),
        (Some(CustomOp::Two(op)), [a, b]) => Ok(a.apply_op2_arc(b, op.clone())?),
        (Some(CustomOp::Three(op)), [a, c, b]) if fault::active("custom.operands") => {
            Ok(a.apply_op3_arc(b, c, op.clone())?)
        }
        (Some(CustomOp::Three(op)), [a, b, c]) => Ok(a.apply_op3_arc(b, c, op.clone())?),
        (Some(CustomOp::Backward(op, input)), x) => backward(op, usize::from(*input), x),
        _ => Err(Error::Internal("a custom op with other inputs than recorded".into())),
    }
}

/// The gradient of one input by the op's own backward, from its inputs, its result and the gradient of that; zeros where it gives none.
fn backward(op: &CustomOp, input: usize, x: &[Tensor]) -> Result<Tensor> {
    let gradients: SmallVec<[Option<Tensor>; 3]> = match (op, x) {
        (CustomOp::One(op), [a, y, g]) => SmallVec::from_iter([op.bwd(a, y, g)?]),
        (CustomOp::Two(op), [a, b, y, g]) => op.bwd(a, b, y, g).map(|(a, b)| SmallVec::from_iter([a, b]))?,
        (CustomOp::Three(op), [a, b, c, y, g]) => {
            op.bwd(a, b, c, y, g).map(|(a, b, c)| SmallVec::from_iter([a, b, c]))?
        }
        _ => return Err(Error::Internal("a backward with other inputs than recorded".into())),
    };
    match (gradients.into_iter().nth(input).flatten(), x.get(input)) {
        (Some(gradient), _) => Ok(gradient),
        (None, Some(x)) => Ok(x.zeros_like()?),
        (None, None) => Err(Error::Internal("a backward of an input that is not there".into())),
    }
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
        // exp(b·log a): not a number for a < 0, where the row program has one
        BinaryOp::Pow => a.broadcast_pow(b),
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

/// Candle divides by strides where it reduces, by 0 too: a dim of one element that was broadcast passes for contiguous.
fn dense(x: &Tensor) -> candle_core::Result<Tensor> {
    if x.stride().contains(&0) {
        x.force_contiguous()
    } else {
        Ok(x.clone())
    }
}

fn reduce(f: ReduceOp, x: &Tensor, axes: u32, keepdim: bool) -> candle_core::Result<Tensor> {
    let dims: Vec<usize> = (0..x.rank()).filter(|d| axes & (1 << d) != 0).collect();
    if dims.is_empty() {
        return Ok(x.clone());
    }
    if x.elem_count() == 0 && matches!(f, ReduceOp::Max | ReduceOp::Min | ReduceOp::LogSumExp) {
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
    let x = &dense(x)?;
    match (f, keepdim) {
        (ReduceOp::Sum, true) => x.sum_keepdim(dims),
        (ReduceOp::Sum, false) => x.sum(dims),
        (ReduceOp::Mean, true) => x.mean_keepdim(dims),
        (ReduceOp::Mean, false) => x.mean(dims),
        (ReduceOp::Var, _) => {
            let n: usize = dims.iter().map(|&d| x.dims()[d]).product();
            let squares = x.broadcast_sub(&x.mean_keepdim(dims.clone())?)?.sqr()?;
            let sum = if keepdim { squares.sum_keepdim(dims)? } else { squares.sum(dims)? };
            // of nothing there is no variance
            sum / if n == 0 { f64::NAN } else { n as f64 - 1.0 }
        }
        (ReduceOp::LogSumExp, _) => {
            let mut max = x.clone();
            for &d in &dims {
                max = max.max_keepdim(d)?;
            }
            // an infinite largest element is not taken out, or its row would not be a number
            let zeros = max.zeros_like()?;
            max = max.abs()?.lt(f64::INFINITY)?.where_cond(&max, &zeros)?;
            let sum = x.broadcast_sub(&max)?.exp()?.sum_keepdim(dims.clone())?;
            let y = (sum.log()? + max)?;
            if keepdim {
                return Ok(y);
            }
            let kept: Vec<usize> = (0..x.rank()).filter(|d| !dims.contains(d)).map(|d| x.dims()[d]).collect();
            y.reshape(kept)
        }
        (ReduceOp::Max | ReduceOp::Min, _) => {
            // several dims as one: a NaN counts where it comes first of all, not first along some dim
            let dims = &dims[fault::one_if("replay.extreme").min(dims.len())..];
            let kept: Vec<usize> = (0..x.rank()).filter(|d| !dims.contains(d)).collect();
            let row = match dims {
                [] => return Ok(x.clone()),
                [one] => {
                    return match (f, keepdim) {
                        (ReduceOp::Max, true) => x.max_keepdim(*one),
                        (ReduceOp::Max, false) => x.max(*one),
                        (_, true) => x.min_keepdim(*one),
                        (_, false) => x.min(*one),
                    }
                }
                several => x.permute([&kept[..], several].concat())?.flatten_from(kept.len())?,
            };
            let y = if f == ReduceOp::Max { row.max(kept.len())? } else { row.min(kept.len())? };
            if !keepdim {
                return Ok(y);
            }
            let ones: Vec<usize> =
                x.dims().iter().enumerate().map(|(d, &n)| if dims.contains(&d) { 1 } else { n }).collect();
            y.reshape(ones)
        }
    }
}
