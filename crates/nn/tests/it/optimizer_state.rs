//! An optimiser's state in a file: going on from it gives the bits of a run without interruption.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::{text, Rng};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::optim::{Lion, LrSchedule, Optimizer, OptimizerOptions, ParamGroup, ParamsAdamW, Rule, Sgd};
use candle_lazy_nn::params::{Gradients, Params};
use candle_lazy_nn::{Error, LazyTensor};

const CPU: Device = Device::Cpu;
const ADAM: ParamsAdamW = ParamsAdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

/// A line through 16 points of 5 dims: `line.weight` (5), `line.bias` (1) in f64, `line.frozen`.
struct Problem {
    params: Params,
    xs: LazyTensor,
    ys: LazyTensor,
}

impl Problem {
    fn new() -> Self {
        let mut rng = Rng::new(1);
        let mut params = Params::new();
        params.insert("line.weight", rng.tensor(&[5, 1], 1.).unwrap()).unwrap();
        params.insert("line.bias", Tensor::new(&[0.5f64], &CPU).unwrap()).unwrap();
        params.insert("line.frozen", Tensor::new(&[1f32], &CPU).unwrap()).unwrap();
        params.freeze("*.frozen").unwrap();
        let (xs, ys) = (rng.tensor(&[16, 5], 1.).unwrap(), rng.tensor(&[16, 1], 1.).unwrap());
        Self { params, xs: xs.into(), ys: ys.into() }
    }

    /// Of Σ(x·w + b − y)²/2: Xᵀ·(residual) and its sum.
    fn grads(&self) -> Gradients {
        let value = |name: &str| self.params.get(name).unwrap().value();
        let bias = value("line.bias").to_dtype(DType::F32).unwrap();
        let line = self.xs.matmul(&value("line.weight")).unwrap().broadcast_add(&bias).unwrap();
        let residual = line.sub(&self.ys).unwrap();
        let weight = self.xs.t().unwrap().matmul(&residual).unwrap();
        let bias = residual.sum_all().unwrap().reshape(1).unwrap().to_dtype(DType::F64).unwrap();
        Gradients::of(&self.params, [bias, weight]).unwrap()
    }

    fn train(&self, optimizer: &mut Optimizer, steps: usize) {
        for _ in 0..steps {
            optimizer.step(self.grads(), &[]).unwrap();
        }
    }

    /// The bits of all parameters.
    fn bits(&self) -> Vec<u64> {
        let wide = |value: LazyTensor| value.eval().unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        self.params.iter().flat_map(|p| wide(p.value()).to_vec1::<f64>().unwrap()).map(f64::to_bits).collect()
    }
}

fn options() -> OptimizerOptions {
    OptimizerOptions {
        groups: vec![ParamGroup { weight_decay: Some(0.), lr_scale: 0.5, ..ParamGroup::new("*.bias") }],
        clip_norm: Some(1.),
        schedule: Some(LrSchedule::WarmupCosine { warmup_steps: 10, total_steps: 90, max_lr: 0.02, min_lr: 0.001 }),
        ..OptimizerOptions::default()
    }
}

fn rules() -> [Rule; 5] {
    let sgd = Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.01, ..Sgd::default() };
    let lion = Lion { weight_decay: 0.1, ..Lion::default() };
    [Rule::Sgd(Sgd::default()), Rule::Sgd(sgd), Rule::Adam(ADAM), Rule::AdamW(ADAM), Rule::Lion(lion)]
}

#[test]
fn fifty_steps_a_file_and_fifty_more_are_a_hundred_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (values, state) = (dir.path().join("params.safetensors"), dir.path().join("state.safetensors"));
    for rule in rules() {
        let whole = Problem::new();
        let started = whole.bits();
        let mut optimizer = Optimizer::new(&whole.params, rule.clone(), options()).unwrap();
        whole.train(&mut optimizer, 100);
        let first = Problem::new();
        let mut optimizer = Optimizer::new(&first.params, rule.clone(), options()).unwrap();
        first.train(&mut optimizer, 50);
        let halfway = first.bits();
        first.params.save(&values).unwrap();
        optimizer.save(&state).unwrap();
        // saving is no step: the run that goes on is the same too
        first.train(&mut optimizer, 50);
        assert_eq!(first.bits(), whole.bits(), "{rule:?}");
        let second = Problem::new();
        let mut optimizer = Optimizer::new(&second.params, rule.clone(), options()).unwrap();
        second.params.load(&values).unwrap();
        optimizer.load(&state).unwrap();
        assert_eq!((optimizer.steps(), second.bits()), (50, halfway.clone()), "{rule:?}");
        second.train(&mut optimizer, 50);
        assert_eq!((optimizer.steps(), second.bits()), (100, whole.bits()), "{rule:?}");
        assert!(started != halfway && halfway != whole.bits(), "{rule:?} moves");
        // without the state it is another run, but for the rule that keeps none
        let third = Problem::new();
        third.params.load(&values).unwrap();
        let mut optimizer = Optimizer::new(&third.params, rule.clone(), OptimizerOptions::default()).unwrap();
        third.train(&mut optimizer, 50);
        assert_ne!(third.bits(), whole.bits(), "{rule:?}");
    }
}

#[test]
fn a_file_that_is_not_this_optimizers_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state.safetensors");
    let problem = Problem::new();
    let mut optimizer = Optimizer::new(&problem.params, Rule::AdamW(ADAM), options()).unwrap();
    problem.train(&mut optimizer, 2);
    optimizer.save(&state).unwrap();
    let mut lion = Optimizer::new(&problem.params, Rule::Lion(Lion::default()), options()).unwrap();
    let error = text(lion.load(&state));
    let wanted = "state.safetensors is not a valid optimizer state file: it is of the rule `adamw`, here it is `lion`";
    assert!(error.ends_with(wanted), "{error}");
    // of another model: a parameter that is not here
    let mut others = Params::new();
    others.insert("line.weight", Tensor::zeros((5, 1), DType::F32, &CPU).unwrap()).unwrap();
    let mut optimizer = Optimizer::new(&others, Rule::AdamW(ADAM), OptimizerOptions::default()).unwrap();
    assert!(text(optimizer.load(&state)).ends_with("nothing here is called `line.bias`"));
    // of another shape, and of another dtype
    let with = |weight: Tensor, bias: Tensor| {
        let mut params = Params::new();
        params.insert("line.weight", weight).unwrap();
        params.insert("line.bias", bias).unwrap();
        let mut optimizer = Optimizer::new(&params, Rule::AdamW(ADAM), OptimizerOptions::default()).unwrap();
        let error = text(optimizer.load(&state));
        assert_eq!(optimizer.steps(), 0);
        error
    };
    let (weight, bias) = (Tensor::zeros((5, 1), DType::F32, &CPU).unwrap(), Tensor::new(&[0f64], &CPU).unwrap());
    let error = with(weight.t().unwrap(), bias.clone());
    assert!(
        error.contains("`line.weight.exp_avg`") && error.ends_with("expected shape [1, 5], found [5, 1]"),
        "{error}"
    );
    let error = with(weight, bias.to_dtype(DType::F32).unwrap());
    assert!(error.contains("`line.bias.exp_avg`") && error.ends_with("expected F32, found F64"), "{error}");
    // what is no state: the parameters
    problem.params.save(&state).unwrap();
    let mut optimizer = Optimizer::new(&problem.params, Rule::AdamW(ADAM), options()).unwrap();
    assert!(text(optimizer.load(&state)).ends_with("the header has no entry `rule`"));
    let absent = dir.path().join("absent").join("state.safetensors");
    assert!(matches!(optimizer.save(absent), Err(Error::Io { .. })));
}

#[test]
fn headers_that_say_nonsense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state.safetensors");
    let problem = Problem::new();
    let mut optimizer = Optimizer::new(&problem.params, Rule::Sgd(Sgd::default()), options()).unwrap();
    for (entries, message) in [
        (vec![("rule", "sgd")], "the header has no entry `steps`"),
        (vec![("rule", "sgd"), ("steps", "x")], "entry `steps`: invalid digit"),
        (vec![("rule", "sgd"), ("steps", "3"), ("updates", "[]")], "entry `updates`: invalid type"),
    ] {
        let entries = entries.into_iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
        candle_lazy_nn::weights::save_safetensors(&state, &Default::default(), &entries).unwrap();
        let error = text(optimizer.load(&state));
        assert!(error.contains(message), "{error}");
        assert_eq!(optimizer.steps(), 0);
    }
}
