//! Values while a plan runs: foreign Candle tensors and the engine's buffers, and how kernels see them.

use super::Engine;
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use candle_core::quantized::QTensor;
use candle_core::{Device, Storage, Tensor};
use candle_lazy_graph::node::storage_address;
use candle_lazy_ops::storage::cpu_slice;
use candle_lazy_ops::view::{Strided, View};
use candle_lazy_ops::{fault, kernels, Error as OpsError};
use smallvec::SmallVec;
use std::sync::Arc;

/// A Candle tensor, with the address of its storage: the order in which guards are taken.
#[derive(Debug, Clone)]
pub(super) struct Foreign {
    pub(super) tensor: Tensor,
    address: usize,
}

impl Foreign {
    pub(super) fn new(tensor: Tensor) -> Self {
        Self { address: storage_address(&tensor), tensor }
    }

    /// Where its storage is: the same for all views of one.
    pub(super) fn address(&self) -> usize {
        self.address
    }
}

/// What a slot holds.
#[derive(Debug, Clone, Default)]
pub(super) enum SlotValue {
    /// Nothing.
    #[default]
    Empty,
    /// A Candle tensor.
    Foreign(Foreign),
    /// A buffer of the engine.
    Buffer(Engine),
    /// A quantised weight.
    Quantized(Arc<QTensor>),
}

impl SlotValue {
    pub(super) fn buffer(buffer: Buffer, dims: &[usize]) -> Self {
        Self::Buffer(Engine { buffer: Arc::new(buffer), layout: Strided::contiguous(dims) })
    }

    pub(super) fn foreign(tensor: Tensor) -> Self {
        Self::Foreign(Foreign::new(rebased(tensor)))
    }
}

/// A view without elements may begin behind the end of its storage, where Candle's kernels panic: it gets a storage of its
/// own.
pub(super) fn rebased(tensor: Tensor) -> Tensor {
    if tensor.elem_count() > 0 || tensor.layout().start_offset() == 0 {
        return tensor;
    }
    Tensor::zeros(tensor.shape(), tensor.dtype(), tensor.device()).unwrap_or(tensor)
}

pub(super) fn kernel_error(error: OpsError) -> Error {
    // as it is: what it is about (shapes, dtypes) can be asked of it
    Error::Other(Box::new(error))
}

/// Calls `f` with views of the values at `inputs`.
///
/// Candle's storages are locked for reading for as long as `f` runs: one guard per distinct storage, taken in address
/// order. Two guards on one storage, or guards taken in different orders by different threads, would deadlock as soon as
/// somebody waits to write (`Var::set`).
pub(super) fn with_views<R>(
    slots: &[SlotValue],
    inputs: &[u32],
    f: impl FnOnce(&[View<'_>]) -> Result<R>,
) -> Result<R> {
    let mut foreign: SmallVec<[&Foreign; 4]> = SmallVec::new();
    for &slot in inputs {
        if let Some(SlotValue::Foreign(value)) = slots.get(slot as usize) {
            if !foreign.iter().any(|f| f.address == value.address) {
                foreign.push(value);
            }
        }
    }
    foreign.sort_unstable_by_key(|f| f.address);
    let guards: SmallVec<[_; 4]> = foreign.iter().map(|f| (f.address, f.tensor.storage_and_layout().0)).collect();
    let mut views: SmallVec<[View<'_>; 6]> = SmallVec::new();
    for &slot in inputs {
        let view = match slots.get(slot as usize) {
            Some(SlotValue::Buffer(value)) => View::new(value.buffer.slice(), value.layout.clone()),
            Some(SlotValue::Foreign(value)) => {
                let guard = guards.iter().find(|(address, _)| *address == value.address);
                let Some((_, guard)) = guard else {
                    return Err(Error::Internal("a tensor without a guard".into()));
                };
                let storage: &Storage = guard;
                let Storage::Cpu(storage) = storage else {
                    return Err(Error::Internal("a kernel of the CPU on a tensor of another device".into()));
                };
                let Some(slice) = cpu_slice(storage) else {
                    return Err(Error::Internal(format!("no kernel reads {}", value.tensor.dtype().as_str())));
                };
                let mut layout = Strided::from_layout(value.tensor.layout());
                if fault::active("bind.leaf_offset") {
                    layout.offset = 0;
                }
                if fault::active("bind.leaf_strides") {
                    layout = Strided { offset: layout.offset, ..Strided::contiguous(&layout.dims) };
                }
                View::new(slice, layout)
            }
            Some(SlotValue::Quantized(_)) => {
                return Err(Error::Internal("a quantised weight as the operand of a kernel".into()));
            }
            Some(SlotValue::Empty) | None => return Err(Error::Internal(format!("slot ${slot} is empty"))),
        };
        views.push(view.map_err(kernel_error)?);
    }
    f(&views)
}

/// A buffer value as a Candle tensor: moved where nobody else holds it and it is whole, else copied. Returns whether it was
/// copied.
pub(super) fn to_tensor(value: Engine, dims: &[usize]) -> Result<(Tensor, bool)> {
    let (buffer, copied) = own(value, dims)?;
    Ok((buffer.into_tensor(dims)?, copied))
}

/// The same as a buffer that is nobody else's.
pub(super) fn to_buffer(value: Engine, dims: &[usize]) -> Result<Buffer> {
    Ok(own(value, dims)?.0)
}

fn own(value: Engine, dims: &[usize]) -> Result<(Buffer, bool)> {
    let whole = value.is_whole()
        || fault::active("run.view_taken_whole") && value.buffer.slice().len() == dims.iter().product::<usize>();
    let value = if whole {
        let Engine { buffer, layout } = value;
        match Arc::try_unwrap(buffer) {
            Ok(buffer) => return Ok((buffer, false)),
            Err(buffer) => Engine { buffer, layout },
        }
    } else {
        value
    };
    let view = View::new(value.buffer.slice(), value.layout.clone()).map_err(kernel_error)?;
    let mut copy = Buffer::take(view.dtype(), value.layout.elem_count())?;
    kernels::copy_into(&view, &mut copy.slice_mut(), &Strided::contiguous(&value.layout.dims)).map_err(kernel_error)?;
    Ok((copy, true))
}

/// The value of a slot as a Candle tensor. The slot keeps it in that form, so that a second reader does not convert again.
pub(super) fn slot_tensor(slots: &mut [SlotValue], slot: u32) -> Result<Tensor> {
    let Some(place) = slots.get_mut(slot as usize) else {
        return Err(Error::Internal(format!("slot ${slot} does not exist")));
    };
    match std::mem::take(place) {
        SlotValue::Empty => Err(Error::Internal(format!("slot ${slot} is empty"))),
        SlotValue::Quantized(weight) => {
            *place = SlotValue::Quantized(weight);
            Err(Error::Internal("a quantised weight as the operand of an op".into()))
        }
        SlotValue::Foreign(value) => {
            let tensor = value.tensor.clone();
            *place = SlotValue::Foreign(value);
            Ok(tensor)
        }
        SlotValue::Buffer(value) => {
            let dims = value.layout.dims.clone();
            let (tensor, _) = to_tensor(value, &dims)?;
            debug_assert!(matches!(tensor.device(), Device::Cpu));
            *place = SlotValue::foreign(tensor.clone());
            Ok(tensor)
        }
    }
}
