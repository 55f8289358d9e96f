//! Gradients by the transform and by Candle's tape.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use super::*;
use crate::run::{eval_all, eval_all_with_report};
use crate::AttentionOptions;
use candle_core::{DType, Device, Tensor, Var};

const CPU: Device = Device::Cpu;

fn randn(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &CPU).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn close(a: &Tensor, b: &Tensor, eps: f64) {
    assert_eq!(a.dims(), b.dims());
    let scale = b.abs().unwrap().max_all().unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
    let off = (a.to_dtype(DType::F64).unwrap() - b.to_dtype(DType::F64).unwrap()).unwrap().abs().unwrap();
    let off = off.max_all().unwrap().to_scalar::<f64>().unwrap();
    assert!(off <= eps * (1.0 + scale), "off by {off}: {a} {b}");
}

/// A small network with shared nodes, a broadcast, a reduction that is no sum, and a composite of each kind.
fn network(x: &LazyTensor, w: &LazyTensor, v: &LazyTensor) -> LazyTensor {
    let h = x.matmul(w).unwrap().gelu().unwrap();
    let h = (&h + h.rms_norm(Some(v), 1e-5).unwrap()).unwrap();
    let p = h.softmax(1).unwrap();
    let q = h.max_keepdim(1).unwrap().broadcast_mul(&p).unwrap();
    (q.sqr().unwrap() + h.broadcast_sub(v).unwrap().tanh().unwrap()).unwrap().mean_all().unwrap()
}

fn inputs() -> [LazyTensor; 3] {
    [&[3, 5][..], &[5, 4], &[4]].map(|dims| LazyTensor::from(randn(dims)).variable().unwrap())
}

#[test]
fn gradients_do_not_depend_on_what_was_evaluated() {
    let [x, w, v] = inputs();
    let together = grad(&network(&x, &w, &v), &[&x, &w, &v]).unwrap();
    let want: Vec<_> = eval_all(&together.iter().collect::<Vec<_>>()).unwrap().iter().map(bits).collect();
    // the loss first, and what is on the way printed
    let h = x.matmul(&w).unwrap();
    h.eval().unwrap();
    let loss = network(&x, &w, &v);
    loss.eval().unwrap();
    let after = grad(&loss, &[&x, &w, &v]).unwrap();
    let got: Vec<_> = eval_all(&after.iter().collect::<Vec<_>>()).unwrap().iter().map(bits).collect();
    assert_eq!(got, want);
}

#[test]
fn loss_and_gradients_are_one_plan_and_the_second_step_finds_it() {
    let step = || {
        let [x, w, v] = inputs();
        let loss = network(&x, &w, &v);
        let gradients = grad(&loss, &[&w, &v]).unwrap();
        eval_all_with_report(&[&loss, &gradients[0], &gradients[1]]).unwrap().1
    };
    step();
    let report = step();
    assert!(report.cache_hit && report.replayed.is_empty() && report.fallback_count() == 0, "{report}");
}

#[test]
fn the_tape_gives_what_the_transform_gives() {
    let tensors = [&[3, 5][..], &[5, 4], &[4]].map(|dims| Var::from_tensor(&randn(dims)).unwrap());
    let lazy: Vec<LazyTensor> = tensors.iter().map(|v| LazyTensor::from(v.as_tensor())).collect();
    let loss = network(&lazy[0], &lazy[1], &lazy[2]).eval().unwrap();
    let store = loss.backward().unwrap();
    let again = loss.backward().unwrap();
    let variables: Vec<LazyTensor> =
        tensors.iter().map(|v| LazyTensor::from(v.as_detached_tensor()).variable().unwrap()).collect();
    let refs: Vec<&LazyTensor> = variables.iter().collect();
    let gradients = grad(&network(refs[0], refs[1], refs[2]), &refs).unwrap();
    for (var, gradient) in tensors.iter().zip(&gradients) {
        let got = store.get(var.as_tensor()).unwrap();
        assert!(!got.track_op());
        assert_eq!(bits(got), bits(&gradient.eval().unwrap()));
        assert_eq!(bits(again.get(var.as_tensor()).unwrap()), bits(got));
    }
}

#[test]
fn any_number_of_tracked_leaves() {
    for n in [1usize, 2, 3, 4, 5, 9, 10, 28, 200] {
        let vars: Vec<Var> = (0..n).map(|_| Var::from_tensor(&randn(&[2, 3])).unwrap()).collect();
        let mut sum = LazyTensor::from(vars[0].as_tensor()).sqr().unwrap();
        for (i, var) in vars.iter().enumerate().skip(1) {
            sum = (sum + (LazyTensor::from(var.as_tensor()) * (i as f64)).unwrap().sin().unwrap()).unwrap();
        }
        let (loss, report) = sum.sum_all().unwrap().eval_with_report().unwrap();
        assert!(report.replayed.is_empty(), "{report}");
        let threads: Vec<_> = (0..2)
            .map(|_| {
                std::thread::spawn({
                    let loss = loss.clone();
                    move || loss.backward().unwrap()
                })
            })
            .collect();
        for store in threads.into_iter().map(|t| t.join().unwrap()) {
            for (i, var) in vars.iter().enumerate() {
                let x = var.as_detached_tensor();
                let want = if i == 0 {
                    (x * 2.0).unwrap()
                } else {
                    ((x * i as f64).unwrap().cos().unwrap() * i as f64).unwrap()
                };
                close(store.get(var.as_tensor()).unwrap(), &want, 1e-5);
            }
        }
    }
}

#[test]
fn several_roots_and_what_stands_between_carry_the_gradient() {
    let var = Var::from_tensor(&randn(&[4])).unwrap();
    let x = LazyTensor::from(var.as_tensor());
    let h = x.exp().unwrap();
    let (a, b, c) = (h.sum_all().unwrap(), (&h * 2.0).unwrap(), h.sqr().unwrap());
    let values = eval_all(&[&a, &b, &c]).unwrap();
    // h was held, so it was published too
    assert!(h.is_ready());
    let inner = h.eval().unwrap();
    let loss = (((&values[0] + values[1].sum_all().unwrap()).unwrap() + values[2].sum_all().unwrap()).unwrap()
        + inner.sum_all().unwrap())
    .unwrap();
    let e = var.as_detached_tensor().exp().unwrap();
    let want = ((&e * 4.0).unwrap() + (e.sqr().unwrap() * 2.0).unwrap()).unwrap();
    close(loss.backward().unwrap().get(var.as_tensor()).unwrap(), &want, 1e-6);
    // a later graph on an evaluated value
    let later = h.log().unwrap().sum_all().unwrap().eval().unwrap();
    close(later.backward().unwrap().get(var.as_tensor()).unwrap(), &e.ones_like().unwrap(), 1e-6);
}

#[test]
fn nothing_of_a_tape_outlives_its_result() {
    let var = Var::from_tensor(&randn(&[64])).unwrap();
    let x = LazyTensor::from(var.as_tensor());
    let y = x.sqr().unwrap().sum_all().unwrap();
    let loss = y.eval().unwrap();
    loss.backward().unwrap();
    drop(y);
    assert!(!x.is_sole(), "the tape holds its leaves");
    drop(loss);
    assert!(x.is_sole());
}

#[test]
fn gradients_of_gradients() {
    let x = LazyTensor::from(Tensor::new(&[0.3f64, -0.7, 1.1], &CPU).unwrap()).variable().unwrap();
    let loss = x.tanh().unwrap().sum_all().unwrap();
    let first = grad(&loss, &[&x]).unwrap().remove(0);
    let second = grad(&first.sum_all().unwrap(), &[&x]).unwrap().remove(0);
    let third = grad(&second.sum_all().unwrap(), &[&x]).unwrap().remove(0);
    let t = Tensor::new(&[0.3f64, -0.7, 1.1], &CPU).unwrap().tanh().unwrap();
    let s = t.sqr().unwrap().affine(-1.0, 1.0).unwrap();
    close(&second.eval().unwrap(), &((&t * &s).unwrap() * -2.0).unwrap(), 1e-12);
    // (1 − t²)(6t² − 2)
    close(&third.eval().unwrap(), &(s * t.sqr().unwrap().affine(6.0, -2.0).unwrap()).unwrap(), 1e-12);
}

#[test]
fn second_derivatives_pass_the_parts_of_a_composite() {
    let q = LazyTensor::from(Tensor::randn(0f64, 1.0, (1, 1, 3, 4), &CPU).unwrap());
    let loss = |q: &LazyTensor| -> LazyTensor {
        let options = AttentionOptions { scale: 0.5, causal: true, softcap: None, window: None };
        LazyTensor::attention(q, q, q, None, &options).unwrap().sqr().unwrap().sum_all().unwrap()
    };
    let x = q.variable().unwrap();
    let first = grad(&loss(&x), &[&x]).unwrap().remove(0);
    let curvature = grad(&first.sqr().unwrap().sum_all().unwrap(), &[&x]).unwrap().remove(0).eval().unwrap();
    // the same by central differences of Σ grad²
    let at = |q: &Tensor| -> f64 {
        let x = LazyTensor::from(q).variable().unwrap();
        let g = grad(&loss(&x), &[&x]).unwrap().remove(0);
        g.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    let (q, h) = (q.eval().unwrap(), 1e-5);
    let flat: Vec<f64> = q.flatten_all().unwrap().to_vec1().unwrap();
    let got: Vec<f64> = curvature.flatten_all().unwrap().to_vec1().unwrap();
    for i in 0..flat.len() {
        let moved = |by: f64| {
            let mut flat = flat.clone();
            flat[i] += by;
            at(&Tensor::from_vec(flat, q.shape(), &CPU).unwrap())
        };
        let want = (moved(h) - moved(-h)) / (2.0 * h);
        assert!((got[i] - want).abs() < 1e-5 * (1.0 + want.abs()), "{i}: {} instead of {want}", got[i]);
    }
}

#[test]
fn a_negative_base_has_a_gradient() {
    let a = LazyTensor::new(&[-2f64, 3.0, 0.0], &CPU).unwrap().variable().unwrap();
    let b = LazyTensor::new(&[3f64, 2.0, 2.0], &CPU).unwrap().variable().unwrap();
    let found = grad(&a.pow(&b).unwrap().sum_all().unwrap(), &[&a, &b]).unwrap();
    assert_eq!(found[0].to_vec1::<f64>().unwrap(), [12.0, 6.0, 0.0]);
    let by_exponent = found[1].to_vec1::<f64>().unwrap();
    // no real logarithm of −2; 0² stays 0
    assert!(by_exponent[0].is_nan() && (by_exponent[1] - 9.0 * 3f64.ln()).abs() < 1e-12 && by_exponent[2] == 0.0);
}

#[test]
fn what_cuts_a_gradient_is_named() {
    let x = LazyTensor::from(randn(&[3, 4])).variable().unwrap();
    let y = LazyTensor::from(randn(&[3, 4])).variable().unwrap();
    let line = line!() + 1;
    let cut = x.detach().exp().unwrap();
    let loss = (&cut * &y).unwrap().sum_all().unwrap();
    let error = grad(&loss, &[&y, &x]).unwrap_err().to_string();
    assert!(error.contains("detach") && error.contains(&format!("tests.rs:{line}:")), "{error}");
    // evaluated, the cut is not to be seen any more, but where it was can be said
    cut.eval().unwrap();
    let error = grad(&loss, &[&x]).unwrap_err().to_string();
    assert!(error.contains("exp") && error.contains("was evaluated"), "{error}");
    let line = line!() + 1;
    let ids = y.argmax(1).unwrap();
    let chosen = LazyTensor::from(randn(&[4, 2])).index_select(&ids, 0).unwrap();
    let error = grad(&chosen.sum_all().unwrap(), &[&y]).unwrap_err().to_string();
    assert!(error.contains("argmax") && error.contains(&format!("tests.rs:{line}:")), "{error}");
    let other = LazyTensor::from(randn(&[2])).variable().unwrap();
    let error = grad(&y.sum_all().unwrap(), &[&other]).unwrap_err().to_string();
    assert!(error.contains("does not depend"), "{error}");
    let found = vjp(&[&y], &[&LazyTensor::from(randn(&[3, 4]))], &[&other, &y]).unwrap();
    assert!(found[0].is_none() && found[1].is_some());
}

#[test]
fn bad_requests_are_errors() {
    let x = LazyTensor::from(randn(&[3])).variable().unwrap();
    let text = |r: Result<Vec<LazyTensor>>| r.unwrap_err().to_string();
    assert!(text(grad(&x.exp().unwrap(), &[&x])).contains("one element"));
    assert!(text(grad(&x.argmax(0).unwrap(), &[&x])).contains("floating-point loss"));
    let plain = LazyTensor::from(randn(&[3]));
    assert!(text(grad(&plain.sum_all().unwrap(), &[&plain])).contains("no variable"));
    let ids = LazyTensor::new(&[1u32], &CPU).unwrap();
    assert!(ids.variable().unwrap_err().to_string().contains("floating-point"));
    let y = x.exp().unwrap();
    let wrong = vjp(&[&y], &[&LazyTensor::from(randn(&[4]))], &[&x]).unwrap_err().to_string();
    assert!(wrong.contains("shape of its output") && wrong.contains("tests.rs:"), "{wrong}");
    let wrong = vjp(&[&y], &[&y.to_dtype(DType::F64).unwrap()], &[&x]).unwrap_err().to_string();
    assert!(wrong.contains("dtype of its output"), "{wrong}");
    assert!(vjp(&[&y], &[], &[&x]).is_err());
}

#[test]
fn an_input_that_the_gradient_needs_is_not_written_over() {
    // the product's left side is held by its history alone when the gradient asks for it again
    let w = LazyTensor::from(randn(&[4, 4])).variable().unwrap();
    let x = (LazyTensor::from(randn(&[4, 4])) + 1.0).unwrap();
    crate::run::materialize(&[&x]).unwrap();
    let (value, want) = (x.eval().unwrap().copy().unwrap(), w.eval().unwrap());
    crate::run::materialize(&[&x]).unwrap();
    let y = (x * &w).unwrap();
    let loss = y.sum_all().unwrap();
    drop(y);
    loss.eval().unwrap();
    let g = grad(&loss, &[&w]).unwrap().remove(0);
    close(&g.eval().unwrap(), &value, 0.0);
    close(&w.eval().unwrap(), &want, 0.0);
}

#[test]
fn value_and_grad_takes_functions_with_errors_of_their_own() {
    let f = value_and_grad(|x: &[LazyTensor]| -> Result<LazyTensor> { x[0].mul(&x[1])?.sum_all() });
    let (a, b) = (LazyTensor::new(&[1f32, 2.0], &CPU).unwrap(), LazyTensor::new(&[3f32, 4.0], &CPU).unwrap());
    let (loss, gradients) = f.call(&[&a, &b]).unwrap();
    assert_eq!(loss.to_scalar::<f32>().unwrap(), 11.0);
    assert_eq!(gradients[1].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
    let ids = LazyTensor::new(&[1u32, 2], &CPU).unwrap();
    assert!(f.call(&[&a, &ids]).is_err());
    let fails = value_and_grad(|_: &[LazyTensor]| -> std::result::Result<LazyTensor, Box<dyn std::error::Error>> {
        Err("mine".into())
    });
    assert_eq!(fails.call(&[&a]).unwrap_err().to_string(), "mine");
}
