//! The steps of row programs: beside their inputs, or where an output may be written over an input that was given away, in its place.

use super::{put, Ctx};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::plan::Output;
use crate::report::EvalReport;
use crate::run::bind::Lent;
use crate::run::slots::{kernel_error, with_views, SlotValue};
use crate::run::Engine;
use candle_lazy_graph::{Dims, Sym};
use candle_lazy_ops::fault;
use candle_lazy_ops::row::{Input, RowProgram};
use candle_lazy_ops::view::{Strided, View};
use smallvec::SmallVec;
use std::sync::Arc;

/// A step of a program over a space.
pub(super) fn run(
    ctx: &Ctx<'_>,
    (program, domain, axes): (&RowProgram, &Dims<Sym>, u32),
    slots: &mut [SlotValue],
    lent: &mut Lent,
    report: &mut EvalReport,
) -> Result<()> {
    let (step, bindings) = (ctx.step, ctx.bindings);
    let dims = bindings.dims(domain);
    let params = (0..step.params.len()).map(|i| ctx.param(i)).collect::<Result<SmallVec<[f64; 4]>>>()?;
    let mut buffers: SmallVec<[Buffer; 2]> = SmallVec::new();
    // (input, output), the outputs ascending
    let mut places: SmallVec<[(usize, usize); 2]> = SmallVec::new();
    let mut ran = Ok(());
    for (i, output) in step.outputs.iter().enumerate() {
        let taken = match given_place(ctx, output, slots) {
            Some((input, buffer)) => {
                places.push((input, i));
                Ok(buffer)
            }
            None => ctx.take(i, &bindings.dims(&output.dims)),
        };
        match taken {
            Ok(buffer) => buffers.push(buffer),
            Err(error) => {
                ran = Err(error);
                break;
            }
        }
    }
    if ran.is_ok() {
        ran = match places.is_empty() {
            true => row_program(program, (&dims, axes), &params, slots, &step.inputs, &mut buffers),
            false => in_place(program, &dims, &params, slots, (&step.inputs, &places), &mut buffers),
        };
    }
    if ran.is_err() {
        // nothing was written: what was taken goes back to where it can be given back from
        for (input, output) in places.into_iter().rev() {
            let (slot, buffer) = (ctx.input(input)?, buffers.remove(output));
            if let Some(place) = slots.get_mut(slot as usize) {
                *place = SlotValue::buffer(buffer, &bindings.dims(&ctx.output(output)?.dims));
            }
        }
        return ran;
    }
    for (output, buffer) in step.outputs.iter().zip(buffers) {
        put(slots, output, buffer, bindings);
    }
    for (input, output) in places {
        lent.moved(ctx.input(input)?, ctx.output(output)?.slot);
        report.in_place += 1;
    }
    Ok(())
}

/// Runs a program over a space of `dims` with these row axes, to which its inputs broadcast.
pub(in crate::run) fn row_program(
    program: &RowProgram,
    (dims, axes): (&[usize], u32),
    params: &[f64],
    slots: &[SlotValue],
    inputs: &[u32],
    buffers: &mut [Buffer],
) -> Result<()> {
    with_views(slots, inputs, |views| {
        let mut broadcast: SmallVec<[View<'_>; 6]> = SmallVec::new();
        for view in views {
            broadcast.push(over_dims(view, dims)?);
        }
        let mut outputs: SmallVec<[_; 2]> = buffers.iter_mut().map(Buffer::slice_mut).collect();
        program.run(dims, axes, &broadcast, params, &mut outputs).map_err(kernel_error)
    })
}

/// The memory of the input that `output` may be written over, taken out of its slot: where it is whole, ends here, and is nobody else's.
fn given_place(ctx: &Ctx<'_>, output: &Output, slots: &mut [SlotValue]) -> Option<(usize, Buffer)> {
    if ctx.number < ctx.memory.settled {
        return None;
    }
    let input = usize::from(output.in_place_of?);
    let slot = ctx.input(input).ok()?;
    if !ctx.step.free_after.contains(&slot) {
        return None;
    }
    let place = slots.get_mut(slot as usize)?;
    match std::mem::take(place) {
        SlotValue::Buffer(value) if value.is_whole() => match Arc::try_unwrap(value.buffer) {
            Ok(buffer) => Some((input, buffer)),
            Err(buffer) => {
                *place = SlotValue::Buffer(Engine { buffer, layout: value.layout });
                None
            }
        },
        other => {
            *place = other;
            None
        }
    }
}

/// As [`row_program`], elementwise, with the inputs of `places` (input, output) in the outputs' buffers.
fn in_place(
    program: &RowProgram,
    dims: &[usize],
    params: &[f64],
    slots: &[SlotValue],
    (inputs, places): (&[u32], &[(usize, usize)]),
    buffers: &mut [Buffer],
) -> Result<()> {
    let place = |i: usize| places.iter().find(|(input, _)| *input == i).map(|(_, output)| *output);
    let read: SmallVec<[u32; 4]> =
        inputs.iter().enumerate().filter(|(i, _)| place(*i).is_none()).map(|(_, slot)| *slot).collect();
    with_views(slots, &read, |views| {
        let mut views = views.iter();
        let mut operands: SmallVec<[Input<'_>; 6]> = SmallVec::new();
        for i in 0..inputs.len() {
            operands.push(match (place(i), views.as_slice()) {
                (Some(output), _) => Input::Output(output),
                (None, [view, ..]) => {
                    views.next();
                    Input::View(over_dims(view, dims)?)
                }
                (None, []) => return Err(Error::Internal("an operand without a view".into())),
            });
        }
        let mut outputs: SmallVec<[_; 2]> = buffers.iter_mut().map(Buffer::slice_mut).collect();
        program.run_in_place(dims, &operands, params, &mut outputs).map_err(kernel_error)
    })
}

/// A view broadcast to `dims`.
fn over_dims<'a>(view: &View<'a>, dims: &[usize]) -> Result<View<'a>> {
    let mut layout = view.layout.broadcast_to(dims).map_err(kernel_error)?;
    if fault::active("bind.broadcast_stride") {
        spoil_broadcast(&mut layout);
    }
    Ok(View { data: view.data, layout })
}

/// The fault of one wrong broadcast stride: a repeated dim and one that is walked through change roles.
fn spoil_broadcast(layout: &mut Strided) {
    let repeated = (0..layout.strides.len()).find(|&d| layout.strides[d] == 0 && layout.dims[d] > 1);
    let walked = (0..layout.strides.len()).find(|&d| layout.strides[d] != 0 && layout.dims[d] > 1);
    if let (Some(repeated), Some(walked)) = (repeated, walked) {
        if layout.dims[repeated] <= layout.dims[walked] {
            layout.strides.swap(repeated, walked);
        }
    }
}
