//! `training`: low-rank layers, losses, the optimiser's step, schedules, and a step of the training loop.

use super::ops::{lora, product, LOW_RANK, SCALING};
use super::{Call, Dtypes};
use candle_core::{DType, Result, Tensor, Var};
use candle_lazy_compat::graph::LazyTensor;
use candle_lazy_compat::training::{
    cross_entropy_loss, cross_entropy_loss_with_smoothing, AdamW, AdamWConfig, LRScheduler, LoRAAdapter,
    LoRAAdapterConfig, LoRAConfig, LoRALayer, TargetModule, Trainer, TrainingConfig, TrainingStep,
};
use candle_lazy_compat::Result as Compat;

const RANK: usize = 4;

/// A layer with these factors, as v1's users set them.
fn layer(a: &Tensor, b: &Tensor) -> Compat<LoRALayer> {
    let config = LoRAConfig { rank: RANK, alpha: SCALING * RANK as f32, dropout: 0.0 };
    let layer = LoRALayer::new(a.dim(0)?, b.dim(1)?, &config, a.device())?;
    layer.lora_a().set(&a.detach())?;
    layer.lora_b().set(&b.detach())?;
    Ok(layer)
}

/// An adapter of one layer whose down projection (12 to 8) has these factors.
fn adapter(a: &Tensor, b: &Tensor) -> Compat<LoRAAdapter> {
    let config = LoRAAdapterConfig {
        rank: RANK,
        alpha: SCALING * RANK as f32,
        dropout: 0.0,
        target_modules: vec![TargetModule::DownProj],
    };
    let adapter = LoRAAdapter::new(8, 12, 1, &config, a.device())?;
    for (_, layer) in adapter.layers() {
        layer.lora_a().set(&a.detach())?;
        layer.lora_b().set(&b.detach())?;
    }
    Ok(adapter)
}

/// Targets (2, 3) below five classes; class 9 stands for what is ignored.
fn targets(x: &Tensor) -> Result<Tensor> {
    Tensor::new(&[[0u32, 4, 9], [2, 2, 1]], x.device())
}

/// −log softmax of the last dim.
fn nll(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(2)?)?;
    shifted.exp()?.sum_keepdim(2)?.log()?.broadcast_sub(&shifted)
}

/// The mean of −log softmax at the targets that count.
fn entropy(x: &Tensor) -> Result<Tensor> {
    let chosen = [(0, 0, 0), (0, 1, 4), (1, 0, 2), (1, 1, 2), (1, 2, 1)];
    let all = nll(x)?;
    let terms = chosen.iter().map(|&(b, s, c)| all.get(b)?.get(s)?.get(c)).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&terms, 0)?.mean_all()
}

fn adamw_config() -> AdamWConfig {
    AdamWConfig { learning_rate: 0.1, beta1: 0.75, beta2: 0.875, epsilon: 0.015625, weight_decay: 0.25 }
}

/// Targets (2, 3) below eight classes; the highest number stands for what is ignored.
fn step_targets(x: &Tensor) -> Result<Tensor> {
    Tensor::new(&[[0u32, 7, u32::MAX], [2, 5, 1]], x.device())
}

/// The largest norm of the gradients in [`Trainer::train`]: smaller than theirs.
const MAX_NORM: f32 = 0.0625;

/// What the adapter's layer gives is taken for logits: their loss, and A and B after one step of AdamW.
fn stepped(x: &[Tensor], max_norm: Option<f64>) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let (a, b) = (Var::from_tensor(&x[1])?, Var::from_tensor(&x[2])?);
    let logits = &lora(&[x[0].clone(), a.as_tensor().clone(), b.as_tensor().clone()])?.0[0];
    let chosen = [(0, 0, 0), (0, 1, 7), (1, 0, 2), (1, 1, 5), (1, 2, 1)];
    let all = nll(logits)?;
    let terms = chosen.iter().map(|&(b, s, c)| all.get(b)?.get(s)?.get(c)).collect::<Result<Vec<_>>>()?;
    let loss = Tensor::stack(&terms, 0)?.mean_all()?;
    let store = loss.backward()?;
    let of = |var: &Var| store.get(var).cloned().ok_or_else(|| candle_core::Error::Msg("no gradient".into()));
    let mut gradients = vec![of(&a)?, of(&b)?];
    if let Some(max_norm) = max_norm {
        let mut sum = 0.0;
        for gradient in &gradients {
            sum += gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
        }
        let scale = max_norm / (sum.sqrt() + 1e-6);
        gradients = gradients.iter().map(|gradient| gradient * scale).collect::<Result<_>>()?;
    }
    let c = adamw_config();
    let (lr, decay) = (f64::from(c.learning_rate), f64::from(c.weight_decay));
    let (mut values, mut sizes) = (vec![loss.detach()], vec![loss.detach()]);
    for (value, gradient) in x[1..].iter().zip(&gradients) {
        // at the first step the corrected means are g and g²
        let step = (gradient.div(&(gradient.abs()? + f64::from(c.epsilon))?)? * lr)?;
        values.push(((value * (1.0 - lr * decay))? - &step)?);
        // the quotient multiplies the gradient's error by up to 1/ε
        sizes.push(((value.abs()? + step.abs()?)? + lr)?);
    }
    Ok((values, sizes))
}

/// The loss, and the adapter's variables.
fn after(loss: f32, adapter: &LoRAAdapter) -> Compat<Vec<Tensor>> {
    let mut all = Vec::new();
    for (_, layer) in adapter.layers() {
        all.push(Tensor::new(loss, layer.lora_a().device())?);
        all.extend([layer.lora_a().as_detached_tensor(), layer.lora_b().as_detached_tensor()]);
    }
    Ok(all)
}

fn logits_of(adapter: &LoRAAdapter, x: &Tensor) -> Compat<Tensor> {
    let logits = adapter.forward(0, &TargetModule::DownProj, x)?;
    Ok(logits.ok_or_else(|| candle_core::Error::Msg("the layer is missing".into()))?)
}

const SCHEDULES: [LRScheduler; 4] = [
    LRScheduler::constant(0.5),
    LRScheduler::linear(4, 0.5),
    LRScheduler::cosine(6, 0.5, 0.125),
    LRScheduler::warmup_cosine(3, 7, 0.5, 0.125),
];

/// The rates of [`SCHEDULES`] at the steps 0 to 8, by v1's formulas.
fn rates() -> Vec<f64> {
    let cosine = |done: f64| 0.125 + (0.5 - 0.125) * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
    let mut all = vec![0.5; 9];
    let steps = || (0..9).map(f64::from);
    all.extend(steps().map(|step| 0.5 * (step / 4.0).min(1.0)));
    all.extend(steps().map(|step| cosine(step / 6.0)));
    all.extend(steps().map(|step| if step < 3.0 { 0.5 * step / 3.0 } else { cosine((step - 3.0) / 4.0) }));
    all
}

const LOGITS: &[&[usize]] = &[&[2, 3, 5]];
/// The parameter and two gradients.
const PARAMETER: &[&[usize]] = &[&[3, 4], &[3, 4], &[3, 4]];
/// x (…, 12), A, B.
const DOWN: &[&[usize]] = &[&[2, 3, 12], &[12, 4], &[4, 8]];

pub(super) const CALLS: &[Call] = &[
    Call {
        name: "LoRALayer::forward(x)",
        inputs: LOW_RANK,
        dtypes: Dtypes::F32,
        ours: |x| Ok(vec![layer(&x[1], &x[2])?.forward(&x[0])?]),
        formula: lora,
        roundings: 2.0,
        gradients: false,
    },
    Call {
        name: "LoRALayer::forward_lazy(x)?.eval()",
        inputs: LOW_RANK,
        dtypes: Dtypes::F32,
        ours: |x| Ok(vec![layer(&x[1], &x[2])?.forward_lazy(&LazyTensor::from_tensor(x[0].clone())?)?.eval()?]),
        formula: lora,
        roundings: 2.0,
        gradients: false,
    },
    Call {
        name: "LoRALayer's gradients of x, A and B",
        inputs: LOW_RANK,
        dtypes: Dtypes::F32,
        ours: |x| {
            let layer = layer(&x[1], &x[2])?;
            let input = candle_core::Var::from_tensor(&x[0])?;
            let store = layer.forward(&input)?.sqr()?.sum_all()?.backward()?;
            let of = |tensor: &Tensor| store.get(tensor).cloned().ok_or(candle_core::Error::Msg("no gradient".into()));
            Ok(vec![of(&input)?, of(layer.lora_a_tensor())?, of(layer.lora_b_tensor())?])
        },
        formula: |x| {
            // y = x·A·B·s, loss Σy²: with g = 2y·s, the gradients are g·Bᵀ·Aᵀ, xᵀ·(g·Bᵀ), (x·A)ᵀ·g
            let s = f64::from(SCALING);
            let gradients = |x: &Tensor, a: &Tensor, b: &Tensor| -> Result<Vec<Tensor>> {
                let rows = x.flatten_to(1)?.contiguous()?;
                let hidden = rows.matmul(a)?;
                let g = (hidden.matmul(b)? * (2.0 * s * s))?;
                let back = g.matmul(&b.t()?.contiguous()?)?;
                let dx = back.matmul(&a.t()?.contiguous()?)?.reshape(x.shape())?;
                Ok(vec![dx, rows.t()?.contiguous()?.matmul(&back)?, hidden.t()?.contiguous()?.matmul(&g)?])
            };
            let magnitudes = gradients(&x[0].abs()?, &x[1].abs()?, &x[2].abs()?)?;
            Ok((gradients(&x[0], &x[1], &x[2])?, magnitudes))
        },
        roundings: 4.0,
        gradients: false,
    },
    Call {
        name: "LoRAAdapter::forward(0, DownProj, x)",
        inputs: DOWN,
        dtypes: Dtypes::F32,
        ours: |x| {
            let delta = adapter(&x[1], &x[2])?.forward(0, &TargetModule::DownProj, &x[0])?;
            Ok(delta.into_iter().collect())
        },
        formula: lora,
        roundings: 2.0,
        gradients: false,
    },
    Call {
        name: "LoRAAdapter::merge_weights(base, 0, DownProj)",
        inputs: &[&[8, 12], &[12, 4], &[4, 8]],
        dtypes: Dtypes::F32,
        ours: |x| Ok(vec![adapter(&x[1], &x[2])?.merge_weights(&x[0], 0, &TargetModule::DownProj)?]),
        formula: |x| {
            let merged = |base: &Tensor, a: &Tensor, b: &Tensor| -> Result<Tensor> {
                base + (product(a, b)?.t()? * f64::from(SCALING))?
            };
            let magnitude = merged(&x[0].abs()?, &x[1].abs()?, &x[2].abs()?)?;
            Ok((vec![merged(&x[0], &x[1], &x[2])?], vec![magnitude]))
        },
        roundings: 3.0,
        gradients: false,
    },
    Call {
        name: "cross_entropy_loss(logits, targets, Some(9))",
        inputs: LOGITS,
        dtypes: Dtypes::Floats,
        ours: |x| Ok(vec![cross_entropy_loss(&x[0], &targets(&x[0])?, Some(9))?]),
        formula: |x| Ok((vec![entropy(&x[0])?], Vec::new())),
        roundings: 4.0,
        gradients: true,
    },
    Call {
        name: "cross_entropy_loss_with_smoothing(logits, targets, 0.25, Some(9))",
        inputs: LOGITS,
        dtypes: Dtypes::Floats,
        ours: |x| Ok(vec![cross_entropy_loss_with_smoothing(&x[0], &targets(&x[0])?, 0.25, Some(9))?]),
        // the uniform part counts all positions, ignored ones included
        formula: |x| Ok((vec![((entropy(&x[0])? * 0.75)? + (nll(&x[0])?.mean_all()? * 0.25)?)?], Vec::new())),
        roundings: 6.0,
        gradients: true,
    },
    Call {
        name: "AdamW, two steps of a named parameter",
        inputs: PARAMETER,
        dtypes: Dtypes::F32,
        ours: |x| {
            let mut optimizer = AdamW::new(adamw_config())?;
            optimizer.add_parameter("w", &x[0])?;
            let first = optimizer.step("w", &x[0], &x[1])?;
            let second = optimizer.step("w", &first, &x[2])?;
            Ok(vec![first, second])
        },
        formula: |x| {
            let c = adamw_config();
            let (lr, b1, b2) = (f64::from(c.learning_rate), f64::from(c.beta1), f64::from(c.beta2));
            let (eps, decay) = (f64::from(c.epsilon), f64::from(c.weight_decay));
            let (mut theta, mut m, mut v) = (x[0].clone(), x[0].zeros_like()?, x[0].zeros_like()?);
            let (mut values, mut magnitudes) = (Vec::new(), Vec::new());
            for (t, g) in [(1, &x[1]), (2, &x[2])] {
                m = ((m * b1)? + (g * (1.0 - b1))?)?;
                v = ((v * b2)? + (g.sqr()? * (1.0 - b2))?)?;
                let root = ((&v / (1.0 - b2.powi(t)))?.sqrt()? + eps)?;
                let step = ((&m / (1.0 - b1.powi(t)))?.div(&root)? * lr)?;
                magnitudes.push(((theta.abs()? * (1.0 + lr * decay))? + step.abs()?)?);
                theta = ((&theta - step)? - (&theta * (lr * decay))?)?;
                values.push(theta.clone());
            }
            Ok((values, magnitudes))
        },
        roundings: 6.0,
        gradients: false,
    },
    Call {
        name: "AdamW::step_var",
        inputs: &[&[3, 4], &[3, 4]],
        dtypes: Dtypes::F32,
        ours: |x| {
            let mut optimizer = AdamW::new(adamw_config())?;
            let var = candle_core::Var::from_tensor(&x[0])?;
            optimizer.step_var(&var, &x[1])?;
            Ok(vec![var.as_detached_tensor()])
        },
        formula: |x| {
            let c = adamw_config();
            // at the first step the corrected means are g and g²
            let root = (x[1].abs()? + f64::from(c.epsilon))?;
            let step = (x[1].div(&root)? * f64::from(c.learning_rate))?;
            let kept = 1.0 - f64::from(c.learning_rate) * f64::from(c.weight_decay);
            Ok((vec![((&x[0] * kept)? - &step)?], vec![(x[0].abs()? + step.abs()?)?]))
        },
        roundings: 6.0,
        gradients: false,
    },
    Call {
        name: "TrainingStep::execute: the loss, A and B",
        inputs: DOWN,
        dtypes: Dtypes::F32,
        ours: |x| {
            let (adapter, mut optimizer) = (adapter(&x[1], &x[2])?, AdamW::new(adamw_config())?);
            let (rate, targets) = (adamw_config().learning_rate, step_targets(&x[0])?);
            let done = TrainingStep::new()
                .execute(&x[0], &targets, &adapter, &mut optimizer, rate, |x| logits_of(&adapter, x))?;
            after(done.loss, &adapter)
        },
        formula: |x| stepped(x, None),
        roundings: 12.0,
        gradients: false,
    },
    Call {
        name: "Trainer::train, one step of clipped gradients: the loss, A and B",
        inputs: DOWN,
        dtypes: Dtypes::F32,
        ours: |x| {
            let config = TrainingConfig {
                num_epochs: 1,
                lr_scheduler: LRScheduler::constant(adamw_config().learning_rate),
                optimizer_config: adamw_config(),
                max_grad_norm: Some(MAX_NORM),
            };
            let adapter = adapter(&x[1], &x[2])?;
            let mut trainer = Trainer::new(8, 12, 1, adapter.config(), config, x[0].device())?;
            *trainer.lora_adapter_mut() = adapter.clone();
            let done = trainer.train(&[(x[0].clone(), step_targets(&x[0])?)], |x: &Tensor| logits_of(&adapter, x))?;
            after(done.iter().map(|metrics| metrics.loss).sum(), trainer.lora_adapter())
        },
        formula: |x| stepped(x, Some(f64::from(MAX_NORM))),
        roundings: 12.0,
        gradients: false,
    },
    Call {
        name: "LRScheduler::get_lr, all four",
        inputs: &[&[1]],
        dtypes: Dtypes::F32,
        ours: |x| {
            let rates = SCHEDULES.iter().flat_map(|schedule| (0..9).map(|step| schedule.get_lr(step)));
            Ok(vec![Tensor::from_iter(rates, x[0].device())?])
        },
        formula: |x| Ok((vec![Tensor::from_iter(rates(), x[0].device())?.to_dtype(x[0].dtype())?], Vec::new())),
        roundings: 1.0,
        gradients: false,
    },
];
