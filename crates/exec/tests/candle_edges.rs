//! Where Candle's methods have edges of their own: integers against numbers, tensors without dims, ranges that do not count.

#![allow(clippy::unwrap_used)] // as tests do

use candle_core::op::CmpOp;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var, D};
use candle_lazy_exec::LazyTensor;

const CPU: Device = Device::Cpu;
/// One more than f64 counts to.
const LARGE: i64 = (1 << 53) + 1;

/// The elements of an integer tensor, or the bits of a float tensor.
fn bits(tensor: &Tensor) -> Vec<i64> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => flat.to_vec1::<f32>().unwrap().iter().map(|v| i64::from(v.to_bits())).collect(),
        DType::F64 => flat.to_vec1::<f64>().unwrap().iter().map(|v| v.to_bits() as i64).collect(),
        _ => flat.to_dtype(DType::I64).unwrap().to_vec1().unwrap(),
    }
}

#[track_caller]
fn same(got: candle_lazy_exec::Result<LazyTensor>, want: candle_core::Result<Tensor>) {
    let (got, want) = (got.unwrap().eval().unwrap(), want.unwrap());
    assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()));
    assert_eq!(bits(&got), bits(&want));
}

#[test]
fn integers_meet_numbers_as_candles_do() {
    let tensors = [
        Tensor::new(&[LARGE, LARGE - 1, -LARGE, i64::MAX, i64::MIN, 7, 0, 44, 255, -1], &CPU).unwrap(),
        Tensor::new(&[0u8, 1, 44, 255], &CPU).unwrap(),
        Tensor::new(&[0u32, 1, 44, 255, u32::MAX], &CPU).unwrap(),
        Tensor::new(&[0f32, 9007199254740992.0, -1.5, 44.0, f32::NAN], &CPU).unwrap(),
        Tensor::new(&[0f64, LARGE as f64, -1.5, 44.0, f64::NAN], &CPU).unwrap(),
    ];
    for eager in &tensors {
        let lazy = LazyTensor::from(eager);
        macro_rules! against {
            ($($number:expr),* $(,)?) => {$(
                same(lazy.eq($number), eager.eq($number));
                same(lazy.ne($number), eager.ne($number));
                same(lazy.lt($number), eager.lt($number));
                same(lazy.le($number), eager.le($number));
                same(lazy.gt($number), eager.gt($number));
                same(lazy.ge($number), eager.ge($number));
                same(lazy.cmp($number, CmpOp::Ne), eager.cmp($number, CmpOp::Ne));
                same(lazy.maximum($number), eager.maximum($number));
                same(lazy.minimum($number), eager.minimum($number));
                same(lazy.clamp($number, 255u8), eager.clamp($number, 255u8));
            )*};
        }
        against!(LARGE, -LARGE, i64::MAX, i64::MIN, 7i64, 300i64, -1i64, 256u32, u32::MAX, 44u8);
        against!(1.5f64, -1.5f64, 300.0f64, 1e30f64, f64::NAN, f64::NEG_INFINITY, 0.1f32, 16777217i64, -300.0f32);
    }
}

#[test]
fn a_large_integer_is_eagers_in_checked_mode_too() {
    let x = LazyTensor::new(&[LARGE, LARGE - 1, 7], &CPU).unwrap();
    let checked = x.eq(LARGE).unwrap().eval_checked().unwrap();
    assert_eq!(checked.to_vec1::<u8>().unwrap(), [1, 0, 0]);
}

#[test]
fn functions_of_integers_are_candles() {
    let tensors = [
        Tensor::new(&[LARGE, -LARGE, i64::MAX, -i64::MAX, 0, 1, -1], &CPU).unwrap(),
        Tensor::new(&[0u8, 1, 44, 255], &CPU).unwrap(),
        Tensor::new(&[0u32, 1, 44, u32::MAX], &CPU).unwrap(),
        Tensor::new(&[0f32, -0.0, 2.5, -2.5, -0.4, f32::INFINITY], &CPU).unwrap(),
    ];
    for eager in &tensors {
        let lazy = LazyTensor::from(eager);
        same(lazy.abs(), eager.abs());
        same(lazy.relu(), eager.relu());
        same(lazy.floor(), eager.floor());
        same(lazy.ceil(), eager.ceil());
        same(lazy.round(), eager.round());
        same(lazy.sign(), eager.sign());
    }
}

#[test]
fn tensors_without_dims_are_candles() {
    let eager = Tensor::new(2.5f32, &CPU).unwrap();
    let lazy = LazyTensor::from(&eager);
    same(lazy.get(3), eager.get(3));
    same(lazy.flatten_all(), eager.flatten_all());
    same(lazy.flatten(0, 0), eager.flatten(0, 0));
    same(lazy.flatten_to(D::Minus1), eager.flatten_to(D::Minus1));
    same(lazy.flatten_from(D::Minus1), eager.flatten_from(D::Minus1));
    for dim in [0usize, 2] {
        assert!(eager.cumsum(dim).is_err() && lazy.cumsum(dim).is_err());
    }
    let eager = Tensor::arange(0f32, 24., &CPU).unwrap().reshape((4, 6)).unwrap();
    same(LazyTensor::from(&eager).repeat(2), eager.repeat(2));
    same(LazyTensor::from(&eager).repeat(()), eager.repeat(()));
}

#[test]
fn ranges_with_steps_are_candles_or_refused() {
    macro_rules! count {
        ($($from:expr, $to:expr, $step:expr;)*) => {$(
            same(LazyTensor::arange_step($from, $to, $step, &CPU), Tensor::arange_step($from, $to, $step, &CPU));
        )*};
    }
    count! {
        0f32, 1., 0.1;
        1f64, -1., -0.3;
        0f32, 0., 1.;
        5f32, 0., 1.;
        0u8, 250, 10;
        5u32, 6, 100;
        -7i64, 7, 3;
        7i64, -7, -3;
        i64::MAX - 5, i64::MAX - 1, 2;
    }
    // Candle's own sum overflows here
    let steps = LazyTensor::arange_step(250u8, 255, 10, &CPU).unwrap();
    assert_eq!(steps.to_vec1::<u8>().unwrap(), [250]);
    let steps = LazyTensor::arange_step(i64::MAX - 3, i64::MAX, 2, &CPU).unwrap();
    assert_eq!(steps.to_vec1::<i64>().unwrap(), [i64::MAX - 3, i64::MAX - 1]);
    let line = line!() + 1;
    let lost = LazyTensor::arange_step(16777216f32, 16777219., 1., &CPU).unwrap_err();
    let many = LazyTensor::arange_step(0i64, i64::MAX, 1, &CPU).unwrap_err();
    let none = LazyTensor::arange_step(0f32, 1., 0., &CPU).unwrap_err();
    let nan = LazyTensor::arange_step(0f32, f32::INFINITY, 1., &CPU).unwrap_err();
    for (i, error) in [lost, many, none, nan].iter().enumerate() {
        assert_eq!(error.site().unwrap().location().line(), line + i as u32, "{error}");
        assert!(error.to_string().starts_with("arange"), "{error}");
    }
}

/// Says six elements and holds two.
struct Short;

impl CustomOp1 for Short {
    fn name(&self) -> &'static str {
        "short"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![1., 2.]), Shape::from((2, 3))))
    }
}

#[test]
fn a_custom_op_that_holds_less_than_its_shape_is_named() {
    let x = LazyTensor::zeros((2, 3), DType::F32, &CPU).unwrap();
    let line = line!() + 1;
    let y = x.custom_op1(Short, (2, 3), DType::F32).unwrap();
    for error in [y.eval().unwrap_err(), y.exp().unwrap().eval().unwrap_err(), y.eval_checked().unwrap_err()] {
        let text = error.to_string();
        assert!(text.contains("custom op short"), "{text}");
        assert_eq!(error.site().unwrap().location().line(), line, "{text}");
    }
}

/// An op without a backward.
struct Zeros;

impl CustomOp1 for Zeros {
    fn name(&self) -> &'static str {
        "zeros"
    }
    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0; layout.shape().elem_count()]), layout.shape().clone()))
    }
}

#[test]
fn errors_of_a_backward_and_of_a_conversion_name_the_callers_line() {
    let var = Var::zeros((5, 3), DType::F32, &CPU).unwrap();
    let src = LazyTensor::ones((7, 3), DType::F32, &CPU).unwrap();
    let written = line!() + 1;
    let loss = LazyTensor::from(var.as_tensor()).custom_op1(Zeros, (5, 3), DType::F32).unwrap().sum_all().unwrap();
    let line = line!() + 1;
    let refused = loss.backward().map(|_| ()).unwrap_err();
    assert_eq!(refused.site().unwrap().location().line(), line, "{refused}");
    assert_eq!(refused.to_string().lines().count(), 1, "{refused}");
    // the op that has no backward, and its own line
    let text = refused.to_string();
    assert!(text.contains("zeros") && text.contains(&format!("candle_edges.rs:{written}:")), "{text}");
    let line = line!() + 1;
    let refused = f32::try_from(&src).unwrap_err();
    assert_eq!(refused.site().unwrap().location().line(), line, "{refused}");
}

/// Candle takes a broadcast dim of one element for contiguous, and then divides by its stride of 0 where it reduces.
#[test]
fn one_row_of_a_broadcast_reduces_where_candle_would_divide_by_zero() {
    let var = Var::new(&[[1f32, 3., 2.]], &CPU).unwrap();
    for leaf in [var.as_tensor().clone(), var.as_detached_tensor()] {
        let row = LazyTensor::from(leaf).broadcast_as((4, 3)).unwrap().narrow(0, 0, 1).unwrap();
        let reduced = row.max_keepdim(0).unwrap();
        assert_eq!(reduced.to_vec2::<f32>().unwrap(), [[1., 3., 2.]]);
        assert_eq!(row.argmax(0).unwrap().to_vec1::<u32>().unwrap(), [0, 0, 0]);
        assert_eq!(row.log_sum_exp(0).unwrap().to_vec1::<f32>().unwrap(), [1., 3., 2.]);
        assert_eq!(row.softmax(0).unwrap().to_vec2::<f32>().unwrap(), [[1., 1., 1.]]);
        assert_eq!(row.log_softmax(0).unwrap().to_vec2::<f32>().unwrap(), [[0., 0., 0.]]);
    }
}
