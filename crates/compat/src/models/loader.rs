//! Tensors of a safetensors file.

use crate::backend::Device;
use crate::error::{Error, ModelError, Result};
use candle_core::{DType, Tensor};
use candle_lazy_nn::weights::SafetensorsFile;
use std::collections::HashMap;
use std::path::Path;

/// Reads safetensors files onto a device.
#[derive(Debug, Clone)]
pub struct ModelLoader {
    device: Device,
    dtype: Option<DType>,
}

impl ModelLoader {
    /// A loader onto `device` that leaves dtypes as they are.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self { device, dtype: None }
    }

    /// The same, converting every tensor (whole numbers too) to `dtype`.
    #[must_use]
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    /// All tensors of a file, by name.
    ///
    /// # Errors
    /// [`ModelError::FileNotFound`] where there is no such file, [`ModelError::InvalidFormat`] where it is no safetensors file or cannot
    /// be read, Candle's error where a dtype cannot be converted.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<HashMap<String, Tensor>> {
        let path = path.as_ref();
        if !path.exists() {
            return Err(ModelError::FileNotFound { path: path.to_path_buf() }.into());
        }
        let tensors = candle_core::safetensors::load(path, self.device.as_candle_device());
        let tensors = tensors.map_err(|error| ModelError::InvalidFormat {
            reason: format!("failed to load {}: {error}", path.display()),
        })?;
        let Some(dtype) = self.dtype else {
            return Ok(tensors);
        };
        let converted = tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)));
        converted.collect()
    }

    /// As [`ModelLoader::load`], where every name of `expected_shapes` is in the file with its shape. Other tensors are not looked at.
    ///
    /// # Errors
    /// As [`ModelLoader::load`]; [`ModelError::InvalidFormat`] for a name that is missing, [`ModelError::ShapeMismatch`] for another
    /// shape; of several, the first by name.
    pub fn load_with_validation(
        &self,
        path: impl AsRef<Path>,
        expected_shapes: &HashMap<String, Vec<usize>>,
    ) -> Result<HashMap<String, Tensor>> {
        let tensors = self.load(path)?;
        let mut names: Vec<_> = expected_shapes.iter().collect();
        names.sort_unstable();
        for (name, expected) in names {
            let Some(tensor) = tensors.get(name) else {
                return Err(ModelError::InvalidFormat { reason: format!("missing tensor: {name}") }.into());
            };
            if tensor.dims() != expected {
                let (expected, actual) = (expected.clone(), tensor.dims().to_vec());
                return Err(ModelError::ShapeMismatch { expected, actual }.into());
            }
        }
        Ok(tensors)
    }

    /// Names and shapes of a file's tensors; only the header is read.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be read, [`ModelError::InvalidFormat`] where it is no safetensors file.
    pub fn inspect(&self, path: impl AsRef<Path>) -> Result<HashMap<String, Vec<usize>>> {
        let file = match SafetensorsFile::open(path) {
            Ok(file) => file,
            Err(candle_lazy_nn::Error::Io { source, .. }) => return Err(Error::Io(source)),
            Err(error) => return Err(ModelError::InvalidFormat { reason: error.to_string() }.into()),
        };
        Ok(file.all_shapes().map(|(name, shape)| (name.to_string(), shape.dims().to_vec())).collect())
    }

    /// The device that tensors are read onto.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// The dtype that tensors are converted to, where one was given.
    #[must_use]
    pub const fn dtype(&self) -> Option<DType> {
        self.dtype
    }
}
