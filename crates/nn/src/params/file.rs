//! Parameters in safetensors files.

use super::{quoted, Params};
use crate::error::{Error, Result};
use crate::weights::{save_safetensors, SafetensorsFile};
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_exec::{eval_all, materialize, LazyTensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A copy, recorded: two signs give the same bits back.
pub(crate) fn copied(value: &LazyTensor) -> Result<LazyTensor> {
    Ok(value.neg()?.neg()?)
}

/// The values of named tensors on the CPU, evaluated as one plan. They are copies: a value of the engine's that becomes a tensor of
/// Candle's would make another plan of the next step.
pub(crate) fn values(named: &[(String, LazyTensor)]) -> Result<BTreeMap<String, Tensor>> {
    let copies = named.iter().map(|(_, tensor)| copied(tensor)).collect::<Result<Vec<_>>>()?;
    let mut values = BTreeMap::new();
    for ((name, _), value) in named.iter().zip(eval_all(&copies.iter().collect::<Vec<_>>())?) {
        values.insert(name.clone(), value.detach().to_device(&Device::Cpu)?.contiguous()?);
    }
    Ok(values)
}

/// Refuses a file that does not have exactly these tensors, by the names of what is missing and what is too much, or by the first tensor
/// of another shape, or of another dtype where one is asked for.
pub(crate) fn check_file(file: &SafetensorsFile, wanted: &[(&str, &Shape, Option<DType>)]) -> Result<()> {
    let names: BTreeSet<&str> = wanted.iter().map(|(name, _, _)| *name).collect();
    let stored: BTreeSet<&str> = file.names().collect();
    let bad = |message: String| Err(Error::format(file.path(), "parameter", message));
    let (missing, surplus) = (names.difference(&stored), stored.difference(&names));
    match (missing.clone().next(), surplus.clone().next()) {
        (None, None) => {}
        (Some(_), None) => return bad(format!("it lacks {}", quoted(missing))),
        (None, Some(_)) => return bad(format!("nothing here is called {}", quoted(surplus))),
        (Some(_), Some(_)) => {
            return bad(format!("it lacks {}, and nothing here is called {}", quoted(missing), quoted(surplus)))
        }
    }
    for &(name, shape, dtype) in wanted {
        if let Some((_, found)) = file.all_shapes().find(|(stored, found)| *stored == name && *found != shape) {
            let (name, expected, found) = (name.to_string(), shape.clone(), found.clone());
            return Err(Error::TensorShape { name, expected, found, file: Some(file.path().to_path_buf()) });
        }
        if let Some(dtype) = dtype.filter(|dtype| file.dtype(name) != Some(*dtype)) {
            let found = file.dtype(name).map_or("a dtype that Candle does not have".to_string(), |d| format!("{d:?}"));
            let message = format!("expected {dtype:?}, found {found}");
            return Err(Error::Tensor { name: name.to_string(), file: Some(file.path().to_path_buf()), message });
        }
    }
    Ok(())
}

impl Params {
    /// Makes the values of trainable parameters values of the engine's own, as those are that a step computes, so that the first step's
    /// plan is that of later ones.
    pub(crate) fn copy_into_engine(&self) -> Result<()> {
        let mut copies = Vec::new();
        for param in self.trainable() {
            copies.push((param, copied(&param.value())?));
        }
        materialize(&copies.iter().map(|(_, copy)| copy).collect::<Vec<_>>())?;
        for (param, copy) in copies {
            param.replace(copy)?;
        }
        Ok(())
    }

    /// Writes all parameters, frozen ones too, to a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// Where a value cannot be computed, and as [`save_safetensors`]; what was at `path` is there still then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path, &BTreeMap::new())
    }

    /// [`Params::save`] with entries for the file's header.
    ///
    /// # Errors
    /// As [`Params::save`].
    pub fn save_with(&self, path: impl AsRef<Path>, metadata: &BTreeMap<String, String>) -> Result<()> {
        let named: Vec<_> = self.iter().map(|param| (param.name().to_string(), param.value())).collect();
        save_safetensors(path, &values(&named)?, metadata)
    }

    /// Gives all parameters the values of a file that [`Params::save`] wrote. Which are frozen stays.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`]; [`Error::Format`] naming the parameters that the file lacks and the tensors that are no parameters,
    /// [`Error::TensorShape`] and [`Error::Tensor`] for another shape or dtype. All parameters are as they were then.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        let file = SafetensorsFile::open(path)?;
        let wanted: Vec<_> = self.iter().map(|param| (param.name(), param.shape(), Some(param.dtype()))).collect();
        check_file(&file, &wanted)?;
        let mut read = Vec::with_capacity(self.len());
        for param in self.iter() {
            read.push((param, file.tensor(param.name(), param.dtype(), param.device())?));
        }
        for (param, tensor) in read {
            param.replace(tensor.into())?;
        }
        Ok(())
    }
}
