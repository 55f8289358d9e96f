//! `candle_core::safetensors` on lazy tensors.

use super::{here, Device, Result, Tensor};
use std::collections::HashMap;
use std::path::Path;

/// Every tensor of a file, each a leaf.
///
/// # Errors
/// When the file cannot be read or is no safetensors file.
#[track_caller]
pub fn load<P: AsRef<Path>>(filename: P, device: &Device) -> Result<HashMap<String, Tensor>> {
    let path = filename.as_ref();
    match candle_core::safetensors::load(path, device) {
        Ok(tensors) => Ok(lazy(tensors)),
        Err(error) => here(Err(super::Error::from(error).context(path.display().to_string()))),
    }
}

/// Every tensor of a file in memory, each a leaf.
///
/// # Errors
/// When it is no safetensors file.
#[track_caller]
pub fn load_buffer(data: &[u8], device: &Device) -> Result<HashMap<String, Tensor>> {
    here(candle_core::safetensors::load_buffer(data, device)).map(lazy)
}

fn lazy(tensors: HashMap<String, candle_core::Tensor>) -> HashMap<String, Tensor> {
    tensors.into_iter().map(|(name, tensor)| (name, tensor.into())).collect()
}

/// Writes tensors to a file: evaluates all of them as one plan.
///
/// # Errors
/// When evaluation fails or the file cannot be written.
#[track_caller]
pub fn save<K: AsRef<str> + Ord + std::fmt::Display, P: AsRef<Path>>(
    tensors: &HashMap<K, Tensor>,
    filename: P,
) -> Result<()> {
    let (names, lazy): (Vec<&K>, Vec<&Tensor>) = tensors.iter().unzip();
    let values = here(candle_lazy_exec::eval_all(&lazy))?;
    let values: HashMap<&str, candle_core::Tensor> = names.into_iter().map(|name| name.as_ref()).zip(values).collect();
    here(candle_core::safetensors::save(&values, filename))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candle::DType;

    #[test]
    fn there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.safetensors");
        let x = Tensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap();
        let tensors = HashMap::from([("x", x.clone()), ("y", (&x + 1.0).unwrap().to_dtype(DType::BF16).unwrap())]);
        save(&tensors, &file).unwrap();
        for back in [load(&file, &Device::Cpu), load_buffer(&std::fs::read(&file).unwrap(), &Device::Cpu)] {
            let back = back.unwrap();
            assert_eq!(back["x"].to_vec1::<f32>().unwrap(), [1., 2., 3.]);
            assert_eq!(back["y"].to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [2., 3., 4.]);
        }
        let line = line!() + 1;
        let absent = load(dir.path().join("absent"), &Device::Cpu).unwrap_err();
        assert_eq!(absent.site().unwrap().location().line(), line, "{absent}");
        assert!(absent.to_string().contains("absent"), "{absent}");
        assert!(load_buffer(b"no", &Device::Cpu).is_err());
        assert!(save(&tensors, dir.path()).is_err());
    }
}
