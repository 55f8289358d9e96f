//! `ModelLoader`: values, shapes, dtypes, and the errors of files that are not what they should be.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use candle_core::{DType, Device as CandleDevice, Tensor};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, ModelError};
use metal_candle::models::ModelLoader;
use metal_candle::Device;
use std::collections::HashMap;
use std::path::PathBuf;

/// A file with `weight` (2, 3) of f32 and `ids` (4) of i64.
fn file(dir: &tempfile::TempDir) -> PathBuf {
    let weight = Tensor::new(&[[1f32, 2., 3.], [4., 5., 6.]], &CandleDevice::Cpu).unwrap();
    let ids = Tensor::new(&[1i64, 2, 3, 4], &CandleDevice::Cpu).unwrap();
    let path = dir.path().join("model.safetensors");
    candle_core::safetensors::save(&HashMap::from([("weight", weight), ("ids", ids)]), &path).unwrap();
    path
}

fn loader() -> ModelLoader {
    ModelLoader::new(Device::new_cpu())
}

#[test]
fn tensors_are_read_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = loader().load(file(&dir)).unwrap();
    assert_eq!(tensors.len(), 2);
    assert_eq!(tensors["weight"].to_vec2::<f32>().unwrap(), [[1., 2., 3.], [4., 5., 6.]]);
    assert_eq!(tensors["ids"].to_vec1::<i64>().unwrap(), [1, 2, 3, 4]);
}

#[test]
fn a_dtype_converts_every_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let half = loader().with_dtype(DType::F16);
    assert_eq!((half.dtype(), loader().dtype()), (Some(DType::F16), None));
    assert!(half.device().is_cpu());
    let tensors = half.clone().load(file(&dir)).unwrap();
    assert!(tensors.values().all(|tensor| tensor.dtype() == DType::F16));
    let ids = tensors["ids"].to_dtype(DType::F32).unwrap();
    assert_eq!(ids.to_vec1::<f32>().unwrap(), [1., 2., 3., 4.]);
}

#[test]
fn shapes_are_told_without_the_data() {
    let dir = tempfile::tempdir().unwrap();
    let shapes = loader().inspect(file(&dir)).unwrap();
    assert_eq!(shapes, HashMap::from([("weight".to_string(), vec![2, 3]), ("ids".to_string(), vec![4])]));
    // a dtype that Candle does not have has a shape too
    let header = r#"{"mask": {"dtype": "BOOL", "shape": [2, 2], "data_offsets": [0, 4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend([0, 1, 0, 1]);
    let path = dir.path().join("mask.safetensors");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(loader().inspect(path).unwrap(), HashMap::from([("mask".to_string(), vec![2, 2])]));
}

#[test]
fn expected_shapes_are_compared_and_others_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir);
    let expect = |name: &str, shape: &[usize]| HashMap::from([(name.to_string(), shape.to_vec())]);
    assert_eq!(loader().load_with_validation(&path, &expect("weight", &[2, 3])).unwrap().len(), 2);
    assert_eq!(loader().load_with_validation(&path, &HashMap::new()).unwrap().len(), 2);
    let error = loader().load_with_validation(&path, &expect("weight", &[3, 2])).unwrap_err();
    let Error::Model(ModelError::ShapeMismatch { expected, actual }) = &error else { panic!("{error:?}") };
    assert_eq!((expected.as_slice(), actual.as_slice()), ([3, 2].as_slice(), [2, 3].as_slice()));
    assert!(error.to_string().contains("shape mismatch: expected [3, 2], got [2, 3]"), "{error}");
    let error = loader().load_with_validation(&path, &expect("bias", &[2])).unwrap_err();
    assert!(matches!(error, Error::Model(ModelError::InvalidFormat { .. })), "{error:?}");
    assert!(error.to_string().contains("missing tensor: bias"), "{error}");
}

#[test]
fn files_that_are_not_there_or_not_right() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent.safetensors");
    for error in
        [loader().load(&absent).unwrap_err(), loader().load_with_validation(&absent, &HashMap::new()).unwrap_err()]
    {
        assert!(matches!(&error, Error::Model(ModelError::FileNotFound { path }) if *path == absent), "{error:?}");
        assert!(error.to_string().contains("model file not found"), "{error}");
    }
    assert!(matches!(loader().inspect(&absent).unwrap_err(), Error::Io(_)));
    assert!(matches!(loader().inspect(dir.path()).unwrap_err(), Error::Io(_)));
    let broken = dir.path().join("broken.safetensors");
    std::fs::write(&broken, b"no such format").unwrap();
    for error in [loader().load(&broken).unwrap_err(), loader().inspect(&broken).unwrap_err()] {
        assert!(matches!(error, Error::Model(ModelError::InvalidFormat { .. })), "{error:?}");
        assert!(error.to_string().contains("invalid model format"), "{error}");
        assert!(error.to_string().contains("broken.safetensors"), "{error}");
    }
}
