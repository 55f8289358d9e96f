//! Checkpoints: what is saved comes back, files that v1 wrote load, and what is lost is named.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::training::{assert_near, numbers, tensor, wide};
use candle_core::{DType, Device, Tensor};
use candle_lazy_compat::error::CheckpointError;
use candle_lazy_compat::training::checkpoint::{load_checkpoint, save_checkpoint, CheckpointMetadata};
use candle_lazy_compat::training::{AdapterRegistry, LoRAAdapter, LoRAAdapterConfig, TargetModule};
use candle_lazy_compat::Error;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::Path;

fn adapter(num_layers: usize) -> LoRAAdapter {
    let target_modules = vec![TargetModule::QProj, TargetModule::DownProj];
    let config = LoRAAdapterConfig { rank: 2, target_modules, ..LoRAAdapterConfig::default() };
    LoRAAdapter::new(8, 12, num_layers, &config, &Device::Cpu).unwrap()
}

fn filled(num_layers: usize) -> LoRAAdapter {
    let adapter = adapter(num_layers);
    for (at, (_, layer)) in adapter.layers().enumerate() {
        layer.lora_a().set(&tensor(layer.lora_a().dims(), 2 * at)).unwrap();
        layer.lora_b().set(&tensor(layer.lora_b().dims(), 2 * at + 1)).unwrap();
    }
    adapter
}

fn assert_filled(adapter: &LoRAAdapter) {
    for (at, (_, layer)) in adapter.layers().enumerate() {
        assert_near(layer.lora_a_tensor(), &numbers(layer.lora_a_tensor().elem_count(), 2 * at), 0.0);
        assert_near(layer.lora_b_tensor(), &numbers(layer.lora_b_tensor().elem_count(), 2 * at + 1), 0.0);
    }
}

fn metadata() -> CheckpointMetadata {
    CheckpointMetadata { global_step: 120, loss: 0.625, learning_rate: 1e-4, timestamp: 1_765_432_100 }
}

#[test]
fn what_is_saved_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.safetensors");
    save_checkpoint(&filled(2), &path, Some(&metadata())).unwrap();
    let mut loaded = adapter(2);
    let found = load_checkpoint(&mut loaded, &path).unwrap().unwrap();
    assert_eq!((found.global_step, found.loss), (120, 0.625));
    assert_eq!((found.learning_rate, found.timestamp), (1e-4, 1_765_432_100));
    assert_filled(&loaded);
    // over a file that is there, and without metadata
    save_checkpoint(&adapter(2), &path, None).unwrap();
    assert!(load_checkpoint(&mut loaded, &path).unwrap().is_none());
    assert!(wide(loaded.get_layer(1, &TargetModule::QProj).unwrap().lora_b_tensor()).iter().all(|v| *v == 0.0));
    // no other file is left
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_format_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.safetensors");
    save_checkpoint(&filled(1), &path, Some(&metadata())).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let want =
        ["layers.0.down_proj.lora_a", "layers.0.down_proj.lora_b", "layers.0.q_proj.lora_a", "layers.0.q_proj.lora_b"];
    assert_eq!(names, want);
    let a = file.tensor("layers.0.down_proj.lora_a").unwrap();
    assert_eq!((a.shape(), a.dtype()), (&[12, 2][..], safetensors::Dtype::F32));
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let json = header.metadata().as_ref().unwrap().get("checkpoint_metadata").unwrap();
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!((json["global_step"].as_u64(), json["loss"].as_f64()), (Some(120), Some(0.625)));
    assert_eq!(json["timestamp"].as_u64(), Some(1_765_432_100));
}

/// A file as v1 wrote it: by safetensors itself.
fn write(path: &Path, tensors: &HashMap<String, Tensor>, metadata: Option<&str>) {
    let metadata = metadata.map(|json| HashMap::from([("checkpoint_metadata".to_string(), json.to_string())]));
    safetensors::serialize_to_file(tensors, metadata, path).unwrap();
}

fn tensors() -> HashMap<String, Tensor> {
    HashMap::from([
        ("layers.0.q_proj.lora_a".to_string(), tensor(&[8, 2], 0)),
        ("layers.0.q_proj.lora_b".to_string(), tensor(&[2, 8], 1)),
        ("layers.0.down_proj.lora_a".to_string(), tensor(&[12, 2], 2)),
        ("layers.0.down_proj.lora_b".to_string(), tensor(&[2, 8], 3)),
    ])
}

#[test]
fn a_file_of_v1() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v1.safetensors");
    // JSON has no NaN: serde_json wrote null
    let json = r#"{"global_step":7,"loss":null,"learning_rate":0.5,"timestamp":9}"#;
    write(&path, &tensors(), Some(json));
    let mut loaded = adapter(1);
    let found = load_checkpoint(&mut loaded, &path).unwrap().unwrap();
    assert!(found.loss.is_nan());
    assert_eq!((found.global_step, found.learning_rate, found.timestamp), (7, 0.5, 9));
    assert_filled(&loaded);
    // tensors of further layers are not asked for
    let mut more = tensors();
    more.insert("layers.1.q_proj.lora_a".to_string(), tensor(&[3, 3], 4));
    write(&path, &more, None);
    let mut loaded = adapter(1);
    assert!(load_checkpoint(&mut loaded, &path).unwrap().is_none());
    assert_filled(&loaded);
    // an adapter without layers has nothing to fill
    assert!(load_checkpoint(&mut adapter(0), &path).unwrap().is_none());
}

/// v1 let a layer that the file lacks be as it is.
#[test]
fn a_file_of_fewer_layers_than_the_adapter_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fewer.safetensors");
    write(&path, &tensors(), None);
    let mut loaded = adapter(2);
    let second = |adapter: &LoRAAdapter| -> Vec<Vec<f64>> {
        adapter.layers().skip(2).flat_map(|(_, layer)| layer.trainable_variables()).map(|var| wide(var)).collect()
    };
    let before = second(&loaded);
    load_checkpoint(&mut loaded, &path).unwrap();
    for (at, (_, layer)) in loaded.layers().take(2).enumerate() {
        assert_near(layer.lora_a_tensor(), &numbers(layer.lora_a_tensor().elem_count(), 2 * at), 0.0);
        assert_near(layer.lora_b_tensor(), &numbers(layer.lora_b_tensor().elem_count(), 2 * at + 1), 0.0);
    }
    assert_eq!(second(&loaded), before);
}

#[test]
fn a_file_that_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.safetensors");
    let refused = |tensors: &HashMap<String, Tensor>, wanted: &str| {
        write(&path, tensors, None);
        let mut loaded = filled(1);
        let error = load_checkpoint(&mut loaded, &path).unwrap_err();
        assert!(matches!(error, Error::Checkpoint(CheckpointError::LoadFailed { .. })), "{error:?}");
        let text = error.to_string();
        let named = text.contains("failed to load checkpoint") && text.contains("other.safetensors");
        assert!(named && text.contains(wanted), "{text}");
        // nothing of the file has reached the adapter
        assert_filled(&loaded);
    };
    let mut lacking: HashMap<String, Tensor> = tensors().into_iter().map(|(n, t)| (n, t.neg().unwrap())).collect();
    lacking.remove("layers.0.down_proj.lora_b");
    refused(&lacking, "missing tensor: layers.0.down_proj.lora_b");
    let of_peft = HashMap::from([("base_model.model.q_proj.lora_A.weight".to_string(), tensor(&[2, 8], 0))]);
    refused(&of_peft, "no tensor of layers.0.q_proj or of any other layer of the adapter");
    lacking.insert("layers.0.down_proj.lora_b".to_string(), tensor(&[3, 8], 3));
    refused(&lacking, "shape mismatch for layers.0.down_proj.lora_b: expected [2, 8] of F32, got [3, 8] of F32");
    let half = tensor(&[2, 8], 3).to_dtype(DType::F16).unwrap();
    lacking.insert("layers.0.down_proj.lora_b".to_string(), half);
    refused(&lacking, "expected [2, 8] of F32, got [2, 8] of F16");
}

#[test]
fn files_that_are_no_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.safetensors");
    let error = load_checkpoint(&mut adapter(1), &path).unwrap_err();
    assert!(matches!(error, Error::Candle(_)) && error.to_string().contains("none.safetensors"), "{error}");
    std::fs::write(&path, "no safetensors").unwrap();
    let error = load_checkpoint(&mut adapter(1), &path).unwrap_err();
    assert!(matches!(error, Error::Checkpoint(CheckpointError::InvalidFormat { .. })), "{error:?}");
    assert!(error.to_string().contains("invalid checkpoint format"), "{error}");
    write(&path, &tensors(), Some("{"));
    let error = load_checkpoint(&mut adapter(1), &path).unwrap_err().to_string();
    assert!(error.contains("invalid checkpoint format") && error.contains("checkpoint_metadata"), "{error}");
    let nowhere = dir.path().join("no").join("dir.safetensors");
    let error = save_checkpoint(&adapter(1), nowhere, None).unwrap_err();
    assert!(matches!(error, Error::Checkpoint(CheckpointError::SaveFailed { .. })), "{error:?}");
    assert!(error.to_string().contains("failed to save checkpoint"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nan.safetensors");
    let diverged = CheckpointMetadata { loss: f32::NAN, learning_rate: f32::INFINITY, ..metadata() };
    save_checkpoint(&filled(1), &path, Some(&diverged)).unwrap();
    let found = load_checkpoint(&mut adapter(1), &path).unwrap().unwrap();
    assert!(found.loss.is_nan() && found.learning_rate.is_nan());
    assert_eq!(found.global_step, 120);
}

#[test]
fn a_registry_fills_from_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.safetensors");
    save_checkpoint(&filled(1), &path, None).unwrap();
    let mut registry = AdapterRegistry::new();
    registry.load_adapter_from_checkpoint("a".to_string(), adapter(1), &path).unwrap();
    assert_filled(registry.get_adapter("a").unwrap());
    let twice = registry.load_adapter_from_checkpoint("a".to_string(), adapter(1), &path).unwrap_err().to_string();
    assert!(twice.contains("'a' already exists"), "{twice}");
    let nowhere = dir.path().join("none.safetensors");
    assert!(registry.load_adapter_from_checkpoint("b".to_string(), adapter(1), nowhere).is_err());
    assert_eq!(registry.list_adapters(), ["a"]);
}
