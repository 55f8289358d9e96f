//! Which reference judges an op, and at which scale.

use crate::reference::{self as r, Arr, AttentionSpec, Summed};
use crate::value::ulp;
use crate::{opaque, Error, Result};
use candle_core::DType;
use candle_lazy_graph::{ArgOp, BinaryOp, CmpOp, Distribution, Op, ReduceOp, ScatterOp, UnaryOp};

/// What the result should be.
#[derive(Debug, Clone)]
pub struct Judged {
    /// The result, in f64.
    pub value: Arr,
    /// Per element what its rounding is measured by: |value|, or Σ|aᵢ·bᵢ| for a sum of products (a plain sum being one with
    /// ones).
    pub magnitude: Arr,
    /// The dim along which the elements of a row lie.
    pub row: usize,
}

impl Judged {
    fn plain(value: Arr) -> Self {
        let magnitude = value.map(f64::abs);
        let row = value.dims.len().saturating_sub(1);
        Self { value, magnitude, row }
    }

    fn summed(s: Summed) -> Self {
        let row = s.value.dims.len().saturating_sub(1);
        Self { value: s.value, magnitude: s.magnitude, row }
    }

    /// With an inner magnitude, which counts in units of the arithmetic: that of the result, except that f16 and bf16 are
    /// computed in f32.
    fn within(s: Summed, dtype: DType) -> Self {
        let factor = match dtype {
            DType::F16 | DType::BF16 => ulp(DType::F32, 1.0) / ulp(dtype, 1.0),
            _ => 1.0,
        };
        let inner = s.inner.clone();
        let mut judged = Self::summed(s);
        for (m, i) in judged.magnitude.data.iter_mut().zip(inner.iter().flat_map(|i| &i.data)) {
            *m = m.max(i * factor);
        }
        judged
    }

    fn within_if(s: Summed, dtype: DType) -> Self {
        if s.inner.is_some() {
            return Self::within(s, dtype);
        }
        Self::summed(s)
    }

    /// The scale of every element: the largest magnitude of its row.
    #[must_use]
    pub fn scales(&self) -> Vec<f64> {
        let finite = |x: f64| if x.is_finite() { x } else { 0.0 };
        // terms may be infinite where their sum is finite (a class of probability zero)
        let magnitudes: Vec<f64> = self
            .magnitude
            .data
            .iter()
            .zip(&self.value.data)
            .map(|(&m, &v)| if m.is_finite() { m } else { v.abs() })
            .collect();
        let (n, step) = match self.value.dims.get(self.row) {
            Some(&n) if n > 0 => (n, r::strides(&self.value.dims)[self.row]),
            _ => return magnitudes.into_iter().map(finite).collect(),
        };
        let start = |at: usize| at - at / step % n * step;
        let mut largest = vec![0.0f64; magnitudes.len()];
        for (at, &m) in magnitudes.iter().enumerate() {
            let row = start(at);
            largest[row] = largest[row].max(finite(m));
        }
        (0..largest.len()).map(|at| largest[start(at)]).collect()
    }
}

/// The reference's name for a unary function.
#[must_use]
pub fn unary_of(f: UnaryOp) -> r::Unary {
    match f {
        UnaryOp::Neg => r::Unary::Neg,
        UnaryOp::Abs => r::Unary::Abs,
        UnaryOp::Recip => r::Unary::Recip,
        UnaryOp::Sqr => r::Unary::Sqr,
        UnaryOp::Sqrt => r::Unary::Sqrt,
        UnaryOp::Rsqrt => r::Unary::Rsqrt,
        UnaryOp::Exp => r::Unary::Exp,
        UnaryOp::Log => r::Unary::Log,
        UnaryOp::Sin => r::Unary::Sin,
        UnaryOp::Cos => r::Unary::Cos,
        UnaryOp::Tanh => r::Unary::Tanh,
        UnaryOp::Erf => r::Unary::Erf,
        UnaryOp::Gelu => r::Unary::Gelu,
        UnaryOp::GeluErf => r::Unary::GeluErf,
        UnaryOp::Relu => r::Unary::Relu,
        UnaryOp::Silu => r::Unary::Silu,
        UnaryOp::Sigmoid => r::Unary::Sigmoid,
        UnaryOp::Floor => r::Unary::Floor,
        UnaryOp::Ceil => r::Unary::Ceil,
        UnaryOp::Round => r::Unary::Round,
        UnaryOp::Sign => r::Unary::Sign,
    }
}

fn binary_of(f: BinaryOp) -> r::Binary {
    match f {
        BinaryOp::Add => r::Binary::Add,
        BinaryOp::Sub => r::Binary::Sub,
        BinaryOp::Mul => r::Binary::Mul,
        BinaryOp::Div => r::Binary::Div,
        BinaryOp::Maximum => r::Binary::Maximum,
        BinaryOp::Minimum => r::Binary::Minimum,
        BinaryOp::Pow => r::Binary::Pow,
    }
}

fn compare_of(f: CmpOp) -> r::Compare {
    match f {
        CmpOp::Eq => r::Compare::Eq,
        CmpOp::Ne => r::Compare::Ne,
        CmpOp::Lt => r::Compare::Lt,
        CmpOp::Le => r::Compare::Le,
        CmpOp::Gt => r::Compare::Gt,
        CmpOp::Ge => r::Compare::Ge,
    }
}

/// What integers do to a result: cut the fraction, wrap at the dtype's width (saturate in a cast, as Rust's `as` does).
fn integral(value: Arr, dtype: DType, cast: bool) -> Arr {
    let (low, high) = match dtype {
        DType::U8 => (0.0, 255.0),
        DType::U32 => (0.0, f64::from(u32::MAX)),
        DType::I64 => (i64::MIN as f64, i64::MAX as f64),
        _ => return value,
    };
    value.map(|x| {
        let x = x.trunc();
        if cast {
            return x.clamp(low, high);
        }
        if dtype == DType::I64 || (low..=high).contains(&x) {
            x
        } else {
            x.rem_euclid(high + 1.0)
        }
    })
}

/// Both forms of gelu are x/2·(1 + f): a sum whose magnitude is |x|, and which cancels for negative x.
fn gelu_like(f: UnaryOp, value: Arr, inner: Arr, dtype: DType) -> Judged {
    let plain = Judged::plain(value);
    match f {
        UnaryOp::Gelu | UnaryOp::GeluErf => {
            let summed = Summed { value: plain.value, magnitude: plain.magnitude, inner: Some(inner) };
            Judged::within(summed, dtype)
        }
        _ => plain,
    }
}

/// x·wᵀ where the kernel rounds x to eight bits: by at most 1/254 of the row's largest number, which counts as part of the
/// magnitude.
fn quantised(x: &Arr, w: &Arr, dtype: DType) -> Result<Judged> {
    let mut judged = Judged::summed(r::linear(x, w, None)?);
    let width = x.dims.last().copied().unwrap_or(1).max(1);
    let sums: Vec<f64> = w.data.chunks(width).map(|row| row.iter().map(|v| v.abs()).sum()).collect();
    // an error of two units at the magnitude is allowed, and a unit is at least half of what it is at a power of two
    let share = 1.0 / 254.0 / ulp(dtype, 1.0);
    for (row, magnitude) in x.data.chunks(width).zip(judged.magnitude.data.chunks_mut(sums.len().max(1))) {
        let largest = row.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        magnitude.iter_mut().zip(&sums).for_each(|(m, sum)| *m += largest * sum * share);
    }
    Ok(judged)
}

/// The reference's result of `op`; `inputs` are the numbers that the tensors really hold.
///
/// # Errors
/// When the reference refuses the inputs, or there is none.
pub fn judge(op: &Op, s: &[f64], x: &[&Arr], dtype: DType) -> Result<Judged> {
    let at = |d: u8| usize::from(d);
    Ok(match op {
        Op::Full { shape, .. } => Judged::plain(integral(Arr::full(shape, s[0]), dtype, true)),
        Op::CausalMask { queries, keys, window, .. } => Judged::plain(r::causal_mask(*queries, *keys, *window)),
        Op::Unary(f) => gelu_like(*f, r::unary(unary_of(*f), x[0]), x[0].map(f64::abs), dtype),
        Op::Binary(f) => Judged::plain(integral(r::binary(binary_of(*f), x[0], x[1])?, dtype, false)),
        Op::Compare(f) => Judged::plain(r::compare(compare_of(*f), x[0], x[1])?),
        Op::CompareScalar(f) => Judged::plain(r::compare(compare_of(*f), x[0], &Arr::full(&[], s[0]))?),
        Op::Affine => {
            let value = x[0].map(|v| v.mul_add(s[0], s[1]));
            let magnitude = x[0].map(|v| (v * s[0]).abs() + s[1].abs());
            Judged { magnitude, ..Judged::plain(integral(value, dtype, false)) }
        }
        Op::Powf => Judged::plain(r::binary(r::Binary::Pow, x[0], &Arr::full(&[], s[0]))?),
        Op::Where => Judged::plain(r::select(x[0], x[1], x[2])?),
        Op::Cast(dtype) => Judged::plain(integral(x[0].clone(), *dtype, true)),
        Op::Reduce { op: f, axes, keepdim } => {
            let f = match f {
                ReduceOp::Sum => r::Reduction::Sum,
                ReduceOp::Mean => r::Reduction::Mean,
                ReduceOp::Max => r::Reduction::Max,
                ReduceOp::Min => r::Reduction::Min,
                ReduceOp::Var => r::Reduction::Var,
                ReduceOp::LogSumExp => r::Reduction::LogSumExp,
            };
            let mut summed = r::reduce(f, x[0], *axes, *keepdim)?;
            if let (r::Reduction::Var, Some(inner)) = (f, &mut summed.inner) {
                // (d + e)² is off by 2de, which the inner magnitude holds, and by e²
                let unit = ulp(if dtype == DType::F64 { dtype } else { DType::F32 }, 1.0);
                let squared = r::variance_of_roundings(x[0], *axes, *keepdim)?;
                inner.data.iter_mut().zip(&squared.data).for_each(|(i, s)| *i += unit * s);
            }
            Judged::within_if(summed, dtype)
        }
        Op::Matmul => Judged::summed(r::matmul(x[0], x[1])?),
        Op::Reshape { shape } => Judged::plain(r::reshape(x[0], shape)?),
        Op::Permute { perm } => Judged::plain(r::permute(x[0], &perm.iter().map(|&d| at(d)).collect::<Vec<_>>())),
        Op::Narrow { dim, start, len } => Judged::plain(r::narrow(x[0], at(*dim), *start, *len)),
        Op::Broadcast { shape } => Judged::plain(r::broadcast(x[0], shape)),
        Op::Arange { len, dtype } => {
            let data = (0..*len).map(|i| s[0] + i as f64 * s[1]).collect();
            Judged::plain(integral(Arr { dims: vec![*len], data }, *dtype, true))
        }
        Op::Random { dist, shape, dtype } => {
            let bits = match dtype {
                DType::F64 => 53,
                DType::F16 => 11,
                DType::BF16 => 8,
                _ => 24,
            };
            let key = x[0].data.first().copied().unwrap_or(0.0) as u64;
            Judged::plain(r::random(key, *dist == Distribution::Normal, s[0], s[1], bits, shape))
        }
        Op::Elu => {
            let value = x[0].map(|x| if x >= 0.0 { x } else { s[0] * libm::expm1(x) });
            // eˣ − 1 is a difference
            let magnitude = x[0].map(|x| if x >= 0.0 { x } else { s[0].abs() * (libm::exp(x) + 1.0) });
            Judged { magnitude, ..Judged::plain(value) }
        }
        Op::Clamp => Judged::plain(x[0].map(|x| {
            let raised = if x < s[0] { s[0] } else { x };
            if raised > s[1] {
                s[1]
            } else {
                raised
            }
        })),
        Op::ArgReduce { op, dim, keepdim } => Judged::plain(r::arg_reduce(x[0], at(*dim), *op == ArgOp::Min, *keepdim)),
        Op::Stride { dim, start, len, step } => Judged::plain(r::stride(x[0], at(*dim), *start, *len, *step)),
        Op::Gather { dim } => Judged::plain(r::gather(x[0], x[1], at(*dim))?),
        Op::Scatter { op: ScatterOp::Set, dim } => Judged::plain(r::scatter(x[0], x[1], x[2], at(*dim))?),
        Op::Scatter { op: ScatterOp::Add, dim } => Judged::summed(r::scatter_add(x[0], x[1], x[2], at(*dim))?),
        Op::IndexAdd { dim } => Judged::summed(r::index_add(x[0], x[1], x[2], at(*dim))?),
        Op::GroupNorm { groups, weight, bias } => {
            let b = if *weight { 2 } else { 1 };
            let summed = r::group_norm(x[0], *groups, weight.then(|| x[1]), bias.then(|| x[b]), s[0])?;
            let mut judged = Judged::within(summed, dtype);
            // a row is a group, not its last dim
            let width = x[0].dims[1..].iter().product::<usize>() / groups;
            for row in judged.magnitude.data.chunks_mut(width.max(1)) {
                let largest = row.iter().copied().fold(0.0, f64::max);
                row.fill(largest);
            }
            judged
        }
        Op::CrossEntropy => Judged::within(r::cross_entropy(x[0], x[1])?, dtype),
        Op::QMatmul => quantised(x[0], x[1], dtype)?,
        Op::Custom { name, .. } => match (*name, x) {
            (opaque::SQUARE, [a]) => Judged::plain(r::binary(r::Binary::Mul, a, a)?),
            (opaque::PRODUCT, [a, b]) => Judged::plain(r::binary(r::Binary::Mul, a, b)?),
            (opaque::PRODUCT_SUM, [a, b, c]) => {
                let product = r::binary(r::Binary::Mul, a, b)?;
                let magnitude = r::binary(r::Binary::Add, &product.map(f64::abs), &c.map(f64::abs))?;
                Judged { magnitude, ..Judged::plain(r::binary(r::Binary::Add, &product, c)?) }
            }
            _ => return Err(Error::NoTwin(format!("no reference for {op}"))),
        },
        Op::Contiguous | Op::Detach | Op::Barrier | Op::Checkpoint { .. } | Op::ToDevice => Judged::plain(x[0].clone()),
        Op::Concat { dim } => Judged::plain(r::concat(x, at(*dim))?),
        Op::IndexSelect { dim } => Judged::plain(r::index_select(x[0], x[1], at(*dim))?),
        Op::SliceAssign { dim, start } => Judged::plain(r::slice_assign(x[0], x[1], at(*dim), *start)),
        Op::Softmax { dim } => Judged { row: at(*dim), ..Judged::plain(r::softmax(x[0], at(*dim))) },
        Op::LogSoftmax { dim } => Judged { row: at(*dim), ..Judged::plain(r::log_softmax(x[0], at(*dim))) },
        Op::RmsNorm { weight } => Judged::plain(r::rms_norm(x[0], weight.then(|| x[1]), s[0])?),
        Op::LayerNorm { weight, bias } => {
            let b = if *weight { 2 } else { 1 };
            Judged::within(r::layer_norm(x[0], weight.then(|| x[1]), bias.then(|| x[b]), s[0])?, dtype)
        }
        Op::Linear { bias } => Judged::summed(r::linear(x[0], x[1], bias.then(|| x[2]))?),
        Op::Lora { base } => Judged::summed(r::lora(x[0], x[1], x[2], s[0], base.then(|| x[3]))?),
        Op::LoraSegments { rows } => {
            let factors: Vec<_> = x[2..].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            Judged::summed(r::lora_segments(x[0], x[1], rows, &factors, s)?)
        }
        Op::Glu { act } => {
            let product = r::binary(r::Binary::Mul, x[0], x[1])?.map(f64::abs);
            gelu_like(*act, r::glu(unary_of(*act), x[0], x[1]), product, dtype)
        }
        Op::Rope { interleaved } => Judged::summed(r::rope(x[0], x[1], x[2], *interleaved)?),
        Op::Attention { mask, causal, softcap, window } => {
            let spec = AttentionSpec { scale: s[0], causal: *causal, softcap: softcap.then(|| s[1]), window: *window };
            Judged::within(r::attention(x[0], x[1], x[2], mask.then(|| x[3]), &spec)?, dtype)
        }
        Op::AttentionBackward { mask, causal, softcap, window } => {
            let spec = AttentionSpec { scale: s[0], causal: *causal, softcap: softcap.then(|| s[1]), window: *window };
            let summed = r::attention_backward([x[0], x[1], x[2], x[3]], mask.then(|| x[4]), &spec)?;
            // three tensors in one row: the magnitudes are those of the rows of each already
            Judged { row: usize::MAX, ..Judged::within(summed, dtype) }
        }
        Op::Embedding => Judged::plain(r::embedding(x[0], x[1])?),
        other => return Err(Error::NoTwin(format!("no reference for {other}"))),
    })
}
