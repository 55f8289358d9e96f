//! Steps of the optimiser: each rule against its formula in f64, groups, clipping, plans, gradients that are no numbers, failures.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::text;
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::optim::{
    clip_grad_norm, Lion, LrSchedule, NonFinitePart, OnNonFinite, Optimizer, OptimizerOptions, ParamGroup, ParamsAdamW,
    Rule, Sgd,
};
use candle_lazy_nn::params::{Gradients, Params};
use candle_lazy_nn::LazyTensor;

const CPU: Device = Device::Cpu;
const ADAM: ParamsAdamW = ParamsAdamW { lr: 0.05, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
const GRADS: [[f64; 4]; 5] =
    [[0.5, -2., 0.25, 0.], [-0.125, 1., 0.25, 0.], [4., 0.5, -0.75, 0.], [0.01, -3., 0., 0.], [1., 1., 1., -1.]];
const START: [f64; 4] = [1., -0.5, 0., 3.];

fn tensor(values: &[f64], dtype: DType) -> Tensor {
    Tensor::from_slice(values, values.len(), &CPU).unwrap().to_dtype(dtype).unwrap()
}

fn wide(value: &LazyTensor) -> Vec<f64> {
    value.eval().unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// One parameter `w` of these values.
fn single(values: &[f64], dtype: DType) -> Params {
    let mut params = Params::new();
    params.insert("w", tensor(values, dtype)).unwrap();
    params
}

fn value(params: &Params, name: &str) -> Vec<f64> {
    wide(&params.get(name).unwrap().value())
}

/// Gradients by name.
fn grads(params: &Params, named: &[(&str, &[f64])]) -> Gradients {
    let mut grads = Gradients::new();
    for (name, values) in named {
        let param = params.get(name).unwrap();
        grads.insert(param, tensor(values, param.dtype())).unwrap();
    }
    grads
}

/// A rule of one number in f64: θ and what is kept, after gradient g at step t.
type Formula = fn(theta: f64, kept: &mut [f64; 2], g: f64, t: i32) -> f64;

fn adam(theta: f64, kept: &mut [f64; 2], g: f64, t: i32) -> f64 {
    let p = ADAM;
    kept[0] = p.beta1 * kept[0] + (1. - p.beta1) * g;
    kept[1] = p.beta2 * kept[1] + (1. - p.beta2) * g * g;
    let (m, v) = (kept[0] / (1. - p.beta1.powi(t)), kept[1] / (1. - p.beta2.powi(t)));
    theta - p.lr * m / (v.sqrt() + p.eps)
}

fn rules() -> Vec<(Rule, Formula)> {
    let sgd = Sgd { lr: 0.1, momentum: 0., nesterov: false, weight_decay: 0.2 };
    let heavy = Sgd { momentum: 0.8, ..sgd };
    let lion = Lion { lr: 0.03, beta1: 0.9, beta2: 0.99, weight_decay: 0.5 };
    vec![
        (Rule::Sgd(sgd), |theta, _, g, _| theta - 0.1 * (g + 0.2 * theta)),
        (Rule::Sgd(heavy), |theta, kept, g, _| {
            kept[0] = 0.8 * kept[0] + g + 0.2 * theta;
            theta - 0.1 * kept[0]
        }),
        (Rule::Sgd(Sgd { nesterov: true, ..heavy }), |theta, kept, g, _| {
            let g = g + 0.2 * theta;
            kept[0] = 0.8 * kept[0] + g;
            theta - 0.1 * (g + 0.8 * kept[0])
        }),
        (Rule::Adam(ADAM), |theta, kept, g, t| adam(theta, kept, g + ADAM.weight_decay * theta, t)),
        (Rule::AdamW(ADAM), |theta, kept, g, t| adam(theta, kept, g, t) - ADAM.lr * ADAM.weight_decay * theta),
        (Rule::Lion(lion), |theta, kept, g, _| {
            let c = 0.9 * kept[0] + (1. - 0.9) * g;
            kept[0] = 0.99 * kept[0] + (1. - 0.99) * g;
            let sign = if c == 0. { 0. } else { c.signum() };
            theta - 0.03 * (sign + 0.5 * theta)
        }),
    ]
}

#[test]
fn every_rule_follows_its_formula() {
    for (rule, formula) in rules() {
        for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F64, 1e-14)] {
            let params = single(&START, dtype);
            let mut optimizer = Optimizer::new(&params, rule.clone(), OptimizerOptions::default()).unwrap();
            let (mut theta, mut kept) = (START, [[0.; 2]; 4]);
            for (t, row) in (1..).zip(&GRADS) {
                let report = optimizer.step(grads(&params, &[("w", row)]), &[]).unwrap();
                assert_eq!((report.step, report.lr), (t as u64, rule.lr()));
                for ((theta, kept), g) in theta.iter_mut().zip(&mut kept).zip(row) {
                    *theta = formula(*theta, kept, *g, t);
                }
                for (got, want) in value(&params, "w").into_iter().zip(theta) {
                    assert!((got - want).abs() <= tolerance * want.abs().max(1.), "{rule:?} step {t}: {got} {want}");
                }
            }
            assert_eq!(optimizer.steps(), 5);
        }
    }
}

#[test]
fn a_rule_without_decay_and_one_of_zero_gradients() {
    let plain = ParamsAdamW { weight_decay: 0., ..ADAM };
    let params = single(&[1., 2.], DType::F32);
    let mut optimizer = Optimizer::new(&params, Rule::AdamW(plain), OptimizerOptions::default()).unwrap();
    optimizer.step(grads(&params, &[("w", &[0., 4.])]), &[]).unwrap();
    // m̂ = g and √v̂ = |g| at the first step: the whole rate, whatever the gradient
    let got = value(&params, "w");
    assert!(got[0] == 1. && (got[1] - 1.95).abs() < 1e-6, "{got:?}");
}

#[test]
fn half_precision_is_rounded_once_a_step() {
    let params = single(&[1., -2.], DType::BF16);
    let rule = Rule::Sgd(Sgd { lr: 0.25, ..Sgd::default() });
    let mut optimizer = Optimizer::new(&params, rule, OptimizerOptions::default()).unwrap();
    optimizer.step(grads(&params, &[("w", &[0.5, 1.])]), &[]).unwrap();
    assert_eq!(params.get("w").unwrap().value().dtype(), DType::BF16);
    assert_eq!(value(&params, "w"), [0.875, -2.25]);
}

/// Two parameters, `a.bias` and `a.weight`.
fn pair() -> Params {
    let mut params = Params::new();
    params.insert("a.weight", tensor(&[2., 4.], DType::F32)).unwrap();
    params.insert("a.bias", tensor(&[8.], DType::F32)).unwrap();
    params
}

#[test]
fn groups_have_their_own_rate_and_decay() {
    let params = pair();
    let group = ParamGroup { lr_scale: 0.5, weight_decay: Some(0.), ..ParamGroup::new("*.bias") };
    let options = OptimizerOptions { groups: vec![group, ParamGroup::new("*")], ..OptimizerOptions::default() };
    let rule = Rule::Sgd(Sgd { lr: 0.5, weight_decay: 1., ..Sgd::default() });
    let mut optimizer = Optimizer::new(&params, rule, options).unwrap();
    optimizer.step(grads(&params, &[("a.bias", &[4.]), ("a.weight", &[1., 2.])]), &[]).unwrap();
    assert_eq!(value(&params, "a.bias"), [8. - 0.25 * 4.]);
    assert_eq!(value(&params, "a.weight"), [2. - 0.5 * 3., 4. - 0.5 * 6.]);
}

#[test]
fn frozen_parameters_stay_and_may_come_back() {
    let params = pair();
    let rule = Rule::AdamW(ParamsAdamW { weight_decay: 0., ..ADAM });
    let mut optimizer = Optimizer::new(&params, rule, OptimizerOptions::default()).unwrap();
    params.freeze("*.bias").unwrap();
    optimizer.step(grads(&params, &[("a.weight", &[1., 1.])]), &[]).unwrap();
    assert_eq!(value(&params, "a.bias"), [8.]);
    params.unfreeze("*").unwrap();
    optimizer.step(grads(&params, &[("a.weight", &[1., 1.]), ("a.bias", &[2.])]), &[]).unwrap();
    // its own first step: the whole rate
    assert!((value(&params, "a.bias")[0] - (8. - 0.05)).abs() < 1e-6);
}

#[test]
fn clipping_is_pytorchs_and_part_of_the_step() {
    let rule = Rule::Sgd(Sgd { lr: 1., ..Sgd::default() });
    for largest in [0.5, 1e9] {
        let params = pair();
        let options = OptimizerOptions { clip_norm: Some(largest), ..OptimizerOptions::default() };
        let mut optimizer = Optimizer::new(&params, rule.clone(), options).unwrap();
        // 2² + 3² + 6² = 7²
        let report = optimizer.step(grads(&params, &[("a.bias", &[2.]), ("a.weight", &[3., -6.])]), &[]).unwrap();
        assert!((report.norm.unwrap() - 7.).abs() < 1e-12);
        let mut eager = [tensor(&[2.], DType::F32), tensor(&[3., -6.], DType::F32)];
        clip_grad_norm(&mut eager, largest).unwrap();
        let clipped: Vec<f64> = eager.iter().flat_map(|g| wide(&g.into())).collect();
        let got = [value(&params, "a.bias"), value(&params, "a.weight")].concat();
        for ((got, start), g) in got.iter().zip([8., 2., 4.]).zip(clipped) {
            assert!((got - (start - g)).abs() < 1e-6, "{got} {start} {g}");
        }
    }
}

#[test]
fn the_rate_follows_the_schedule() {
    let params = single(&[0.], DType::F64);
    let schedule = LrSchedule::WarmupLinear { warmup_steps: 2, total_steps: 4, max_lr: 1., min_lr: 0. };
    let options = OptimizerOptions { schedule: Some(schedule), ..OptimizerOptions::default() };
    let mut optimizer = Optimizer::new(&params, Rule::Sgd(Sgd::default()), options).unwrap();
    let mut rates = Vec::new();
    for _ in 0..6 {
        rates.push(optimizer.lr());
        optimizer.step(grads(&params, &[("w", &[-1.])]), &[]).unwrap();
    }
    assert_eq!(rates, [0., 0.5, 1., 0.5, 0., 0.]);
    assert_eq!(value(&params, "w"), [2.]);
}

/// Recorded gradients of Σ(θ − target)²/2 of `params`, and the loss.
fn quadratic(params: &Params) -> (Gradients, LazyTensor) {
    let (mut grads, mut parts) = (Vec::new(), Vec::new());
    for param in params.trainable() {
        let residual = param.value().affine(1., -1.).unwrap();
        parts.push(residual.sqr().unwrap().sum_all().unwrap());
        grads.push(residual);
    }
    let loss = LazyTensor::stack(&parts, 0).unwrap().sum_all().unwrap().affine(0.5, 0.).unwrap();
    (Gradients::of(params, grads).unwrap(), loss)
}

#[test]
fn a_step_is_one_plan_that_is_found_again() {
    for (rule, _) in rules() {
        for clip_norm in [None, Some(0.1)] {
            let params = pair();
            let schedule = LrSchedule::Cosine { total_steps: 100, max_lr: 0.1, min_lr: 0.01 };
            let options = OptimizerOptions { clip_norm, schedule: Some(schedule), ..OptimizerOptions::default() };
            let mut optimizer = Optimizer::new(&params, rule.clone(), options).unwrap();
            for step in 0..5 {
                let (grads, loss) = quadratic(&params);
                let report = optimizer.step(grads, &[&loss]).unwrap();
                assert!(loss.is_ready());
                assert!(params.iter().all(|param| param.value().is_ready()));
                assert!(step == 0 || report.eval.cache_hit, "{rule:?} step {step}: {}", report.eval);
                assert_eq!(report.eval.fallback_count(), 0, "{}", report.eval);
            }
        }
    }
}

#[test]
fn a_parameter_and_what_is_kept_of_it_are_one_program() {
    for (rule, _) in rules() {
        let kernels = |count: usize| {
            let mut params = Params::new();
            for at in 0..count {
                // sizes of their own: nothing is merged
                params.insert(format!("p{at}.w"), tensor(&vec![0.5; 8 + at], DType::F32)).unwrap();
            }
            let options = OptimizerOptions { on_non_finite: OnNonFinite::Apply, ..OptimizerOptions::default() };
            let mut optimizer = Optimizer::new(&params, rule.clone(), options).unwrap();
            let named = params.iter().map(|param| tensor(&vec![1.; param.elem_count()], DType::F32).into());
            let grads = Gradients::of(&params, named.collect::<Vec<_>>()).unwrap();
            optimizer.step(grads, &[]).unwrap().eval.kernel_count()
        };
        assert_eq!((kernels(1), kernels(5)), (1, 5), "{rule:?}");
    }
}

/// [`quadratic`] with a loss that no gradient passes.
fn detached(params: &Params) -> (Gradients, LazyTensor) {
    let (gradients, loss) = quadratic(params);
    (gradients, loss.detach())
}

#[test]
fn a_step_writes_over_what_nobody_else_holds() {
    for (rule, _) in rules() {
        for on_non_finite in [OnNonFinite::Stop, OnNonFinite::Skip, OnNonFinite::Apply] {
            let options = OptimizerOptions { clip_norm: Some(1.), on_non_finite, ..OptimizerOptions::default() };
            let (alone, watched) = (pair(), pair());
            let [mut first, mut second] =
                [&alone, &watched].map(|params| Optimizer::new(params, rule.clone(), options.clone()).unwrap());
            let kept = match &rule {
                Rule::Sgd(sgd) => usize::from(sgd.momentum > 0.),
                Rule::Lion(_) => 1,
                _ => 2,
            };
            for step in 0..3 {
                // a loss that is traced would keep its history, the parameters with it
                let (gradients, loss) = detached(&alone);
                let report = first.step(gradients, &[&loss]).unwrap();
                assert_eq!(report.eval.in_place, 2 * (1 + kept), "{rule:?} {on_non_finite:?} {step}: {}", report.eval);
                // what somebody holds stays as it was, and its new value is the same
                let old = ["a.weight", "a.bias"].map(|name| watched.get(name).unwrap().value());
                let before = old.each_ref().map(wide);
                let (gradients, loss) = detached(&watched);
                let report = second.step(gradients, &[&loss]).unwrap();
                assert_eq!(report.eval.in_place, 2 * kept, "{rule:?} {on_non_finite:?} {step}: {}", report.eval);
                assert_eq!(old.each_ref().map(wide), before);
            }
            for name in ["a.weight", "a.bias"] {
                assert_eq!(value(&alone, name), value(&watched, name), "{rule:?} {name}");
            }
        }
    }
}

#[test]
fn gradients_that_are_no_numbers_stop_or_are_skipped() {
    let bad = |params: &Params| grads(params, &[("a.bias", &[1.]), ("a.weight", &[1., f64::NAN])]);
    let good = |params: &Params| grads(params, &[("a.bias", &[1.]), ("a.weight", &[1., -1.])]);
    let run = |on_non_finite: OnNonFinite| {
        let params = pair();
        let options = OptimizerOptions { on_non_finite, ..OptimizerOptions::default() };
        (Optimizer::new(&params, Rule::AdamW(ADAM), options).unwrap(), params)
    };
    let (mut clean, without) = run(OnNonFinite::Stop);
    clean.step(good(&without), &[]).unwrap();
    clean.step(good(&without), &[]).unwrap();
    for on_non_finite in [OnNonFinite::Stop, OnNonFinite::Skip] {
        let (mut optimizer, params) = run(on_non_finite);
        optimizer.step(good(&params), &[]).unwrap();
        let before = [value(&params, "a.bias"), value(&params, "a.weight")];
        let result = optimizer.step(bad(&params), &[]);
        match on_non_finite {
            OnNonFinite::Skip => {
                let report = result.unwrap();
                let skipped = Some(NonFinitePart::Gradient("a.weight".into()));
                assert_eq!((report.skipped, report.step), (skipped, 1));
                assert!(report.norm.unwrap().is_nan());
            }
            _ => {
                let error = text(result);
                let wanted =
                    "step 1: the gradient of `a.weight` is not finite (the norm of all gradients is NaN): give \
                              the step the loss, not detached";
                assert!(error.starts_with(wanted), "{error}");
            }
        }
        assert_eq!([value(&params, "a.bias"), value(&params, "a.weight")], before);
        // what is kept is as before too: the next step is that of a run without the bad one
        assert_eq!(optimizer.step(good(&params), &[]).unwrap().step, 2);
        assert_eq!(value(&params, "a.weight"), value(&without, "a.weight"));
        assert_eq!(value(&params, "a.bias"), value(&without, "a.bias"));
    }
    let (mut optimizer, params) = run(OnNonFinite::Apply);
    let report = optimizer.step(bad(&params), &[]).unwrap();
    assert!(report.norm.is_none() && report.skipped.is_none());
    assert!(value(&params, "a.weight")[1].is_nan());
}

#[test]
fn the_first_number_that_is_none_is_named_in_ones_own_loop() {
    let step = |optimizer: &mut Optimizer, params: &Params, loss: &LazyTensor| {
        let gradients = params.grad(loss).unwrap();
        optimizer.step(gradients, &[loss])
    };
    let new = |on_non_finite: OnNonFinite| {
        let params = pair();
        let options = OptimizerOptions { on_non_finite, ..OptimizerOptions::default() };
        (Optimizer::new(&params, Rule::AdamW(ADAM), options).unwrap(), params)
    };
    let both = |params: &Params| {
        let of = |name: &str| params.get(name).unwrap().value().sum_all().unwrap();
        of("a.bias").add(&of("a.weight")).unwrap()
    };
    // a NaN on the way to the loss: its op and its line
    let (mut optimizer, params) = new(OnNonFinite::Stop);
    let before = [value(&params, "a.bias"), value(&params, "a.weight")];
    let (line, broken) = (line!(), both(&params).affine(0.0, 0.0).unwrap().log().unwrap());
    let loss = (&broken * 2.0).unwrap();
    let error = text(step(&mut optimizer, &params, &loss));
    let wanted =
        ["step 0: the gradient of `a.bias` is not finite", "the first such number of the loss is log of (f32 [])"];
    for part in wanted.into_iter().chain([format!("optimizer.rs:{line}:").as_str()]) {
        assert!(error.contains(part), "{error} lacks {part}");
    }
    // finite gradients of a loss that is not: no step
    let loss = both(&params).add(&LazyTensor::new(f32::INFINITY, &Device::Cpu).unwrap()).unwrap();
    let error = text(step(&mut optimizer, &params, &loss));
    for part in ["step 0: the loss is not finite", "the first such number of the loss is the leaf f32 []"] {
        assert!(error.contains(part), "{error} lacks {part}");
    }
    assert_eq!([value(&params, "a.bias"), value(&params, "a.weight")], before);
    let (mut skipping, params) = new(OnNonFinite::Skip);
    let loss = both(&params).add(&LazyTensor::new(f32::NAN, &Device::Cpu).unwrap()).unwrap();
    let report = step(&mut skipping, &params, &loss).unwrap();
    assert_eq!((report.skipped, report.step), (Some(NonFinitePart::Loss), 0));
    assert!(report.norm.unwrap().is_finite());
    assert_eq!([value(&params, "a.bias"), value(&params, "a.weight")], before);
    // an infinity that is meant is not what made the NaN
    let (mut optimizer, params) = new(OnNonFinite::Stop);
    let mask = LazyTensor::new(&[f32::NEG_INFINITY, 0.], &Device::Cpu).unwrap();
    let masked = both(&params).reshape((1,)).unwrap().broadcast_add(&mask).unwrap().softmax(0).unwrap();
    let (line, broken) = (line!(), masked.affine(1.0, -9.0).unwrap().log().unwrap());
    let loss = broken.sum_all().unwrap();
    let error = text(step(&mut optimizer, &params, &loss));
    assert!(error.contains("loss is log of (f32 [2])") && error.contains(&format!("optimizer.rs:{line}:")), "{error}");
    // one that is detached says nothing of where it comes from
    let loss = both(&params);
    let lost = (&loss * f64::NAN).unwrap().detach();
    let error = text(optimizer.step(params.grad(&loss).unwrap(), &[&lost]));
    let wanted = "step 0: the loss is not finite (the norm of all gradients is 1.7";
    assert!(error.starts_with(wanted) && error.contains("): give the step the loss, not detached"), "{error}");
    // a number beside a loss that is as it should be is nobody's business
    let loss = both(&params);
    let other = LazyTensor::new(f32::NAN, &Device::Cpu).unwrap();
    assert_eq!(optimizer.step(params.grad(&loss).unwrap(), &[&loss, &other]).unwrap().step, 1);
    // a finite loss of gradients that are not
    let (mut optimizer, params) = new(OnNonFinite::Stop);
    let root = both(&params).affine(0.0, 0.0).unwrap().sqrt().unwrap();
    let error = text(step(&mut optimizer, &params, &root));
    assert!(error.contains("the loss and all it is made of is finite"), "{error}");
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let params = pair();
    let mut optimizer = Optimizer::new(&params, Rule::AdamW(ADAM), OptimizerOptions::default()).unwrap();
    optimizer.step(grads(&params, &[("a.bias", &[1.]), ("a.weight", &[1., 2.])]), &[]).unwrap();
    let before = [value(&params, "a.bias"), value(&params, "a.weight")];
    let ids = LazyTensor::new(&[9u32, 9], &CPU).unwrap();
    let weight = params.get("a.weight").unwrap();
    let mut broken = grads(&params, &[("a.bias", &[1.])]);
    broken.insert(weight, weight.value().index_select(&ids, 0).unwrap()).unwrap();
    let error = text(optimizer.step(broken, &[]));
    assert!(error.contains("index_select"), "{error}");
    assert_eq!([value(&params, "a.bias"), value(&params, "a.weight")], before);
    assert_eq!(optimizer.steps(), 1);
    optimizer.step(grads(&params, &[("a.bias", &[1.]), ("a.weight", &[1., 2.])]), &[]).unwrap();
    assert_eq!(optimizer.steps(), 2);
}

#[test]
fn gradients_and_parameters_must_be_the_same() {
    let params = pair();
    let mut optimizer = Optimizer::new(&params, Rule::AdamW(ADAM), OptimizerOptions::default()).unwrap();
    let error = text(optimizer.step(grads(&params, &[("a.bias", &[1.])]), &[]));
    assert!(error.contains("`a.weight` have no gradient"), "{error}");
    params.freeze("a.bias").unwrap();
    let both = grads(&params, &[("a.bias", &[1.]), ("a.weight", &[1., 2.])]);
    assert!(text(optimizer.step(both, &[])).contains("a gradient for `a.bias`, which is frozen"));
    let others = single(&[1.], DType::F32);
    let mut foreign = grads(&params, &[("a.weight", &[1., 2.])]);
    foreign.insert(others.get("w").unwrap(), tensor(&[1.], DType::F32)).unwrap();
    assert!(text(optimizer.step(foreign, &[])).contains("a gradient for `w`, which is no parameter here"));
    assert!(text(Optimizer::new(&Params::new(), Rule::AdamW(ADAM), OptimizerOptions::default())).contains("none to"));
}

#[test]
fn numbers_that_mean_nothing_are_refused() {
    let new = |rule: Rule, options: OptimizerOptions| text(Optimizer::new(&pair(), rule, options));
    let none = OptimizerOptions::default;
    let sgd = Sgd::default();
    let cases = [
        (Rule::Sgd(Sgd { lr: -1., ..sgd }), "config of SGD: the learning rate must be finite and not below 0, got -1"),
        (Rule::Sgd(Sgd { momentum: 1., ..sgd }), "config of SGD: the momentum must be in [0, 1), got 1"),
        (Rule::Sgd(Sgd { nesterov: true, ..sgd }), "config of SGD: Nesterov's form needs a momentum above 0"),
        (Rule::Adam(ParamsAdamW { eps: 0., ..ADAM }), "config of Adam: epsilon must be finite and above 0, got 0"),
        (Rule::AdamW(ParamsAdamW { beta2: 1., ..ADAM }), "config of AdamW: beta2 must be in [0, 1), got 1"),
        (Rule::Lion(Lion { beta1: -0.1, ..Lion::default() }), "config of Lion: beta1 must be in [0, 1), got -0.1"),
        (
            Rule::Lion(Lion { weight_decay: f64::NAN, ..Lion::default() }),
            "config of Lion: the weight decay must be finite and not below 0, got NaN",
        ),
    ];
    for (rule, message) in cases {
        assert_eq!(new(rule, none()), message);
    }
    let rule = || Rule::AdamW(ADAM);
    let clip = OptimizerOptions { clip_norm: Some(0.), ..none() };
    assert!(new(rule(), clip).contains("the largest norm must be finite and above 0, got 0"));
    let group = |group: ParamGroup| OptimizerOptions { groups: vec![group], ..none() };
    assert!(new(rule(), group(ParamGroup::new("b.*"))).contains("the pattern `b.*` names none of `a.bias`, `a.weight`"));
    let scale = ParamGroup { lr_scale: -1., ..ParamGroup::new("*") };
    assert!(new(rule(), group(scale)).contains("a group's factor of the rate must be finite and not below 0, got -1"));
    let decay = ParamGroup { weight_decay: Some(f64::INFINITY), ..ParamGroup::new("*") };
    assert!(new(rule(), group(decay)).contains("a group's weight decay must be finite and not below 0, got inf"));
    let schedule = OptimizerOptions { schedule: Some(LrSchedule::Constant { lr: 0. }), ..none() };
    assert!(new(rule(), schedule).contains("the learning rate must be finite and greater than 0, got 0"));
}

#[test]
fn a_loss_of_values_that_are_no_more_is_refused_by_name() {
    let params = pair();
    let loss = params.get("a.bias").unwrap().value().sum_all().unwrap();
    Optimizer::new(&params, Rule::AdamW(ADAM), OptimizerOptions::default()).unwrap();
    let (line, error) = (line!(), text(params.grad(&loss)));
    let wanted = "`a.bias`, `a.weight` are new, or got another value, since the loss was recorded";
    assert!(error.contains(wanted) && error.contains(&format!("optimizer.rs:{line}:")), "{error}");
}
