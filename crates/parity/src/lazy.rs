//! A case recorded on lazy tensors, through the methods that users call.

use crate::case::Case;
use crate::{opaque, Error, Result};
use candle_core::Device;
use candle_lazy_exec::{AttentionOptions, LazyTensor, LoraSegment};
use candle_lazy_graph::{ArgOp, BinaryOp, BuildSite, CmpOp, Distribution, Node, Op, ReduceOp, ScatterOp, UnaryOp};

/// The result of a case on `x`, whose weight may be quantised.
///
/// # Errors
/// When recording refuses the inputs.
pub fn record_case(case: &Case, x: &[LazyTensor]) -> Result<LazyTensor> {
    match (&case.op, x) {
        (Op::QMatmul, [x, w]) => match opaque::weight(case, &[x.eval()?, w.eval()?])? {
            Some(weight) => Ok(x.qmatmul(&weight)?),
            None => Err(Error::NoTwin(format!("{} without a weight", case.op))),
        },
        _ => record(&case.op, &case.scalars, x),
    }
}

/// The result of `op` on `x`.
///
/// # Errors
/// When recording refuses the inputs.
pub fn record(op: &Op, s: &[f64], x: &[LazyTensor]) -> Result<LazyTensor> {
    if let Op::Custom { name, shape, dtype, .. } = op {
        return opaque::record(name, shape, *dtype, x);
    }
    let meant = op.arity().unwrap_or(x.len().max(1));
    if meant != x.len() || op.scalar_count() != s.len() {
        return Err(Error::NoTwin(format!("{op} takes {meant} inputs and {} scalars", op.scalar_count())));
    }
    let dev = Device::Cpu;
    Ok(match op {
        Op::Full { shape, dtype } => LazyTensor::filled(s[0], shape.to_vec(), *dtype, &dev)?,
        Op::CausalMask { queries, keys, window, dtype } => {
            LazyTensor::causal_mask(*queries, *keys, *window, *dtype, &dev)?
        }
        Op::Unary(f) => unary(*f, &x[0])?,
        Op::Binary(f) => binary(*f, &x[0], &x[1])?,
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
        Op::Where => x[0].where_cond(&x[1], &x[2])?,
        Op::Cast(dtype) => x[0].to_dtype(*dtype)?,
        Op::Reduce { op: f, axes, keepdim } => {
            let dims: Vec<usize> = (0..x[0].rank()).filter(|d| axes & (1 << d) != 0).collect();
            match (f, keepdim, &dims[..]) {
                (ReduceOp::Sum, true, _) => x[0].sum_keepdim(dims)?,
                (ReduceOp::Sum, false, _) => x[0].sum(dims)?,
                (ReduceOp::Mean, true, _) => x[0].mean_keepdim(dims)?,
                (ReduceOp::Mean, false, _) => x[0].mean(dims)?,
                (ReduceOp::Max, true, _) => x[0].max_keepdim(dims)?,
                (ReduceOp::Max, false, _) => x[0].max(dims)?,
                (ReduceOp::Min, true, _) => x[0].min_keepdim(dims)?,
                (ReduceOp::Min, false, _) => x[0].min(dims)?,
                (ReduceOp::Var, true, _) => x[0].var_keepdim(dims)?,
                (ReduceOp::Var, false, _) => x[0].var(dims)?,
                (ReduceOp::LogSumExp, true, _) => x[0].log_sum_exp_keepdim(dims)?,
                (ReduceOp::LogSumExp, false, _) => x[0].log_sum_exp(dims)?,
            }
        }
        Op::Matmul => x[0].broadcast_matmul(&x[1])?,
        Op::Reshape { shape } => x[0].reshape(shape.to_vec())?,
        Op::Permute { perm } => x[0].permute(perm.iter().map(|&d| usize::from(d)).collect::<Vec<_>>())?,
        Op::Narrow { dim, start, len } => x[0].narrow(usize::from(*dim), *start, *len)?,
        Op::Broadcast { shape } => x[0].broadcast_as(shape.to_vec())?,
        Op::Contiguous => x[0].contiguous()?,
        Op::Detach => x[0].detach(),
        Op::Concat { dim } => LazyTensor::cat(x, usize::from(*dim))?,
        Op::IndexSelect { dim } => x[0].index_select(&x[1], usize::from(*dim))?,
        Op::SliceAssign { dim, start } => x[0].slice_scatter(&x[1], usize::from(*dim), *start)?,
        Op::Softmax { dim } => x[0].softmax(usize::from(*dim))?,
        Op::LogSoftmax { dim } => x[0].log_softmax(usize::from(*dim))?,
        Op::RmsNorm { weight } => x[0].rms_norm(weight.then(|| &x[1]), s[0])?,
        Op::LayerNorm { weight, bias } => {
            let b = if *weight { 2 } else { 1 };
            x[0].layer_norm(weight.then(|| &x[1]), bias.then(|| &x[b]), s[0])?
        }
        Op::Linear { bias } => x[0].linear(&x[1], bias.then(|| &x[2]))?,
        Op::Lora { base: false } => x[0].lora(&x[1], &x[2], s[0])?,
        Op::Lora { base: true } => x[0].lora_add(&x[3], &x[1], &x[2], s[0])?,
        Op::LoraSegments { rows } => {
            let mut segments = Vec::new();
            for (i, sizes) in rows.chunks_exact(2).enumerate() {
                segments.push(LoraSegment { rows: sizes[0], adapter: None });
                segments.push(LoraSegment { rows: sizes[1], adapter: Some((&x[2 + 2 * i], &x[3 + 2 * i], s[i])) });
            }
            x[0].lora_segments(&x[1], &segments)?
        }
        Op::Glu { act: UnaryOp::Silu } => x[0].silu_mul(&x[1])?,
        Op::Glu { act: UnaryOp::Gelu } => x[0].gelu_mul(&x[1])?,
        Op::Glu { act: UnaryOp::GeluErf } => x[0].gelu_erf_mul(&x[1])?,
        Op::Rope { interleaved: false } => x[0].rope(&x[1], &x[2])?,
        Op::Rope { interleaved: true } => x[0].rope_i(&x[1], &x[2])?,
        Op::Attention { mask, causal, softcap, window } => {
            let options =
                AttentionOptions { scale: s[0], causal: *causal, softcap: softcap.then(|| s[1]), window: *window };
            LazyTensor::attention(&x[0], &x[1], &x[2], mask.then(|| &x[3]), &options)?
        }
        Op::Embedding => x[0].embedding(&x[1])?,
        Op::Arange { len, dtype } => LazyTensor::arange_recorded(s[0], s[1], *len, *dtype, &dev)?,
        Op::Random { dist: Distribution::Uniform, shape, dtype } => {
            LazyTensor::rand_from(&x[0], s[0], s[1], shape.to_vec(), *dtype)?
        }
        Op::Random { dist: Distribution::Normal, shape, dtype } => {
            LazyTensor::randn_from(&x[0], s[0], s[1], shape.to_vec(), *dtype)?
        }
        Op::Elu => x[0].elu(s[0])?,
        Op::Clamp => x[0].clamp(s[0], s[1])?,
        Op::ArgReduce { op, dim, keepdim } => match (op, keepdim) {
            (ArgOp::Max, true) => x[0].argmax_keepdim(usize::from(*dim))?,
            (ArgOp::Max, false) => x[0].argmax(usize::from(*dim))?,
            (ArgOp::Min, true) => x[0].argmin_keepdim(usize::from(*dim))?,
            (ArgOp::Min, false) => x[0].argmin(usize::from(*dim))?,
        },
        Op::Gather { dim } => x[0].gather(&x[1], usize::from(*dim))?,
        Op::Scatter { op: ScatterOp::Set, dim } => x[0].scatter(&x[1], &x[2], usize::from(*dim))?,
        Op::Scatter { op: ScatterOp::Add, dim } => x[0].scatter_add(&x[1], &x[2], usize::from(*dim))?,
        Op::IndexAdd { dim } => x[0].index_add(&x[1], &x[2], usize::from(*dim))?,
        Op::GroupNorm { groups, weight, bias } => {
            let b = if *weight { 2 } else { 1 };
            x[0].group_norm(*groups, weight.then(|| &x[1]), bias.then(|| &x[b]), s[0])?
        }
        Op::CrossEntropy => x[0].cross_entropy(&x[1])?,
        _ => as_node(op, s, x)?,
    })
}

/// An op for which there is no method: a node of the graph itself.
fn as_node(op: &Op, s: &[f64], x: &[LazyTensor]) -> Result<LazyTensor> {
    let inputs: Vec<_> = x.iter().map(|t| t.node()).collect();
    let node = Node::record(op.clone(), s, &inputs, Some(&Device::Cpu), BuildSite::here())?;
    Ok(LazyTensor::from_node(node))
}

fn unary(f: UnaryOp, x: &LazyTensor) -> Result<LazyTensor> {
    Ok(match f {
        UnaryOp::Neg => x.neg()?,
        UnaryOp::Abs => x.abs()?,
        UnaryOp::Recip => x.recip()?,
        UnaryOp::Sqr => x.sqr()?,
        UnaryOp::Sqrt => x.sqrt()?,
        UnaryOp::Rsqrt => x.rsqrt()?,
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
        UnaryOp::Sigmoid => x.sigmoid()?,
        UnaryOp::Floor => x.floor()?,
        UnaryOp::Ceil => x.ceil()?,
        UnaryOp::Round => x.round()?,
        UnaryOp::Sign => x.sign()?,
    })
}

fn binary(f: BinaryOp, a: &LazyTensor, b: &LazyTensor) -> Result<LazyTensor> {
    let same = a.dims() == b.dims();
    Ok(match f {
        BinaryOp::Add if same => (a + b)?,
        BinaryOp::Sub if same => (a - b)?,
        BinaryOp::Mul if same => (a * b)?,
        BinaryOp::Div if same => (a / b)?,
        BinaryOp::Add => a.broadcast_add(b)?,
        BinaryOp::Sub => a.broadcast_sub(b)?,
        BinaryOp::Mul => a.broadcast_mul(b)?,
        BinaryOp::Div => a.broadcast_div(b)?,
        BinaryOp::Maximum if same => a.maximum(b)?,
        BinaryOp::Minimum if same => a.minimum(b)?,
        BinaryOp::Maximum => a.broadcast_maximum(b)?,
        BinaryOp::Minimum => a.broadcast_minimum(b)?,
        BinaryOp::Pow if same => a.pow(b)?,
        BinaryOp::Pow => a.broadcast_pow(b)?,
    })
}
