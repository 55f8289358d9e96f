//! Steps of a LoRA training beside those that PyTorch and PEFT took: `crates/nn/tests/fixtures/train.py` wrote theirs.

use crate::rng::Rng;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::loss::TokenLossOptions;
use candle_lazy_nn::models::{CausalLm, CausalLmConfig};
use candle_lazy_nn::optim::{LrSchedule, Optimizer, OptimizerOptions, ParamsAdamW, Rule};
use candle_lazy_nn::weights::SafetensorsFile;
use candle_lazy_nn::{LoraAdapter, LoraConfig, ModelDir, VarBuilder};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The largest difference of a step's loss, relative to PyTorch's, that counts as agreement.
pub const LOSS_TOLERANCE: f64 = 1e-4;

/// The largest norm of a factor's difference, relative to the norm of PyTorch's, that counts as agreement.
pub const FACTOR_TOLERANCE: f64 = 1e-3;

/// What PyTorch did, as a file says it, beside a directory with the adapter that came of it, in PEFT's format.
#[derive(Debug)]
pub struct PeftRun {
    steps: Steps,
    adapter: PathBuf,
}

/// Ids and targets (batch, length) of one step.
type Batch = (Vec<Vec<u32>>, Vec<Vec<i64>>);

#[derive(Debug, Deserialize)]
struct Steps {
    /// Of a model of made-up weights.
    made_up: Option<MadeUp>,
    /// What the first numbers of the factors, in −1..1, were multiplied by: A's and B's.
    first: (f64, f64),
    rate: f64,
    warmup: usize,
    clip: f64,
    decay: f64,
    smoothing: f64,
    /// Those of each step.
    batches: Vec<Batch>,
    /// Before each step.
    losses: Vec<f64>,
}

/// A model's config, and the names and shapes of its weights.
#[derive(Debug, Deserialize)]
struct MadeUp {
    config: serde_json::Value,
    weights: Vec<(String, Vec<usize>)>,
}

/// How near ours came.
#[derive(Debug)]
pub struct Agreement {
    /// |ours − theirs| / |theirs| of the loss of every step.
    pub losses: Vec<f64>,
    /// The factors by their names in PEFT's file.
    pub factors: Vec<(String, FactorAgreement)>,
}

/// Frobenius norms of a factor's differences, relative to the norm of PyTorch's after the last step.
#[derive(Debug, Clone, Copy)]
pub struct FactorAgreement {
    /// Of ours from theirs.
    pub difference: f64,
    /// Of theirs from what it was before the first step.
    pub moved: f64,
}

impl Agreement {
    /// The largest difference of a loss.
    #[must_use]
    pub fn worst_loss(&self) -> f64 {
        self.losses.iter().copied().fold(0.0, largest)
    }

    /// The largest difference of a factor.
    #[must_use]
    pub fn worst_factor(&self) -> f64 {
        self.factors.iter().map(|(_, factor)| factor.difference).fold(0.0, largest)
    }

    /// What is wrong with it, if anything.
    #[must_use]
    pub fn wrong(&self) -> [Option<String>; 2] {
        let step = self.losses.iter().position(|off| off.is_nan() || *off > LOSS_TOLERANCE);
        let factor =
            self.factors.iter().find(|(_, factor)| factor.difference.is_nan() || factor.difference > FACTOR_TOLERANCE);
        let loss = step.map(|at| format!("the loss of step {} is off by {:.1e}", at + 1, self.worst_loss()));
        let factor = factor.map(|(name, factor)| format!("{name} is off by {:.1e}", factor.difference));
        [loss, factor]
    }
}

/// The larger one; NaN is larger than anything.
fn largest(most: f64, next: f64) -> f64 {
    if next > most || next.is_nan() {
        next
    } else {
        most
    }
}

impl PeftRun {
    /// 20 steps on SmolLM2-135M-Instruct in f32: rank 4 on every linear map of four blocks, warm-up, cosine, clipping, decay.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn smollm2() -> Result<Self> {
        Self::open("smollm2_lora")
    }

    /// 20 steps on a Llama of made-up weights, which PyTorch took in f64: rsLoRA on all linear maps, label smoothing.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn tiny() -> Result<Self> {
        Self::open("tiny_lora")
    }

    fn open(name: &str) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let path = folder.join(format!("{name}.json"));
        let file = |detail: String| Error::File { path: path.display().to_string(), detail };
        let text = std::fs::read_to_string(&path).map_err(|e| file(e.to_string()))?;
        let steps = serde_json::from_str(&text).map_err(|e| file(e.to_string()))?;
        Ok(Self { steps, adapter: folder.join(name) })
    }

    /// The model that the steps were taken on, for one of made-up weights: they come from the generator that the script has too.
    ///
    /// # Errors
    /// When the steps were taken on another, or it cannot be made.
    pub fn model(&self) -> Result<CausalLm> {
        let made_up = self.steps.made_up.as_ref();
        let MadeUp { config, weights: shapes } =
            made_up.ok_or_else(|| Error::NoTwin("a model of real weights".into()))?;
        let config = CausalLmConfig::from_json(&config.to_string())?;
        let (mut rng, mut weights) = (Rng::new(1), HashMap::new());
        for (name, shape) in shapes {
            let (scale, shift) = if name.contains("norm") { (0.2, 1.0) } else { (0.35, 0.0) };
            weights.insert(name.clone(), unit(&mut rng, shape)?.affine(scale, shift)?);
        }
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        Ok(CausalLm::load(vb, &config)?)
    }

    /// Takes the same steps on the model, which must be the one that PyTorch had; the adapter stays on it.
    ///
    /// # Errors
    /// When the file is not as it should be, and when a step fails.
    pub fn compare(&self, model: &mut CausalLm) -> Result<Agreement> {
        let adapter = LoraAdapter::attach(model, &LoraConfig::from_dir(&self.adapter)?, 0)?;
        let first = self.set_factors(&adapter)?;
        let Steps { rate: lr, warmup, clip, decay, smoothing, batches, losses: wanted, .. } = &self.steps;
        let rule = Rule::AdamW(ParamsAdamW { lr: *lr, weight_decay: *decay, ..ParamsAdamW::default() });
        let schedule =
            LrSchedule::WarmupCosine { warmup_steps: *warmup, total_steps: batches.len(), max_lr: *lr, min_lr: 0.0 };
        let options =
            OptimizerOptions { clip_norm: Some(*clip), schedule: Some(schedule), ..OptimizerOptions::default() };
        let loss_options = TokenLossOptions { label_smoothing: *smoothing, ..TokenLossOptions::default() };
        let mut optimizer = Optimizer::new(adapter.params(), rule, options)?;
        let mut losses = Vec::new();
        for ((ids, targets), wanted) in batches.iter().zip(wanted) {
            let ids = LazyTensor::from(Tensor::new(ids.clone(), model.device())?);
            let targets = LazyTensor::from(Tensor::new(targets.clone(), model.device())?);
            let at = model.positions(ids.dim(1)?)?;
            let loss = { model.token_loss(&ids, &at, &targets, None, &loss_options)?.mean()? };
            optimizer.step(adapter.params().grad(&loss)?, &[&loss])?;
            let loss = loss.eval()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            losses.push((loss - wanted).abs() / wanted.abs());
        }
        let file = SafetensorsFile::open(self.adapter.join("adapter_model.safetensors"))?;
        let mut factors = Vec::new();
        for param in adapter.params().iter() {
            let theirs = file.tensor(param.name(), DType::F64, &Device::Cpu)?;
            let ours = param.value().eval()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            let before = first.get(param.name()).ok_or_else(|| Error::NoTwin(format!("no {}", param.name())))?;
            let norm = |x: Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
            let (scale, before) = (norm(theirs.clone())?, before.to_dtype(DType::F64)?);
            let difference = norm((ours - &theirs)?)? / scale;
            let moved = norm((theirs - before)?)? / scale;
            factors.push((param.name().to_string(), FactorAgreement { difference, moved }));
        }
        Ok(Agreement { losses, factors })
    }

    /// The first numbers of all factors, in the order of their names; gives them to the adapter, and back.
    fn set_factors(&self, adapter: &LoraAdapter) -> Result<HashMap<String, Tensor>> {
        let mut params: Vec<_> = adapter.params().iter().collect();
        params.sort_by_key(|param| param.name());
        let (mut rng, mut first) = (Rng::new(2), HashMap::new());
        for param in params {
            let (a, b) = self.steps.first;
            let scale = if param.name().contains("lora_A") { a } else { b };
            let value = unit(&mut rng, param.shape().dims())?.affine(scale, 0.0)?;
            param.set(value.clone())?;
            first.insert(param.name().to_string(), value);
        }
        Ok(first)
    }
}

/// Numbers in −1..1 of 24 bits, f32, as the script makes them.
fn unit(rng: &mut Rng, shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| (rng.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The steps on the published decoder, and what is wrong with them, if anything.
///
/// # Errors
/// When the model cannot be loaded or run.
pub fn trains_as_peft(decoder: &ModelDir) -> Result<Vec<(String, Option<String>)>> {
    let agreement = PeftRun::smollm2()?.compare(&mut decoder.causal_lm(DType::F32, &Device::Cpu)?)?;
    let [loss, factor] = agreement.wrong();
    let (losses, factors) = (agreement.losses.len(), agreement.factors.len());
    Ok(vec![
        (format!("the losses of {losses} steps are PyTorch's ({:.1e})", agreement.worst_loss()), loss),
        (format!("{factors} factors after them are PEFT's ({:.1e})", agreement.worst_factor()), factor),
    ])
}
