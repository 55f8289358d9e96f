//! GGUF files that are cut, changed or of a kind that is not computed: errors, never panics.

use crate::common::{decoder_vars, TestResult};
use crate::gguf::{parts, wide_config, Parts};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::models::CausalLm;
use candle_lazy_nn::weights::{Gguf, GgufHeader};
use candle_lazy_nn::Error;
use proptest::prelude::*;
use std::path::Path;

fn good() -> candle_core::Result<Parts> {
    let config = wide_config();
    parts(&config, &decoder_vars(&config, 1)?, "llama", GgmlDType::Q8_0)
}

/// Opens the file and reads all of it.
fn load(path: &Path) -> Result<(), Error> {
    let gguf = Gguf::open(path)?;
    CausalLm::load(gguf.var_builder(DType::F32, &Device::Cpu), gguf.config()).map(|_| ())
}

#[test]
fn a_file_cut_anywhere_is_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    let bytes = std::fs::read(good()?.write(dir.path())?)?;
    let path = dir.path().join("cut.gguf");
    // Everywhere in the header, then in strides through the data.
    for cut in (0..4000).chain((4000..bytes.len() - 32).step_by(997)) {
        std::fs::write(&path, &bytes[..cut])?;
        let error = load(&path);
        assert!(matches!(error, Err(Error::Format { .. })), "cut at {cut}: {error:?}");
    }
    std::fs::write(&path, &bytes)?;
    load(&path)?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn changed_bytes_never_panic(flips in prop::collection::vec((0usize..4000, any::<u8>()), 1..8)) {
        let run = || -> TestResult {
            let dir = tempfile::tempdir()?;
            let path = good()?.write(dir.path())?;
            let mut bytes = std::fs::read(&path)?;
            for (at, value) in &flips {
                bytes[*at] = *value;
            }
            std::fs::write(&path, &bytes)?;
            // Whether a change is noticed depends on where it is; that it does no harm does not.
            drop(load(&path));
            Ok(())
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

fn header(counts: (u64, u64), rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(counts.0.to_le_bytes());
    bytes.extend(counts.1.to_le_bytes());
    bytes.extend_from_slice(rest);
    bytes
}

/// A metadata entry.
fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = (key.len() as u64).to_le_bytes().to_vec();
    bytes.extend(key.as_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend_from_slice(value);
    bytes
}

/// A tensor of the list.
fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = (name.len() as u64).to_le_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((dims.len() as u32).to_le_bytes());
    for dim in dims {
        bytes.extend(dim.to_le_bytes());
    }
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

#[test]
fn headers_that_lie_are_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("lie.gguf");
    let nested: Vec<u8> =
        (0..40).flat_map(|_| [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat()).collect();
    let alignment = |n: u32| header((0, 1), &[entry("general.alignment", 4, &n.to_le_bytes()), vec![0; 64]].concat());
    let twice = [tensor("t", &[1], 0, 0), tensor("t", &[1], 0, 0), vec![0; 64]].concat();
    let with = |t: Vec<u8>| header((1, 0), &[t, vec![0; 128]].concat());
    let cases: [(&str, Vec<u8>); 19] = [
        ("does not begin", b"GGML0000".to_vec()),
        ("version", [b"GGUF".to_vec(), 1u32.to_le_bytes().to_vec(), vec![0; 32]].concat()),
        ("version", [b"GGUF".to_vec(), 99u32.to_le_bytes().to_vec(), vec![0; 32]].concat()),
        ("tensors do not fit", header((u64::MAX, 0), &[0; 64])),
        ("metadata entries do not fit", header((0, 1 << 40), &[0; 64])),
        ("bytes of a string", header((0, 1), &[u64::MAX.to_le_bytes().to_vec(), vec![0; 64]].concat())),
        (
            "array elements",
            header(
                (0, 1),
                &entry("k", 9, &[4u32.to_le_bytes().to_vec(), (1u64 << 60).to_le_bytes().to_vec()].concat()),
            ),
        ),
        ("nested", header((0, 1), &entry("k", 9, &nested))),
        ("unknown type", header((0, 1), &entry("k", 77, &[0; 16]))),
        ("truth value", header((0, 1), &entry("k", 7, &[2; 16]))),
        ("alignment", alignment(0)),
        ("alignment", alignment(12)),
        ("dims", with(tensor("t", &[1, 1, 1, 1, 1], 0, 0))),
        ("storage type", with(tensor("t", &[32], 99, 0))),
        ("larger than the file", with(tensor("t", &[1 << 40, 1 << 40], 0, 0))),
        // no element, and sizes that overflow beside the 0, in either order
        ("larger than the file", with(tensor("t", &[0, 1 << 40, 1 << 40], 0, 0))),
        ("larger than the file", with(tensor("t", &[1 << 40, 1 << 40, 0], 0, 0))),
        ("the file ends before", with(tensor("t", &[32], 0, u64::MAX))),
        ("divide into", with(tensor("t", &[33], 8, 0))),
    ];
    for (part, bytes) in cases {
        std::fs::write(&path, bytes)?;
        let error = GgufHeader::read(&path).map(|_| ());
        assert!(matches!(&error, Err(Error::Format { message, .. }) if message.contains(part)), "{part}: {error:?}");
    }
    std::fs::write(&path, header((2, 0), &twice))?;
    let error = GgufHeader::read(&path).map(|_| ());
    assert!(matches!(&error, Err(Error::Format { message, .. }) if message.contains("twice")), "{error:?}");
    assert!(matches!(GgufHeader::read(dir.path().join("absent")), Err(Error::Io { .. })));
    Ok(())
}

#[test]
fn what_is_not_computed_is_refused_by_name() -> TestResult {
    let dir = tempfile::tempdir()?;
    let mut other = good()?;
    other.set("general.architecture", Value::String("mamba".into()));
    let error = load(&other.write(dir.path())?);
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "mamba"), "{error:?}");
    let mut yarn = good()?;
    yarn.set("llama.rope.scaling.type", Value::String("yarn".into()));
    let error = load(&yarn.write(dir.path())?);
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "yarn"), "{error:?}");
    let mut partial = good()?;
    partial.set("llama.rope.dimension_count", Value::U32(4));
    let error = load(&partial.write(dir.path())?);
    assert!(matches!(&error, Err(Error::Config { message, .. }) if message.contains("partly")), "{error:?}");
    Ok(())
}

#[test]
fn metadata_that_is_missing_or_wrong_is_named() -> TestResult {
    let dir = tempfile::tempdir()?;
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let mut lacking = good()?;
        lacking.remove(key);
        let error = load(&lacking.write(dir.path())?);
        assert!(matches!(&error, Err(Error::Config { message, .. }) if message.contains(key)), "{key}: {error:?}");
        let mut wrong = good()?;
        wrong.set(key, Value::Array(vec![Value::U32(3)]));
        let error = load(&wrong.write(dir.path())?);
        assert!(matches!(&error, Err(Error::Config { message, .. }) if message.contains(key)), "{key}: {error:?}");
    }
    let mut zero = good()?;
    zero.set("llama.attention.head_count", Value::U32(0));
    assert!(matches!(load(&zero.write(dir.path())?), Err(Error::Config { .. })));
    let mut negative = good()?;
    negative.set("llama.block_count", Value::I32(-1));
    assert!(matches!(load(&negative.write(dir.path())?), Err(Error::Config { .. })));
    Ok(())
}

#[test]
fn tensors_that_do_not_fit_the_metadata_are_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    let mut headless = good()?;
    headless.tensors.retain(|(name, _)| name != "token_embd.weight");
    let error = load(&headless.write(dir.path())?);
    assert!(matches!(&error, Err(Error::MissingTensor { name, .. }) if name == "token_embd.weight"), "{error:?}");
    let mut heads = good()?;
    heads.set("llama.attention.head_count_kv", Value::U32(4));
    let error = load(&heads.write(dir.path())?);
    assert!(matches!(&error, Err(Error::TensorShape { name, .. }) if name.contains("k_proj")), "{error:?}");
    let mut factors = good()?;
    factors.add("rope_freqs.weight", &Tensor::ones(3, DType::F32, &Device::Cpu)?, GgmlDType::F32)?;
    let gguf = Gguf::open(factors.write(dir.path())?)?;
    let model = CausalLm::load(gguf.var_builder(DType::F32, &Device::Cpu), gguf.config())?;
    assert!(matches!(model.new_cache(4), Err(Error::Config { .. })), "three factors for four frequencies");
    let mut more = good()?;
    more.set("llama.block_count", Value::U32(2));
    let error = load(&more.write(dir.path())?);
    assert!(matches!(&error, Err(Error::Config { message, .. }) if message.contains("model.layers.2")), "{error:?}");
    Ok(())
}
