//! Arbitrary bytes as a safetensors file. With an even first byte they are the file; with an odd one they are the JSON header
//! and what follows a zero byte is the data, so that the length in front is right.
#![no_main]

use candle_core::{DType, Device};
use candle_lazy_fuzz::{contained, file_of};
use candle_lazy_nn::weights::{safetensors, SafetensorsFile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| contained(|| {
    let Some((&mode, rest)) = data.split_first() else { return };
    let bytes = if mode % 2 == 0 {
        rest.to_vec()
    } else {
        let mut parts = rest.splitn(2, |b| *b == 0);
        let header = parts.next().unwrap_or_default();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.extend_from_slice(parts.next().unwrap_or_default());
        file
    };
    let Ok(path) = file_of(&bytes, "safetensors") else { return };
    let Ok(file) = SafetensorsFile::open(&path) else { return };
    let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16, DType::U32, DType::I64, DType::U8];
    let dtype = dtypes[usize::from(mode / 2) % dtypes.len()];
    let Ok(vb) = safetensors(&[&path], dtype, &Device::Cpu) else { return };
    for name in file.names() {
        let _ = file.shape(name);
        let _ = vb.get_unchecked(name);
        let _ = vb.get((2, 2), name);
    }
}));
