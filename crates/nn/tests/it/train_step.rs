//! Steps of a LoRA training: data, forward, loss, gradients by the graph transform, optimiser.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::{builder, decoder_vars, text, tiny_config, Rng};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::{grad, RandomKey};
use candle_lazy_nn::data::{Batch, Batches, Document, Packing, Rows};
use candle_lazy_nn::loss::{token_cross_entropy, TokenLoss, TokenLossOptions};
use candle_lazy_nn::models::CausalLm;
use candle_lazy_nn::optim::{OnNonFinite, Optimizer, OptimizerOptions, ParamsAdamW, Rule};
use candle_lazy_nn::params::Gradients;
use candle_lazy_nn::train::{Trainer, TrainerOptions};
use candle_lazy_nn::{Error, LazyTensor, LoraAdapter, LoraConfig, LoraTargets};

fn model() -> CausalLm {
    let config = tiny_config();
    CausalLm::load(builder(&decoder_vars(&config, 1).unwrap()), &config).unwrap()
}

/// Eight texts of 5 to 9 tokens, a quarter of each its prompt.
fn rows() -> Rows {
    let mut rng = Rng::new(2);
    let documents: Vec<Document> =
        (0..8).map(|at| Document::with_prompt(rng.ids(5 + at % 5, 61), 2).unwrap()).collect();
    let rows = Rows::pack(&documents, 10, &Packing::Documents { end: Some(2), pad: 0 }).unwrap();
    rows.check(64, 61).unwrap();
    rows
}

fn loss(model: &CausalLm, batch: &Batch, options: &TokenLossOptions) -> TokenLoss {
    let at = model.positions(batch.inputs.dims()[1]).unwrap();
    let logits = model.forward_causal(&batch.inputs, &at).unwrap();
    token_cross_entropy(&logits, &batch.targets, Some(&batch.weights), options).unwrap()
}

fn scalar(value: &LazyTensor) -> f64 {
    value.eval().unwrap().to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

#[test]
fn the_gradient_of_the_token_loss_is_softmax_minus_target() {
    const TARGETS: [i64; 4] = [3, -100, 0, 4];
    let values = Rng::new(1).tensor(&[4, 5], 3.).unwrap();
    for smoothing in [0., 0.2] {
        let options = TokenLossOptions { label_smoothing: smoothing, ..TokenLossOptions::default() };
        let logits = LazyTensor::from(values.clone()).variable().unwrap();
        let targets = LazyTensor::new(&TARGETS, &Device::Cpu).unwrap();
        let mean = token_cross_entropy(&logits, &targets, None, &options).unwrap().mean().unwrap();
        let got = grad(&mean, &[&logits]).unwrap()[0].to_vec2::<f32>().unwrap();
        for ((got, row), target) in got.iter().zip(values.to_vec2::<f32>().unwrap()).zip(TARGETS) {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            for (class, (got, x)) in (0i64..).zip(got.iter().zip(&row)) {
                let share = if class == target { 1. - smoothing } else { 0. } + smoothing / 5.;
                let want = if target == -100 { 0. } else { (f64::from(*x).exp() / sum - share) / 3. };
                assert!((f64::from(*got) - want).abs() < 1e-7, "{got} {want}");
            }
        }
    }
}

#[test]
fn a_step_is_one_plan_and_the_loss_falls() {
    let (mut model, rows) = (model(), rows());
    let config = LoraConfig { dropout: 0.1, targets: LoraTargets::AllLinear, ..LoraConfig::default() };
    let adapter = LoraAdapter::attach(&mut model, &config, 7).unwrap();
    let rule = Rule::AdamW(ParamsAdamW { lr: 0.02, ..ParamsAdamW::default() });
    let options = OptimizerOptions { clip_norm: Some(1.), ..OptimizerOptions::default() };
    let mut optimizer = Optimizer::new(adapter.params(), rule, options).unwrap();
    let whole = rows.batch(&(0..rows.count()).collect::<Vec<_>>(), &Device::Cpu).unwrap();
    let smooth = TokenLossOptions { label_smoothing: 0.05, ..TokenLossOptions::default() };
    let measure = || scalar(&loss(&model, &whole, &TokenLossOptions::default()).mean().unwrap());
    let before = measure();
    let mut batches = Batches::new(rows.count(), 4, 3).unwrap();
    for step in 0..30 {
        adapter.train(RandomKey::new(5).fold_in(step));
        let batch = rows.batch(&batches.of_step(step), &Device::Cpu).unwrap();
        let mean = loss(&model, &batch, &smooth).mean().unwrap();
        let grads = adapter.params().grad(&mean).unwrap();
        let report = optimizer.step(grads, &[&mean]).unwrap();
        assert!(mean.is_ready() && report.norm.unwrap() > 0.);
        assert!(step == 0 || report.eval.cache_hit, "step {step}: {}", report.eval);
    }
    adapter.eval();
    let after = measure();
    assert!(after < 0.5 * before, "{before} {after}");
}

#[test]
fn parts_of_a_batch_give_the_gradients_of_the_whole() {
    let (mut model, rows) = (model(), rows());
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig::default(), 7).unwrap();
    let mut rng = Rng::new(9);
    for param in adapter.params().matching("*.lora_B.weight").unwrap() {
        param.set(rng.tensor(param.shape().dims(), 0.3).unwrap()).unwrap();
    }
    let options = TokenLossOptions::default();
    let of = |at: &[usize]| loss(&model, &rows.batch(at, &Device::Cpu).unwrap(), &options);
    let whole = adapter.params().grad(&of(&[0, 1, 2, 3, 4]).mean().unwrap()).unwrap();
    let (mut sums, mut weight) = (Gradients::new(), 0.);
    for part in [&[0, 1][..], &[2, 3], &[4]] {
        // sums, not means: parts may have more or fewer targets
        let part = of(part);
        weight += part.weight;
        sums.accumulate(adapter.params().grad(&part.sum).unwrap(), &[&part.sum]).unwrap();
    }
    let means = sums.scaled(1. / weight).unwrap();
    let flat = |grad: &LazyTensor| -> Tensor { grad.eval().unwrap().flatten_all().unwrap() };
    for ((name, whole), (other, parts)) in whole.iter().zip(means.iter()) {
        assert_eq!(name, other);
        let (whole, parts) = (flat(whole), flat(parts));
        crate::common::close(&parts, &whole, 1e-4).unwrap();
        assert!(whole.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-5);
    }
}

fn optimizer(adapter: &LoraAdapter, on_non_finite: OnNonFinite) -> Optimizer {
    let rule = Rule::AdamW(ParamsAdamW { lr: 0.02, ..ParamsAdamW::default() });
    let options = OptimizerOptions { clip_norm: Some(1.), on_non_finite, ..OptimizerOptions::default() };
    Optimizer::new(adapter.params(), rule, options).unwrap()
}

fn bits(adapter: &LoraAdapter) -> Vec<u32> {
    let values = adapter.params().iter().map(|param| param.value().eval().unwrap().flatten_all().unwrap());
    values.flat_map(|value| value.to_vec1::<f32>().unwrap()).map(f32::to_bits).collect()
}

#[test]
fn a_training_goes_on_from_a_checkpoint_bit_for_bit() {
    let (rows, dir) = (rows(), tempfile::tempdir().unwrap());
    let config = LoraConfig { dropout: 0.2, ..LoraConfig::default() };
    for accumulate in [1, 2] {
        let options = TrainerOptions { batch: 3, accumulate, ..TrainerOptions::default() };
        let (mut whole, mut first, mut second) = (model(), model(), model());
        let adapters = [&mut whole, &mut first, &mut second].map(|m| LoraAdapter::attach(m, &config, 7).unwrap());
        let trainer = |model, adapter| {
            Trainer::new(model, adapter, &rows, optimizer(adapter, OnNonFinite::Stop), options).unwrap()
        };
        let mut all = trainer(&whole, &adapters[0]);
        assert_eq!(all.steps_per_epoch(), [3, 2][accumulate - 1]);
        let losses: Vec<f64> = (0..10).map(|_| all.step().unwrap().loss).collect();
        let checkpoint = dir.path().join(format!("checkpoint-{accumulate}"));
        let mut before = trainer(&first, &adapters[1]);
        for loss in &losses[..5] {
            assert_eq!(before.step().unwrap().loss, *loss);
        }
        before.save(&checkpoint).unwrap();
        assert!(matches!(before.save(&checkpoint), Err(Error::Io { .. })), "a checkpoint is not written over");
        let mut after = trainer(&second, &adapters[2]);
        after.resume(&checkpoint).unwrap();
        for loss in &losses[5..] {
            let step = after.step().unwrap();
            assert_eq!(step.loss, *loss);
            assert_eq!((step.lr, step.skipped), (0.02, None));
        }
        assert_eq!(after.optimizer().steps(), 10);
        assert_eq!(bits(&adapters[2]), bits(&adapters[0]));
        assert_ne!(bits(&adapters[1]), bits(&adapters[0]));
        // of another training: nothing changes
        let other = TrainerOptions { seed: 1, ..options };
        let mut third = model();
        let adapter = LoraAdapter::attach(&mut third, &config, 7).unwrap();
        let started = bits(&adapter);
        let mut trainer = Trainer::new(&third, &adapter, &rows, optimizer(&adapter, OnNonFinite::Stop), other).unwrap();
        assert!(text(trainer.resume(&checkpoint)).contains("it is of another training: Progress { batches: "));
        // the same tensors, scaled by something else, would go on somewhere else
        let scaled = LoraConfig { alpha: config.alpha + 1.0, ..config.clone() };
        let mut fourth = model();
        let elsewhere = LoraAdapter::attach(&mut fourth, &scaled, 7).unwrap();
        let by = optimizer(&elsewhere, OnNonFinite::Stop);
        let error = text(Trainer::new(&fourth, &elsewhere, &rows, by, options).unwrap().resume(&checkpoint));
        assert!(error.contains(&format!("alpha {:?}", config.alpha)), "{error}");
        assert!(error.contains(&format!("alpha {:?}", scaled.alpha)), "{error}");
        assert_eq!(bits(&elsewhere), started);
        std::fs::remove_file(checkpoint.join("optimizer.safetensors")).unwrap();
        let mut trainer =
            Trainer::new(&third, &adapter, &rows, optimizer(&adapter, OnNonFinite::Stop), options).unwrap();
        assert!(matches!(trainer.resume(&checkpoint), Err(Error::Io { .. })));
        assert_eq!(bits(&adapter), started);
    }
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 2, "nothing unfinished is left behind");
}

#[test]
fn a_training_lowers_the_loss_and_measures_without_dropout() {
    let (mut model, rows) = (model(), rows());
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig { dropout: 0.2, ..LoraConfig::default() }, 7).unwrap();
    let options = TrainerOptions { batch: 4, accumulate: 2, ..TrainerOptions::default() };
    let mut trainer = Trainer::new(&model, &adapter, &rows, optimizer(&adapter, OnNonFinite::Stop), options).unwrap();
    let before = trainer.evaluate(&rows).unwrap();
    let whole = rows.batch(&(0..rows.count()).collect::<Vec<_>>(), &Device::Cpu).unwrap();
    let want = scalar(&loss(&model, &whole, &TokenLossOptions::default()).mean().unwrap());
    assert!((before - want).abs() < 1e-5 * want);
    for step in 1..=20 {
        let report = trainer.step().unwrap();
        assert_eq!((report.step, report.positions), (step, 80));
        assert!(report.norm.unwrap() > 0. && report.loss > 0.);
    }
    let after = trainer.evaluate(&rows).unwrap();
    assert!(after < 0.7 * before, "{before} {after}");
    assert_eq!(trainer.evaluate(&rows).unwrap(), after);
}

#[test]
fn a_training_step_writes_in_place() {
    let (mut model, rows) = (model(), rows());
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig { dropout: 0.2, ..LoraConfig::default() }, 7).unwrap();
    for accumulate in [1, 2] {
        let options = TrainerOptions { batch: 4, accumulate, ..TrainerOptions::default() };
        let mut trainer =
            Trainer::new(&model, &adapter, &rows, optimizer(&adapter, OnNonFinite::Stop), options).unwrap();
        for step in 0..3 {
            let report = trainer.step().unwrap().eval;
            // a parameter and its two moments; where parts are added up, their sums too
            let sums = (accumulate - 1) * adapter.params().len();
            assert_eq!(report.in_place, 3 * adapter.params().len() + sums, "step {step}: {report}");
        }
    }
}

#[test]
fn a_loss_that_is_no_number_is_named_or_skipped() {
    let rows = rows();
    let config = tiny_config();
    let mut vars = decoder_vars(&config, 1).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let spoilt = (vars[name].zeros_like().unwrap() + f64::NAN).unwrap();
    vars.insert(name.to_string(), spoilt);
    let mut model = CausalLm::load(builder(&vars), &config).unwrap();
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig::default(), 7).unwrap();
    let started = bits(&adapter);
    let options = TrainerOptions::default();
    let mut trainer = Trainer::new(&model, &adapter, &rows, optimizer(&adapter, OnNonFinite::Stop), options).unwrap();
    let error = text(trainer.step());
    assert!(error.starts_with("step 0: the gradient of `base_model.model.model.layers.0.self_attn."), "{error}");
    assert!(error.contains("the first such number of the loss is the leaf f32 [40, 24]"), "{error}");
    let mut trainer = Trainer::new(&model, &adapter, &rows, optimizer(&adapter, OnNonFinite::Skip), options).unwrap();
    let step = trainer.step().unwrap();
    assert!(step.skipped.is_some() && step.loss.is_nan() && step.step == 0);
    assert_eq!(bits(&adapter), started);
    let new = |options: TrainerOptions| {
        text(Trainer::new(&model, &adapter, &rows, optimizer(&adapter, OnNonFinite::Stop), options))
    };
    assert!(new(TrainerOptions { accumulate: 0, ..options }).contains("a step of no batches"));
    assert!(new(TrainerOptions { batch: 0, ..options }).contains("both must be above 0"));
}
