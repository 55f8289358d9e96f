//! The safetensors reader: what it reads, and what it refuses.

use crate::common::{close, Rng, TestResult};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::weights::{safetensors, save_safetensors, SafetensorsFile};
use candle_lazy_nn::{linear_no_bias, Error};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn write(dir: &Path, name: &str, tensors: &[(&str, Tensor)]) -> candle_core::Result<PathBuf> {
    let path = dir.join(name);
    let map: HashMap<String, Tensor> = tensors.iter().map(|(name, t)| ((*name).to_string(), t.clone())).collect();
    candle_core::safetensors::save(&map, &path)?;
    Ok(path)
}

/// A file with this header text and `data` zero bytes behind it.
fn raw(dir: &Path, header: &str, data: usize) -> std::io::Result<PathBuf> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    let path = dir.join("raw.safetensors");
    std::fs::write(&path, bytes)?;
    Ok(path)
}

#[test]
fn tensors_come_back_in_every_dtype() -> TestResult {
    let dir = tempfile::tempdir()?;
    // More than one chunk of the reader, and an odd rest.
    let big = Rng::new(1).tensor(&[300_001], 5.)?;
    let small = Rng::new(2).tensor(&[3, 4, 5], 5.)?;
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?;
    let floats = [DType::F32, DType::F64, DType::F16, DType::BF16];
    for stored in floats {
        let tensors =
            [("big", big.to_dtype(stored)?), ("small", small.to_dtype(stored)?), ("empty", empty.to_dtype(stored)?)];
        let path = write(dir.path(), &format!("{stored:?}.safetensors"), &tensors)?;
        for wanted in floats {
            let vb = safetensors(&[&path], wanted, &Device::Cpu)?;
            for (name, tensor) in &tensors {
                let got = vb.get(tensor.shape(), name)?;
                assert_eq!(got.dtype(), wanted);
                let want = tensor.to_dtype(wanted)?;
                close(&got.to_dtype(DType::F32)?, &want.to_dtype(DType::F32)?, 0.)?;
            }
        }
    }
    Ok(())
}

#[test]
fn integers_come_back() -> TestResult {
    let dir = tempfile::tempdir()?;
    let ids = Tensor::new(&[[1i64, 2, 3], [-4, 5, 6]], &Device::Cpu)?;
    let path =
        write(dir.path(), "ids.safetensors", &[("ids", ids.clone()), ("bytes", ids.abs()?.to_dtype(DType::U8)?)])?;
    let vb = safetensors(&[&path], DType::I64, &Device::Cpu)?;
    assert_eq!(vb.get((2, 3), "ids")?.to_vec2::<i64>()?, ids.to_vec2::<i64>()?);
    assert_eq!(vb.get((2, 3), "bytes")?.to_vec2::<i64>()?, [[1, 2, 3], [4, 5, 6]]);
    Ok(())
}

#[test]
fn whole_numbers_are_no_parameters() -> TestResult {
    let dir = tempfile::tempdir()?;
    let ids = Tensor::new(&[[1i64, 2, 3], [-4, 5, 6]], &Device::Cpu)?;
    for stored in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let path = write(dir.path(), "whole.safetensors", &[("linear.weight", ids.abs()?.to_dtype(stored)?)])?;
        for wanted in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let vb = safetensors(&[&path], wanted, &Device::Cpu)?;
            let error = candle_lazy_nn::linear_no_bias(3, 2, vb.pp("linear")).map(|_| ());
            let Err(Error::Tensor { name, file, message }) = &error else {
                panic!("{stored:?} as {wanted:?}: {error:?}");
            };
            assert_eq!((name.as_str(), file.as_deref()), ("linear.weight", Some(path.as_path())));
            assert!(message.contains(&format!("{stored:?}")) && message.contains(&format!("{wanted:?}")), "{message}");
        }
    }
    Ok(())
}

#[test]
fn shards_are_one_model_and_a_name_in_two_of_them_is_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (a, b) = (Rng::new(3).tensor(&[2, 2], 1.)?, Rng::new(4).tensor(&[3], 1.)?);
    let one = write(dir.path(), "1.safetensors", &[("a", a.clone())])?;
    let two = write(dir.path(), "2.safetensors", &[("b", b.clone())])?;
    let vb = safetensors(&[&one, &two], DType::F32, &Device::Cpu)?;
    close(&vb.get((2, 2), "a")?, &a, 0.)?;
    close(&vb.get(3, "b")?, &b, 0.)?;
    assert!(vb.contains_tensor("a") && !vb.contains_tensor("c"));
    let again = write(dir.path(), "3.safetensors", &[("a", a)])?;
    let error = safetensors(&[&one, &again], DType::F32, &Device::Cpu).map(|_| ());
    assert!(matches!(&error, Err(Error::Format { message, .. }) if message.contains("`a`")), "{error:?}");
    Ok(())
}

#[test]
fn what_is_missing_or_misshapen_is_named_with_the_file() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = write(dir.path(), "w.safetensors", &[("fc.weight", Rng::new(5).tensor(&[4, 3], 1.)?)])?;
    let vb = safetensors(&[&path], DType::F32, &Device::Cpu)?;
    let missing = linear_no_bias(3, 4, vb.pp("head")).map(|_| ());
    assert!(
        matches!(&missing, Err(Error::MissingTensor { name, file: Some(file) }) if name == "head.weight" && *file == path),
        "{missing:?}"
    );
    let misshapen = linear_no_bias(4, 3, vb.pp("fc")).map(|_| ()).unwrap_err();
    let text = misshapen.to_string();
    for part in ["fc.weight", "w.safetensors", "[3, 4]", "[4, 3]"] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    Ok(())
}

#[test]
fn a_file_cut_anywhere_is_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    let tensors = [("a", Rng::new(6).tensor(&[5, 7], 1.)?), ("b", Rng::new(7).tensor(&[9], 1.)?)];
    let bytes = std::fs::read(write(dir.path(), "whole.safetensors", &tensors)?)?;
    let path = dir.path().join("cut.safetensors");
    for cut in 0..bytes.len() {
        std::fs::write(&path, &bytes[..cut])?;
        let error = SafetensorsFile::open(&path).map(|_| ());
        assert!(matches!(error, Err(Error::Format { .. })), "cut at {cut}: {error:?}");
    }
    std::fs::write(&path, &bytes)?;
    assert_eq!(SafetensorsFile::open(&path)?.names().collect::<Vec<_>>(), ["a", "b"]);
    Ok(())
}

#[test]
fn headers_that_lie_are_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    let tensor = |name: &str, dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#""{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{begin}, {end}]}}"#)
    };
    let cases = [
        (format!("{{{}}}", tensor("a", "F32", "[2]", 0, 8)), 9, "bytes follow"),
        (format!("{{{}}}", tensor("a", "F32", "[3]", 0, 8)), 8, "does not fill"),
        (format!("{{{}}}", tensor("a", "F32", "[2]", 8, 0)), 8, "lies at bytes"),
        (format!("{{{}}}", tensor("a", "F32", "[2]", 4, 12)), 12, "gap"),
        (format!("{{{}}}", tensor("a", "Q9", "[2]", 0, 8)), 8, "unknown dtype"),
        (format!("{{{}}}", tensor("a", "F32", "[4294967296, 4294967296, 4]", 0, 8)), 8, "does not fill"),
        (format!("{{{}}}", tensor("a", "F32", "[0, 4294967296, 4294967296]", 0, 0)), 0, "does not fill"),
        (format!("{{{}}}", tensor("a", "F32", "[4294967296, 4294967296, 0]", 0, 0)), 0, "does not fill"),
        (format!("{{{}, {}}}", tensor("a", "F32", "[2]", 0, 8), tensor("b", "F32", "[2]", 4, 12)), 12, "overlap"),
        (r#"{"a": {"dtype": "F32"}}"#.to_string(), 0, "`a`"),
        ("[1, 2]".to_string(), 0, "no JSON object"),
    ];
    for (header, data, part) in cases {
        let error = SafetensorsFile::open(raw(dir.path(), &header, data)?).map(|_| ());
        assert!(matches!(&error, Err(Error::Format { message, .. }) if message.contains(part)), "{header}: {error:?}");
    }
    let path = dir.path().join("huge.safetensors");
    std::fs::write(&path, u64::MAX.to_le_bytes())?;
    assert!(matches!(SafetensorsFile::open(&path), Err(Error::Format { .. })));
    assert!(matches!(SafetensorsFile::open(dir.path().join("absent")), Err(Error::Io { .. })));
    Ok(())
}

#[test]
fn a_dtype_that_candle_lacks_is_refused_when_it_is_asked_for() -> TestResult {
    let dir = tempfile::tempdir()?;
    let header =
        r#"{"__metadata__": {"format": "pt"}, "weight": {"dtype": "BOOL", "shape": [2, 2], "data_offsets": [0, 4]}}"#;
    let path = raw(dir.path(), header, 4)?;
    let file = SafetensorsFile::open(&path)?;
    assert_eq!(file.shape("weight"), None);
    let shapes: Vec<_> = file.all_shapes().map(|(name, shape)| (name, shape.dims())).collect();
    assert_eq!(shapes, [("weight", [2, 2].as_slice())]);
    let vb = safetensors(&[path], DType::F32, &Device::Cpu)?;
    let error = linear_no_bias(2, 2, vb).map(|_| ());
    assert!(matches!(&error, Err(Error::Tensor { message, .. }) if message.contains("BOOL")), "{error:?}");
    Ok(())
}

#[test]
fn a_file_cut_after_it_was_opened_is_an_error() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = write(dir.path(), "w.safetensors", &[("weight", Rng::new(8).tensor(&[40, 30], 1.)?)])?;
    let vb = safetensors(&[&path], DType::F32, &Device::Cpu)?;
    let bytes = std::fs::read(&path)?;
    std::fs::write(&path, &bytes[..bytes.len() - 5])?;
    assert!(matches!(linear_no_bias(30, 40, vb), Err(Error::Tensor { .. })));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn changed_bytes_never_panic(flips in prop::collection::vec((0usize..260, any::<u8>()), 1..6)) {
        let run = || -> TestResult {
            let dir = tempfile::tempdir()?;
            let path = write(dir.path(), "w.safetensors", &[("a", Rng::new(9).tensor(&[5, 7], 1.)?)])?;
            let mut bytes = std::fs::read(&path)?;
            for (at, value) in &flips {
                if let Some(byte) = bytes.get_mut(*at) {
                    *byte = *value;
                }
            }
            std::fs::write(&path, &bytes)?;
            if let Ok(vb) = safetensors(&[&path], DType::F32, &Device::Cpu) {
                // Data may have changed unnoticed; a shape that still reads must be the one that was asked for.
                if let Ok(tensor) = vb.get((5, 7), "a") {
                    assert_eq!(tensor.dims(), [5, 7]);
                }
            }
            Ok(())
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

#[cfg(unix)]
#[test]
fn a_saved_file_may_be_read_by_whom_any_new_file_may() -> TestResult {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir()?;
    let mode =
        |name: &str| -> std::io::Result<u32> { Ok(std::fs::metadata(dir.path().join(name))?.permissions().mode()) };
    std::fs::write(dir.path().join("any"), b"new")?;
    let tensors = [("x".to_string(), Tensor::new(1f32, &Device::Cpu)?)].into();
    save_safetensors(dir.path().join("saved.safetensors"), &tensors, &Default::default())?;
    assert_eq!(mode("saved.safetensors")?, mode("any")?);
    Ok(())
}
