//! Elementwise steps write over a value that was given away, and over nothing that somebody may still read.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

use candle_core::{CustomOp1, DType, Device, Tensor};
use candle_lazy_exec::{eval_all_with, materialize, run, EvalOptions, EvalReport, LazyTensor};
use std::sync::atomic::{AtomicBool, Ordering};

const CPU: Device = Device::Cpu;

fn tensor(dims: &[usize], dtype: DType) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &CPU).unwrap().to_dtype(dtype).unwrap()
}

/// A value of the engine's own.
fn own(t: &Tensor) -> LazyTensor {
    let zero = Tensor::zeros(t.shape(), t.dtype(), &CPU).unwrap();
    let value = LazyTensor::from(&zero).add(&LazyTensor::from(t)).unwrap();
    materialize(&[&value]).unwrap();
    value
}

/// The value of `f` of it, with no other handle on it.
fn given(t: &Tensor, f: impl Fn(&LazyTensor) -> LazyTensor) -> (Tensor, EvalReport) {
    let x = own(t);
    let y = f(&x);
    drop(x);
    let (mut values, report) =
        eval_all_with(&[&y], &EvalOptions { validate: false, ..EvalOptions::default() }).unwrap();
    (values.remove(0), report)
}

/// The same with a handle.
fn kept(t: &Tensor, f: impl Fn(&LazyTensor) -> LazyTensor) -> (Tensor, EvalReport) {
    let x = own(t);
    let y = f(&x);
    let (mut values, report) =
        eval_all_with(&[&y], &EvalOptions { validate: false, ..EvalOptions::default() }).unwrap();
    assert_eq!(bits(&x.eval().unwrap()), bits(t), "what somebody holds stays as it was");
    (values.remove(0), report)
}

fn bits(t: &Tensor) -> Vec<u64> {
    let t = t.flatten_all().unwrap();
    match t.dtype() {
        DType::F64 => t.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect(),
        // what is narrower widens without loss
        _ => t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap().iter().map(|v| u64::from(v.to_bits())).collect(),
    }
}

#[test]
fn a_chain_writes_over_what_was_given_away() {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        for dims in [&[7usize, 5][..], &[1], &[300, 1001], &[0, 3]] {
            let t = tensor(dims, dtype);
            let row = LazyTensor::from(tensor(&dims[dims.len() - 1..], dtype));
            // read again by what comes behind the first result
            let f = |x: &LazyTensor| {
                let y = x.sqr().unwrap().affine(0.5, 1.0).unwrap();
                y.tanh().unwrap().broadcast_mul(&row).unwrap().sub(x).unwrap()
            };
            let ((want, beside), (got, over)) = (kept(&t, f), given(&t, f));
            assert_eq!(bits(&got), bits(&want), "{dtype:?} {dims:?}");
            assert_eq!((beside.in_place, over.in_place), (0, 1), "{dtype:?} {dims:?}: {over}");
            let bytes = (t.elem_count() * dtype.size_in_bytes()) as u64;
            assert!(over.peak_bytes + bytes <= beside.peak_bytes, "{} of {}", over.peak_bytes, beside.peak_bytes);
        }
    }
}

#[test]
fn readers_before_are_served_and_nothing_is_written_over_for_those_behind() {
    let t = tensor(&[64, 33], DType::F32);
    // the sum reads it first
    let before = |x: &LazyTensor| x.affine(2.0, 0.0).unwrap().broadcast_div(&x.sum_all().unwrap()).unwrap();
    let (got, report) = given(&t, before);
    assert_eq!((bits(&got), report.in_place), (bits(&kept(&t, before).0), 1), "{report}");
    // the product reads it last
    let behind = |x: &LazyTensor| x.exp().unwrap().add(&x.sin().unwrap()).unwrap().matmul(&x.t().unwrap()).unwrap();
    let (got, report) = given(&t, behind);
    assert_eq!((bits(&got), report.in_place), (bits(&kept(&t, behind).0), 0), "{report}");
    // the smaller dtype has no room, the other shape neither
    let other = |x: &LazyTensor| x.exp().unwrap().to_dtype(DType::BF16).unwrap();
    assert_eq!(given(&t, other).1.in_place, 0);
    let other = |x: &LazyTensor| x.exp().unwrap().reshape((33, 64)).unwrap().neg().unwrap();
    assert_eq!(bits(&given(&t, other).0), bits(&kept(&t, other).0));
}

#[test]
fn a_view_that_somebody_holds_keeps_the_memory_as_it_was() {
    let t = tensor(&[6, 8], DType::F32);
    let x = own(&t);
    let part = x.narrow(0, 2, 3).unwrap();
    materialize(&[&part]).unwrap();
    let y = x.exp().unwrap().affine(2.0, 1.0).unwrap();
    drop(x);
    let (_, report) = eval_all_with(&[&y], &EvalOptions { validate: false, ..EvalOptions::default() }).unwrap();
    assert_eq!(report.in_place, 0, "{report}");
    assert_eq!(bits(&part.eval().unwrap()), bits(&t.narrow(0, 2, 3).unwrap().contiguous().unwrap()));
}

#[test]
fn several_results_of_one_program_take_several_places() {
    let (a, b) = (tensor(&[50, 40], DType::F32), tensor(&[50, 40], DType::F32));
    let both = |given: bool| {
        let (x, y) = (own(&a), own(&b));
        let sum = x.add(&y).unwrap().sin().unwrap();
        let product = x.mul(&y).unwrap().sub(&sum).unwrap();
        let held = (!given).then(|| (x.clone(), y.clone()));
        drop((x, y));
        let options = EvalOptions { validate: false, ..EvalOptions::default() };
        let (values, report) = eval_all_with(&[&sum, &product], &options).unwrap();
        drop(held);
        (values.iter().map(bits).collect::<Vec<_>>(), report)
    };
    let ((want, beside), (got, over)) = (both(false), both(true));
    assert!(got == want);
    assert_eq!((beside.in_place, over.in_place), (0, 2), "{over}");
}

/// Fails once.
struct Once(AtomicBool);

impl CustomOp1 for Once {
    fn name(&self) -> &'static str {
        "once"
    }

    fn cpu_fwd(
        &self,
        storage: &candle_core::CpuStorage,
        layout: &candle_core::Layout,
    ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
        if !self.0.swap(true, Ordering::SeqCst) {
            candle_core::bail!("not yet");
        }
        let values = storage.as_slice::<f32>()?[layout.start_offset()..][..layout.shape().elem_count()].to_vec();
        Ok((candle_core::CpuStorage::F32(values), layout.shape().clone()))
    }
}

#[test]
fn what_fails_before_leaves_a_given_value_as_it_was() {
    let (t, other) = (tensor(&[30], DType::F32), tensor(&[30], DType::F32));
    let x = own(&t);
    let last = LazyTensor::from(&other).custom_op1(Once(AtomicBool::new(false)), 30, DType::F32).unwrap();
    let y = x.exp().unwrap().add(&last).unwrap();
    drop((x, last));
    let options = EvalOptions { validate: false, ..EvalOptions::default() };
    assert!(eval_all_with(&[&y], &options).unwrap_err().to_string().contains("not yet"));
    let (values, report) = eval_all_with(&[&y], &options).unwrap();
    assert_eq!(report.in_place, 1, "{report}");
    let want = own(&t).exp().unwrap().add(&LazyTensor::from(&other)).unwrap().eval().unwrap();
    assert_eq!(bits(&values[0]), bits(&want));
}

#[test]
fn what_may_fail_behind_keeps_a_given_value() {
    let (t, other) = (tensor(&[30], DType::F32), tensor(&[30], DType::F32));
    let x = own(&t);
    let y = x.exp().unwrap().affine(2.0, 0.5).unwrap();
    // reads the result, so it comes behind, and fails the first time
    let z = y.custom_op1(Once(AtomicBool::new(false)), 30, DType::F32).unwrap().add(&LazyTensor::from(&other)).unwrap();
    drop((x, y));
    let options = EvalOptions { validate: false, ..EvalOptions::default() };
    assert!(eval_all_with(&[&z], &options).unwrap_err().to_string().contains("not yet"));
    let (values, report) = eval_all_with(&[&z], &options).unwrap();
    assert_eq!(report.in_place, 0, "{report}");
    let y = own(&t).exp().unwrap().affine(2.0, 0.5).unwrap();
    assert_eq!(bits(&values[0]), bits(&y.add(&LazyTensor::from(&other)).unwrap().eval().unwrap()));
}

#[test]
fn the_plan_says_what_may_be_written_over() {
    let x = own(&tensor(&[4, 4], DType::F32));
    let y = x.exp().unwrap().affine(2.0, 1.0).unwrap();
    let plan = run::explain(&[&y], &EvalOptions::default()).unwrap().to_string();
    assert!(plan.contains("over $"), "{plan}");
}
