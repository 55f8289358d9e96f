//! The eager twin of every op: what candle-core and candle-nn compose, differentiable.

use crate::case::Case;
use crate::{opaque, Error, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_lazy_graph::{ArgOp, BinaryOp, CmpOp, Op, ReduceOp, ScatterOp, UnaryOp};
use candle_nn::Module;

/// The result of `op` on plain tensors, by Candle's own differentiable ops.
///
/// # Errors
/// When Candle refuses (an empty row has no largest element there, for example).
pub fn run(op: &Op, s: &[f64], x: &[Tensor]) -> Result<Tensor> {
    let dev = Device::Cpu;
    let at = |d: u8| usize::from(d);
    Ok(match op {
        Op::Full { shape, dtype } => Tensor::full(s[0], shape.to_vec(), &dev)?.to_dtype(*dtype)?,
        Op::CausalMask { queries, keys, window, dtype } => mask(*queries, *keys, *window, *dtype)?,
        Op::Unary(f) => unary(*f, &x[0])?,
        Op::Binary(f) => match f {
            BinaryOp::Add => x[0].broadcast_add(&x[1])?,
            BinaryOp::Sub => x[0].broadcast_sub(&x[1])?,
            BinaryOp::Mul => x[0].broadcast_mul(&x[1])?,
            BinaryOp::Div => x[0].broadcast_div(&x[1])?,
            BinaryOp::Maximum => x[0].broadcast_maximum(&x[1])?,
            BinaryOp::Minimum => x[0].broadcast_minimum(&x[1])?,
            BinaryOp::Pow => x[0].broadcast_pow(&x[1])?,
        },
        Op::Compare(f) => match f {
            CmpOp::Eq => x[0].broadcast_eq(&x[1])?,
            CmpOp::Ne => x[0].broadcast_ne(&x[1])?,
            CmpOp::Lt => x[0].broadcast_lt(&x[1])?,
            CmpOp::Le => x[0].broadcast_le(&x[1])?,
            CmpOp::Gt => x[0].broadcast_gt(&x[1])?,
            CmpOp::Ge => x[0].broadcast_ge(&x[1])?,
        },
        Op::CompareScalar(f) => match f {
            CmpOp::Eq => x[0].eq(s[0])?,
            CmpOp::Ne => x[0].ne(s[0])?,
            CmpOp::Lt => x[0].lt(s[0])?,
            CmpOp::Le => x[0].le(s[0])?,
            CmpOp::Gt => x[0].gt(s[0])?,
            CmpOp::Ge => x[0].ge(s[0])?,
        },
        Op::Affine => x[0].affine(s[0], s[1])?,
        Op::Powf => x[0].powf(s[0])?,
        Op::Where => {
            let shape = x[1].shape().broadcast_shape_binary_op(x[2].shape(), "where_cond")?;
            let shape = x[0].shape().broadcast_shape_binary_op(&shape, "where_cond")?;
            x[0].broadcast_as(&shape)?.where_cond(&x[1].broadcast_as(&shape)?, &x[2].broadcast_as(&shape)?)?
        }
        Op::Cast(dtype) => x[0].to_dtype(*dtype)?,
        Op::Reduce { op: f, axes, keepdim } => reduce(*f, *axes, *keepdim, &x[0])?,
        Op::Matmul => x[0].contiguous()?.broadcast_matmul(&x[1].contiguous()?)?,
        Op::Reshape { shape } => x[0].reshape(shape.to_vec())?,
        Op::Permute { perm } => x[0].permute(perm.iter().map(|&d| at(d)).collect::<Vec<_>>())?,
        Op::Narrow { dim, start, len } => x[0].narrow(at(*dim), *start, *len)?,
        Op::Broadcast { shape } => x[0].broadcast_as(shape.to_vec())?,
        Op::Elu => x[0].elu(s[0])?,
        Op::Clamp => x[0].clamp(s[0], s[1])?,
        Op::ArgReduce { op, dim, keepdim } => {
            let (x, dim) = (dense(&x[0].contiguous()?)?, at(*dim));
            match (op, keepdim) {
                (ArgOp::Max, true) => x.argmax_keepdim(dim)?,
                (ArgOp::Max, false) => x.argmax(dim)?,
                (ArgOp::Min, true) => x.argmin_keepdim(dim)?,
                (ArgOp::Min, false) => x.argmin(dim)?,
            }
        }
        Op::Stride { dim, start, len, step } => {
            let ids: Vec<u32> = (0..*len).map(|i| (start + i * step) as u32).collect();
            x[0].contiguous()?.index_select(&Tensor::from_vec(ids, *len, &dev)?, at(*dim))?
        }
        Op::ToDevice => x[0].to_device(&dev)?,
        Op::Gather { dim } => x[0].contiguous()?.gather(&x[1].contiguous()?, at(*dim))?,
        Op::Scatter { op: ScatterOp::Set, dim } => {
            x[0].contiguous()?.scatter(&x[1].contiguous()?, &x[2].contiguous()?, at(*dim))?
        }
        Op::Scatter { op: ScatterOp::Add, dim } => {
            x[0].contiguous()?.scatter_add(&x[1].contiguous()?, &x[2].contiguous()?, at(*dim))?
        }
        Op::IndexAdd { dim } => x[0].contiguous()?.index_add(&x[1].contiguous()?, &x[2].contiguous()?, at(*dim))?,
        Op::GroupNorm { groups, weight, bias } => {
            let c = x[0].dim(1)?;
            let w = if *weight { x[1].clone() } else { Tensor::ones(c, x[0].dtype(), &dev)? };
            let b = if *bias { x[if *weight { 2 } else { 1 }].clone() } else { Tensor::zeros(c, x[0].dtype(), &dev)? };
            candle_nn::GroupNorm::new(w, b, c, *groups, s[0])?.forward(&x[0])?
        }
        Op::CrossEntropy => candle_nn::loss::cross_entropy(&x[0], &x[1].contiguous()?)?,
        Op::Custom { name, .. } => opaque::eagerly(name, x)?,
        Op::Contiguous => x[0].contiguous()?,
        Op::Detach | Op::Barrier => x[0].detach(),
        Op::Checkpoint { .. } => x[0].clone(),
        Op::Concat { dim } => Tensor::cat(x, at(*dim))?,
        Op::IndexSelect { dim } => x[0].contiguous()?.index_select(&x[1].contiguous()?, at(*dim))?,
        Op::SliceAssign { dim, start } => slice_assign(&x[0], &x[1], at(*dim), *start)?,
        Op::Softmax { dim } => candle_nn::ops::softmax(&dense(&x[0])?, at(*dim))?,
        Op::LogSoftmax { dim } => candle_nn::ops::log_softmax(&dense(&x[0])?, at(*dim))?,
        Op::RmsNorm { weight } => {
            if let (true, false) = (*weight, x[0].dtype() == DType::F64) {
                candle_nn::ops::rms_norm_slow(&x[0], &x[1], s[0] as f32)?
            } else {
                // candle-nn's takes an f32 eps and needs a weight
                let y = root_mean(&x[0], s[0])?;
                if *weight {
                    y.broadcast_mul(&x[1])?
                } else {
                    y
                }
            }
        }
        Op::LayerNorm { weight, bias } => {
            if let (true, true, false) = (*weight, *bias, x[0].dtype() == DType::F64) {
                candle_nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], s[0] as f32)?
            } else {
                let mean = wide(&x[0])?.mean_keepdim(D::Minus1)?;
                let centred = wide(&x[0])?.broadcast_sub(&mean)?;
                let mut y = root_mean(&centred, s[0])?.to_dtype(x[0].dtype())?;
                if *weight {
                    y = y.broadcast_mul(&x[1])?;
                }
                if *bias {
                    y = y.broadcast_add(&x[if *weight { 2 } else { 1 }])?;
                }
                y
            }
        }
        Op::Linear { bias } => {
            let linear = candle_nn::Linear::new(x[1].contiguous()?, bias.then(|| x[2].clone()));
            rows(&x[0], |x| Ok(linear.forward(x)?))?
        }
        Op::Lora { base } => {
            let y = vector(&x[0], |v| {
                Ok(v.broadcast_matmul(&x[1].contiguous()?)?.broadcast_matmul(&x[2].contiguous()?)?)
            })?;
            let y = (y * s[0])?;
            if *base {
                (&x[3] + y)?
            } else {
                y
            }
        }
        Op::LoraSegments { rows } => lora_segments(x, s, rows)?,
        Op::Glu { act } => (unary(*act, &x[0])? * &x[1])?,
        Op::Rope { interleaved } => rope(&x[0], &x[1], &x[2], *interleaved)?,
        Op::Attention { mask, causal, softcap, window } => {
            let cap = softcap.then(|| s[1]);
            let added = if *mask { Some(&x[3]) } else { None };
            let window = causal.then_some(*window);
            attention([&x[0], &x[1], &x[2]], added, s[0], cap, window)?
        }
        Op::AttentionBackward { mask, causal, softcap, window } => {
            let cap = softcap.then(|| s[1]);
            let added = if *mask { Some(&x[4]) } else { None };
            let window = causal.then_some(*window);
            attention_backward([&x[0], &x[1], &x[2], &x[3]], added, s[0], cap, window)?
        }
        Op::Embedding => {
            let ids = x[1].contiguous()?;
            let mut dims = ids.dims().to_vec();
            dims.push(x[0].dim(1)?);
            x[0].contiguous()?.index_select(&ids.flatten_all()?, 0)?.reshape(dims)?
        }
        other => return Err(Error::NoTwin(format!("eager Candle has no {other}"))),
    })
}

/// The eager result of a case, whose weight may be quantised.
///
/// # Errors
/// As [`run`].
pub fn run_case(case: &Case, x: &[Tensor]) -> Result<Tensor> {
    match opaque::weight(case, x)? {
        Some(weight) => opaque::product(&x[0], &weight),
        None => run(&case.op, &case.scalars, x),
    }
}

/// As [`run`], for gradients in f64: where Candle's own backward has constants of six
/// digits or cancels, the function is composed.
///
/// # Errors
/// As [`run`].
pub fn run_case_precisely(case: &Case, x: &[Tensor]) -> Result<Tensor> {
    match opaque::weight(case, x)? {
        Some(weight) => opaque::product(&x[0], &weight),
        None => run_precisely(&case.op, &case.scalars, x),
    }
}

/// As [`run_case_precisely`], for an op.
///
/// # Errors
/// As [`run`].
pub fn run_precisely(op: &Op, s: &[f64], x: &[Tensor]) -> Result<Tensor> {
    let precise = |f: UnaryOp, x: &Tensor| -> Result<Tensor> {
        let inner = match f {
            UnaryOp::Gelu => ((x + (x.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?.tanh()?,
            UnaryOp::GeluErf => (x * std::f64::consts::FRAC_1_SQRT_2)?.erf()?,
            // 1 − s, of which Candle's backwards make use, is a difference
            UnaryOp::Silu => return Ok((x * sigmoid(x)?)?),
            UnaryOp::Sigmoid => return sigmoid(x),
            other => return unary(other, x),
        };
        Ok(((inner + 1.0)? * (x * 0.5)?)?)
    };
    match op {
        Op::Unary(f) => precise(*f, &x[0]),
        Op::Glu { act } => Ok((precise(*act, &x[0])? * &x[1])?),
        _ => run(op, s, x),
    }
}

/// 1/(1 + e⁻ˣ) for x ≥ 0, eˣ/(1 + eˣ) below.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    let e = x.abs()?.neg()?.exp()?;
    Ok(x.ge(0.0)?.where_cond(&e.ones_like()?, &e)?.div(&(&e + 1.0)?)?)
}

/// The unary functions of Candle; those it lacks are composed.
fn unary(f: UnaryOp, x: &Tensor) -> Result<Tensor> {
    Ok(match f {
        UnaryOp::Neg => x.neg()?,
        UnaryOp::Abs => x.abs()?,
        UnaryOp::Recip => x.recip()?,
        UnaryOp::Sqr => x.sqr()?,
        UnaryOp::Sqrt => x.sqrt()?,
        UnaryOp::Rsqrt => x.sqrt()?.recip()?,
        UnaryOp::Exp => x.exp()?,
        UnaryOp::Log => x.log()?,
        UnaryOp::Sin => x.sin()?,
        UnaryOp::Cos => x.cos()?,
        UnaryOp::Tanh => x.tanh()?,
        UnaryOp::Erf => x.erf()?,
        UnaryOp::Gelu => x.gelu()?,
        UnaryOp::GeluErf => x.gelu_erf()?,
        UnaryOp::Relu => x.relu()?,
        UnaryOp::Silu => x.silu()?,
        UnaryOp::Sigmoid => candle_nn::ops::sigmoid(x)?,
        UnaryOp::Floor => x.floor()?,
        UnaryOp::Ceil => x.ceil()?,
        UnaryOp::Round => x.round()?,
        UnaryOp::Sign => x.sign()?,
    })
}

fn reduce(f: ReduceOp, axes: u32, keepdim: bool, x: &Tensor) -> Result<Tensor> {
    let dims: Vec<usize> = (0..x.rank()).filter(|d| axes & (1 << d) != 0).collect();
    let x = &dense(x)?;
    Ok(match f {
        ReduceOp::Sum if keepdim => x.sum_keepdim(dims)?,
        ReduceOp::Sum => x.sum(dims)?,
        ReduceOp::Mean if keepdim => x.mean_keepdim(dims)?,
        ReduceOp::Mean => x.mean(dims)?,
        ReduceOp::Var => match dims[..] {
            [d] if keepdim => x.var_keepdim(d)?,
            [d] => x.var(d)?,
            _ => {
                let n: usize = dims.iter().map(|&d| x.dims()[d]).product();
                let squares = x.broadcast_sub(&x.mean_keepdim(dims.clone())?)?.sqr()?;
                let sum = if keepdim { squares.sum_keepdim(dims)? } else { squares.sum(dims)? };
                (sum / (n as f64 - 1.0))?
            }
        },
        ReduceOp::LogSumExp => {
            let y = x.log_sum_exp(dims.clone())?;
            if keepdim {
                let kept: Vec<usize> =
                    x.dims().iter().enumerate().map(|(d, &n)| if dims.contains(&d) { 1 } else { n }).collect();
                y.reshape(kept)?
            } else {
                y
            }
        }
        ReduceOp::Max | ReduceOp::Min => {
            // as `max_all` does: several dims are one row
            let kept: Vec<usize> = (0..x.rank()).filter(|d| !dims.contains(d)).collect();
            let (row, at) = match &dims[..] {
                [] => return Ok(x.clone()),
                [one] => (x.clone(), *one),
                several => (x.permute([&kept[..], several].concat())?.flatten_from(kept.len())?, kept.len()),
            };
            let y = if f == ReduceOp::Max { row.max(at)? } else { row.min(at)? };
            if keepdim {
                let ones: Vec<usize> =
                    x.dims().iter().enumerate().map(|(d, &n)| if dims.contains(&d) { 1 } else { n }).collect();
                y.reshape(ones)?
            } else {
                y
            }
        }
    })
}

/// Candle divides by strides where it reduces, by 0 too: a dim of one element that was broadcast passes for contiguous.
fn dense(x: &Tensor) -> Result<Tensor> {
    Ok(if x.stride().contains(&0) { x.force_contiguous()? } else { x.clone() })
}

fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    })
}

fn root_mean(x: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = wide(x)?;
    let mean = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?;
    Ok(wide.broadcast_div(&mean.sqrt()?)?.to_dtype(x.dtype())?)
}

/// As [`vector`], and as rows of one matrix beyond rank 4, where Candle's linear takes no weight.
fn rows(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if x.rank() <= 4 {
        return vector(x, f);
    }
    let y = f(&x.flatten_to(x.rank() - 2)?)?;
    let mut dims = x.dims().to_vec();
    if let (Some(last), Some(&n)) = (dims.last_mut(), y.dims().last()) {
        *last = n;
    }
    Ok(y.reshape(dims)?)
}

/// A product with a vector on the left: a row of a matrix for the time being.
fn vector(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let x = x.contiguous()?;
    if x.rank() == 1 {
        return Ok(f(&x.unsqueeze(0)?)?.squeeze(0)?);
    }
    f(&x)
}

fn slice_assign(x: &Tensor, src: &Tensor, dim: usize, start: usize) -> Result<Tensor> {
    let end = start + src.dim(dim)?;
    let mut parts = Vec::new();
    if start > 0 {
        parts.push(x.narrow(dim, 0, start)?);
    }
    parts.push(src.clone());
    if end < x.dim(dim)? {
        parts.push(x.narrow(dim, end, x.dim(dim)? - end)?);
    }
    Ok(Tensor::cat(&parts, dim)?)
}

/// A base in pieces: those of a segment with what its adapter adds, the others as they are.
fn lora_segments(x: &[Tensor], scales: &[f64], sizes: &[usize]) -> Result<Tensor> {
    let dim = x[0].rank() - 2;
    let mut pieces = Vec::new();
    let mut start = 0;
    for ((sizes, factors), &scale) in sizes.chunks_exact(2).zip(x[2..].chunks_exact(2)).zip(scales) {
        pieces.push(x[1].narrow(dim, start, sizes[0])?);
        start += sizes[0];
        let (own, base) = (x[0].narrow(dim, start, sizes[1])?.contiguous()?, x[1].narrow(dim, start, sizes[1])?);
        let hidden = own.broadcast_matmul(&factors[0].contiguous()?)?;
        pieces.push((base + (hidden.broadcast_matmul(&factors[1].contiguous()?)? * scale)?)?);
        start += sizes[1];
    }
    pieces.push(x[1].narrow(dim, start, x[1].dim(dim)? - start)?);
    pieces.retain(|piece| piece.dims()[dim] > 0);
    match pieces.as_slice() {
        [] => Ok(x[1].clone()),
        _ => Ok(Tensor::cat(&pieces, dim)?),
    }
}

fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
    if cos.rank() == 3 {
        if x.dim(0)? == 0 {
            return Ok(x.contiguous()?);
        }
        // candle-nn's composed version takes tables of two dims: one batch entry at a time
        let rows = (0..x.dim(0)?)
            .map(|i| rope(&x.narrow(0, i, 1)?, &cos.get(i)?, &sin.get(i)?, interleaved))
            .collect::<Result<Vec<_>>>()?;
        return Ok(Tensor::cat(&rows, 0)?);
    }
    let x = x.contiguous()?;
    Ok(if interleaved {
        candle_nn::rotary_emb::rope_i_slow(&x, cos, sin)?
    } else {
        candle_nn::rotary_emb::rope_slow(&x, cos, sin)?
    })
}

fn mask(queries: usize, keys: usize, window: Option<usize>, dtype: DType) -> Result<Tensor> {
    let sees = |at: usize| {
        let (own, key) = (keys - queries + at / keys, at % keys);
        key <= own && window.is_none_or(|w| own - key < w)
    };
    let data: Vec<f32> = (0..queries * keys).map(|at| if sees(at) { 0.0 } else { f32::NEG_INFINITY }).collect();
    Ok(Tensor::from_vec(data, (queries, keys), &Device::Cpu)?.to_dtype(dtype)?)
}

/// Attention as candle-transformers composes it: repeated key heads, scores, mask, softmax, product. `causal` holds the
/// window of a causal mask.
fn attention(
    [q, k, v]: [&Tensor; 3],
    added: Option<&Tensor>,
    scale: f64,
    cap: Option<f64>,
    causal: Option<Option<usize>>,
) -> Result<Tensor> {
    let v = repeated(v, q.dim(1)?)?;
    Ok(attention_weights(q, &repeated(k, q.dim(1)?)?, added, scale, cap, causal)?.0.matmul(&v)?)
}

/// Each key head as often as query heads use it.
fn repeated(x: &Tensor, h: usize) -> Result<Tensor> {
    let (b, hk, t, d) = x.dims4()?;
    let x = x.unsqueeze(2)?.broadcast_as((b, hk, h / hk, t, d))?;
    Ok(x.contiguous()?.reshape((b, h, t, d))?)
}

/// The weights, and the hyperbolic tangent of the softcap where there is one.
fn attention_weights(
    q: &Tensor,
    k: &Tensor,
    added: Option<&Tensor>,
    scale: f64,
    cap: Option<f64>,
    causal: Option<Option<usize>>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (b, h, s, _) = q.dims4()?;
    let (t, mut tanh) = (k.dim(2)?, None);
    let mut scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
    if let Some(cap) = cap {
        let capped = (scores / cap)?.tanh()?;
        scores = (&capped * cap)?;
        tanh = Some(capped);
    }
    if let Some(added) = added {
        scores = scores.broadcast_add(added)?;
    }
    if let Some(window) = causal {
        scores = scores.broadcast_add(&mask(s, t, window, scores.dtype())?.broadcast_as((b, h, s, t))?)?;
    }
    Ok((candle_nn::ops::softmax(&scores, D::Minus1)?, tanh))
}

/// The gradients of attention by their formulas, each head's on its own, behind one another.
fn attention_backward(
    [q, k, v, g]: [&Tensor; 4],
    added: Option<&Tensor>,
    scale: f64,
    cap: Option<f64>,
    causal: Option<Option<usize>>,
) -> Result<Tensor> {
    let (h, hk) = (q.dim(1)?, k.dim(1)?);
    let (keys, values) = (repeated(k, h)?, repeated(v, h)?);
    let (p, tanh) = attention_weights(q, &keys, added, scale, cap, causal)?;
    let turned = |x: &Tensor| x.t()?.contiguous();
    let g = g.contiguous()?;
    let dp = g.matmul(&turned(&values)?)?;
    let mut ds = (&p * dp.broadcast_sub(&(&p * &dp)?.sum_keepdim(D::Minus1)?)?)?;
    if let Some(tanh) = tanh {
        ds = (ds * tanh.sqr()?.affine(-1.0, 1.0)?)?;
    }
    let ds = (ds * scale)?;
    let grouped = |x: Tensor| -> Result<Tensor> {
        let (b, h, t, d) = x.dims4()?;
        Ok(x.reshape((b, hk, h / hk, t, d))?.sum(2)?)
    };
    let dk = grouped(turned(&ds)?.matmul(&q.contiguous()?)?)?;
    let dv = grouped(turned(&p)?.matmul(&g)?)?;
    let parts = [ds.matmul(&keys)?.flatten_all()?, dk.flatten_all()?, dv.flatten_all()?];
    Ok(Tensor::cat(&parts, 0)?)
}
