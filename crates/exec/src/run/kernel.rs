//! One step: the kernel it names, on the values in its slots.

mod heads;
mod rows;

use super::bind::Lent;
use super::slots::{kernel_error, slot_tensor, with_views, SlotValue};
use super::{candle, Engine};
use crate::buffer::{granted, Buffer};
use crate::config::TARGET;
use crate::error::{Error, Result};
use crate::plan::{CandleReason, Memory, Output, Step, StepKind};
use crate::report::EvalReport;
use candle_lazy_graph::{ArgOp, Bindings, Dims, Distribution, Op, ScatterOp, Sym};
use candle_lazy_ops::fault;
use candle_lazy_ops::kernels::{self, AttentionParams};
use candle_lazy_ops::row::programs::Ready;
use candle_lazy_ops::row::BinaryFn;
use candle_lazy_ops::view::{SliceMut, Strided, View};
pub(super) use rows::row_program;
use smallvec::SmallVec;
use std::sync::Arc;
use tracing::trace_span;

struct Ctx<'a> {
    step: &'a Step,
    /// Which step of its plan it is.
    number: usize,
    bindings: &'a Bindings,
    memory: &'a Memory,
    /// Where the step is a product of the rows of several requests: how many there are.
    rows: Option<usize>,
}

impl Ctx<'_> {
    /// What `dims` are in this run.
    fn dims(&self, dims: &Dims<Sym>) -> Dims {
        let dims = self.bindings.dims(dims);
        match self.rows {
            Some(rows) => Dims::from_slice(&[rows, dims.last().copied().unwrap_or(1)]),
            None => dims,
        }
    }

    fn param(&self, i: usize) -> Result<f64> {
        let i = if fault::active("bind.last_scalar") { self.step.params.len() - 1 } else { i };
        let index = self.step.params.get(i).copied();
        index
            .and_then(|p| self.bindings.params.get(p as usize).copied())
            .ok_or_else(|| Error::Internal(format!("{} lacks scalar {i}", self.step.kind.name())))
    }

    /// What attention does, whose scalars are the step's.
    fn attention(&self, causal: bool, softcap: bool, window: Option<Sym>) -> Result<AttentionParams> {
        Ok(AttentionParams {
            scale: self.param(0)?,
            causal,
            softcap: if softcap { Some(self.param(1)?) } else { None },
            window: window.map(|w| self.bindings.size(w)),
        })
    }

    /// Memory for output `i`, of `dims`.
    fn take(&self, i: usize, dims: &[usize]) -> Result<Buffer> {
        let (len, dtype) = (dims.iter().product(), self.output(i)?.dtype);
        match self.rows {
            Some(_) => Buffer::take(dtype, len),
            None => Buffer::take_piece(dtype, len, self.memory.piece(self.number, i)),
        }
    }

    fn output(&self, i: usize) -> Result<&Output> {
        let output = self.step.outputs.get(i);
        output.ok_or_else(|| Error::Internal(format!("{} lacks output {i}", self.step.kind.name())))
    }

    fn input(&self, i: usize) -> Result<u32> {
        let input = self.step.inputs.get(i).copied();
        input.ok_or_else(|| Error::Internal(format!("{} lacks input {i}", self.step.kind.name())))
    }
}

pub(super) fn run_step(
    (step, number): (&Step, usize),
    bindings: &Bindings,
    memory: &Memory,
    slots: &mut [SlotValue],
    lent: &mut Lent,
    report: &mut EvalReport,
) -> Result<()> {
    let ctx = Ctx { step, number, bindings, memory, rows: None };
    let (kernel, ops) = (step.kind.name(), &step.ops);
    let _span = trace_span!(target: TARGET, "step", kernel, number, ops = ?ops).entered();
    match &step.kind {
        StepKind::View(op) => return view(&ctx, op, slots, report),
        StepKind::Candle { op, reason } => {
            let counts = match reason {
                CandleReason::Replay => &mut report.replayed,
                CandleReason::Fallback => &mut report.fallbacks,
            };
            *counts.entry(op.name()).or_default() += 1;
            return candle_op(&ctx, op, slots);
        }
        StepKind::Custom(op) => candle_op(&ctx, op, slots)?,
        StepKind::ToDevice => candle_op(&ctx, &Op::ToDevice, slots)?,
        StepKind::SliceAssign { dim, start } => slice_assign(&ctx, *dim, *start, slots, lent, report)?,
        StepKind::Row { program, domain, axes } => rows::run(&ctx, (program, domain, *axes), slots, lent, report)?,
        StepKind::Products { heads } => {
            let buffers = heads::run(&ctx, heads, slots)?;
            for (output, buffer) in step.outputs.iter().zip(buffers) {
                put(slots, output, buffer, bindings);
            }
        }
        _ => {
            let buffer = single_output(&ctx, slots)?;
            put(slots, ctx.output(0)?, buffer, bindings);
        }
    }
    *report.kernels.entry(step.kind.name()).or_default() += 1;
    Ok(())
}

/// The outputs of a product whose rows are those of several requests, `rows` in all: its inputs are matrices of them, or what all share.
pub(super) fn of_rows(
    (step, number): (&Step, usize),
    bindings: &Bindings,
    memory: &Memory,
    slots: &[SlotValue],
    rows: usize,
) -> Result<SmallVec<[Buffer; 2]>> {
    let ctx = Ctx { step, number, bindings, memory, rows: Some(rows) };
    match &step.kind {
        StepKind::Products { heads } => heads::run(&ctx, heads, slots),
        _ => Ok(SmallVec::from_iter([single_output(&ctx, slots)?])),
    }
}

fn put(slots: &mut [SlotValue], output: &Output, buffer: Buffer, bindings: &Bindings) {
    if let Some(place) = slots.get_mut(output.slot as usize) {
        *place = SlotValue::buffer(buffer, &bindings.dims(&output.dims));
    }
}

/// Kernels that fill one new buffer.
fn single_output(ctx: &Ctx<'_>, slots: &[SlotValue]) -> Result<Buffer> {
    let output = ctx.output(0)?;
    let dims = ctx.dims(&output.dims);
    let mut buffer = ctx.take(0, &dims)?;
    with_views(slots, &ctx.step.inputs, |v| {
        let mut out = buffer.slice_mut();
        let at =
            |i: usize| v.get(i).ok_or_else(|| Error::Internal(format!("{} lacks input {i}", ctx.step.kind.name())));
        match &ctx.step.kind {
            StepKind::Matmul => kernels::matmul(at(0)?, at(1)?, &mut out).map_err(kernel_error),
            StepKind::Linear => linear(at(0)?, at(1)?, v.get(2), &mut out),
            StepKind::Lora => {
                kernels::lora(at(0)?, at(1)?, at(2)?, v.get(3), ctx.param(0)?, &mut out).map_err(kernel_error)
            }
            StepKind::LoraSegments { rows } => {
                let factors = v.get(2..).unwrap_or_default().chunks_exact(2);
                let segments = rows.chunks_exact(2).zip(factors).enumerate().map(|(i, (sizes, factors))| {
                    let (gap, rows) = (ctx.bindings.size(sizes[0]), ctx.bindings.size(sizes[1]));
                    Ok(kernels::Segment { gap, rows, a: &factors[0], b: &factors[1], scale: ctx.param(i)? })
                });
                let segments = segments.collect::<Result<Vec<_>>>()?;
                kernels::lora_segments(at(0)?, at(1)?, &segments, &mut out).map_err(kernel_error)
            }
            StepKind::Rope { interleaved } => {
                kernels::rope(at(0)?, at(1)?, at(2)?, *interleaved, &mut out).map_err(kernel_error)
            }
            StepKind::Attention { mask, causal, softcap, window } => {
                let params = ctx.attention(*causal, *softcap, *window)?;
                let mask = if *mask { Some(at(3)?) } else { None };
                kernels::attention(at(0)?, at(1)?, at(2)?, mask, &params, &mut out).map_err(kernel_error)
            }
            StepKind::AttentionBackward { mask, causal, softcap, window } => {
                let params = ctx.attention(*causal, *softcap, *window)?;
                let mask = if *mask { Some(at(4)?) } else { None };
                kernels::attention_backward(at(0)?, at(1)?, at(2)?, at(3)?, mask, &params, &mut out)
                    .map_err(kernel_error)
            }
            StepKind::IndexSelect { dim } => {
                kernels::index_select(at(0)?, at(1)?, usize::from(*dim), &mut out).map_err(kernel_error)
            }
            StepKind::ArgReduce { op, dim } => {
                kernels::arg_reduce(at(0)?, usize::from(*dim), *op == ArgOp::Min, &mut out).map_err(kernel_error)
            }
            StepKind::Gather { dim } => {
                kernels::gather(at(0)?, at(1)?, usize::from(*dim), &mut out).map_err(kernel_error)
            }
            StepKind::Scatter { op, dim } => {
                let how = match op {
                    ScatterOp::Set => kernels::Scatter::Set,
                    ScatterOp::Add => kernels::Scatter::Add,
                };
                kernels::scatter(at(0)?, at(1)?, at(2)?, usize::from(*dim), how, &mut out).map_err(kernel_error)
            }
            StepKind::IndexAdd { dim } => {
                kernels::index_add(at(0)?, at(1)?, at(2)?, usize::from(*dim), &mut out).map_err(kernel_error)
            }
            StepKind::Arange => kernels::arange(&mut out, ctx.param(0)?, ctx.param(1)?).map_err(kernel_error),
            StepKind::Random { dist } => {
                let mut key = [0i64];
                kernels::cast(at(0)?, &mut SliceMut::I64(&mut key)).map_err(kernel_error)?;
                let dist = match dist {
                    Distribution::Uniform => kernels::Distribution::Uniform,
                    Distribution::Normal => kernels::Distribution::Normal,
                };
                kernels::random(key[0] as u64, dist, ctx.param(0)?, ctx.param(1)?, &mut out).map_err(kernel_error)
            }
            StepKind::Concat { dim } => {
                let whole = Strided::contiguous(&dims);
                let mut start = 0;
                for part in v {
                    let dim = usize::from(*dim);
                    let len = part.dims().get(dim).copied().unwrap_or(0);
                    let place = whole.narrow(dim, start, len).map_err(kernel_error)?;
                    kernels::copy_into(part, &mut out, &place).map_err(kernel_error)?;
                    start += len - fault::one_if("concat.start").min(len);
                }
                Ok(())
            }
            StepKind::Full => kernels::fill(&mut out, ctx.param(0)?).map_err(kernel_error),
            StepKind::CausalMask { window } => {
                let window = window.filter(|_| !fault::active("causal_mask.window"));
                let mut values = candle::causal_mask_values(&dims, window.map(|w| ctx.bindings.size(w)));
                if let (true, Some(last)) = (fault::active("causal_mask.last"), values.last_mut()) {
                    *last = f32::NEG_INFINITY;
                }
                if let (true, Some(hidden)) =
                    (fault::active("causal_mask.diagonal"), values.iter_mut().find(|v| v.is_infinite()))
                {
                    *hidden = 0.0;
                }
                let view = View::new(candle_lazy_ops::view::Slice::F32(&values), Strided::contiguous(&dims));
                kernels::cast(&view.map_err(kernel_error)?, &mut out).map_err(kernel_error)
            }
            StepKind::Cast => kernels::cast(at(0)?, &mut out).map_err(kernel_error),
            StepKind::Copy => kernels::copy_into(at(0)?, &mut out, &Strided::contiguous(&dims)).map_err(kernel_error),
            StepKind::View(_)
            | StepKind::Row { .. }
            | StepKind::Products { .. }
            | StepKind::SliceAssign { .. }
            | StepKind::ToDevice
            | StepKind::Custom(_)
            | StepKind::Candle { .. } => {
                Err(Error::Internal(format!("{} fills no single buffer", ctx.step.kind.name())))
            }
        }
    })?;
    Ok(buffer)
}

/// x·wᵀ with w (out, in) read where it lies; the bias is added to the rounded product, as the pass that splits it off does.
fn linear(x: &View<'_>, w: &View<'_>, bias: Option<&View<'_>>, out: &mut SliceMut<'_>) -> Result<()> {
    let transposed = View { data: w.data, layout: w.layout.permute(&[1, 0]).map_err(kernel_error)? };
    let row;
    let x = match x.dims() {
        [features] => {
            let Some(layout) = x.layout.reshape(&[1, *features]) else {
                return Err(Error::Internal("a vector that has no row form".into()));
            };
            row = View { data: x.data, layout };
            &row
        }
        _ => x,
    };
    // with no elements there is nothing to add, and a width of 0 is no row to add to
    let Some(bias) = bias.filter(|_| !out.is_empty() && !fault::active("linear.bias")) else {
        return kernels::matmul(x, &transposed, out).map_err(kernel_error);
    };
    let mut product = Buffer::take(out.dtype(), out.len())?;
    kernels::matmul(x, &transposed, &mut product.slice_mut()).map_err(kernel_error)?;
    let width = bias.dims().first().copied().unwrap_or(1).max(1);
    let dims = [out.len() / width, width];
    let program = Ready::Binary(BinaryFn::Add).program(out.dtype()).map_err(kernel_error)?;
    let product = View::new(product.slice(), Strided::contiguous(&dims)).map_err(kernel_error)?;
    let bias = View { data: bias.data, layout: bias.layout.broadcast_to(&dims).map_err(kernel_error)? };
    program.run(&dims, 0, &[product, bias], &[], &mut [out.reborrow()]).map_err(kernel_error)
}

/// Another look at the same data.
fn view(ctx: &Ctx<'_>, op: &Op<Sym>, slots: &mut [SlotValue], report: &mut EvalReport) -> Result<()> {
    let output = ctx.output(0)?;
    let input = ctx.input(0)?;
    let dims = ctx.bindings.dims(&output.dims);
    let result = match slots.get(input as usize) {
        Some(SlotValue::Buffer(value)) => {
            let layout = match op {
                Op::Reshape { .. } if fault::active("view.reshape") => Some(Strided::contiguous(&dims)),
                Op::Reshape { .. } => value.layout.reshape(&dims),
                Op::Permute { perm } => {
                    let mut perm: SmallVec<[usize; 8]> = perm.iter().map(|&d| usize::from(d)).collect();
                    if fault::active("view.permute") {
                        perm.reverse();
                    }
                    Some(value.layout.permute(&perm).map_err(kernel_error)?)
                }
                Op::Narrow { dim, start, len } => {
                    let (start, len) = (ctx.bindings.size(*start), ctx.bindings.size(*len));
                    let start = start - fault::one_if("view.narrow").min(start);
                    Some(value.layout.narrow(usize::from(*dim), start, len).map_err(kernel_error)?)
                }
                Op::Stride { .. } => Some(strided(ctx, op, &value.layout)?),
                Op::Broadcast { .. } => Some(value.layout.broadcast_to(&dims).map_err(kernel_error)?),
                Op::Detach | Op::Barrier | Op::Checkpoint { .. } => Some(value.layout.clone()),
                other => return Err(Error::Internal(format!("{} is no view", other.name()))),
            };
            layout.map(|layout| SlotValue::Buffer(Engine { buffer: value.buffer.clone(), layout }))
        }
        Some(SlotValue::Foreign(value)) => foreign_view(ctx, op, &value.tensor, &dims)?.map(SlotValue::foreign),
        Some(SlotValue::Quantized(_) | SlotValue::Empty) | None => {
            return Err(Error::Internal(format!("slot ${input} is empty")));
        }
    };
    let result = match result {
        Some(result) => {
            report.views += 1;
            result
        }
        None => {
            // the strides, or Candle's views, cannot express the new shape
            let mut buffer = ctx.take(0, &dims)?;
            with_views(slots, &[input], |v| {
                let Some(x) = v.first() else {
                    return Err(Error::Internal("reshape lacks its input".into()));
                };
                let x = match op {
                    Op::Stride { .. } => View { data: x.data, layout: strided(ctx, op, &x.layout)? },
                    _ => x.clone(),
                };
                let whole = Strided::contiguous(x.dims());
                kernels::copy_into(&x, &mut buffer.slice_mut(), &whole).map_err(kernel_error)
            })?;
            *report.kernels.entry("contiguous").or_default() += 1;
            SlotValue::buffer(buffer, &dims)
        }
    };
    if let Some(place) = slots.get_mut(output.slot as usize) {
        *place = result;
    }
    Ok(())
}

fn strided(ctx: &Ctx<'_>, op: &Op<Sym>, layout: &Strided) -> Result<Strided> {
    let Op::Stride { dim, start, len, step } = op else {
        return Err(Error::Internal(format!("{} has no step", op.name())));
    };
    let size = |s: &Sym| ctx.bindings.size(*s);
    let step = if fault::active("view.stride") { 1 } else { size(step) };
    layout.stride(usize::from(*dim), size(start), size(len), step).map_err(kernel_error)
}

/// A view of a Candle tensor is Candle's own view: no data moves, and a result that is a view of the user's tensor shares it.
fn foreign_view(
    ctx: &Ctx<'_>,
    op: &Op<Sym>,
    tensor: &candle_core::Tensor,
    dims: &Dims,
) -> Result<Option<candle_core::Tensor>> {
    Ok(Some(match op {
        Op::Reshape { .. } if !tensor.is_contiguous() => return Ok(None),
        Op::Stride { .. } => return Ok(None),
        Op::Reshape { .. } => tensor.reshape(dims.as_slice())?,
        Op::Permute { perm } => {
            let mut perm: Vec<usize> = perm.iter().map(|&d| usize::from(d)).collect();
            if fault::active("view.permute_of_leaf") {
                perm.reverse();
            }
            tensor.permute(perm)?
        }
        Op::Narrow { dim, start, len } => {
            let start = ctx.bindings.size(*start);
            let start = start - fault::one_if("view.narrow_of_leaf").min(start);
            tensor.narrow(usize::from(*dim), start, ctx.bindings.size(*len))?
        }
        Op::Broadcast { .. } => tensor.broadcast_as(dims.as_slice())?,
        Op::Detach => tensor.detach(),
        Op::Barrier | Op::Checkpoint { .. } => tensor.clone(),
        other => return Err(Error::Internal(format!("{} is no view", other.name()))),
    }))
}

fn candle_op(ctx: &Ctx<'_>, op: &Op<Sym>, slots: &mut [SlotValue]) -> Result<()> {
    let output = ctx.output(0)?;
    let mut inputs: SmallVec<[candle_core::Tensor; 4]> = SmallVec::new();
    let mut weight = None;
    for &slot in &ctx.step.inputs {
        match slots.get(slot as usize) {
            Some(SlotValue::Quantized(w)) => weight = Some(w.clone()),
            _ => inputs.push(slot_tensor(slots, slot)?),
        }
    }
    let op = op.map_sizes(|s| ctx.bindings.size(*s));
    let params = (0..ctx.step.params.len()).map(|i| ctx.param(i)).collect::<Result<SmallVec<[f64; 2]>>>()?;
    let dims = ctx.bindings.dims(&output.dims);
    let device = ctx.bindings.device(ctx.step.origin);
    granted(output.dtype, dims.iter().product())?;
    let result = match (&op, weight) {
        (Op::QMatmul, Some(weight)) => candle::qmatmul(&inputs, &weight, &dims)?,
        (Op::Custom { .. }, _) => candle::custom(&ctx.bindings.customs, &params, &inputs)?,
        _ => candle::apply(&op, &params, &inputs, &dims, &device)?,
    };
    if let Op::Custom { name, .. } = &op {
        if result.dims() != dims.as_slice() || result.dtype() != output.dtype {
            // the user's statement, not a defect of this library
            return Err(Error::Candle(candle_core::Error::Msg(format!(
                "custom op {name} gave {} {:?}, {} {:?} was stated",
                result.dtype().as_str(),
                result.dims(),
                output.dtype.as_str(),
                dims.as_slice()
            ))));
        }
        if result.device().is_cpu() {
            // nothing of Candle's checks that a storage holds what its shape says
            candle_lazy_ops::storage::with_view(&result, |_| Ok(()))
                .map_err(|error| Error::Candle(candle_core::Error::Msg(format!("custom op {name}: {error}"))))?;
        }
    }
    if result.dims() != dims.as_slice() || result.dtype() != output.dtype {
        return Err(Error::Internal(format!(
            "{} gave {} {:?}, inference said {} {:?}",
            op.name(),
            result.dtype().as_str(),
            result.dims(),
            output.dtype.as_str(),
            dims.as_slice()
        )));
    }
    if let Some(place) = slots.get_mut(output.slot as usize) {
        *place = SlotValue::foreign(result);
    }
    Ok(())
}

/// Writes a range of the first input: in place where the buffer is whole, ends here and nobody else holds it; else into a copy.
fn slice_assign(
    ctx: &Ctx<'_>,
    dim: u8,
    start: Sym,
    slots: &mut [SlotValue],
    lent: &mut Lent,
    report: &mut EvalReport,
) -> Result<()> {
    let output = ctx.output(0)?;
    let (target, src) = (ctx.input(0)?, ctx.input(1)?);
    let dims = ctx.bindings.dims(&output.dims);
    let start = ctx.bindings.size(start);
    let start = start - fault::one_if("slice_assign.start").min(start);
    let ends_here = ctx.step.free_after.contains(&target) || fault::active("slice_assign.not_last_use");
    let owned = match slots.get_mut(target as usize) {
        Some(SlotValue::Buffer(value)) if ends_here && target != src && value.is_whole() => {
            Arc::get_mut(&mut value.buffer).is_some()
        }
        _ => false,
    };
    if owned {
        let Some(SlotValue::Buffer(mut value)) = slots.get_mut(target as usize).map(std::mem::take) else {
            return Err(Error::Internal("the target of a slice assignment vanished".into()));
        };
        let written = match Arc::get_mut(&mut value.buffer) {
            Some(buffer) => write_slice(slots, src, buffer, &dims, dim, start),
            None => Err(Error::Internal("the target of a slice assignment is shared".into())),
        };
        // on failure the value stays where it can be given back from
        let place = if written.is_ok() { output.slot } else { target };
        if let Some(slot) = slots.get_mut(place as usize) {
            *slot = SlotValue::Buffer(value);
        }
        written?;
        lent.moved(target, output.slot);
        report.in_place += 1;
        return Ok(());
    }
    let mut buffer = ctx.take(0, &dims)?;
    with_views(slots, &[target], |v| {
        let Some(x) = v.first() else {
            return Err(Error::Internal("slice_assign lacks its input".into()));
        };
        if fault::active("slice_assign.no_copy") {
            return kernels::fill(&mut buffer.slice_mut(), 0.0).map_err(kernel_error);
        }
        kernels::copy_into(x, &mut buffer.slice_mut(), &Strided::contiguous(&dims)).map_err(kernel_error)
    })?;
    write_slice(slots, src, &mut buffer, &dims, dim, start)?;
    report.copies += 1;
    put(slots, output, buffer, ctx.bindings);
    Ok(())
}

fn write_slice(
    slots: &[SlotValue],
    src: u32,
    buffer: &mut Buffer,
    dims: &[usize],
    dim: u8,
    start: usize,
) -> Result<()> {
    with_views(slots, &[src], |v| {
        let Some(src) = v.first() else {
            return Err(Error::Internal("slice_assign lacks its source".into()));
        };
        let len = src.dims().get(usize::from(dim)).copied().unwrap_or(0);
        let place = Strided::contiguous(dims).narrow(usize::from(dim), start, len).map_err(kernel_error)?;
        kernels::copy_into(src, &mut buffer.slice_mut(), &place).map_err(kernel_error)
    })
}
