//! Functions on plain tensors: what is refused, and tensors without elements.

use candle_core::{DType, Device, Result, Tensor, D};
use candle_lazy_ops as ops;
use candle_lazy_ops::AttentionParams;

const CPU: Device = Device::Cpu;

#[test]
fn bad_arguments_are_errors_that_name_the_op() {
    let f = |dims: &[usize]| Tensor::ones(dims, DType::F32, &CPU).unwrap();
    let i = Tensor::ones((2, 3), DType::I64, &CPU).unwrap();
    let x = f(&[2, 3]);
    let p = AttentionParams::new(1.0);
    let q = f(&[1, 2, 3, 4]);
    let cases: Vec<(&str, Result<Tensor>)> = vec![
        ("softmax", ops::softmax(&i, 1)),
        ("softmax", ops::softmax(&x, 2)),
        ("softmax", ops::softmax(&Tensor::new(1f32, &CPU).unwrap(), D::Minus1)),
        ("log-softmax", ops::log_softmax(&i, 1)),
        ("rms-norm", ops::rms_norm(&x, Some(&f(&[2])), 1e-5)),
        ("rms-norm", ops::rms_norm(&Tensor::new(1f32, &CPU).unwrap(), None, 1e-5)),
        ("rms-norm", ops::rms_norm(&x, Some(&f(&[3]).to_dtype(DType::F64).unwrap()), 1e-5)),
        ("layer-norm", ops::layer_norm(&x, Some(&f(&[3])), Some(&f(&[1, 3])), 1e-5)),
        ("layer-norm", ops::layer_norm(&i, None, None, 1e-5)),
        ("group-norm", ops::group_norm(&x, 1, None, None, 1e-5)),
        ("group-norm", ops::group_norm(&q, 3, None, None, 1e-5)),
        ("group-norm", ops::group_norm(&q, 0, None, None, 1e-5)),
        ("group-norm", ops::group_norm(&q, 2, Some(&f(&[4])), None, 1e-5)),
        ("group-norm", ops::group_norm(&q, 2, None, Some(&f(&[2]).to_dtype(DType::F16).unwrap()), 1e-5)),
        ("cross-entropy", ops::cross_entropy(&x, &f(&[2]))),
        ("embedding", ops::embedding(&f(&[2]), &i)),
        ("embedding", ops::embedding(&x, &f(&[2]))),
        ("embedding", ops::embedding(&x, &Tensor::new(&[0u32, 2], &CPU).unwrap())),
        ("embedding", ops::embedding(&x, &Tensor::new(&[-1i64], &CPU).unwrap())),
        ("cross-entropy", ops::cross_entropy(&x, &i)),
        ("cross-entropy", ops::cross_entropy(&i, &Tensor::new(&[0u32, 1], &CPU).unwrap())),
        ("cross-entropy", ops::cross_entropy(&x, &Tensor::new(&[0u32, 1, 2], &CPU).unwrap())),
        ("cross-entropy", ops::cross_entropy(&x, &Tensor::new(&[0i64, 3], &CPU).unwrap())),
        ("cross-entropy", ops::cross_entropy(&x, &Tensor::new(&[-1i64, 2], &CPU).unwrap())),
        ("cross-entropy", ops::cross_entropy(&f(&[0, 3]), &Tensor::zeros(0, DType::U8, &CPU).unwrap())),
        ("gelu", ops::gelu(&i)),
        ("gelu-erf", ops::gelu_erf(&i)),
        ("silu", ops::silu(&i)),
        ("silu-mul", ops::silu_mul(&x, &f(&[3, 2]))),
        ("silu-mul", ops::silu_mul(&x, &i)),
        ("matmul", ops::matmul(&x, &x)),
        ("matmul", ops::matmul(&i, &i)),
        ("linear", ops::linear(&x, &f(&[4, 2]), None)),
        ("linear", ops::linear(&x, &f(&[4, 3]), Some(&f(&[3])))),
        ("lora", ops::lora(&x, &f(&[3, 2]), &f(&[3, 4]), 1.0)),
        ("lora", ops::lora(&i, &i, &i, 1.0)),
        ("lora-add", ops::lora_add(&x, &x, &f(&[3, 2]), &f(&[2, 4]), 1.0)),
        ("rope", ops::rope(&x, &x, &x)),
        ("rope", ops::rope(&f(&[1, 1, 2, 3]), &f(&[2, 1]), &f(&[2, 1]))),
        ("rope", ops::rope_i(&q, &f(&[2, 2]), &f(&[3, 2]))),
        ("attention", ops::attention(&q, &f(&[1, 3, 3, 4]), &q, None, &p)),
        ("attention", ops::attention(&q, &q, &q, Some(&f(&[2, 2])), &p)),
        ("attention", ops::attention(&x, &q, &q, None, &p)),
    ];
    for (op, r) in cases {
        // the backtrace, which Candle appends where it is asked to, names functions of ours
        let e = r.expect_err(op).to_string().lines().next().unwrap_or_default().to_string();
        assert!(e.contains(op), "{op}: {e}");
    }
}

#[test]
fn empty_tensors_pass_through() {
    let x = Tensor::zeros((0, 4), DType::F32, &CPU).unwrap();
    let w = Tensor::ones(4, DType::F32, &CPU).unwrap();
    assert_eq!(ops::softmax(&x, 1).unwrap().dims(), [0, 4]);
    assert_eq!(ops::softmax(&x, 0).unwrap().dims(), [0, 4]);
    assert_eq!(ops::rms_norm(&x, Some(&w), 1e-5).unwrap().dims(), [0, 4]);
    assert_eq!(ops::gelu(&x).unwrap().dims(), [0, 4]);
    let groups = Tensor::zeros((0, 4, 3), DType::F32, &CPU).unwrap();
    assert_eq!(ops::group_norm(&groups, 2, Some(&w), None, 1e-5).unwrap().dims(), [0, 4, 3]);
    let m = Tensor::zeros((4, 2), DType::F32, &CPU).unwrap();
    assert_eq!(ops::matmul(&x, &m).unwrap().dims(), [0, 2]);
    let r = Tensor::zeros((2, 3), DType::F32, &CPU).unwrap();
    assert_eq!(ops::lora(&x, &m, &r, 1.0).unwrap().dims(), [0, 3]);
}
