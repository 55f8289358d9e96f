//! Adapters in files: one safetensors file, tensors `layers.{i}.{module}.lora_a` (in, rank) and `.lora_b` (rank, out) of f32, and
//! optionally the metadata entry `checkpoint_metadata`, JSON of [`CheckpointMetadata`]. Files of v1 load.
//!
//! Rank, alpha and targets are not in the file: an adapter is made with them, then filled.

use super::{LoRAAdapter, LoRALayer};
use crate::error::{CheckpointError, Error, Result};
use candle_core::safetensors::Load;
use candle_core::{Device, Tensor, Var};
use candle_lazy_nn::weights::write_whole;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::HashMap;
use std::path::Path;

const METADATA: &str = "checkpoint_metadata";

/// Where training was when a checkpoint was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckpointMetadata {
    /// Steps taken.
    pub global_step: usize,
    /// The last loss. JSON has no NaN and no infinities: they come back as NaN.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f32,
    /// The last learning rate; as `loss`.
    #[serde(deserialize_with = "number_or_nan")]
    pub learning_rate: f32,
    /// Seconds since 1970.
    pub timestamp: u64,
}

/// serde_json writes what is not finite as null.
fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f32, D::Error> {
    Ok(Option::<f32>::deserialize(deserializer)?.unwrap_or(f32::NAN))
}

/// A layer's variables with the ends of their names.
fn parts(layer: &LoRALayer) -> [(&'static str, &Var); 2] {
    [("lora_a", layer.lora_a()), ("lora_b", layer.lora_b())]
}

/// Writes an adapter to a file, whole or not at all: a file that is there is replaced at the end.
///
/// # Errors
/// [`CheckpointError::SaveFailed`] where the file cannot be written.
pub fn save_checkpoint(
    adapter: &LoRAAdapter,
    path: impl AsRef<Path>,
    metadata: Option<&CheckpointMetadata>,
) -> Result<()> {
    let path = path.as_ref();
    let failed =
        |error: &dyn std::fmt::Display| CheckpointError::SaveFailed { reason: format!("{}: {error}", path.display()) };
    let mut tensors = Vec::new();
    for (name, layer) in adapter.layers() {
        for (part, var) in parts(layer) {
            tensors.push((format!("{name}.{part}"), var.as_detached_tensor().to_device(&Device::Cpu)?));
        }
    }
    let metadata = match metadata {
        Some(metadata) => Some(HashMap::from([(METADATA.to_string(), serde_json::to_string(metadata)?)])),
        None => None,
    };
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let bytes = safetensors::serialize(tensors, metadata).map_err(|e| failed(&e))?;
    write_whole(path, &bytes).map_err(|e| CheckpointError::SaveFailed { reason: e.to_string() })?;
    Ok(())
}

/// Fills an adapter from a file and returns the metadata that was saved with it. Tensors that the adapter has no layer for are ignored,
/// and a low-rank layer that the file lacks stays as it is: a new one adds nothing to the model.
///
/// # Errors
/// [`Error::Candle`] where the file cannot be read; [`CheckpointError::InvalidFormat`] where it is no safetensors file or its metadata
/// is not readable; [`CheckpointError::LoadFailed`] for tensors of another shape or dtype, for a layer of which the file has only A or only
/// B, and for a file that has none of the adapter's layers. The adapter is as it was then.
pub fn load_checkpoint(adapter: &mut LoRAAdapter, path: impl AsRef<Path>) -> Result<Option<CheckpointMetadata>> {
    let path = path.as_ref();
    let invalid = |error: &dyn std::fmt::Display| CheckpointError::InvalidFormat {
        reason: format!("{}: {error}", path.display()),
    };
    let bytes = std::fs::read(path).map_err(|e| Error::Candle(candle_core::Error::from(e).with_path(path)))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| invalid(&e))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(&e))?;
    let metadata = match header.metadata().as_ref().and_then(|entries| entries.get(METADATA)) {
        Some(json) => Some(serde_json::from_str(json).map_err(|e| invalid(&format_args!("{METADATA}: {e}")))?),
        None => None,
    };
    for (var, value) in found(adapter, &file, path)? {
        var.set(&value)?;
    }
    Ok(metadata)
}

/// Each variable of the adapter with its value in the file.
fn found<'a>(adapter: &'a LoRAAdapter, file: &SafeTensors<'_>, path: &Path) -> Result<Vec<(&'a Var, Tensor)>> {
    let failed = |reason: String| CheckpointError::LoadFailed { reason: format!("{}: {reason}", path.display()) };
    let mut values = Vec::new();
    for (layer_name, layer) in adapter.layers() {
        let named = parts(layer).map(|(part, var)| (format!("{layer_name}.{part}"), var));
        if named.iter().all(|(name, _)| file.tensor(name).is_err()) {
            continue;
        }
        for (name, var) in named {
            let view = file.tensor(&name).map_err(|_| failed(format!("missing tensor: {name}")))?;
            if view.shape() != var.dims() || view.dtype() != Dtype::F32 {
                let (shape, dtype, dims) = (view.shape(), view.dtype(), var.dims());
                let reason = format!("shape mismatch for {name}: expected {dims:?} of F32, got {shape:?} of {dtype:?}");
                return Err(failed(reason).into());
            }
            values.push((var, view.load(var.device())?));
        }
    }
    match adapter.layers().next() {
        Some((name, _)) if values.is_empty() => {
            Err(failed(format!("no tensor of {name} or of any other layer of the adapter")).into())
        }
        _ => Ok(values),
    }
}
