//! One product for the rows of all members.
//!
//! A product of few rows takes as long as reading its weight, and one pass over the weight serves the rows of every member. They are
//! gathered, multiplied and handed out again; a row's bits do not depend on the rows beside it, so nobody sees a difference.

use super::{by_themselves, Company, Member};
use crate::buffer::Buffer;
use crate::config::TARGET;
use crate::error::{Error, Result};
use crate::plan::{Output, Plan, SourceStep, Step, StepKind};
use crate::run::kernel;
use crate::run::slots::{kernel_error, with_views, SlotValue};
use candle_core::DType;
use candle_lazy_graph::{Dims, Sym};
use candle_lazy_ops::fault;
use candle_lazy_ops::kernels;
use candle_lazy_ops::view::{Strided, View};
use smallvec::SmallVec;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use tracing::trace_span;

/// From so many rows of a member on, its product computes longer than it reads, and gathering gains nothing.
const FEW: usize = 64;
/// The most rows of one product.
const MOST: usize = 1024;

/// Whether step `i` may be one for several members.
pub(super) fn may(plan: &Plan, i: usize) -> bool {
    let kind = plan.steps.get(i).map(|step| &step.kind);
    matches!(kind, Some(StepKind::Matmul | StepKind::Linear | StepKind::Lora | StepKind::Products { .. }))
}

/// What an input of a merged step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Every member has rows of its own.
    Rows,
    /// All have the same.
    Same,
}

/// Members whose products are one: their places, and how many rows each has.
type Merged = Vec<(usize, usize)>;

/// Which members' products become one, where that is at least two.
pub(super) fn shape(plan: &Plan, i: usize, members: &[Member]) -> Option<Merged> {
    if members.len() < 2 || !may(plan, i) {
        return None;
    }
    let step = plan.steps.get(i)?;
    let first = members.first()?;
    let mut merged = Vec::with_capacity(members.len());
    let mut total = 0;
    for (place, member) in members.iter().enumerate() {
        let Some(rows) = rows(step, member).filter(|&n| n < FEW) else { continue };
        if total + rows <= MOST && same_weights(step, first, member) {
            total += rows;
            merged.push((place, rows));
        }
    }
    (merged.len() > 1).then_some(merged)
}

/// How many rows a member's left side has, if its step can be merged.
fn rows(step: &Step, member: &Member) -> Option<usize> {
    let dims = value_dims(member.slots.get(*step.inputs.first()? as usize)?)?;
    // batched products have a right side per batch
    if matches!(step.kind, StepKind::Matmul) && dims.len() != 2 {
        return None;
    }
    if !is_independent(step, member) {
        return None;
    }
    let (_, lead) = dims.split_last()?;
    let rows = lead.iter().product::<usize>();
    // only from the CPU, and only with something to do
    (rows > 0 && dims.iter().all(|&d| d > 0)).then_some(rows)
}

/// Whether a row's bits are the same whatever rows stand beside it: not where the `gemm` crate multiplies.
fn is_independent(step: &Step, member: &Member) -> bool {
    let own = |output: &Output| output.dtype != DType::F64;
    let rank = || member.slots.get(*step.inputs.get(1)? as usize).and_then(value_dims)?.last().copied();
    let skinny = !matches!(step.kind, StepKind::Lora) || rank().is_some_and(kernels::lora_is_skinny);
    step.outputs.iter().all(own) && skinny
}

fn value_dims(value: &SlotValue) -> Option<Dims> {
    match value {
        SlotValue::Buffer(value) => Some(value.layout.dims.iter().copied().collect()),
        SlotValue::Foreign(value) => {
            value.tensor.device().is_cpu().then(|| value.tensor.dims().iter().copied().collect())
        }
        SlotValue::Quantized(_) | SlotValue::Empty => None,
    }
}

/// Which inputs are the same for all where the step can be merged.
fn shared_inputs(step: &Step) -> SmallVec<[usize; 8]> {
    match &step.kind {
        StepKind::Matmul => SmallVec::from_slice(&[1]),
        StepKind::Linear => (1..step.inputs.len()).collect(),
        StepKind::Lora => SmallVec::from_slice(&[1, 2]),
        StepKind::Products { heads } => heads.iter().flat_map(|h| &h.rights).map(|&(w, _)| w as usize).collect(),
        _ => SmallVec::new(),
    }
}

fn same_weights(step: &Step, a: &Member, b: &Member) -> bool {
    let params = |m: &Member| -> SmallVec<[u64; 4]> {
        step.params.iter().filter_map(|&p| m.bindings.params.get(p as usize)).map(|p| p.to_bits()).collect()
    };
    let same = |i: usize| step.inputs.get(i).is_some_and(|&slot| is_same_in(a, b, slot));
    params(a) == params(b) && shared_inputs(step).into_iter().all(same)
}

/// Whether a slot holds the same in both.
fn is_same_in(a: &Member, b: &Member, slot: u32) -> bool {
    match (a.slots.get(slot as usize), b.slots.get(slot as usize)) {
        (Some(a), Some(b)) => is_same(a, b),
        _ => false,
    }
}

/// Whether two values are the same elements of the same memory.
fn is_same(a: &SlotValue, b: &SlotValue) -> bool {
    match (a, b) {
        (SlotValue::Foreign(a), SlotValue::Foreign(b)) => {
            let (x, y) = (a.tensor.layout(), b.tensor.layout());
            a.address() == b.address()
                && x.start_offset() == y.start_offset()
                && x.dims() == y.dims()
                && x.stride() == y.stride()
        }
        (SlotValue::Buffer(a), SlotValue::Buffer(b)) => Arc::ptr_eq(&a.buffer, &b.buffer) && a.layout == b.layout,
        _ => false,
    }
}

/// Runs step `i`: once for those that are merged, and for each of the others.
pub(super) fn run(plan: &Plan, i: usize, members: Vec<Member>, merged: &Merged, company: &Company<'_>) -> Vec<Member> {
    let mut together = Vec::with_capacity(merged.len());
    let mut rest = Vec::new();
    let mut next = merged.iter().peekable();
    for (place, member) in members.into_iter().enumerate() {
        match next.next_if(|(at, _)| *at == place) {
            Some(&(_, rows)) => together.push((member, rows)),
            None => rest.push(member),
        }
    }
    let span = trace_span!(target: TARGET, "merged product", number = i, requests = together.len()).entered();
    let outcome = super::contained(|| products(plan, i, &mut together));
    drop(span);
    let mut all = by_themselves(plan, i..i + 1, rest, company);
    match outcome {
        Ok(()) => {
            company.merged.fetch_add(1, Ordering::Relaxed);
            for (mut member, _) in together {
                member.freed(plan, i);
                all.push(member);
            }
        }
        // each by itself says what is wrong with it, and whose it is
        Err(_) => all.extend(by_themselves(plan, i..i + 1, together.into_iter().map(|(m, _)| m).collect(), company)),
    }
    all.sort_unstable_by_key(|member| member.pending.number);
    all
}

fn products(plan: &Plan, i: usize, members: &mut [(Member, usize)]) -> Result<()> {
    let step = plan.steps.get(i).ok_or_else(|| Error::Internal("a step that is not there".into()))?;
    let total: usize = members.iter().map(|(_, rows)| rows).sum();
    let (gathered, inputs) = gather(step, members, total)?;
    let merged = Step { inputs, ..step.clone() };
    let (first, _) = members.first().ok_or_else(|| Error::Internal("a product of nobody".into()))?;
    let buffers = kernel::of_rows((&merged, i), &first.bindings, &first.memory, &gathered, total)?;
    for (output, buffer) in buffers.iter().enumerate() {
        hand_out(step, (i, output), buffer, members, total)?;
    }
    for (member, _) in members {
        *member.report.kernels.entry(step.kind.name()).or_default() += 1;
    }
    Ok(())
}

/// The inputs of the merged step: rows of all members behind one another, and what they share as it is.
fn gather(step: &Step, members: &[(Member, usize)], total: usize) -> Result<(Vec<SlotValue>, SmallVec<[u32; 4]>)> {
    let mut values = Vec::with_capacity(step.inputs.len());
    for (at, &slot) in step.inputs.iter().enumerate() {
        let (first, _) = members.first().ok_or_else(|| Error::Internal("a product of nobody".into()))?;
        let same = || members.iter().all(|(m, _)| is_same_in(first, m, slot));
        let role = role(step, at, first, same);
        values.push(match role {
            Role::Same => first.slots.get(slot as usize).cloned().unwrap_or_default(),
            Role::Rows => rows_of_all(step, (at, slot), members, total)?,
        });
    }
    let inputs = (0..values.len() as u32).collect();
    Ok((values, inputs))
}

fn role(step: &Step, at: usize, first: &Member, same: impl FnOnce() -> bool) -> Role {
    if at == 0 {
        return Role::Rows;
    }
    match &step.kind {
        StepKind::Lora if at == 3 => Role::Rows,
        StepKind::Products { heads } if !heads.iter().any(|h| h.rights.iter().any(|&(w, _)| w as usize == at)) => {
            // what has rows of one kind for all, such as a bias, is the same for every row
            let dims = step.inputs.get(at).and_then(|&slot| first.slots.get(slot as usize)).and_then(value_dims);
            let flat = dims.is_some_and(|dims| dims.split_last().is_none_or(|(_, lead)| lead.iter().all(|&d| d == 1)));
            if flat && same() {
                Role::Same
            } else {
                Role::Rows
            }
        }
        _ => Role::Same,
    }
}

/// The shape to which input `at` of a step is repeated for one member: that of the product that reads it.
fn read_as(step: &Step, at: usize, member: &Member) -> Option<Dims> {
    let dims = |dims: &Dims<Sym>| member.bindings.dims(dims);
    match &step.kind {
        StepKind::Products { heads } if at > 0 => {
            let reads = |source: &SourceStep| *source == SourceStep::Input(at as u32);
            let head = heads.iter().find(|h| h.epilogue.as_ref().is_some_and(|e| e.inputs.iter().any(reads)))?;
            Some(dims(&head.dims))
        }
        StepKind::Lora if at == 3 => Some(dims(&step.outputs.first()?.dims)),
        _ => None,
    }
}

fn rows_of_all(step: &Step, (at, slot): (usize, u32), members: &[(Member, usize)], total: usize) -> Result<SlotValue> {
    let mut all: Option<(Buffer, usize)> = None;
    let mut row = 0;
    for (member, rows) in members {
        with_views(&member.slots, &[slot], |views| {
            let [view] = views else {
                return Err(Error::Internal("a product lacks an input".into()));
            };
            let layout = match read_as(step, at, member) {
                Some(dims) => view.layout.broadcast_to(&dims).map_err(kernel_error)?,
                None => view.layout.clone(),
            };
            let view = View { data: view.data, layout };
            let width = view.dims().last().copied().unwrap_or(1);
            let (buffer, of) = match &mut all {
                Some(all) => all,
                None => all.insert((Buffer::take(view.dtype(), total * width)?, width)),
            };
            if *of != width {
                return Err(Error::Internal("rows of different lengths in one product".into()));
            }
            let place = part((total, width), (row, *rows), view.dims())?;
            kernels::copy_into(&view, &mut buffer.slice_mut(), &place).map_err(kernel_error)
        })?;
        row += rows;
    }
    let (buffer, width) = all.ok_or_else(|| Error::Internal("a product of nobody".into()))?;
    Ok(SlotValue::buffer(buffer, &[total, width]))
}

/// Some of the rows of a matrix, seen as `dims`.
fn part((total, width): (usize, usize), (row, rows): (usize, usize), dims: &[usize]) -> Result<Strided> {
    let rows = Strided::contiguous(&[total, width]).narrow(0, row, rows).map_err(kernel_error)?;
    rows.reshape(dims).ok_or_else(|| Error::Internal("rows outside of a merged product".into()))
}

/// Gives every member its rows of an output.
fn hand_out(
    step: &Step,
    (number, output): (usize, usize),
    buffer: &Buffer,
    members: &mut [(Member, usize)],
    total: usize,
) -> Result<()> {
    let of = step.outputs.get(output).ok_or_else(|| Error::Internal("an output that is not there".into()))?;
    let mut row = 0;
    for (member, rows) in members {
        let dims = member.bindings.dims(&of.dims);
        let width = dims.last().copied().unwrap_or(1);
        let mut own = Buffer::take_piece(of.dtype, *rows * width, member.memory.piece(number, output))?;
        let from = if fault::active("group.rows") { 0 } else { row };
        let view = View::new(buffer.slice(), part((total, width), (from, *rows), &dims)?).map_err(kernel_error)?;
        kernels::copy_into(&view, &mut own.slice_mut(), &Strided::contiguous(&dims)).map_err(kernel_error)?;
        if let Some(place) = member.slots.get_mut(of.slot as usize) {
            *place = SlotValue::buffer(own, &dims);
        }
        row += *rows;
    }
    Ok(())
}
