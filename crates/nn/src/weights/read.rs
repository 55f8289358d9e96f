//! Reading numbers from a file into the vector they stay in.

use candle_core::{DType, Device, Result, Shape, Tensor, WithDType};
use half::{bf16, f16};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// Bytes read at once: enough to keep the disk busy, little beside any model.
const CHUNK: usize = 1 << 20;

/// An empty vector with room for `len` weights, on huge pages where the system grants them.
pub(crate) fn weight_vec<T: Copy>(len: usize) -> Vec<T> {
    candle_lazy_exec::buffer::vec_with_huge_pages::<T>(len)
}

/// A number as files store it, little-endian.
pub(crate) trait Stored: Copy {
    /// Bytes per number.
    const SIZE: usize;
    /// The number in the first `SIZE` bytes; zero where there are fewer, which [`read_into`] rules out.
    fn decode(bytes: &[u8]) -> Self;
}

macro_rules! stored {
    ($($t:ty),*) => { $(
        impl Stored for $t {
            const SIZE: usize = std::mem::size_of::<$t>();
            #[inline(always)]
            fn decode(bytes: &[u8]) -> Self {
                let mut raw = [0u8; std::mem::size_of::<$t>()];
                for (to, from) in raw.iter_mut().zip(bytes) {
                    *to = *from;
                }
                <$t>::from_le_bytes(raw)
            }
        }
    )* };
}
stored!(f32, f64, f16, bf16, u8, u32, i16, i32, i64);

/// Reads `count` numbers of type `S` from `file` at `offset` and appends each, converted, to `out`.
pub(crate) fn read_into<S: Stored, T>(
    file: &mut File,
    offset: u64,
    count: usize,
    out: &mut Vec<T>,
    convert: impl Fn(S) -> T,
) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let per_chunk = CHUNK / S::SIZE;
    let mut buffer = vec![0u8; per_chunk.min(count) * S::SIZE];
    let mut left = count;
    while left > 0 {
        let now = left.min(per_chunk);
        let Some(bytes) = buffer.get_mut(..now * S::SIZE) else {
            break;
        };
        file.read_exact(bytes)?;
        out.extend(bytes.chunks_exact(S::SIZE).map(|raw| convert(S::decode(raw))));
        left -= now;
    }
    Ok(())
}

/// Where a tensor lies in a file. Size and place have been checked against the file.
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) stored: DType,
    pub(crate) shape: Shape,
}

/// Reads one tensor and converts it to `dtype`.
///
/// Floats become floats on the way into their vector; whole numbers go through Candle's cast.
pub(crate) fn read_tensor(file: &mut File, extent: &Extent, dtype: DType, device: &Device) -> Result<Tensor> {
    let tensor = match (extent.stored.is_float(), dtype) {
        (true, DType::F32) => read_floats(file, extent, |v| v, |v| v as f32)?,
        (true, DType::F64) => read_floats(file, extent, f64::from, |v| v)?,
        (true, DType::F16) => read_floats(file, extent, f16::from_f32, f16::from_f64)?,
        (true, DType::BF16) => read_floats(file, extent, bf16::from_f32, bf16::from_f64)?,
        _ => read_as_stored(file, extent)?,
    };
    let tensor = if tensor.dtype() == dtype { tensor } else { tensor.to_dtype(dtype)? };
    tensor.to_device(device)
}

fn read_floats<T: WithDType>(
    file: &mut File,
    extent: &Extent,
    from_f32: impl Fn(f32) -> T,
    from_f64: impl Fn(f64) -> T,
) -> Result<Tensor> {
    let count = extent.shape.elem_count();
    let mut out = weight_vec::<T>(count);
    let at = extent.offset;
    match extent.stored {
        DType::F32 => read_into(file, at, count, &mut out, from_f32)?,
        DType::F64 => read_into(file, at, count, &mut out, from_f64)?,
        DType::F16 => read_into(file, at, count, &mut out, |v: f16| from_f32(v.to_f32()))?,
        DType::BF16 => read_into(file, at, count, &mut out, |v: bf16| from_f32(v.to_f32()))?,
        other => candle_core::bail!("{other:?} cannot be read as floats"),
    }
    Tensor::from_vec(out, &extent.shape, &Device::Cpu)
}

fn read_plain<T: WithDType + Stored>(file: &mut File, extent: &Extent) -> Result<Tensor> {
    let count = extent.shape.elem_count();
    let mut out = weight_vec::<T>(count);
    read_into(file, extent.offset, count, &mut out, |v: T| v)?;
    Tensor::from_vec(out, &extent.shape, &Device::Cpu)
}

fn read_as_stored(file: &mut File, extent: &Extent) -> Result<Tensor> {
    match extent.stored {
        DType::F32 => read_plain::<f32>(file, extent),
        DType::F64 => read_plain::<f64>(file, extent),
        DType::F16 => read_plain::<f16>(file, extent),
        DType::BF16 => read_plain::<bf16>(file, extent),
        DType::U8 => read_plain::<u8>(file, extent),
        DType::U32 => read_plain::<u32>(file, extent),
        DType::I16 => read_plain::<i16>(file, extent),
        DType::I32 => read_plain::<i32>(file, extent),
        DType::I64 => read_plain::<i64>(file, extent),
        other => candle_core::bail!("dtype {other:?} cannot be read"),
    }
}
