//! Ways to make a builder, and what it gives.

use super::{at_line, random, same};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::candle_nn::{self as lazy_nn, Init, VarBuilder, VarMap};
use candle_lazy_nn::LazyTensor;
use std::collections::HashMap;

fn tensors() -> HashMap<String, Tensor> {
    [("a.w", vec![2, 3]), ("a.b.w", vec![4]), ("top", vec![1])]
        .into_iter()
        .enumerate()
        .map(|(seed, (name, dims))| (name.to_string(), random(&dims, seed as u64)))
        .collect()
}

#[test]
fn names_prefixes_and_dtypes() {
    let all = tensors();
    let vb = VarBuilder::from_tensors(all.clone(), DType::F32, &Device::Cpu);
    let a = vb.pp("a");
    same(a.get((2, 3), "w"), Ok(all["a.w"].clone()));
    same(a.push_prefix("b").get(4, "w"), Ok(all["a.b.w"].clone()));
    same(vb.pp("a.b").get_unchecked("w"), Ok(all["a.b.w"].clone()));
    same(a.pp("b").root().get(1, "top"), Ok(all["top"].clone()));
    same(a.set_prefix("a.b").get_with_hints(4, "w", Init::Const(0.)), Ok(all["a.b.w"].clone()));
    assert_eq!(a.pp("b").prefix(), "a.b");
    assert!(a.contains_tensor("w") && a.contains_tensor("b.w") && !a.contains_tensor("b") && !vb.contains_tensor("w"));
    assert!(vb.device().is_cpu() && vb.dtype() == DType::F32);
    assert_eq!(vb.to_dtype(DType::F64).get(1, "top").unwrap().dtype(), DType::F64);
    assert_eq!(vb.clone().set_dtype(DType::F16).get(1, "top").unwrap().dtype(), DType::F16);
    assert_eq!(vb.get_unchecked_dtype("top", DType::BF16).unwrap().dtype(), DType::BF16);
    let wide = vb.get_with_hints_dtype(1, "top", Init::Const(0.), DType::F64).unwrap();
    assert_eq!(wide.dtype(), DType::F64);
    let renamed = vb.rename_f(|name: &str| name.replace("model.", "a."));
    same(renamed.get((2, 3), "model.w"), Ok(all["a.w"].clone()));
}

#[test]
fn lazy_tensors_and_candles_builders_go_in() {
    let all = tensors();
    let doubled: HashMap<String, LazyTensor> =
        all.iter().map(|(name, tensor)| (name.clone(), (LazyTensor::from(tensor) * 2.0).unwrap())).collect();
    let vb = VarBuilder::from_tensors(doubled, DType::F32, &Device::Cpu);
    same(vb.get(1, "top"), &all["top"] * 2.0);
    let eager = candle_nn::VarBuilder::from_tensors(all.clone(), DType::F32, &Device::Cpu);
    let vb = VarBuilder::from(eager.pp("a"));
    same(vb.get((2, 3), "w"), Ok(all["a.w"].clone()));
    assert_eq!(vb.into_inner().prefix(), "a");
    let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu).get((2, 2), "x").unwrap();
    assert_eq!(zeros.to_vec2::<f32>().unwrap(), [[0.; 2]; 2]);
}

#[test]
fn safetensors_from_files_and_memory() {
    let all = tensors();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    candle_core::safetensors::save(&all, &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let from_file = VarBuilder::from_mmaped_safetensors(&[&path], DType::F32, &Device::Cpu).unwrap();
    let from_slice = VarBuilder::from_slice_safetensors(&bytes, DType::F32, &Device::Cpu).unwrap();
    let from_buffer = VarBuilder::from_buffered_safetensors(bytes.clone(), DType::F32, &Device::Cpu).unwrap();
    for vb in [from_file, from_slice, from_buffer] {
        same(vb.pp("a").get((2, 3), "w"), Ok(all["a.w"].clone()));
    }
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(VarBuilder::from_mmaped_safetensors(&[&path], DType::F32, &Device::Cpu).is_err());
}

#[test]
fn variables_are_made_and_get_gradients() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let layer = lazy_nn::linear(3, 2, vb.pp("l")).unwrap();
    let x = LazyTensor::from(random(&[4, 3], 1));
    let loss = x.apply(&layer).unwrap().sqr().unwrap().mean_all().unwrap();
    let grads = loss.backward().unwrap();
    assert_eq!(map.all_vars().len(), 2);
    for var in map.all_vars() {
        let grad = grads.get(&var).expect("a gradient");
        assert_eq!(grad.dims(), var.dims());
        assert!(grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() > 0.0);
    }
}

#[test]
fn what_is_missing_or_has_another_shape_is_named_with_this_line() {
    let vb = VarBuilder::from_tensors(tensors(), DType::F32, &Device::Cpu).pp("a");
    let error = vb.get(7, "nothing").unwrap_err();
    at_line(&error, line!() - 1);
    assert!(error.to_string().contains("`a.nothing`"), "{error}");
    let error = lazy_nn::linear_no_bias(4, 2, vb.clone()).unwrap_err();
    at_line(&error, line!() - 1);
    let error = vb.get((3, 3), "w").unwrap_err();
    at_line(&error, line!() - 1);
    let text = error.to_string();
    assert!(text.contains("`a.w`") && text.contains("[3, 3]") && text.contains("[2, 3]"), "{text}");
}
