//! What is recorded in a scope without gradients keeps no history.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_exec::{grad, is_grad_enabled, no_grad, LazyTensor};
use std::panic::{catch_unwind, AssertUnwindSafe};

const CPU: Device = Device::Cpu;

fn variable() -> LazyTensor {
    LazyTensor::new(&[1f32, 2.0, 3.0], &CPU).unwrap().variable().unwrap()
}

#[test]
fn variables_are_constants_inside_and_inputs_are_freed() {
    let w = variable();
    let h = no_grad(|| w.exp().unwrap());
    assert!(!w.is_sole());
    let y = no_grad(|| h.sqr().unwrap());
    assert!(!y.is_traced() && w.is_variable());
    drop(h);
    y.eval().unwrap();
    assert!(w.is_sole(), "an input outlived the value");
    // outside again, with history
    let h = w.exp().unwrap();
    let y = h.sqr().unwrap();
    drop(h);
    y.eval().unwrap();
    assert!(y.is_traced() && !w.is_sole());
    // a loss recorded inside has no gradient, and says so
    let loss = no_grad(|| w.sum_all().unwrap());
    assert!(grad(&loss, &[&w]).unwrap_err().to_string().contains("variable"));
}

#[test]
fn scopes_nest_and_end_with_a_panic_and_are_the_threads_own() {
    no_grad(|| {
        no_grad(|| assert!(!is_grad_enabled()));
        assert!(!is_grad_enabled());
        assert!(std::thread::spawn(is_grad_enabled).join().unwrap());
    });
    assert!(is_grad_enabled());
    let panicked = catch_unwind(AssertUnwindSafe(|| no_grad(|| panic!("inside"))));
    assert!(panicked.is_err() && is_grad_enabled());
    let failed: Result<(), String> = no_grad(|| Err("inside".into()));
    assert!(failed.is_err() && is_grad_enabled());
}

#[test]
fn a_gradient_taken_inside_has_none_of_its_own() {
    let w = variable();
    let loss = w.sqr().unwrap().sum_all().unwrap();
    let g = no_grad(|| grad(&loss, &[&w])).unwrap().remove(0);
    assert!(!g.is_traced());
    assert_eq!(g.to_vec1::<f32>().unwrap(), [2.0, 4.0, 6.0]);
    assert!(grad(&loss, &[&w]).unwrap()[0].is_traced());
    // a variable made inside is one
    assert!(no_grad(variable).is_variable());
}

#[test]
fn what_candle_tracks_is_not_tracked_inside() {
    let var = Var::from_tensor(&Tensor::ones(3, DType::F32, &CPU).unwrap()).unwrap();
    let x = LazyTensor::from(var.as_tensor());
    let y = no_grad(|| x.exp().unwrap().sum_all().unwrap());
    assert!(!y.eval().unwrap().track_op());
    assert!(x.exp().unwrap().sum_all().unwrap().eval().unwrap().track_op());
}
