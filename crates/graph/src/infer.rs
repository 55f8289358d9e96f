//! Shape and dtype inference: the only truth about what an op gives.
//!
//! [`infer`] runs when an op is recorded, when a composite decomposes, after every pass (on the concrete sizes at
//! hand), and what it says is checked against every tensor that a plan produces.
//!
//! Where Candle is laxer, this says so: `matmul` compares the batch dims one by one (Candle compares their product),
//! `max` and `min` over an empty dim are errors, and no op promotes a dtype.

mod composites;
mod glance;

use crate::error::{Error, ErrorKind, Result};
use crate::op::{BinaryOp, Dims, Op, ReduceOp, UnaryOp};
use candle_core::DType;
use composites::{attention, attention_backward, group_norm, linear, lora, lora_segments, norm, qmatmul, rope};
pub(crate) use glance::at_a_glance;
use smallvec::SmallVec;

/// What inference knows of an input.
#[derive(Debug, Clone, Copy)]
pub struct Meta<'a> {
    /// The dimensions.
    pub dims: &'a [usize],
    /// The element type.
    pub dtype: DType,
}

/// What inference says of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutMeta {
    /// The dimensions.
    pub dims: Dims,
    /// The element type.
    pub dtype: DType,
}

/// The dtypes that can be recorded.
pub const DTYPES: [DType; 7] = [DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64];

/// Whether the dtype can be recorded: asked several times of every op, so it is no search.
#[inline]
fn is_known(dtype: DType) -> bool {
    use DType::{BF16, F16, F32, F64, I64, U32, U8};
    matches!(dtype, U8 | U32 | I64 | BF16 | F16 | F32 | F64)
}

/// The largest rank that can be recorded.
pub const MAX_RANK: usize = 8;

/// The number of elements, or `None` where it overflows. Sizes that overflow beside a 0 count as overflowing, whatever their
/// order: strides are products of some of them.
#[must_use]
pub fn elem_count(dims: &[usize]) -> Option<usize> {
    let without_zeros = dims.iter().try_fold(1usize, |acc, &d| acc.checked_mul(d.max(1)))?;
    Some(if dims.contains(&0) { 0 } else { without_zeros })
}

/// The shape that two shapes broadcast to (numpy's rule: aligned at the end, size one stretches).
#[must_use]
pub fn broadcast_shapes(a: &[usize], b: &[usize]) -> Option<Dims> {
    if a == b {
        return Some(Dims::from_slice(a));
    }
    let rank = a.len().max(b.len());
    let mut out: Dims = SmallVec::with_capacity(rank);
    for i in 0..rank {
        let at = |dims: &[usize]| (i + dims.len()).checked_sub(rank).map_or(1, |j| dims[j]);
        let (da, db) = (at(a), at(b));
        out.push(match (da, db) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => return None,
        });
    }
    Some(out)
}

struct Ctx<'a> {
    op: &'static str,
    inputs: &'a [Meta<'a>],
}

impl Ctx<'_> {
    fn shape<T>(&self, detail: impl Into<String>) -> Result<T> {
        Err(Error::new(self.op, ErrorKind::Shape(detail.into())))
    }
    fn dtype<T>(&self, detail: impl Into<String>) -> Result<T> {
        Err(Error::new(self.op, ErrorKind::DType(detail.into())))
    }
    fn range<T>(&self, detail: impl Into<String>) -> Result<T> {
        Err(Error::new(self.op, ErrorKind::Range(detail.into())))
    }
    fn dims(&self, i: usize) -> &[usize] {
        self.inputs[i].dims
    }
    fn ty(&self, i: usize) -> DType {
        self.inputs[i].dtype
    }

    fn known(&self, dtype: DType) -> Result<()> {
        if is_known(dtype) {
            return Ok(());
        }
        Err(Error::new(self.op, ErrorKind::Unsupported(format!("dtype {}", dtype.as_str()))))
    }

    fn float(&self, i: usize) -> Result<DType> {
        let dtype = self.ty(i);
        if dtype.is_float() && is_known(dtype) {
            return Ok(dtype);
        }
        self.dtype(format!(
            "needs a floating-point tensor, got {} of shape {:?}; cast it first: .to_dtype(DType::F32)",
            dtype.as_str(),
            self.dims(i)
        ))
    }

    /// All inputs in `which` have the dtype of the first one.
    fn same_dtype(&self, which: std::ops::Range<usize>) -> Result<DType> {
        let first = self.ty(which.start);
        for i in which.clone() {
            if self.ty(i) != first {
                let all: Vec<_> = which.map(|j| format!("{} {:?}", self.ty(j).as_str(), self.dims(j))).collect();
                return self.dtype(format!(
                    "operands are {}; cast one of them, for example .to_dtype(DType::{:?})",
                    all.join(" and "),
                    first
                ));
            }
        }
        self.known(first)?;
        Ok(first)
    }

    fn broadcast(&self, a: &[usize], b: &[usize]) -> Result<Dims> {
        match broadcast_shapes(a, b) {
            Some(dims) => Ok(dims),
            None => {
                let hint = match (a.len().abs_diff(b.len()), a.first() == b.first() && !a.is_empty()) {
                    (0, _) | (_, false) => "",
                    // (b, n) with (b): the common mistake of a forgotten keepdim
                    (_, true) => {
                        "; shapes are aligned at the end: .unsqueeze(…) or a …_keepdim reduction may be missing"
                    }
                };
                self.shape(format!("{a:?} and {b:?} do not broadcast{hint}"))
            }
        }
    }

    fn dim_in(&self, dim: u8, rank: usize) -> Result<usize> {
        if usize::from(dim) < rank {
            return Ok(usize::from(dim));
        }
        self.range(format!("dim {dim} of a tensor of rank {rank}, shape {:?}", self.dims(0)))
    }

    fn ids(&self, i: usize) -> Result<()> {
        if matches!(self.ty(i), DType::U8 | DType::U32 | DType::I64) {
            return Ok(());
        }
        self.dtype(format!(
            "indices must be u8, u32 or i64, got {} {:?}; cast them: .to_dtype(DType::U32)",
            self.ty(i).as_str(),
            self.dims(i)
        ))
    }

    /// Input 0 chooses.
    fn condition(&self) -> Result<()> {
        if matches!(self.ty(0), DType::U8 | DType::U32 | DType::I64) {
            return Ok(());
        }
        self.dtype(format!(
            "the condition {:?} must be u8, u32 or i64, got {}; compare first, for example .ne(0.0)",
            self.dims(0),
            self.ty(0).as_str()
        ))
    }

    /// A vector over the last dim of input 0 with its dtype: a norm's weight or bias.
    fn last_dim_vector(&self, i: usize, what: &str) -> Result<()> {
        let last = self.dims(0).last().copied().unwrap_or(1);
        if self.dims(i) != [last] {
            return self.shape(format!(
                "{what} has shape {:?}, the input {:?} needs [{last}]",
                self.dims(i),
                self.dims(0)
            ));
        }
        self.same_dtype_pair(i, what)
    }

    fn same_dtype_pair(&self, i: usize, what: &str) -> Result<()> {
        if self.ty(i) == self.ty(0) {
            return Ok(());
        }
        self.dtype(format!(
            "{what} is {}, the input is {}; cast it: .to_dtype(DType::{:?})",
            self.ty(i).as_str(),
            self.ty(0).as_str(),
            self.ty(0)
        ))
    }
}

#[inline]
pub(crate) fn out(dims: impl Into<Dims>, dtype: DType) -> OutMeta {
    OutMeta { dims: dims.into(), dtype }
}

/// The shape and dtype of `op` applied to `inputs`.
///
/// # Errors
/// An [`Error`] naming the op, the shapes and the dtypes when the inputs do not fit.
pub fn infer(op: &Op, inputs: &[Meta<'_>]) -> Result<OutMeta> {
    infer_checked(op, inputs).map_err(|e| e.on(inputs))
}

fn infer_checked(op: &Op, inputs: &[Meta<'_>]) -> Result<OutMeta> {
    let ctx = Ctx { op: op.name(), inputs };
    match op.arity() {
        Some(n) if n != inputs.len() => return ctx.shape(format!("takes {n} inputs, got {}", inputs.len())),
        None if inputs.is_empty() => return ctx.shape("takes at least one input, got none"),
        _ => {}
    }
    for input in inputs {
        ctx.known(input.dtype)?;
        // a leaf may be any Candle tensor
        if input.dims.len() > MAX_RANK {
            return ctx.shape(format!("{:?} has more than {MAX_RANK} dims", input.dims));
        }
    }
    let result = infer_op(op, &ctx)?;
    if result.dims.len() > MAX_RANK {
        return ctx.shape(format!("rank {} is above the limit of {MAX_RANK}", result.dims.len()));
    }
    // bytes, not elements, so that no later size computation overflows
    let bytes = elem_count(&result.dims).and_then(|n| n.checked_mul(result.dtype.size_in_bytes().max(1)));
    if bytes.is_none_or(|b| b > isize::MAX as usize) {
        return ctx.shape(format!("{:?} has more bytes than memory can address", result.dims.as_slice()));
    }
    Ok(result)
}

fn infer_op(op: &Op, ctx: &Ctx<'_>) -> Result<OutMeta> {
    Ok(match op {
        Op::Full { shape, dtype } => {
            ctx.known(*dtype)?;
            out(shape.clone(), *dtype)
        }
        Op::CausalMask { queries, keys, window, dtype } => {
            ctx.known(*dtype)?;
            if !dtype.is_float() {
                return ctx.dtype(format!("an additive mask must be floating-point, not {}", dtype.as_str()));
            }
            if queries > keys {
                return ctx.shape(format!("{queries} queries and only {keys} keys"));
            }
            if *window == Some(0) {
                return ctx.range("a sliding window of zero keys");
            }
            out(Dims::from_slice(&[*queries, *keys]), *dtype)
        }
        Op::Arange { len, dtype } => {
            ctx.known(*dtype)?;
            out(Dims::from_slice(&[*len]), *dtype)
        }
        Op::Random { shape, dtype, .. } => {
            ctx.ids(0)?;
            if elem_count(ctx.dims(0)) != Some(1) {
                return ctx.shape(format!("the key must be one integer, got {:?}", ctx.dims(0)));
            }
            if !dtype.is_float() {
                return ctx.dtype(format!("random numbers are floating-point, not {}", dtype.as_str()));
            }
            ctx.known(*dtype)?;
            out(shape.clone(), *dtype)
        }
        Op::Unary(_) | Op::Powf | Op::Elu => {
            let dtype = ctx.float(0)?;
            out(ctx.dims(0), dtype)
        }
        Op::Affine => {
            ctx.known(ctx.ty(0))?;
            out(ctx.dims(0), ctx.ty(0))
        }
        Op::Clamp => {
            let dtype = ctx.float(0)?;
            out(ctx.dims(0), dtype)
        }
        Op::Binary(f) => {
            if *f == BinaryOp::Pow {
                ctx.float(0)?;
            }
            let dims = ctx.broadcast(ctx.dims(0), ctx.dims(1))?;
            out(dims, ctx.same_dtype(0..2)?)
        }
        Op::Compare(_) => {
            let dims = ctx.broadcast(ctx.dims(0), ctx.dims(1))?;
            ctx.same_dtype(0..2)?;
            out(dims, DType::U8)
        }
        Op::CompareScalar(_) => {
            ctx.known(ctx.ty(0))?;
            out(ctx.dims(0), DType::U8)
        }
        Op::Where => {
            ctx.condition()?;
            let values = ctx.broadcast(ctx.dims(1), ctx.dims(2))?;
            let dims = ctx.broadcast(ctx.dims(0), &values)?;
            out(dims, ctx.same_dtype(1..3)?)
        }
        Op::Cast(dtype) => {
            ctx.known(ctx.ty(0))?;
            ctx.known(*dtype)?;
            out(ctx.dims(0), *dtype)
        }
        Op::Reduce { op, axes, keepdim } => reduce(ctx, *op, *axes, *keepdim)?,
        Op::ArgReduce { dim, keepdim, .. } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            if ctx.dims(0)[d] == 0 {
                return ctx.range(format!("no {} over the empty dim {dim} of {:?}", ctx.op, ctx.dims(0)));
            }
            let mut dims = Dims::from_slice(ctx.dims(0));
            if *keepdim {
                dims[d] = 1;
            } else {
                dims.remove(d);
            }
            out(dims, DType::U32)
        }
        Op::Matmul => matmul(ctx)?,
        Op::Reshape { shape } => {
            if elem_count(shape) != elem_count(ctx.dims(0)) {
                return ctx.shape(format!(
                    "{:?} has {} elements, {:?} would need another number",
                    ctx.dims(0),
                    ctx.dims(0).iter().product::<usize>(),
                    shape.as_slice()
                ));
            }
            out(shape.clone(), ctx.ty(0))
        }
        Op::Permute { perm } => {
            let rank = ctx.dims(0).len();
            let mut seen = [false; MAX_RANK];
            let valid = perm.len() == rank
                && perm.iter().all(|&d| {
                    let d = usize::from(d);
                    d < rank && !std::mem::replace(&mut seen[d], true)
                });
            if !valid {
                return ctx.range(format!("{:?} is no permutation of the dims of {:?}", perm.as_slice(), ctx.dims(0)));
            }
            let dims: Dims = perm.iter().map(|&d| ctx.dims(0)[usize::from(d)]).collect();
            out(dims, ctx.ty(0))
        }
        Op::Narrow { dim, start, len } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            if start.checked_add(*len).is_none_or(|end| end > ctx.dims(0)[d]) {
                return ctx.range(format!("start {start} and length {len} exceed dim {dim} of {:?}", ctx.dims(0)));
            }
            let mut dims = Dims::from_slice(ctx.dims(0));
            dims[d] = *len;
            out(dims, ctx.ty(0))
        }
        Op::Stride { dim, start, len, step } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            let last = len.checked_sub(1).map_or(Some(0), |n| n.checked_mul(*step)).and_then(|n| n.checked_add(*start));
            if *step == 0 || (*len > 0 && last.is_none_or(|last| last >= ctx.dims(0)[d])) {
                return ctx.range(format!(
                    "{len} indices from {start} in steps of {step} exceed dim {dim} of {:?}",
                    ctx.dims(0)
                ));
            }
            let mut dims = Dims::from_slice(ctx.dims(0));
            dims[d] = *len;
            out(dims, ctx.ty(0))
        }
        Op::Broadcast { shape } => {
            if broadcast_shapes(ctx.dims(0), shape).as_deref() != Some(shape.as_slice()) {
                return ctx.shape(format!("{:?} does not broadcast to {:?}", ctx.dims(0), shape.as_slice()));
            }
            out(shape.clone(), ctx.ty(0))
        }
        Op::Checkpoint { .. } => {
            let count = ctx.inputs.len();
            if count > 2 || count == 2 && (ctx.dims(0) != ctx.dims(1) || ctx.ty(0) != ctx.ty(1)) {
                return ctx.shape("takes one tensor, or two of one shape and dtype");
            }
            out(ctx.dims(0), ctx.ty(0))
        }
        Op::Contiguous | Op::Detach | Op::Barrier | Op::ToDevice => out(ctx.dims(0), ctx.ty(0)),
        Op::Concat { dim } => concat(ctx, *dim)?,
        Op::IndexSelect { dim } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            ctx.ids(1)?;
            let [count] = ctx.dims(1) else {
                return ctx.shape(format!("indices must have one dim, got {:?}", ctx.dims(1)));
            };
            let mut dims = Dims::from_slice(ctx.dims(0));
            dims[d] = *count;
            out(dims, ctx.ty(0))
        }
        Op::Gather { dim } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            ctx.ids(1)?;
            let (x, ids) = (ctx.dims(0), ctx.dims(1));
            if x.len() != ids.len() || x.iter().zip(ids).enumerate().any(|(i, (a, b))| i != d && b > a) {
                return ctx.shape(format!(
                    "indices {ids:?} for {x:?}: the ranks must be equal, and outside dim {dim} no index dim larger"
                ));
            }
            out(ids, ctx.ty(0))
        }
        Op::Scatter { dim, .. } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            ctx.ids(1)?;
            let (x, ids, src) = (ctx.dims(0), ctx.dims(1), ctx.dims(2));
            let fits = x.len() == src.len() && x.iter().zip(src).enumerate().all(|(i, (a, b))| i == d || a == b);
            if ids != src || !fits {
                return ctx.shape(format!(
                    "source {src:?} and indices {ids:?} for {x:?}: both need its shape, except for dim {dim}"
                ));
            }
            ctx.same_dtype_pair(2, "the source")?;
            out(x, ctx.ty(0))
        }
        Op::IndexAdd { dim } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            ctx.ids(1)?;
            let (x, ids, src) = (ctx.dims(0), ctx.dims(1), ctx.dims(2));
            let fits = x.len() == src.len()
                && x.iter().zip(src).enumerate().all(|(i, (a, b))| i == d || a == b)
                && ids == [src[d]];
            if !fits {
                return ctx.shape(format!(
                    "source {src:?} and indices {ids:?} for {x:?}: the source needs its shape, except for dim {dim}, and one index per slice"
                ));
            }
            ctx.same_dtype_pair(2, "the source")?;
            out(x, ctx.ty(0))
        }
        Op::SliceAssign { dim, start } => {
            let d = ctx.dim_in(*dim, ctx.dims(0).len())?;
            let dtype = ctx.same_dtype(0..2)?;
            let (x, src) = (ctx.dims(0), ctx.dims(1));
            let fits = x.len() == src.len()
                && x.iter().zip(src).enumerate().all(|(i, (a, b))| i == d || a == b)
                && start.checked_add(src[d]).is_some_and(|end| end <= x[d]);
            if !fits {
                return ctx.shape(format!("{src:?} does not fit into {x:?} at {start} of dim {dim}"));
            }
            out(x, dtype)
        }
        Op::Softmax { dim } | Op::LogSoftmax { dim } => {
            ctx.dim_in(*dim, ctx.dims(0).len())?;
            let dtype = ctx.float(0)?;
            out(ctx.dims(0), dtype)
        }
        Op::RmsNorm { .. } | Op::LayerNorm { .. } => norm(op, ctx)?,
        Op::Linear { bias } => linear(ctx, *bias)?,
        Op::Lora { base } => lora(ctx, *base)?,
        Op::LoraSegments { rows } => lora_segments(ctx, rows)?,
        Op::Glu { act } => {
            if !matches!(act, UnaryOp::Silu | UnaryOp::Gelu | UnaryOp::GeluErf | UnaryOp::Relu | UnaryOp::Sigmoid) {
                return Err(Error::new(
                    op.name(),
                    ErrorKind::Unsupported(format!("{} is no activation of a gated unit", act.name())),
                ));
            }
            ctx.float(0)?;
            let dtype = ctx.same_dtype(0..2)?;
            if ctx.dims(0) != ctx.dims(1) {
                return ctx.shape(format!("gate {:?} and up {:?} differ", ctx.dims(0), ctx.dims(1)));
            }
            out(ctx.dims(0), dtype)
        }
        Op::Rope { .. } => rope(ctx)?,
        Op::Attention { mask, causal, window, .. } => attention(ctx, mask.then_some(3), *causal, *window)?,
        Op::AttentionBackward { mask, causal, window, .. } => attention_backward(ctx, *mask, *causal, *window)?,
        Op::Embedding => {
            ctx.ids(1)?;
            ctx.known(ctx.ty(0))?;
            let [_, width] = ctx.dims(0) else {
                return ctx.shape(format!("the table must have two dims, got {:?}", ctx.dims(0)));
            };
            let mut dims = Dims::from_slice(ctx.dims(1));
            dims.push(*width);
            out(dims, ctx.ty(0))
        }
        Op::GroupNorm { groups, weight, bias } => group_norm(ctx, *groups, *weight, *bias)?,
        Op::CrossEntropy => {
            let dtype = ctx.float(0)?;
            ctx.ids(1)?;
            let fits = matches!((ctx.dims(0), ctx.dims(1)), ([n, c], [m]) if n == m && *n > 0 && *c > 0);
            if !fits {
                return ctx.shape(format!(
                    "logits {:?} and targets {:?}: needs (n, classes) and (n), neither empty",
                    ctx.dims(0),
                    ctx.dims(1)
                ));
            }
            out(Dims::new(), dtype)
        }
        Op::QMatmul => qmatmul(ctx)?,
        Op::Custom { arity, shape, dtype, .. } => {
            ctx.known(*dtype)?;
            // a backward takes the result and its gradient, too
            if !(1..=5).contains(arity) {
                return ctx.shape(format!("a custom op of {arity} inputs; Candle knows one to three"));
            }
            out(shape.clone(), *dtype)
        }
    })
}

fn reduce(ctx: &Ctx<'_>, op: ReduceOp, axes: u32, keepdim: bool) -> Result<OutMeta> {
    let dims = ctx.dims(0);
    if dims.len() < 32 && axes >> dims.len() != 0 {
        return ctx.range(format!("dims (bit mask {axes:#b}) of a tensor of shape {dims:?}"));
    }
    let real = matches!(op, ReduceOp::Mean | ReduceOp::Var | ReduceOp::LogSumExp);
    let dtype = if real { ctx.float(0)? } else { ctx.ty(0) };
    ctx.known(dtype)?;
    let reduced = |d: usize| axes & (1 << d) != 0;
    if op == ReduceOp::Var && axes == 0 {
        return ctx.range(format!("the variance of {dims:?} over no dims"));
    }
    if matches!(op, ReduceOp::Max | ReduceOp::Min | ReduceOp::LogSumExp)
        && (0..dims.len()).any(|d| reduced(d) && dims[d] == 0)
    {
        return ctx.range(format!("no {} over an empty dim of {dims:?}", op.name()));
    }
    let mut result: Dims = SmallVec::new();
    for (d, &size) in dims.iter().enumerate() {
        match (reduced(d), keepdim) {
            (false, _) => result.push(size),
            (true, true) => result.push(1),
            (true, false) => {}
        }
    }
    Ok(out(result, dtype))
}

fn matmul(ctx: &Ctx<'_>) -> Result<OutMeta> {
    ctx.float(0)?;
    let dtype = ctx.same_dtype(0..2)?;
    let (a, b) = (ctx.dims(0), ctx.dims(1));
    let ([a_batch @ .., m, k], [b_batch @ .., k2, n]) = (a, b) else {
        return ctx.shape(format!("{a:?} x {b:?}: both sides need at least two dims"));
    };
    if k != k2 {
        let hint = match (k == n, m == k2) {
            (true, _) => "; the right side transposed would fit: .t()",
            (false, true) => "; the left side transposed would fit: .t()",
            (false, false) => "",
        };
        return ctx.shape(format!("{a:?} x {b:?}: the inner dims {k} and {k2} differ{hint}"));
    }
    let Some(mut dims) = broadcast_shapes(a_batch, b_batch) else {
        return ctx.shape(format!("{a:?} x {b:?}: the batch dims do not broadcast"));
    };
    dims.extend([*m, *n]);
    Ok(out(dims, dtype))
}

fn concat(ctx: &Ctx<'_>, dim: u8) -> Result<OutMeta> {
    let dtype = ctx.same_dtype(0..ctx.inputs.len())?;
    let first = ctx.dims(0);
    let d = ctx.dim_in(dim, first.len())?;
    let mut dims = Dims::from_slice(first);
    for i in 1..ctx.inputs.len() {
        let other = ctx.dims(i);
        let fits = other.len() == first.len() && (0..first.len()).all(|j| j == d || first[j] == other[j]);
        if !fits {
            return ctx.shape(format!("{first:?} and {other:?} differ outside dim {dim}"));
        }
        match dims[d].checked_add(other[d]) {
            Some(sum) => dims[d] = sum,
            None => return ctx.shape(format!("dim {dim} overflows")),
        }
    }
    Ok(out(dims, dtype))
}

#[cfg(test)]
mod tests;
