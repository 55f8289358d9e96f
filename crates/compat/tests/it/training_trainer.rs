//! The training loop: it trains its adapter, clips, follows its schedule, and says so where nothing can be trained.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::training::{assert_near, tensor, wide};
use candle_core::{Device, Tensor, Var};
use candle_lazy_compat::error::{InferenceError, TrainingError};
use candle_lazy_compat::training::{
    cross_entropy_loss, AdamW, AdamWConfig, LRScheduler, LoRAAdapter, LoRAAdapterConfig, TargetModule, Trainer,
    TrainingConfig, TrainingStep,
};
use candle_lazy_compat::{Error, Result};
use std::cell::Cell;

const WIDTH: usize = 8;

/// A frozen model of two projections over embedded tokens, with its adapter: logits (batch, seq, 8).
fn logits(adapter: &LoRAAdapter, ids: &Tensor) -> Result<Tensor> {
    let (batch, seq) = ids.dims2()?;
    let x = tensor(&[WIDTH, WIDTH], 31).embedding(&ids.flatten_all()?)?.reshape((batch, seq, WIDTH))?;
    let mut y = x.broadcast_matmul(&tensor(&[WIDTH, WIDTH], 32))?;
    for target in [TargetModule::QProj, TargetModule::VProj] {
        if let Some(delta) = adapter.forward(0, &target, &x)? {
            y = (y + delta)?;
        }
    }
    Ok(y)
}

fn ids(values: [[u32; 3]; 2]) -> Tensor {
    Tensor::new(&values, &Device::Cpu).unwrap()
}

/// Each token's successor modulo 8.
fn dataset() -> Vec<(Tensor, Tensor)> {
    vec![
        (ids([[0, 1, 2], [3, 4, 5]]), ids([[1, 2, 3], [4, 5, 6]])),
        (ids([[6, 7, 0], [2, 4, 6]]), ids([[7, 0, 1], [3, 5, 7]])),
    ]
}

fn lora() -> LoRAAdapterConfig {
    LoRAAdapterConfig { rank: 4, alpha: 8.0, ..LoRAAdapterConfig::default() }
}

fn config(num_epochs: usize, learning_rate: f32) -> TrainingConfig {
    TrainingConfig { num_epochs, lr_scheduler: LRScheduler::constant(learning_rate), ..TrainingConfig::default() }
}

/// With variables that do not depend on chance, B ≠ 0 included.
fn fill(adapter: &LoRAAdapter) {
    for (at, (_, layer)) in adapter.layers().enumerate() {
        layer.lora_a().set(&tensor(layer.lora_a().dims(), 40 + at)).unwrap();
        layer.lora_b().set(&tensor(layer.lora_b().dims(), 50 + at).affine(0.1, 0.0).unwrap()).unwrap();
    }
}

fn trainer(config: TrainingConfig) -> Trainer {
    let trainer = Trainer::new(WIDTH, 12, 1, &lora(), config, &Device::Cpu).unwrap();
    fill(trainer.lora_adapter());
    trainer
}

fn variables(adapter: &LoRAAdapter) -> Vec<Vec<f64>> {
    adapter.layers().flat_map(|(_, layer)| layer.trainable_variables()).map(|var| wide(var)).collect()
}

#[test]
fn the_default_config() {
    let config = TrainingConfig::default();
    assert_eq!((config.num_epochs, config.max_grad_norm), (3, Some(1.0)));
    assert!(matches!(config.lr_scheduler, LRScheduler::Constant { lr } if lr == 1e-4));
    assert_eq!(config.optimizer_config.learning_rate, 1e-4);
}

#[test]
fn a_trainer_lowers_its_loss() {
    let mut trainer = Trainer::new(WIDTH, 12, 1, &lora(), config(100, 0.05), &Device::Cpu).unwrap();
    let metrics = trainer.train_adapter(&dataset(), logits).unwrap();
    assert_eq!((metrics.len(), trainer.global_step()), (200, 200));
    assert!(metrics.iter().zip(1..).all(|(m, step)| m.step == step && m.learning_rate == 0.05));
    let (first, last) = (metrics[0].loss, metrics[199].loss);
    // chance is log 8 = 2.08; the successor of each of 8 tokens can be learned by heart
    assert!(first > 1.0 && last < 0.1, "{first} to {last}");
    // the first loss is that of the model before any update
    let untrained = LoRAAdapter::new(WIDTH, 12, 0, &lora(), &Device::Cpu).unwrap();
    let (input, target) = &dataset()[0];
    let want = cross_entropy_loss(&logits(&untrained, input).unwrap(), target, None).unwrap();
    assert_near(&want, &[first.into()], 1e-6);
    assert!(variables(trainer.lora_adapter()).iter().flatten().all(|v| v.is_finite()));
}

#[test]
fn a_closure_that_holds_the_adapter_trains_it_too() {
    let (mut held, mut handed) = (trainer(config(5, 0.05)), trainer(config(5, 0.05)));
    let adapter = held.lora_adapter().clone();
    let got = held.train(&dataset(), |ids| logits(&adapter, ids)).unwrap();
    let want = handed.train_adapter(&dataset(), logits).unwrap();
    assert_eq!(got.iter().map(|m| m.loss).collect::<Vec<_>>(), want.iter().map(|m| m.loss).collect::<Vec<_>>());
    assert_eq!(variables(held.lora_adapter()), variables(handed.lora_adapter()));
    assert!(got[9].loss < got[0].loss);
}

#[test]
fn steps_and_rates_go_on_over_runs() {
    let scheduler = LRScheduler::linear(4, 0.4);
    let mut trainer = trainer(TrainingConfig { lr_scheduler: scheduler, ..config(1, 0.1) });
    let before = variables(trainer.lora_adapter());
    let one = trainer.train_adapter(&dataset()[..1], logits).unwrap();
    assert_eq!((one[0].step, one[0].learning_rate), (1, 0.0));
    assert_eq!(variables(trainer.lora_adapter()), before);
    let more = trainer.train_adapter(&dataset(), logits).unwrap();
    let got: Vec<_> = more.iter().map(|m| (m.step, m.learning_rate)).collect();
    assert_eq!(got, [(2, 0.1), (3, 0.2)]);
    assert!(trainer.train_adapter(&[], logits).unwrap().is_empty());
    assert_eq!(trainer.global_step(), 3);
    fill(trainer.lora_adapter_mut());
    assert_eq!(variables(trainer.lora_adapter()), before);
}

#[test]
fn gradients_are_clipped_by_their_common_norm() {
    // a large ε makes the first update lr·g/(|g| + ε), which the size of g shows in
    let optimizer_config = AdamWConfig { epsilon: 1.0, weight_decay: 0.0, ..AdamWConfig::default() };
    for max_grad_norm in [Some(0.05), Some(1e3), None, Some(0.0), Some(-1.0), Some(f32::INFINITY)] {
        let mut trainer = trainer(TrainingConfig { optimizer_config, max_grad_norm, ..config(1, 0.1) });
        let (input, target) = &dataset()[0];
        let before = variables(trainer.lora_adapter());
        let loss = cross_entropy_loss(&logits(trainer.lora_adapter(), input).unwrap(), target, None).unwrap();
        let store = loss.backward().unwrap();
        let vars = trainer.lora_adapter().layers().flat_map(|(_, layer)| layer.trainable_variables());
        let grads: Vec<Vec<f64>> = vars.map(|var| wide(store.get(var).unwrap())).collect();
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        assert!(norm > 0.1, "{norm}");
        // none of 0 and less clips, as in v1 and in Hugging Face's Trainer
        let scale = match max_grad_norm {
            Some(max) if max > 0.0 => (f64::from(max) / (norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        trainer.train_adapter(&dataset()[..1], logits).unwrap();
        for ((got, theta), grad) in variables(trainer.lora_adapter()).iter().zip(&before).zip(&grads) {
            for ((got, theta), grad) in got.iter().zip(theta).zip(grad) {
                let g = scale * grad;
                let want = theta - f64::from(0.1f32) * g / (g.abs() + 1.0);
                assert!((got - want).abs() < 3e-7, "{max_grad_norm:?}: {got} against {want}");
            }
        }
    }
}

#[track_caller]
fn gradient_error(error: Error, what: &str) {
    assert!(matches!(error, Error::Training(TrainingError::Gradient { .. })), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("gradient error") && text.contains(what), "{text}");
}

#[test]
fn a_loss_that_does_not_depend_on_the_adapter() {
    let constant = tensor(&[2, 3, WIDTH], 1);
    let mut trainer = trainer(config(2, 0.1));
    let before = variables(trainer.lora_adapter());
    gradient_error(
        trainer.train_adapter(&dataset(), |_, _| Ok::<_, Error>(constant.clone())).unwrap_err(),
        "no variable",
    );
    // of a variable that is another's
    let other = Var::from_tensor(&constant).unwrap();
    let tracked = other.affine(2.0, 0.0).unwrap();
    let of_another = trainer.train_adapter(&dataset(), |_, _| Ok::<_, Error>(tracked.clone()));
    gradient_error(of_another.unwrap_err(), "no variable");
    assert_eq!(trainer.global_step(), 0);
    // `train` measures these, as v1 did
    trainer.train(&dataset(), |_| Ok::<_, Error>(tracked.clone())).unwrap();
    let metrics = trainer.train(&dataset(), |_| Ok::<_, Error>(constant.clone())).unwrap();
    assert_eq!(metrics.iter().map(|m| m.step).collect::<Vec<_>>(), [5, 6, 7, 8]);
    let want = cross_entropy_loss(&constant, &dataset()[0].1, None).unwrap();
    assert_near(&want, &[metrics[0].loss.into()], 0.0);
    assert_eq!(variables(trainer.lora_adapter()), before);
}

#[test]
fn numbers_that_are_none_change_nothing() {
    let mut trainer = trainer(config(1, 0.1));
    let before = variables(trainer.lora_adapter());
    let error = trainer
        .train_adapter(&dataset(), |adapter, ids| Ok::<_, Error>(logits(adapter, ids)?.affine(f64::NAN, 0.0)?))
        .unwrap_err();
    assert!(matches!(error, Error::Training(TrainingError::Failed { .. })), "{error:?}");
    assert!(error.to_string().contains("the loss is NaN"), "{error}");
    // √ at 0 has an infinite slope; the loss itself is finite
    let adapter = trainer.lora_adapter_mut();
    let error = {
        for (_, layer) in adapter.layers() {
            layer.lora_b().set(&layer.lora_b().zeros_like().unwrap()).unwrap();
        }
        trainer.train_adapter(&dataset(), |adapter, ids| {
            let (batch, seq) = ids.dims2()?;
            let x = tensor(&[batch, seq, WIDTH], 3);
            let delta = adapter.forward(0, &TargetModule::QProj, &x)?.unwrap();
            Ok::<_, Error>(delta.sqr()?.sqrt()?)
        })
    };
    gradient_error(error.unwrap_err(), "the norm of the gradients is NaN");
    for (_, layer) in trainer.lora_adapter().layers() {
        assert!(wide(layer.lora_b_tensor()).iter().all(|v| *v == 0.0));
    }
    assert_eq!(variables(trainer.lora_adapter())[0], before[0]);
    assert_eq!(trainer.global_step(), 0);
}

#[test]
fn configs_that_mean_nothing() {
    let refused = |config: TrainingConfig, lora: &LoRAAdapterConfig, what: &str| {
        let Err(error) = Trainer::new(WIDTH, 12, 1, lora, config, &Device::Cpu) else { panic!("{what}: accepted") };
        let text = error.to_string();
        assert!(text.contains("invalid training configuration") && text.contains(what), "{text}");
    };
    refused(TrainingConfig { max_grad_norm: Some(f32::NAN), ..config(1, 0.1) }, &lora(), "max_grad_norm");
    let optimizer_config = AdamWConfig { beta1: 1.5, ..AdamWConfig::default() };
    refused(TrainingConfig { optimizer_config, ..config(1, 0.1) }, &lora(), "beta1");
    refused(config(1, 0.1), &LoRAAdapterConfig { rank: 0, ..lora() }, "rank must be greater than 0");
}

/// v1 took any schedule: what `LRScheduler::validate` refuses trains with the rates that `get_lr` has.
#[test]
fn schedules_that_v1_took() {
    // the rates of the first three steps
    let schedules = [
        (LRScheduler::linear(0, 0.1), [0.1, 0.1, 0.1]),
        (LRScheduler::constant(0.0), [0.0, 0.0, 0.0]),
        (LRScheduler::cosine(0, 0.1, 0.025), [0.025, 0.025, 0.025]),
        (LRScheduler::cosine(2, 0.025, 0.1), [0.025, 0.0625, 0.1]),
        (LRScheduler::warmup_cosine(2, 1, 0.1, 0.025), [0.0, 0.05, 0.025]),
    ];
    for (lr_scheduler, want) in schedules {
        assert!(lr_scheduler.validate().is_err(), "{lr_scheduler:?}");
        let mut trainer = trainer(TrainingConfig { lr_scheduler: lr_scheduler.clone(), ..config(1, 0.1) });
        let three = dataset().into_iter().cycle().take(3).collect::<Vec<_>>();
        let got: Vec<f32> =
            trainer.train_adapter(&three, logits).unwrap().iter().map(|metrics| metrics.learning_rate).collect();
        assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-7), "{lr_scheduler:?}: {got:?}");
    }
    // rates that would spoil the adapter are errors of the step
    for lr in [f32::NAN, f32::INFINITY, -0.1] {
        let mut trainer = trainer(config(1, lr));
        let before = variables(trainer.lora_adapter());
        let text = trainer.train_adapter(&dataset(), logits).unwrap_err().to_string();
        assert!(text.contains("invalid training configuration") && text.contains("learning rate"), "{text}");
        assert_eq!(variables(trainer.lora_adapter()), before);
    }
}

#[test]
fn the_closures_own_error_comes_back() {
    let mut trainer = trainer(config(1, 0.1));
    let calls = Cell::new(0);
    let error = trainer
        .train(&dataset(), |_| {
            calls.set(calls.get() + 1);
            Err::<Tensor, _>(InferenceError::EndOfSequence { position: 3 })
        })
        .unwrap_err();
    assert!(matches!(error, Error::Inference(InferenceError::EndOfSequence { position: 3 })), "{error:?}");
    assert_eq!(calls.get(), 1);
    let error = trainer.train(&dataset(), |ids| ids.reshape(7)).unwrap_err();
    assert!(matches!(error, Error::Candle(_)), "{error:?}");
    let flat = trainer.train_adapter(&dataset(), |_, _| Ok::<_, Error>(tensor(&[6, WIDTH], 1))).unwrap_err();
    assert!(flat.to_string().contains("logits must be 3-D"), "{flat}");
}

#[test]
fn single_steps() {
    let adapter = LoRAAdapter::new(WIDTH, 12, 1, &lora(), &Device::Cpu).unwrap();
    fill(&adapter);
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let mut step = TrainingStep::new();
    assert_eq!((step.step(), TrainingStep::default().step()), (0, 0));
    let (input, target) = &dataset()[0];
    let mut run = |step: &mut TrainingStep, lr| {
        step.execute(input, target, &adapter, &mut optimizer, lr, |ids| logits(&adapter, ids))
    };
    let before = cross_entropy_loss(&logits(&adapter, input).unwrap(), target, None).unwrap();
    let first = run(&mut step, 0.05).unwrap();
    assert_near(&before, &[first.loss.into()], 0.0);
    assert_eq!((first.step, first.learning_rate, step.step()), (1, 0.05, 1));
    let second = run(&mut step, 0.01).unwrap();
    assert!(second.loss < first.loss);
    assert_eq!((second.step, second.learning_rate), (2, 0.01));
    for lr in [f32::NAN, -0.1, f32::INFINITY] {
        let text = run(&mut step, lr).unwrap_err().to_string();
        assert!(
            text.contains("invalid training configuration") && text.contains("the learning rate must be"),
            "{text}"
        );
    }
    assert_eq!(step.step(), 2);
    step.reset();
    assert_eq!(step.step(), 0);
    assert_eq!(run(&mut step, 0.01).unwrap().step, 1);
    // two projections of A and B each, three times
    assert_eq!((optimizer.step_count(), optimizer.learning_rate()), (12, 0.01));
}

#[test]
fn ignored_targets_do_not_count() {
    let adapter = LoRAAdapter::new(WIDTH, 12, 1, &lora(), &Device::Cpu).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig::default()).unwrap();
    let targets = ids([[1, u32::MAX, 3], [u32::MAX, 5, 6]]);
    let (input, forward) = (&dataset()[0].0, |ids: &Tensor| logits(&adapter, ids));
    let loss = cross_entropy_loss(&forward(input).unwrap(), &targets, Some(u32::MAX)).unwrap();
    let metrics = TrainingStep::new().execute(input, &targets, &adapter, &mut optimizer, 0.1, forward).unwrap();
    assert_near(&loss, &[metrics.loss.into()], 0.0);
}
