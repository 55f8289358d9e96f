//! Weights from files, behind Candle's `VarBuilder`, and into files.
//!
//! Each tensor is read once, straight into the memory it stays in (asked for in huge pages, converted to the wanted
//! dtype on the way): no map of the file stays behind, so the file may change or vanish after loading. Every count and
//! offset of a file is checked against its size before anything is allocated.

mod gguf;
mod gguf_header;
mod read;
mod safetensors;
mod write;

#[cfg(feature = "tokenizers")]
pub(crate) use gguf::as_u64;
pub use gguf::Gguf;
pub use gguf_header::{GgufHeader, GgufTensorInfo};
pub use safetensors::{safetensors, SafetensorsFile};
pub use write::{save_safetensors, write_whole};

/// The number of elements; `None` where sizes overflow, a 0 among them or not: Candle multiplies some of them for strides.
fn elements(shape: &[usize]) -> Option<u64> {
    let without_zeros = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim.max(1)))?;
    if shape.contains(&0) {
        return Some(0);
    }
    u64::try_from(without_zeros).ok()
}
