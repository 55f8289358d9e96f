//! Reading Candle's CPU storage.

use crate::error::{Error, Result};
use crate::kernels::fresh;
use crate::view::{Slice, SliceMut, Strided, View};
use candle_core::{CpuStorage, DType, Layout, Storage, Tensor};

/// The elements of a CPU storage; `None` for an element type that kernels do not cover.
pub fn cpu_slice(storage: &CpuStorage) -> Option<Slice<'_>> {
    Some(match storage {
        CpuStorage::U8(v) => Slice::U8(v),
        CpuStorage::U32(v) => Slice::U32(v),
        CpuStorage::I64(v) => Slice::I64(v),
        CpuStorage::BF16(v) => Slice::BF16(v),
        CpuStorage::F16(v) => Slice::F16(v),
        CpuStorage::F32(v) => Slice::F32(v),
        CpuStorage::F64(v) => Slice::F64(v),
        _ => return None,
    })
}

/// A CPU storage under a layout.
///
/// # Errors
/// `Unsupported` for an element type that kernels do not cover, `OutOfBounds`.
pub fn cpu_view<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<View<'a>> {
    let data = cpu_slice(storage).ok_or_else(|| Error::unsupported(op, "this element type has no kernels"))?;
    View::new(data, Strided::from_layout(layout))
}

/// Runs `f` on a CPU tensor's elements while its storage is read-locked. `f` must not use Candle on the same storage.
///
/// # Errors
/// `Unsupported` for a tensor that is not on the CPU, and whatever `f` returns.
pub fn with_view<R>(tensor: &Tensor, f: impl FnOnce(View<'_>) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(s) => f(cpu_view("with-view", s, layout)?),
        _ => Err(Error::unsupported("with-view", "the tensor is not on the CPU")),
    }
}

/// The elements of a CPU storage, to write; `None` for an element type that kernels do not cover.
pub(crate) fn cpu_slice_mut(storage: &mut CpuStorage) -> Option<SliceMut<'_>> {
    Some(match storage {
        CpuStorage::U8(v) => SliceMut::U8(v),
        CpuStorage::U32(v) => SliceMut::U32(v),
        CpuStorage::I64(v) => SliceMut::I64(v),
        CpuStorage::BF16(v) => SliceMut::BF16(v),
        CpuStorage::F16(v) => SliceMut::F16(v),
        CpuStorage::F32(v) => SliceMut::F32(v),
        CpuStorage::F64(v) => SliceMut::F64(v),
        _ => return None,
    })
}

/// A new CPU storage of `n` elements that `f` writes, every one.
///
/// # Errors
/// `Unsupported` for an element type that kernels do not cover, and whatever `f` returns.
pub(crate) fn filled(
    op: &'static str,
    dtype: DType,
    n: usize,
    f: impl FnOnce(&mut SliceMut<'_>) -> Result<()>,
) -> Result<CpuStorage> {
    let mut storage = match dtype {
        DType::U8 => CpuStorage::U8(fresh(n)),
        DType::U32 => CpuStorage::U32(fresh(n)),
        DType::I64 => CpuStorage::I64(fresh(n)),
        DType::BF16 => CpuStorage::BF16(fresh(n)),
        DType::F16 => CpuStorage::F16(fresh(n)),
        DType::F32 => CpuStorage::F32(fresh(n)),
        DType::F64 => CpuStorage::F64(fresh(n)),
        other => return Err(Error::unsupported(op, format!("dtype {}", other.as_str()))),
    };
    match cpu_slice_mut(&mut storage) {
        Some(mut out) => f(&mut out)?,
        None => return Err(Error::unsupported(op, format!("dtype {}", dtype.as_str()))),
    }
    Ok(storage)
}
