//! AdamW against its formula in f64, clipping against the norm, schedules against values by hand.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_nn::optim::{clip_grad_norm, grad_norm, validate_adamw, LrSchedule, Moments, ParamsAdamW};

const PARAMS: ParamsAdamW = ParamsAdamW { lr: 0.05, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The formula, element by element: θ after each gradient.
fn reference(mut theta: f64, grads: &[f64], p: &ParamsAdamW) -> Vec<f64> {
    let (mut m, mut v) = (0.0, 0.0);
    let mut path = Vec::new();
    for (t, g) in (1..).zip(grads) {
        m = p.beta1 * m + (1.0 - p.beta1) * g;
        v = p.beta2 * v + (1.0 - p.beta2) * g * g;
        let (m_hat, v_hat) = (m / (1.0 - p.beta1.powi(t)), v / (1.0 - p.beta2.powi(t)));
        theta = theta - p.lr * m_hat / (v_hat.sqrt() + p.eps) - p.lr * p.weight_decay * theta;
        path.push(theta);
    }
    path
}

#[test]
fn adamw_follows_its_formula() {
    let start = [1.0f32, -0.5, 0.0, 3.0];
    let grads = [[0.5f32, -2.0, 0.25, 0.0], [-0.125, 1.0, 0.25, 0.0], [4.0, 0.5, -0.75, 0.0], [0.01, -3.0, 0.0, 0.0]];
    let mut theta = tensor(&start);
    let mut moments = Moments::new(4, &Device::Cpu);
    assert!(moments.first().is_none() && moments.second().is_none());
    for (done, grad) in grads.iter().enumerate() {
        theta = moments.adamw(&theta, &tensor(grad), &PARAMS).unwrap();
        assert_eq!(moments.steps(), done + 1);
        for (i, got) in wide(&theta).into_iter().enumerate() {
            let so_far: Vec<f64> = grads[..=done].iter().map(|g| f64::from(g[i])).collect();
            let want = reference(f64::from(start[i]), &so_far, &PARAMS)[done];
            // steps of 0.05, each a few roundings of numbers up to 3
            assert!((got - want).abs() < 1e-6, "step {done}, {i}: {got} against {want}");
        }
    }
    // by hand after four steps: m = Σ 0.1·0.9^(3−t)·g, v = Σ 0.01·0.99^(3−t)·g²
    let m: f64 = grads.iter().zip(0..).map(|(g, t)| 0.1 * 0.9f64.powi(3 - t) * f64::from(g[0])).sum();
    let v: f64 = grads.iter().zip(0..).map(|(g, t)| 0.01 * 0.99f64.powi(3 - t) * f64::from(g[0]).powi(2)).sum();
    assert!((wide(moments.first().unwrap())[0] - m).abs() < 1e-7);
    assert!((wide(moments.second().unwrap())[0] - v).abs() < 1e-7);
    moments.reset();
    assert_eq!(moments.steps(), 0);
    let again = moments.adamw(&tensor(&start), &tensor(&grads[0]), &PARAMS).unwrap();
    assert!((wide(&again)[0] - reference(1.0, &[0.5], &PARAMS)[0]).abs() < 1e-6);
}

#[test]
fn adamw_keeps_the_parameters_dtype() {
    for (dtype, bound) in [(DType::F16, 1e-3), (DType::BF16, 8e-3), (DType::F64, 1e-7)] {
        let (theta, grad) =
            (tensor(&[1.0, -2.0]).to_dtype(dtype).unwrap(), tensor(&[0.5, 4.0]).to_dtype(dtype).unwrap());
        let mut moments = Moments::new(2, &Device::Cpu);
        let new = moments.adamw(&theta, &grad, &PARAMS).unwrap();
        assert_eq!((new.dtype(), moments.first().unwrap().dtype()), (dtype, DType::F32));
        for (got, (theta, grad)) in wide(&new).into_iter().zip([(1.0, 0.5), (-2.0, 4.0)]) {
            assert!((got - reference(theta, &[grad], &PARAMS)[0]).abs() < bound, "{dtype:?}: {got}");
        }
    }
}

#[test]
fn adamw_takes_variables_and_views() {
    let var = Var::from_tensor(&tensor(&[1.0, 2.0, 3.0, 4.0]).reshape((2, 2)).unwrap()).unwrap();
    let grad = tensor(&[1.0, -1.0, 2.0, -2.0]).reshape((2, 2)).unwrap().t().unwrap();
    let mut moments = Moments::new((2, 2), &Device::Cpu);
    let new = moments.adamw(&var, &grad, &PARAMS).unwrap();
    assert!(!new.track_op());
    var.set(&new).unwrap();
    for (got, (theta, grad)) in wide(&var).into_iter().zip([(1.0, 1.0), (2.0, 2.0), (3.0, -1.0), (4.0, -2.0)]) {
        assert!((got - reference(theta, &[grad], &PARAMS)[0]).abs() < 1e-6);
    }
}

#[test]
fn updates_that_do_not_fit() {
    let mut moments = Moments::new(2, &Device::Cpu);
    let (two, three) = (tensor(&[1.0, 2.0]), tensor(&[1.0, 2.0, 3.0]));
    let mut said = |theta: &Tensor, grad: &Tensor, params: &ParamsAdamW| {
        moments.adamw(theta, grad, params).unwrap_err().to_string()
    };
    let text = said(&two, &three, &PARAMS);
    assert!(
        text.contains("AdamW: shape mismatch: the gradient is [3], its state [2]") && text.contains("optim.rs"),
        "{text}"
    );
    assert!(said(&three, &two, &PARAMS).contains("the parameter is [3]"));
    assert!(said(&two, &two.to_dtype(DType::U32).unwrap(), &PARAMS).contains("the gradient must be a float tensor"));
    assert!(said(&two, &two, &ParamsAdamW { lr: -1.0, ..PARAMS }).contains("learning rate"));
    assert_eq!(moments.steps(), 0);
    for (params, what) in [
        (ParamsAdamW { lr: f64::NAN, ..PARAMS }, "the learning rate must be finite and not below 0, got NaN"),
        (ParamsAdamW { beta1: 1.0, ..PARAMS }, "beta1 must be in [0, 1), got 1"),
        (ParamsAdamW { beta2: -0.5, ..PARAMS }, "beta2 must be in [0, 1), got -0.5"),
        (ParamsAdamW { eps: 0.0, ..PARAMS }, "epsilon must be finite and above 0, got 0"),
        (
            ParamsAdamW { weight_decay: f64::INFINITY, ..PARAMS },
            "the weight decay must be finite and not below 0, got inf",
        ),
    ] {
        let text = validate_adamw(&params).unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
    }
    validate_adamw(&ParamsAdamW { lr: 0.0, beta1: 0.0, beta2: 0.0, weight_decay: 0.0, ..PARAMS }).unwrap();
}

#[test]
fn gradients_are_clipped_by_their_common_norm() {
    // 2² + 3² + 6² = 7²
    let grads = || vec![tensor(&[2.0, -3.0]), tensor(&[6.0]).reshape((1, 1)).unwrap()];
    assert_eq!(grad_norm(&grads()).unwrap(), 7.0);
    assert_eq!(grad_norm(&[]).unwrap(), 0.0);
    let mut clipped = grads();
    assert_eq!(clip_grad_norm(&mut clipped, 3.5).unwrap(), 7.0);
    let scale = 3.5 / (7.0 + 1e-6);
    for (got, want) in clipped.iter().flat_map(wide).zip([2.0, -3.0, 6.0]) {
        assert!((got - want * scale).abs() < 4e-7);
    }
    assert_eq!(clipped[1].dims(), [1, 1]);
    for enough in [7.1, 100.0] {
        let mut kept = grads();
        assert_eq!(clip_grad_norm(&mut kept, enough).unwrap(), 7.0);
        assert_eq!(kept.iter().flat_map(wide).collect::<Vec<_>>(), [2.0, -3.0, 6.0]);
    }
    assert_eq!(clip_grad_norm(&mut [tensor(&[0.0])], 1.0).unwrap(), 0.0);
    // the square of 1e30 is no f32
    let mut large = [tensor(&[3e30, 4e30])];
    assert!((clip_grad_norm(&mut large, 1.0).unwrap() / 5e30 - 1.0).abs() < 1e-6);
    assert!((wide(&large[0])[0] - 0.6).abs() < 1e-6);
}

#[test]
fn norms_that_nothing_can_be_clipped_to() {
    let mut grads = [tensor(&[1.0, f32::NAN])];
    let text = clip_grad_norm(&mut grads, 1.0).unwrap_err().to_string();
    assert!(text.contains("clip_grad_norm: the norm of the gradients is NaN"), "{text}");
    assert_eq!(wide(&grads[0])[0], 1.0);
    assert!(clip_grad_norm(&mut [tensor(&[f32::INFINITY])], 1.0).unwrap_err().to_string().contains("is inf"));
    for norm in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let text = clip_grad_norm(&mut [tensor(&[1.0])], norm).unwrap_err().to_string();
        assert!(text.contains("the largest norm must be finite and above 0"), "{text}");
    }
    let text = grad_norm(&[Tensor::ones(2, DType::U32, &Device::Cpu).unwrap()]).unwrap_err().to_string();
    assert!(text.contains("a gradient must be a float tensor"), "{text}");
}

#[test]
fn rates_of_schedules() {
    let close = |schedule: LrSchedule, want: &[(usize, f64)]| {
        schedule.validate().unwrap();
        for (step, rate) in want {
            let got = schedule.lr(*step);
            assert!((got - rate).abs() < 1e-15, "{schedule:?} at {step}: {got} against {rate}");
        }
    };
    close(LrSchedule::Constant { lr: 0.5 }, &[(0, 0.5), (usize::MAX, 0.5)]);
    close(LrSchedule::Warmup { warmup_steps: 4, max_lr: 0.8 }, &[(0, 0.0), (1, 0.2), (3, 0.6), (4, 0.8), (99, 0.8)]);
    // cos(π/3) = 1/2, cos(π/2) = 0, cos(2π/3) = −1/2
    let cosine = LrSchedule::Cosine { total_steps: 6, max_lr: 1.0, min_lr: 0.2 };
    close(cosine, &[(0, 1.0), (2, 0.8), (3, 0.6), (4, 0.4), (6, 0.2), (7, 0.2), (usize::MAX, 0.2)]);
    let both = LrSchedule::WarmupCosine { warmup_steps: 2, total_steps: 8, max_lr: 1.0, min_lr: 0.2 };
    close(both, &[(0, 0.0), (1, 0.5), (2, 1.0), (4, 0.8), (5, 0.6), (6, 0.4), (8, 0.2), (9, 0.2)]);
    close(
        LrSchedule::WarmupCosine { warmup_steps: 0, total_steps: 6, max_lr: 1.0, min_lr: 0.2 },
        &[(0, 1.0), (3, 0.6)],
    );
}

#[test]
fn lines_go_down_and_stay() {
    let line = LrSchedule::Linear { total_steps: 4, max_lr: 1.0, min_lr: 0.5 };
    line.validate().unwrap();
    assert_eq!([0, 1, 2, 4, 9].map(|step| line.lr(step)), [1.0, 0.875, 0.75, 0.5, 0.5]);
    let warm = LrSchedule::WarmupLinear { warmup_steps: 2, total_steps: 6, max_lr: 1.0, min_lr: 0.5 };
    warm.validate().unwrap();
    assert_eq!([0, 1, 2, 4, 6, usize::MAX].map(|step| warm.lr(step)), [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]);
    LrSchedule::WarmupLinear { warmup_steps: 0, total_steps: 1, max_lr: 1.0, min_lr: 0.0 }.validate().unwrap();
}

#[test]
fn schedules_that_mean_nothing() {
    let refused = |schedule: LrSchedule, what: &str| {
        let text = schedule.validate().unwrap_err().to_string();
        assert!(text.contains("the learning rate schedule") && text.contains(what), "{text}");
        // but no step panics
        let rates: Vec<f64> = [0, 1, 2, 3, 100, usize::MAX].map(|step| schedule.lr(step)).to_vec();
        rates
    };
    for lr in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(LrSchedule::Constant { lr }, "must be finite and greater than 0");
        refused(LrSchedule::Warmup { warmup_steps: 2, max_lr: lr }, "must be finite and greater than 0");
    }
    assert_eq!(
        refused(LrSchedule::Warmup { warmup_steps: 0, max_lr: 0.5 }, "warmup_steps must be greater than 0")[0],
        0.5
    );
    let cosine = |total_steps, min_lr| LrSchedule::Cosine { total_steps, max_lr: 1.0, min_lr };
    assert_eq!(refused(cosine(0, 0.25), "total_steps must be greater than 0"), [0.25; 6]);
    for min_lr in [-0.1, 1.1, f64::NAN] {
        refused(cosine(4, min_lr), "min_lr must be from 0 to max_lr 1");
    }
    assert_eq!(
        refused(LrSchedule::Linear { total_steps: 0, max_lr: 1.0, min_lr: 0.25 }, "total_steps must be"),
        [0.25; 6]
    );
    let line =
        |warmup_steps, total_steps| LrSchedule::WarmupLinear { warmup_steps, total_steps, max_lr: 1., min_lr: 0. };
    refused(line(3, 3), "warmup_steps 3 must be less than total_steps 3");
    refused(line(0, 0), "total_steps must be greater than 0");
    let both =
        |warmup_steps, total_steps| LrSchedule::WarmupCosine { warmup_steps, total_steps, max_lr: 1.0, min_lr: 0.25 };
    let rates = refused(both(3, 2), "warmup_steps 3 must be less than total_steps 2");
    assert_eq!(rates[3..], [0.25; 3]);
    refused(both(3, 3), "warmup_steps 3 must be less than total_steps 3");
    refused(both(0, 0), "total_steps must be greater than 0");
}
