//! What the rounding of a gradient is measured by: per element of an input, the terms that its gradient is the sum of, added up
//! without their signs.
//!
//! A norm's gradient inv·(g' − mean g' − x̂·mean(g'·x̂)) may cancel to nothing (a row of equal numbers, or of two), softmax's
//! y·(g − Σ g·y) too, and what is left is the rounding of the terms. Where x̂ or a score is itself a difference or a sum of
//! larger numbers, their rounding comes in through an inner magnitude, which counts in units of the arithmetic (f32 for f16 and
//! bf16), as for results.

mod attention;

use crate::case::Case;
use crate::value::ulp;
use crate::{eager, Result};
use candle_core::{DType, Tensor, Var, D};
use candle_lazy_graph::{Op, ReduceOp, UnaryOp};

/// The magnitudes of an input's gradient, `None` where it is what the gradient itself is: of a single term.
pub(super) type Magnitudes = Vec<Option<Tensor>>;

/// The magnitudes for inputs `x` in f64 and the result's gradient `g`, without its sign.
///
/// # Errors
/// When Candle refuses.
pub(super) fn magnitudes(case: &Case, x: &[Tensor], g: &Tensor) -> Result<Magnitudes> {
    let factor = match case.dtype() {
        dtype @ (DType::F16 | DType::BF16) => ulp(DType::F32, 1.0) / ulp(dtype, 1.0),
        _ => 1.0,
    };
    let s = &case.scalars;
    Ok(match &case.op {
        Op::Unary(f) => vec![slope(*f, &x[0])?.map(|slope| g * slope).transpose()?],
        Op::Glu { act } => {
            let gate = slope(*act, &x[0])?.map(|slope| (g * slope)?.mul(&x[1].abs()?)).transpose()?;
            let value = eager::run(&Op::Unary(*act), &[], &x[..1])?.abs()?;
            vec![gate, Some((g * value)?)]
        }
        Op::Softmax { dim } => {
            vec![Some(softmax(&candle_nn::ops::softmax(&x[0], usize::from(*dim))?, g, usize::from(*dim))?)]
        }
        Op::LogSoftmax { dim } => {
            let y = candle_nn::ops::softmax(&x[0], usize::from(*dim))?;
            vec![Some((g + y.broadcast_mul(&g.sum_keepdim(usize::from(*dim))?)?)?)]
        }
        Op::CrossEntropy => {
            let (n, classes) = x[0].dims2()?;
            let ids = x[1].to_dtype(DType::I64)?.contiguous()?.unsqueeze(1)?;
            let targets = Tensor::zeros((n, classes), DType::F64, x[0].device())?;
            let targets = targets.scatter(&ids, &ids.ones_like()?.to_dtype(DType::F64)?, 1)?;
            let terms = (candle_nn::ops::softmax(&x[0], 1)? + targets)?;
            vec![Some((terms.broadcast_mul(g)? / n as f64)?), None]
        }
        Op::Reduce { op: ReduceOp::Var, axes, keepdim } => {
            let dims: Vec<usize> = (0..x[0].rank()).filter(|d| axes & (1 << d) != 0).collect();
            let n: usize = dims.iter().map(|&d| x[0].dims()[d]).product();
            // the mean may cancel, the rounding of its sum does not
            let mean = x[0].abs()?.mean_keepdim(dims)?;
            let g = if *keepdim { g.clone() } else { g.reshape(mean.dims())? };
            let terms = x[0].abs()?.broadcast_add(&mean)?.broadcast_mul(&g)?;
            vec![Some((terms * (2.0 / (n as f64 - 1.0)))?)]
        }
        Op::RmsNorm { weight } => {
            let n = x[0].dim(D::Minus1)?;
            norm(&Norm { x, g, weight: *weight, bias: false, width: n, eps: s[0], centred: false, factor })?
        }
        Op::LayerNorm { weight, bias } => {
            let n = x[0].dim(D::Minus1)?;
            norm(&Norm { x, g, weight: *weight, bias: *bias, width: n, eps: s[0], centred: true, factor })?
        }
        Op::GroupNorm { groups, weight, bias } => {
            let width = x[0].dims()[1..].iter().product::<usize>() / groups;
            norm(&Norm { x, g, weight: *weight, bias: *bias, width, eps: s[0], centred: true, factor })?
        }
        Op::Attention { .. } => attention::once(case, x, g, factor)?,
        Op::AttentionBackward { .. } => attention::twice(case, x, g, factor)?,
        Op::Rope { .. } => {
            // the two halves of a pair have terms of opposite signs: one of both signs of the first half's gradient adds them
            let (plus, minus) = (without_signs(case, x, g)?, without_signs(case, x, &signed(case, g)?)?);
            let larger = |(a, b): (Option<Tensor>, Option<Tensor>)| match (a, b) {
                (Some(a), Some(b)) => Ok(Some(a.abs()?.maximum(&b.abs()?)?)),
                _ => Ok(None),
            };
            plus.into_iter().zip(minus).map(larger).collect::<Result<_>>()?
        }
        Op::Binary(_) => broadcast_terms(case, x, g)?,
        // the weight exp(x − y) has the relative error of its exponent
        Op::Reduce { op: ReduceOp::LogSumExp, axes, .. } => {
            let dims: Vec<usize> = (0..x[0].rank()).filter(|d| axes & (1 << d) != 0).collect();
            if x[0].elem_count() == 0 {
                return Ok(vec![None]);
            }
            let g = g.reshape(x[0].sum_keepdim(dims.clone())?.dims())?;
            let y = eager::run(&Op::Reduce { op: ReduceOp::LogSumExp, axes: *axes, keepdim: true }, &[], &x[..1])?;
            let weight = x[0].broadcast_sub(&y)?.exp()?;
            let widest = ((x[0].abs()?.broadcast_add(&y.abs()?)?) * factor)?.maximum(1.0)?;
            vec![Some(weight.broadcast_mul(&g)?.mul(&widest)?)]
        }
        Op::Matmul | Op::Linear { .. } | Op::Lora { .. } | Op::LoraSegments { .. } | Op::Embedding => {
            without_signs(case, x, g)?
        }
        _ => vec![None; x.len()],
    })
}

/// The terms of a function's derivative; `None` where there is one.
fn slope(f: UnaryOp, x: &Tensor) -> Result<Option<Tensor>> {
    Ok(Some(match f {
        // s + x·s·(1 − s)
        UnaryOp::Silu => {
            let s = candle_nn::ops::sigmoid(x)?;
            ((x.abs()? * s.affine(-1.0, 1.0)?)? + 1.0)?.mul(&s)?
        }
        // s·(1 − s)
        UnaryOp::Sigmoid => {
            let s = candle_nn::ops::sigmoid(x)?;
            (&s * (&s + 1.0)?)?
        }
        // ½·(1 + erf) + x·φ(x); the other form differs from it by less than a thousandth
        UnaryOp::Gelu | UnaryOp::GeluErf => {
            let inner = (x.affine(std::f64::consts::FRAC_1_SQRT_2, 0.0)?.erf()?.abs()? + 1.0)?.affine(0.5, 0.0)?;
            let density =
                (x.sqr()?.affine(-0.5, 0.0)?.exp()? * (0.5 * std::f64::consts::FRAC_2_SQRT_PI / 2f64.sqrt()))?;
            (inner + (x.abs()? * density)?)?
        }
        _ => return Ok(None),
    }))
}

/// y·(g + Σ g·y) along `dim`.
fn softmax(y: &Tensor, g: &Tensor, dim: usize) -> Result<Tensor> {
    let sum = (g * y)?.sum_keepdim(dim)?;
    Ok(g.broadcast_add(&sum)?.mul(y)?)
}

/// The gradients of sums of products, all of whose numbers are taken without their signs.
fn without_signs(case: &Case, x: &[Tensor], g: &Tensor) -> Result<Magnitudes> {
    let (mut vars, mut inputs) = (Vec::new(), Vec::new());
    for (x, spec) in x.iter().zip(&case.inputs) {
        let var = spec.is_tracked().then(|| Var::from_tensor(&x.abs()?)).transpose()?;
        inputs.push(var.as_ref().map_or_else(|| x.clone(), |v| v.as_tensor().clone()));
        vars.push(var);
    }
    let scalars: Vec<f64> = case.scalars.iter().map(|s| s.abs()).collect();
    let y = eager::run(&case.op, &scalars, &inputs)?;
    let grads = (y * g)?.sum_all()?.backward()?;
    Ok(vars.iter().map(|v| v.as_ref().and_then(|v| grads.get(v.as_tensor()).cloned())).collect())
}

/// The terms of the gradients of an elementwise op of two tensors, added up where an operand was broadcast.
fn broadcast_terms(case: &Case, x: &[Tensor], g: &Tensor) -> Result<Magnitudes> {
    let whole: Vec<Var> = x
        .iter()
        .map(|x| Var::from_tensor(&x.broadcast_as(g.dims())?.contiguous()?))
        .collect::<candle_core::Result<_>>()?;
    let y = eager::run(&case.op, &case.scalars, &whole.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>())?;
    let grads = (y * g)?.sum_all()?.backward()?;
    let mut magnitudes = Vec::new();
    for (x, var) in x.iter().zip(&whole) {
        let Some(terms) = grads.get(var.as_tensor()) else {
            magnitudes.push(None);
            continue;
        };
        let extra = g.rank() - x.rank();
        let stretched = |&d: &usize| d < extra || x.dims()[d - extra] != g.dims()[d];
        let dims: Vec<usize> = (0..g.rank()).filter(stretched).collect();
        magnitudes.push(Some(terms.abs()?.sum_keepdim(dims)?.reshape(x.dims())?));
    }
    Ok(magnitudes)
}

/// `g` with the first of every pair of a rotary embedding negative.
fn signed(case: &Case, g: &Tensor) -> Result<Tensor> {
    let d = g.dim(D::Minus1)?;
    let first = |i: usize| match case.op {
        Op::Rope { interleaved: true } => i.is_multiple_of(2),
        _ => i < d / 2,
    };
    let signs: Vec<f64> = (0..d).map(|i| if first(i) { -1.0 } else { 1.0 }).collect();
    Ok(g.broadcast_mul(&Tensor::from_vec(signs, d, g.device())?)?)
}

/// A norm over rows of `width` elements.
struct Norm<'n> {
    x: &'n [Tensor],
    g: &'n Tensor,
    weight: bool,
    bias: bool,
    width: usize,
    eps: f64,
    centred: bool,
    factor: f64,
}

fn norm(n: &Norm<'_>) -> Result<Magnitudes> {
    let whole = &n.x[0];
    let mut magnitudes = vec![None; n.x.len()];
    if whole.elem_count() == 0 {
        return Ok(magnitudes);
    }
    // the dims that a weight or bias is summed over: those behind a batch's channels, or all but the last
    let vector = n.x.get(1).map_or(n.width, Tensor::elem_count);
    let per_channel = n.width != vector || whole.rank() > 2 && whole.dim(D::Minus1)? != vector;
    let shape = if per_channel {
        (whole.dim(0)?, vector, whole.elem_count() / (whole.dim(0)? * vector))
    } else {
        (whole.elem_count() / vector, vector, 1)
    };
    let rows = (whole.elem_count() / n.width, n.width);
    let x = whole.contiguous()?.reshape(rows)?;
    let mean = if n.centred { x.mean_keepdim(1)? } else { (x.narrow(1, 0, 1)? * 0.0)? };
    let d = x.broadcast_sub(&mean)?;
    let inv = (d.sqr()?.mean_keepdim(1)? + n.eps)?.sqrt()?.recip()?;
    let unit = d.broadcast_mul(&inv)?.abs()?;
    // what the unit vector is a difference of
    let wide = x.abs()?.broadcast_add(&mean.abs()?)?.broadcast_mul(&inv)?;
    let inner_unit = (&wide * n.factor)?.maximum(&unit)?;
    let mut g = n.g.contiguous()?.reshape(shape)?;
    let per_vector = |terms: &Tensor| -> Result<Tensor> { Ok(terms.reshape(shape)?.sum((0, 2))?) };
    if n.bias {
        magnitudes[if n.weight { 2 } else { 1 }] = Some(per_vector(&g)?);
    }
    if n.weight {
        magnitudes[1] = Some(per_vector(&(&g * inner_unit.reshape(shape)?)?)?);
        g = g.broadcast_mul(&n.x[1].abs()?.reshape((1, vector, 1))?)?;
    }
    let g = g.reshape(rows)?;
    let terms = |unit: &Tensor, other: &Tensor| -> Result<Tensor> {
        let along = unit.broadcast_mul(&(&g * other)?.mean_keepdim(1)?)?;
        let mut sum = (&g + along)?;
        if n.centred {
            sum = sum.broadcast_add(&g.mean_keepdim(1)?)?;
        }
        Ok(sum.broadcast_mul(&inv)?)
    };
    let outer = terms(&unit, &unit)?;
    let inner = terms(&wide, &unit)?.maximum(&terms(&unit, &wide)?)?;
    magnitudes[0] = Some(outer.maximum(&(inner * n.factor)?)?.reshape(whole.dims())?);
    Ok(magnitudes)
}
