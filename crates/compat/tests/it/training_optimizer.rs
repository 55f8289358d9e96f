//! AdamW over several steps of two parameters, and schedules.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::training::{assert_near, numbers, tensor};
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_compat::error::TrainingError;
use candle_lazy_compat::training::{AdamW, AdamWConfig, LRScheduler};
use candle_lazy_compat::Error;

const CONFIG: AdamWConfig =
    AdamWConfig { learning_rate: 0.05, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };

/// One parameter by the formula in f64, with its own count of steps.
struct Reference {
    theta: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    t: i32,
}

impl Reference {
    fn new(theta: Vec<f64>) -> Self {
        let zeros = vec![0.0; theta.len()];
        Self { m: zeros.clone(), v: zeros, theta, t: 0 }
    }

    fn step(&mut self, grad: &[f64], lr: f64) {
        let (b1, b2) = (f64::from(CONFIG.beta1), f64::from(CONFIG.beta2));
        self.t += 1;
        for (i, g) in grad.iter().enumerate() {
            self.m[i] = b1 * self.m[i] + (1.0 - b1) * g;
            self.v[i] = b2 * self.v[i] + (1.0 - b2) * g * g;
            let (m, v) = (self.m[i] / (1.0 - b1.powi(self.t)), self.v[i] / (1.0 - b2.powi(self.t)));
            let decay = lr * f64::from(CONFIG.weight_decay) * self.theta[i];
            self.theta[i] -= lr * m / (v.sqrt() + f64::from(CONFIG.epsilon)) + decay;
        }
    }
}

#[test]
fn the_default_config() {
    let config = AdamWConfig::default();
    assert_eq!((config.learning_rate, config.beta1, config.beta2), (1e-4, 0.9, 0.999));
    assert_eq!((config.epsilon, config.weight_decay), (1e-8, 0.01));
    config.validate().unwrap();
}

#[test]
fn configs_that_mean_nothing() {
    for (config, what) in [
        (AdamWConfig { learning_rate: 0.0, ..CONFIG }, "the learning rate must be greater than 0"),
        (AdamWConfig { learning_rate: -1.0, ..CONFIG }, "the learning rate must be finite and not below 0, got -1"),
        (AdamWConfig { learning_rate: f32::NAN, ..CONFIG }, "the learning rate must be finite"),
        (AdamWConfig { beta1: 1.0, ..CONFIG }, "beta1 must be in [0, 1), got 1"),
        (AdamWConfig { beta2: -0.5, ..CONFIG }, "beta2 must be in [0, 1), got -0.5"),
        (AdamWConfig { epsilon: 0.0, ..CONFIG }, "epsilon must be finite and above 0, got 0"),
        (AdamWConfig { weight_decay: -1.0, ..CONFIG }, "the weight decay must be finite and not below 0, got -1"),
    ] {
        for error in [config.validate().unwrap_err(), AdamW::new(config).unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("invalid training configuration") && text.contains(what), "{text}");
        }
    }
}

#[test]
fn two_variables_of_which_each_counts_its_steps() {
    let (first, second) = (Var::from_tensor(&tensor(&[2, 3], 1)).unwrap(), Var::from_tensor(&tensor(&[4], 2)).unwrap());
    let mut optimizer = AdamW::new(CONFIG).unwrap();
    let (mut a, mut b) = (Reference::new(numbers(6, 1)), Reference::new(numbers(4, 2)));
    for step in 0..6 {
        let lr = if step < 3 { 0.05f32 } else { 0.02 };
        optimizer.set_lr(lr);
        optimizer.step_var(&first, &tensor(&[2, 3], 10 + step)).unwrap();
        a.step(&numbers(6, 10 + step), lr.into());
        if step % 2 == 0 {
            // a clone and a moved variable are the same parameter
            let moved = second.clone();
            optimizer.step_var(&moved, &tensor(&[4], 20 + step)).unwrap();
            b.step(&numbers(4, 20 + step), lr.into());
        }
        // six steps of 0.05 on numbers around 1, a few roundings of 6e-8 each
        assert_near(&first, &a.theta, 1e-6);
        assert_near(&second, &b.theta, 1e-6);
    }
    assert_eq!(optimizer.step_count(), 6 + 3);
}

#[test]
fn named_parameters() {
    let mut optimizer = AdamW::new(CONFIG).unwrap();
    let (mut x, mut y) = (tensor(&[3], 1), tensor(&[2, 2], 2));
    optimizer.add_parameter("x", &x).unwrap();
    optimizer.add_parameter(String::from("y"), &y).unwrap();
    let (mut a, mut b) = (Reference::new(numbers(3, 1)), Reference::new(numbers(4, 2)));
    for step in 0..4 {
        x = optimizer.step("x", &x, &tensor(&[3], 10 + step)).unwrap();
        y = optimizer.step("y", &y, &tensor(&[2, 2], 20 + step)).unwrap();
        a.step(&numbers(3, 10 + step), 0.05f32.into());
        b.step(&numbers(4, 20 + step), 0.05f32.into());
        assert_near(&x, &a.theta, 1e-6);
        assert_near(&y, &b.theta, 1e-6);
    }
    assert_eq!(optimizer.step_count(), 8);
    optimizer.reset_state();
    assert_eq!(optimizer.step_count(), 0);
    // the name stays known, its state is new
    let mut again = Reference::new(a.theta.clone());
    again.step(&numbers(3, 30), 0.05f32.into());
    x = optimizer.step("x", &x, &tensor(&[3], 30)).unwrap();
    assert_near(&x, &again.theta, 2e-6);
    // added again, it starts anew too
    optimizer.add_parameter("x", &x).unwrap();
    let mut fresh = Reference::new(again.theta.clone());
    fresh.step(&numbers(3, 31), 0.05f32.into());
    assert_near(&optimizer.step("x", &x, &tensor(&[3], 31)).unwrap(), &fresh.theta, 3e-6);
}

#[test]
fn a_reset_forgets_variables() {
    let var = Var::from_tensor(&tensor(&[3], 1)).unwrap();
    let mut optimizer = AdamW::new(CONFIG).unwrap();
    optimizer.step_var(&var, &tensor(&[3], 10)).unwrap();
    optimizer.reset_state();
    var.set(&tensor(&[3], 1)).unwrap();
    optimizer.step_var(&var, &tensor(&[3], 11)).unwrap();
    let mut reference = Reference::new(numbers(3, 1));
    reference.step(&numbers(3, 11), 0.05f32.into());
    assert_near(&var, &reference.theta, 1e-6);
}

#[test]
fn what_an_optimiser_says_of_itself() {
    let mut optimizer = AdamW::new(CONFIG).unwrap();
    assert_eq!((optimizer.learning_rate(), optimizer.step_count()), (0.05, 0));
    assert_eq!(optimizer.config().beta2, 0.99);
    optimizer.set_lr(0.0);
    assert_eq!(optimizer.learning_rate(), 0.0);
    // at a rate of 0 the parameter stays
    let var = Var::from_tensor(&tensor(&[3], 1)).unwrap();
    optimizer.step_var(&var, &tensor(&[3], 2)).unwrap();
    assert_near(&var, &numbers(3, 1), 0.0);
    assert!(format!("{optimizer:?}").contains("AdamW"));
}

#[test]
fn steps_that_do_not_fit() {
    let mut optimizer = AdamW::new(CONFIG).unwrap();
    let x = tensor(&[3], 1);
    let error = optimizer.step("x", &x, &x).unwrap_err();
    assert!(matches!(error, Error::Training(TrainingError::StateError { .. })), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("training state error") && text.contains("'x' not found"), "{text}");
    optimizer.add_parameter("x", &x).unwrap();
    let var = Var::from_tensor(&x).unwrap();
    let other = tensor(&[4], 1);
    for error in [optimizer.step("x", &x, &other).unwrap_err(), optimizer.step_var(&var, &other).unwrap_err()] {
        assert!(matches!(error, Error::Training(TrainingError::Gradient { .. })), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("gradient error") && text.contains("the gradient is [4], its state [3]"), "{text}");
    }
    let whole = Tensor::ones(3, DType::U32, &Device::Cpu).unwrap();
    assert!(optimizer.step_var(&var, &whole).unwrap_err().to_string().contains("must be a float tensor"));
    optimizer.set_lr(f32::NAN);
    let error = optimizer.step_var(&var, &x).unwrap_err().to_string();
    assert!(error.contains("invalid training configuration") && error.contains("learning rate"), "{error}");
    assert_eq!(optimizer.step_count(), 0);
    assert_near(&var, &numbers(3, 1), 0.0);
}

#[test]
fn schedules() {
    let close = |scheduler: LRScheduler, want: &[(usize, f32)]| {
        scheduler.validate().unwrap();
        for (step, rate) in want {
            let got = scheduler.get_lr(*step);
            assert!((got - rate).abs() <= rate * 1e-6, "{scheduler:?} at {step}: {got} against {rate}");
        }
    };
    const CONSTANT: LRScheduler = LRScheduler::constant(1e-4);
    assert!(matches!(CONSTANT, LRScheduler::Constant { lr } if lr == 1e-4));
    assert_eq!(CONSTANT.get_lr(1000), 1e-4);
    close(CONSTANT, &[(0, 1e-4)]);
    let linear = LRScheduler::linear(10, 1e-3);
    assert!(matches!(linear, LRScheduler::Linear { warmup_steps: 10, max_lr } if max_lr == 1e-3));
    assert_eq!((linear.get_lr(0), linear.get_lr(10), linear.get_lr(1000)), (0.0, 1e-3, 1e-3));
    close(linear, &[(1, 1e-4), (5, 5e-4)]);
    let cosine = LRScheduler::cosine(6, 1e-3, 2e-4);
    assert!(matches!(cosine, LRScheduler::Cosine { total_steps: 6, .. }));
    close(cosine, &[(0, 1e-3), (2, 8e-4), (3, 6e-4), (4, 4e-4), (6, 2e-4), (100, 2e-4)]);
    let both = LRScheduler::warmup_cosine(2, 8, 1e-3, 2e-4);
    assert!(matches!(both, LRScheduler::WarmupCosine { warmup_steps: 2, total_steps: 8, .. }));
    close(both, &[(0, 0.0), (1, 5e-4), (2, 1e-3), (4, 8e-4), (5, 6e-4), (6, 4e-4), (8, 2e-4), (100, 2e-4)]);
}

#[test]
fn schedules_that_mean_nothing() {
    for (scheduler, what) in [
        (LRScheduler::constant(0.0), "learning rate must be finite and greater than 0"),
        (LRScheduler::constant(f32::NAN), "learning rate must be finite and greater than 0"),
        (LRScheduler::linear(0, 1e-3), "warmup_steps must be greater than 0"),
        (LRScheduler::cosine(0, 1e-3, 0.0), "total_steps must be greater than 0"),
        (LRScheduler::cosine(4, 1e-4, 1e-3), "min_lr must be from 0 to max_lr"),
        (LRScheduler::warmup_cosine(9, 4, 1e-3, 0.0), "warmup_steps 9 must be less than total_steps 4"),
    ] {
        let text = scheduler.validate().unwrap_err().to_string();
        assert!(text.contains("invalid training configuration") && text.contains(what), "{text}");
    }
    // fewer steps than the warm-up has: no panic, and the lowest rate after it
    let short = LRScheduler::warmup_cosine(4, 2, 1e-3, 1e-5);
    assert_eq!((short.get_lr(2), short.get_lr(4), short.get_lr(9)), (5e-4, 1e-5, 1e-5));
}
