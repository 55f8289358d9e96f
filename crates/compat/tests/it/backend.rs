//! The backend: devices, ops on tensors and the fused ops, each against its formula in f64; the errors' words.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too
#![allow(deprecated)] // what v1 had is tested as well

use candle_core::{DType, Device as CandleDevice, Tensor, Var};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{DeviceError, EmbeddingError, Error, ModelError, TrainingError};
use metal_candle::{Device, DeviceType, TensorExt};

/// Values without a pattern that a wrong layout would keep.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + 11) % 101) as f32 / 25.0 - 2.0).collect()
}

/// All results here are sums of a few terms of order one, in f32.
const BOUND: f64 = 2e-6;

fn assert_close(got: &Tensor, want: &[f64]) {
    let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= BOUND * w.abs().max(1.0), "{i}: {g} against {w}");
    }
}

fn rows(values: &[f32], n: usize, f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    values.chunks(n).flat_map(|row| f(&row.iter().map(|&v| f64::from(v)).collect::<Vec<_>>())).collect()
}

fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
    row.iter().map(|v| (v - max).exp() / sum).collect()
}

fn rms_norm(row: &[f64], eps: f64) -> Vec<f64> {
    let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
    row.iter().map(|v| v / (mean + eps).sqrt()).collect()
}

fn layer_norm(row: &[f64], eps: f64) -> Vec<f64> {
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    row.iter().map(|v| (v - mean) / (var + eps).sqrt()).collect()
}

#[test]
fn devices_say_what_they_are() {
    let cpu = Device::new_cpu();
    assert!(cpu.is_cpu() && !cpu.is_metal());
    let info = cpu.info();
    assert_eq!((info.device_type, info.index), (DeviceType::Cpu, 0));
    assert_eq!(info.metal_available, Device::is_metal_available());
    assert!(Device::from_candle_device(CandleDevice::Cpu).as_candle_device().is_cpu());
    assert!(CandleDevice::from(Device::from(CandleDevice::Cpu)).is_cpu());
    assert!(cpu.as_ref().is_cpu() && cpu.into_candle_device().is_cpu());
    if !Device::is_metal_available() {
        let error = Device::new_metal(0).unwrap_err();
        assert!(matches!(error, Error::Device(DeviceError::MetalUnavailable { .. })));
        assert!(error.to_string().contains("Metal device not available"), "{error}");
        assert!(Device::new_with_fallback(0).is_cpu());
    }
    // a number that no machine has, with Metal too
    let error = Device::new_metal(10_000).unwrap_err();
    assert!(matches!(error, Error::Device(DeviceError::MetalUnavailable { .. })), "{error}");
    assert!(Device::new_with_fallback(10_000).is_cpu());
}

#[test]
fn tensor_ext_is_its_formulas() {
    let values = numbers(3 * 5 * 8);
    let x = Tensor::from_vec(values.clone(), (3, 5, 8), &CandleDevice::Cpu).unwrap();
    assert_close(&x.softmax_stable().unwrap(), &rows(&values, 8, softmax));
    assert_close(&x.rms_norm(1e-5).unwrap(), &rows(&values, 8, |r| rms_norm(r, 1e-5)));
    assert_close(&x.layer_norm(1e-5).unwrap(), &rows(&values, 8, |r| layer_norm(r, 1e-5)));
}

#[test]
fn tensor_ext_keeps_the_dtype_and_the_gradient() {
    let x = Tensor::from_vec(numbers(16), (2, 8), &CandleDevice::Cpu).unwrap();
    let half = x.to_dtype(DType::F16).unwrap();
    assert_eq!(half.rms_norm(1e-5).unwrap().dtype(), DType::F16);
    let var = Var::from_tensor(&x).unwrap();
    let weights = Tensor::from_vec((0..16).map(|i| i as f32).collect(), (2, 8), &CandleDevice::Cpu).unwrap();
    let loss = (var.softmax_stable().unwrap() * &weights).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    // d/dx of Σ w·softmax(x) is y·(w − Σ w·y)
    let want = rows(&numbers(16), 8, softmax);
    let want: Vec<f64> = want
        .chunks(8)
        .enumerate()
        .flat_map(|(r, y)| {
            let dot: f64 = y.iter().enumerate().map(|(i, y)| y * (r * 8 + i) as f64).sum();
            y.iter().enumerate().map(move |(i, y)| y * ((r * 8 + i) as f64 - dot)).collect::<Vec<_>>()
        })
        .collect();
    assert_close(grads.get(&var).unwrap(), &want);
}

#[test]
fn bad_input_is_an_error() {
    let scalar = Tensor::new(1f32, &CandleDevice::Cpu).unwrap();
    assert!(scalar.softmax_stable().is_err());
    let ids = Tensor::new(&[1u32, 2], &CandleDevice::Cpu).unwrap();
    assert!(ids.softmax_stable().is_err() && ids.rms_norm(1e-5).is_err());
}

/// The first line of an error names the caller's line; a backtrace may follow, where the environment asks for one.
#[track_caller]
fn assert_names(result: Result<Tensor, impl std::fmt::Display>, what: &str, line: u32) {
    let error = result.unwrap_err().to_string();
    let first = error.lines().next().unwrap_or_default();
    let place = format!("{}:{line}:", file!());
    assert!(first.contains(what) && first.contains(&place), "{place} in: {first}");
}

#[test]
fn an_error_names_the_callers_line() {
    let ids = Tensor::new(&[[1u32, 2]], &CandleDevice::Cpu).unwrap();
    assert_names(ids.softmax_stable(), "softmax", line!());
    assert_names(TensorExt::rms_norm(&ids, 1e-5), "rms_norm", line!());
    assert_names(TensorExt::layer_norm(&ids, 1e-5), "layer_norm", line!());
}

#[test]
fn words_of_the_errors() {
    let said = [
        (Error::from(ModelError::FileNotFound { path: "/a/b".into() }), "model file not found: /a/b"),
        (ModelError::ShapeMismatch { expected: vec![1], actual: vec![2] }.into(), "shape mismatch"),
        (TrainingError::InvalidLoRAConfig { reason: "r".into() }.into(), "invalid LoRA configuration"),
        (TrainingError::InvalidConfig { reason: "r".into() }.into(), "invalid training configuration"),
        (TrainingError::StateError { reason: "r".into() }.into(), "training state error"),
        (DeviceError::MetalUnavailable { reason: "r".into() }.into(), "Metal device not available"),
        (EmbeddingError::ModelNotFound { model_id: "m".into() }.into(), "model not found"),
        (EmbeddingError::EmptyInput.into(), "cannot encode empty text"),
        (EmbeddingError::DimensionMismatch { expected: 1, actual: 2 }.into(), "dimension mismatch"),
    ];
    for (error, words) in said {
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(!metal_candle::VERSION.is_empty());
}

#[cfg(feature = "custom-metal")]
mod fused {
    use super::*;
    use metal_candle::backend::{CustomMetalOps, FusedLoRAOp, FusedRMSNormOp, FusedSoftmaxOp, LayerNormOp};

    fn lora(x: &[f32], a: &[f32], b: &[f32], (inner, rank, out): (usize, usize, usize), scale: f64) -> Vec<f64> {
        rows(x, inner, |x| {
            let mid: Vec<f64> =
                (0..rank).map(|r| (0..inner).map(|k| x[k] * f64::from(a[k * rank + r])).sum()).collect();
            (0..out).map(|o| scale * (0..rank).map(|r| mid[r] * f64::from(b[r * out + o])).sum::<f64>()).collect()
        })
    }

    #[test]
    fn fused_methods_run_on_the_cpu() {
        let (xs, a, b) = (numbers(2 * 3 * 8), numbers(8 * 2), numbers(2 * 5));
        let cpu = &CandleDevice::Cpu;
        let x = Tensor::from_vec(xs.clone(), (2, 3, 8), cpu).unwrap();
        let ta = Tensor::from_vec(a.clone(), (8, 2), cpu).unwrap();
        let tb = Tensor::from_vec(b.clone(), (2, 5), cpu).unwrap();
        let got = x.lora_forward_fused(&ta, &tb, 0.5).unwrap();
        assert_eq!(got.dims(), [2, 3, 5]);
        let want = lora(&xs, &a, &b, (8, 2, 5), 0.5);
        assert_close(&got, &want);
        assert_close(&x.apply_op1(FusedLoRAOp::new(ta.clone(), tb.clone(), 0.5).unwrap()).unwrap(), &want);
        assert_close(&x.softmax_fused().unwrap(), &rows(&xs, 8, softmax));
        assert_close(&x.rms_norm_fused(1e-5).unwrap(), &rows(&xs, 8, |r| rms_norm(r, 1e-5)));
        let error = x.lora_forward_fused(&tb, &ta, 0.5).unwrap_err();
        assert!(matches!(error, TrainingError::Failed { .. }), "{error}");
    }

    #[test]
    fn an_error_of_a_fused_method_names_the_callers_line() {
        let ids = Tensor::new(&[[1u32, 2]], &CandleDevice::Cpu).unwrap();
        assert_names(ids.softmax_fused(), "softmax", line!());
        assert_names(ids.rms_norm_fused(1e-5), "rms_norm", line!());
        assert_names(ids.lora_forward_fused(&ids, &ids, 1.0), "lora", line!());
        assert_names(metal_candle::backend::layer_norm(&ids, 1e-5), "layer_norm", line!());
    }

    #[test]
    fn custom_ops_read_what_a_view_selects() {
        let xs = numbers(6 * 8);
        let x = Tensor::from_vec(xs, (6, 8), &CandleDevice::Cpu).unwrap();
        let view = x.t().unwrap().narrow(1, 1, 4).unwrap();
        let plain: Vec<f32> = view.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_close(&view.apply_op1(FusedSoftmaxOp::new().unwrap()).unwrap(), &rows(&plain, 4, softmax));
        let norm = view.apply_op1(FusedRMSNormOp::new(1e-5).unwrap()).unwrap();
        assert_close(&norm, &rows(&plain, 4, |r| rms_norm(r, 1e-5)));
        assert_close(&view.apply_op1(LayerNormOp::new(1e-5)).unwrap(), &rows(&plain, 4, |r| layer_norm(r, 1e-5)));
        let free = metal_candle::backend::layer_norm(&view, 1e-5).unwrap();
        assert_close(&free, &rows(&plain, 4, |r| layer_norm(r, 1e-5)));
    }

    #[test]
    fn all_three_inputs_of_a_fused_lora_get_a_gradient() {
        let cpu = &CandleDevice::Cpu;
        let var = |n: usize, shape: (usize, usize)| {
            Var::from_tensor(&Tensor::from_vec(numbers(n), shape, cpu).unwrap()).unwrap()
        };
        let (x, a, b) = (var(16, (2, 8)), var(16, (8, 2)), var(6, (2, 3)));
        let grads = x.lora_forward_fused(&a, &b, 2.0).unwrap().sum_all().unwrap().backward().unwrap();
        let eager = x.matmul(&a).unwrap().matmul(&b).unwrap().affine(2.0, 0.0).unwrap();
        let wanted = eager.sum_all().unwrap().backward().unwrap();
        for var in [&x, &a, &b] {
            let want = wanted.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(want.iter().any(|v| *v != 0.0));
            let want: Vec<f64> = want.into_iter().map(f64::from).collect();
            assert_close(grads.get(var).unwrap(), &want);
        }
    }

    #[test]
    fn custom_ops_give_their_input_its_gradient() {
        let x = Var::from_tensor(&Tensor::from_vec(numbers(16), (2, 8), &CandleDevice::Cpu).unwrap()).unwrap();
        let w = Tensor::from_vec((0..16).map(|i| i as f32 / 8.0).collect(), (2, 8), &CandleDevice::Cpu).unwrap();
        let loss = |y: Tensor| (y * &w).unwrap().sum_all().unwrap();
        let got = loss(x.apply_op1(FusedSoftmaxOp::new().unwrap()).unwrap()).backward().unwrap();
        let want = loss(candle_nn::ops::softmax(x.as_tensor(), 1).unwrap()).backward().unwrap();
        let want = want.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_close(got.get(&x).unwrap(), &want.into_iter().map(f64::from).collect::<Vec<_>>());
    }

    #[test]
    fn a_fused_lora_computes_in_its_inputs_dtype() {
        // one rounding of the result: half a unit of the mantissa; f64 rounds each of some twenty operations
        for (dtype, unit) in [(DType::F64, 3e-15), (DType::F16, 4.9e-4), (DType::BF16, 3.9e-3)] {
            let of = |n: usize, shape: (usize, usize)| {
                Tensor::from_vec(numbers(n), shape, &CandleDevice::Cpu).unwrap().to_dtype(dtype).unwrap()
            };
            // as the dtype holds them
            let held = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (x, a, b) = (of(16, (2, 8)), of(16, (8, 2)), of(10, (2, 5)));
            let want = lora(&held(&x), &held(&a), &held(&b), (8, 2, 5), 0.5);
            let largest = want.iter().fold(0f64, |most, v| most.max(v.abs()));
            let got = x.apply_op1(FusedLoRAOp::new(a, b, 0.5).unwrap()).unwrap();
            assert_eq!(got.dtype(), dtype);
            let got = got.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for (g, w) in got.iter().zip(&want) {
                assert!((g - w).abs() <= unit * largest.max(1.0), "{dtype:?}: {g} against {w}");
            }
        }
    }

    #[test]
    fn custom_ops_of_broadcast_views_and_of_none() {
        let row = numbers(8);
        let x = Tensor::from_vec(row.clone(), (1, 8), &CandleDevice::Cpu).unwrap().broadcast_as((3, 8)).unwrap();
        let want = rows(&row.repeat(3), 8, softmax);
        assert_close(&x.apply_op1(FusedSoftmaxOp::new().unwrap()).unwrap(), &want);
        let none = x.narrow(0, 0, 0).unwrap();
        assert_eq!(none.apply_op1(LayerNormOp::new(1e-5)).unwrap().dims(), [0, 8]);
        let ids = Tensor::new(&[1u32, 2], &CandleDevice::Cpu).unwrap();
        assert!(ids.apply_op1(FusedSoftmaxOp::new().unwrap()).is_err());
    }

    /// Candle's storage of a device that it was not built for is a type without content.
    #[cfg(not(target_os = "macos"))]
    #[test]
    fn a_custom_op_without_metal_is_an_error() {
        use candle_core::{CustomOp1, Layout, MetalStorage};
        let op = FusedSoftmaxOp::new().unwrap();
        let error = op.metal_fwd(&MetalStorage, &Layout::contiguous((2, 8))).unwrap_err();
        assert!(matches!(error, candle_core::Error::NotCompiledWithMetalSupport), "{error}");
    }

    #[test]
    fn factors_that_do_not_fit_are_refused() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CandleDevice::Cpu).unwrap();
        assert!(FusedLoRAOp::new(zeros(&[8, 2]), zeros(&[3, 5]), 1.0).is_err());
        assert!(FusedLoRAOp::new(zeros(&[8, 2, 1]), zeros(&[2, 5]), 1.0).is_err());
        assert!(FusedRMSNormOp::new(f32::NAN).is_err());
    }
}
