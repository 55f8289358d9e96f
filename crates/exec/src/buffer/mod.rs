//! Memory of values that no Candle tensor owns.
//!
//! Candle's CPU storage is a plain `Vec`, so a buffer is a `Vec` per element type: becoming a Candle tensor moves it, and
//! what `eval()` returns leaves the pool for good. Every element of a pooled `Vec` is initialised, so reuse needs no
//! `unsafe`; kernels assume no alignment beyond the type's.

mod gather;
mod heap;
mod huge;
mod pool;

pub use gather::{on_huge_pages, HugePages};
pub(crate) use heap::keep_freed;
pub use huge::vec_with_huge_pages;
pub(crate) use pool::running;
pub use pool::{memory_stats, set_pool_cap, trim, MemoryStats};

use crate::error::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Tensor};
use candle_lazy_graph::EngineValue;
use candle_lazy_ops::kernels::fresh;
use candle_lazy_ops::view::{Slice, SliceMut, Strided};
use half::{bf16, f16};
use std::any::Any;
use std::sync::Arc;

macro_rules! for_dtypes {
    ($($variant:ident, $ty:ty;)*) => {
        /// Elements of one dtype; every one initialised.
        #[derive(Debug)]
        pub(crate) enum Data { $(#[doc = "Elements."] $variant(Vec<$ty>)),* }

        impl Data {
            /// Elements of no particular value.
            pub(crate) fn fresh(dtype: DType, len: usize) -> Option<Self> {
                match dtype {
                    $(DType::$variant => Some(Self::$variant(fresh(len))),)*
                    _ => None,
                }
            }
            /// Where the elements begin.
            #[cfg_attr(not(all(target_os = "linux", not(miri))), allow(dead_code))] // pages are Linux's here
            fn address(&self) -> usize {
                match self { $(Self::$variant(v) => v.as_ptr() as usize),* }
            }
            pub(crate) fn dtype(&self) -> DType {
                match self { $(Self::$variant(_) => DType::$variant),* }
            }
            pub(crate) fn len(&self) -> usize {
                match self { $(Self::$variant(v) => v.len()),* }
            }
            fn slice(&self, len: usize) -> Slice<'_> {
                match self { $(Self::$variant(v) => Slice::$variant(&v[..len.min(v.len())])),* }
            }
            fn slice_mut(&mut self, len: usize) -> SliceMut<'_> {
                match self {
                    $(Self::$variant(v) => {
                        let len = len.min(v.len());
                        SliceMut::$variant(&mut v[..len])
                    })*
                }
            }
            fn into_storage(self, len: usize) -> CpuStorage {
                match self {
                    $(Self::$variant(mut v) => {
                        v.truncate(len);
                        CpuStorage::$variant(v)
                    })*
                }
            }
            fn into_tensor(self, len: usize, dims: &[usize]) -> candle_core::Result<Tensor> {
                match self {
                    $(Self::$variant(mut v) => {
                        v.truncate(len);
                        Tensor::from_vec(v, dims, &Device::Cpu)
                    })*
                }
            }
        }
    };
}

for_dtypes! {
    U8, u8;
    U32, u32;
    I64, i64;
    BF16, bf16;
    F16, f16;
    F32, f32;
    F64, f64;
}

impl Data {
    pub(crate) fn bytes(&self) -> usize {
        self.len() * self.dtype().size_in_bytes()
    }
}

/// From this size on the system is asked before memory is taken: a request that it refuses would end the process.
pub(crate) const ASK_FROM: usize = 1 << 28;

/// Refuses what the system would refuse.
pub(crate) fn granted(dtype: DType, len: usize) -> Result<()> {
    let bytes = len.saturating_mul(dtype.size_in_bytes());
    if bytes < ASK_FROM {
        return Ok(());
    }
    let mut probe: Vec<u8> = Vec::new();
    let refused = probe.try_reserve_exact(bytes).is_err();
    // the optimiser may remove an allocation that nobody looks at
    std::hint::black_box(&probe);
    if refused {
        return Err(Error::Memory { bytes });
    }
    Ok(())
}

/// A piece of pooled memory. It returns to the pool when the last reference drops.
#[derive(Debug)]
pub struct Buffer {
    data: Option<Data>,
    len: usize,
}

impl Buffer {
    /// Memory for `len` elements, from the pool or new. The content is whatever was there.
    ///
    /// # Errors
    /// When the dtype has no buffers, or the system does not grant the memory.
    pub fn take(dtype: DType, len: usize) -> Result<Self> {
        Self::take_any(dtype, len, None)
    }

    /// As [`Buffer::take`], in a piece of exactly so many elements, or of `len` if those are fewer.
    ///
    /// # Errors
    /// As [`Buffer::take`].
    pub(crate) fn take_piece(dtype: DType, len: usize, piece: usize) -> Result<Self> {
        Self::take_any(dtype, len, Some(piece.max(len)))
    }

    fn take_any(dtype: DType, len: usize, piece: Option<usize>) -> Result<Self> {
        granted(dtype, piece.unwrap_or(len))?;
        match pool::take(dtype, len, piece) {
            Some(data) => Ok(Self { data: Some(data), len }),
            None => Err(Error::Internal(format!("no buffers of dtype {}", dtype.as_str()))),
        }
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes of memory behind the buffer, slack included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.as_ref().map_or(0, Data::bytes)
    }

    /// The elements.
    #[must_use]
    pub fn slice(&self) -> Slice<'_> {
        // `data` is only `None` while the buffer is being dropped or turned into a tensor
        self.data.as_ref().map_or(Slice::U8(&[]), |d| d.slice(self.len))
    }

    /// The elements, to write.
    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        let len = self.len;
        match &mut self.data {
            Some(data) => data.slice_mut(len),
            None => SliceMut::U8(&mut []),
        }
    }

    /// The elements as a Candle tensor: the `Vec` moves, nothing is copied.
    ///
    /// # Errors
    /// When `dims` do not have as many elements.
    pub fn into_tensor(mut self, dims: &[usize]) -> Result<Tensor> {
        let Some(data) = self.data.take() else {
            return Err(Error::Internal("a buffer without data".into()));
        };
        pool::forget(&data);
        Ok(data.into_tensor(self.len, dims)?)
    }
}

impl Buffer {
    /// As the storage of a Candle tensor; nothing is copied.
    ///
    /// # Errors
    /// When the buffer was taken apart before.
    pub(crate) fn into_storage(mut self) -> Result<CpuStorage> {
        let Some(data) = self.data.take() else {
            return Err(Error::Internal("a buffer without data".into()));
        };
        pool::forget(&data);
        Ok(data.into_storage(self.len))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(data) = self.data.take() {
            pool::put(data);
        }
    }
}

/// A buffer with a layout: what a ready node holds when no Candle tensor does.
#[derive(Debug, Clone)]
pub struct BufferValue {
    /// The memory.
    pub buffer: Arc<Buffer>,
    /// Where the elements lie in it.
    pub layout: Strided,
}

impl BufferValue {
    /// Whether the layout is the whole buffer in row-major order.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.layout.offset == 0 && self.layout.is_contiguous() && self.layout.elem_count() == self.buffer.len()
    }
}

impl EngineValue for BufferValue {
    fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_moves_into_a_tensor() {
        let mut buffer = Buffer::take(DType::F32, 6).unwrap();
        if let SliceMut::F32(s) = buffer.slice_mut() {
            s.copy_from_slice(&[1., 2., 3., 4., 5., 6.]);
        }
        let tensor = buffer.into_tensor(&[2, 3]).unwrap();
        assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[1., 2., 3.], [4., 5., 6.]]);
    }

    #[test]
    fn a_wrong_shape_is_an_error() {
        assert!(Buffer::take(DType::F32, 6).unwrap().into_tensor(&[2, 2]).is_err());
        assert!(Buffer::take(DType::I32, 6).is_err());
    }

    // Miri has no memory to refuse: it ends
    #[cfg(not(miri))]
    #[test]
    fn memory_that_does_not_exist_is_an_error() {
        assert!(matches!(Buffer::take(DType::F64, usize::MAX / 16), Err(Error::Memory { .. })));
        assert!(matches!(Buffer::take(DType::F64, usize::MAX), Err(Error::Memory { .. })));
    }

    #[test]
    fn a_value_knows_whether_it_is_the_whole_buffer() {
        let buffer = Arc::new(Buffer::take(DType::F32, 6).unwrap());
        let whole = BufferValue { buffer: buffer.clone(), layout: Strided::contiguous(&[2, 3]) };
        assert!(whole.is_whole());
        let part = BufferValue { buffer, layout: whole.layout.narrow(0, 0, 1).unwrap() };
        assert!(!part.is_whole() && part.is_contiguous());
    }
}
