//! A step of low-rank training of a decoder, by Candle's autograd and by the graph transform.
//!
//! Both sides have the same frozen weights and the same factors on q and v, and take the loss of all positions but those that are left
//! out. Candle's side is the Llama of candle-transformers with differentiable ops in the place of those that have no backward (the fused
//! norm, the fused rotary embedding).

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_lazy_exec::{eval_all, LazyTensor};
use candle_lazy_nn::loss::TokenLossOptions;
use candle_lazy_nn::models::{CausalLm, CausalLmConfig};
use candle_lazy_nn::optim::{OnNonFinite, Optimizer, OptimizerOptions, Rule};
use candle_lazy_nn::params::Gradients;
use candle_lazy_nn::{LoraAdapter, LoraConfig, LoraTargets, ModelDir};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW};
use std::cell::RefCell;
use std::collections::HashMap;

/// A rate at which no step changes what the next one gives.
const STILL: ParamsAdamW = ParamsAdamW { lr: 1e-12, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
const RANK: usize = 8;
const ADAPTED: [&str; 2] = ["q_proj", "v_proj"];

/// Both sides of a training step.
pub struct TrainingPair {
    eager: RefCell<Eager>,
    lazy: RefCell<Lazy>,
    exact: RefCell<Option<Eager>>,
    dir: ModelDir,
}

struct Lazy {
    model: CausalLm,
    adapter: LoraAdapter,
    optimizer: Optimizer,
}

fn config() -> LoraConfig {
    LoraConfig {
        rank: RANK,
        alpha: 16.0,
        dropout: 0.0,
        targets: LoraTargets::Names(ADAPTED.iter().map(ToString::to_string).collect()),
        ..LoraConfig::default()
    }
}

impl TrainingPair {
    /// Loads both sides, with factors of which neither is zero.
    ///
    /// # Errors
    /// When the model cannot be loaded.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        let mut model = dir.causal_lm(DType::F32, &Device::Cpu)?;
        let adapter = LoraAdapter::attach(&mut model, &config(), 1)?;
        for (i, param) in adapter.params().iter().enumerate() {
            let mut rng = crate::rng::Rng::named(i as u64, "factors");
            let count = param.elem_count();
            let values: Vec<f32> = (0..count).map(|_| (rng.below(2001) as f32 - 1000.0) / 20_000.0).collect();
            param.set(Tensor::from_vec(values, param.shape(), &Device::Cpu)?)?;
        }
        let rule = Rule::AdamW(STILL);
        let options = OptimizerOptions { on_non_finite: OnNonFinite::Apply, ..OptimizerOptions::default() };
        let optimizer = Optimizer::new(adapter.params(), rule, options)?;
        let eager = Eager::load(dir, &adapter, model.config(), DType::F32)?;
        let lazy = RefCell::new(Lazy { model, adapter, optimizer });
        Ok(Self { eager: RefCell::new(eager), lazy, exact: RefCell::default(), dir: dir.clone() })
    }

    /// How many weights a token meets: the frozen maps of all blocks and the head.
    #[must_use]
    pub fn weight_elements(&self) -> usize {
        let eager = self.eager.borrow();
        eager.weights.values().filter(|t| t.rank() == 2).map(Tensor::elem_count).sum()
    }

    /// The most bytes that a step of either side had allocated at once beyond the weights: eager's, then lazy's.
    ///
    /// # Errors
    /// When a part fails.
    pub fn peaks(&self, ids: &[Vec<u32>]) -> Result<(u64, u64)> {
        super::pair::peaks(&|| self.eager(ids), &|| self.lazy(ids))
    }

    /// The most bytes that a step of the lazy side had allocated at once beyond the weights: with the inner values of every block kept, then
    /// with every block a checkpoint.
    ///
    /// # Errors
    /// When a part fails, or the two differ in a bit.
    pub fn checkpoint_peaks(&self, ids: &[Vec<u32>]) -> Result<(u64, u64)> {
        let step = |checkpointed: bool| {
            self.lazy.borrow_mut().model.set_gradient_checkpointing(checkpointed);
            let values = self.lazy(ids);
            self.lazy.borrow_mut().model.set_gradient_checkpointing(false);
            values
        };
        if let Err(text) = crate::compare::same_bits("checkpointed blocks", &step(true)?, &step(false)?)? {
            return Err(Error::NoTwin(text));
        }
        super::pair::peaks(&|| step(false), &|| step(true))
    }

    /// Loss and gradients, one behind the other, of a step of Candle's autograd and AdamW on ids (batch, length).
    ///
    /// # Errors
    /// When a part fails.
    pub fn eager(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.eager.borrow_mut().step(ids)
    }

    /// The same in f64.
    ///
    /// # Errors
    /// When a part fails.
    pub fn exact(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let mut exact = self.exact.borrow_mut();
        if exact.is_none() {
            let lazy = self.lazy.borrow();
            *exact = Some(Eager::load(&self.dir, &lazy.adapter, lazy.model.config(), DType::F64)?);
        }
        match exact.as_mut() {
            Some(exact) => exact.step(ids),
            None => Err(Error::NoTwin("no exact side".into())),
        }
    }

    /// The same by the graph transform and the recorded step, as one plan.
    ///
    /// # Errors
    /// When a part fails.
    pub fn lazy(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (inputs, targets) = tensors(ids)?;
        let Lazy { model, adapter, optimizer } = &mut *self.lazy.borrow_mut();
        let at = model.positions(inputs.dim(1)?)?;
        let (loss, gradients) = {
            let targets = LazyTensor::from(targets.reshape(inputs.shape())?.to_dtype(DType::I64)?);
            let inputs = LazyTensor::from(inputs);
            let loss = model.token_loss(&inputs, &at, &targets, None, &TokenLossOptions::default())?.mean()?;
            let gradients = adapter.params().grad(&loss)?;
            (loss.detach(), gradients)
        };
        let kept = handles(&gradients);
        optimizer.step(gradients, &[&loss])?;
        let values = eval_all(&std::iter::once(&loss).chain(&kept).collect::<Vec<_>>())?;
        joined(values.into_iter())
    }
}

/// Handles on gradients, in the order of their names.
fn handles(gradients: &Gradients) -> Vec<LazyTensor> {
    gradients.iter().map(|(_, gradient)| gradient.clone()).collect()
}

/// Tokens (batch, length − 1), and what follows each as one list.
fn tensors(ids: &[Vec<u32>]) -> Result<(Tensor, Tensor)> {
    let all = Tensor::new(ids.to_vec(), &Device::Cpu)?;
    let len = all.dim(1)? - 1;
    Ok((all.narrow(1, 0, len)?.contiguous()?, all.narrow(1, 1, len)?.flatten_all()?))
}

fn joined(tensors: impl Iterator<Item = Tensor>) -> Result<Tensor> {
    let flat = tensors.map(|t| t.detach().flatten_all()).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&flat, 0)?)
}

/// Candle's side.
struct Eager {
    config: CausalLmConfig,
    weights: HashMap<String, Tensor>,
    /// Sorted by name.
    factors: Vec<(String, Var)>,
    optimizer: AdamW,
    dtype: DType,
}

impl Eager {
    fn load(dir: &ModelDir, adapter: &LoraAdapter, config: &CausalLmConfig, dtype: DType) -> Result<Self> {
        let vb = dir.var_builder(dtype, &Device::Cpu)?;
        let mut names = vec!["model.embed_tokens.weight".to_string(), "model.norm.weight".into()];
        if !config.tie_word_embeddings {
            names.push("lm_head.weight".into());
        }
        let maps = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|part| format!("self_attn.{part}"));
        let mlp = ["gate_proj", "up_proj", "down_proj"].map(|part| format!("mlp.{part}"));
        let norms = ["input_layernorm", "post_attention_layernorm"].map(String::from);
        for layer in 0..config.num_hidden_layers {
            let parts = maps.iter().chain(&mlp).chain(&norms);
            names.extend(parts.map(|part| format!("model.layers.{layer}.{part}.weight")));
        }
        let mut weights = HashMap::new();
        for name in names {
            weights.insert(name.clone(), vb.get_unchecked(&name)?.to_dtype(dtype)?);
        }
        let mut factors = Vec::new();
        for param in adapter.params().iter() {
            factors.push((param.name().to_string(), Var::from_tensor(&param.value().eval()?.to_dtype(dtype)?)?));
        }
        let optimizer = AdamW::new(factors.iter().map(|(_, var)| var.clone()).collect(), STILL)?;
        Ok(Self { config: config.clone(), weights, factors, optimizer, dtype })
    }

    fn weight(&self, name: &str) -> Result<&Tensor> {
        self.weights.get(name).ok_or_else(|| Error::NoTwin(format!("no weight {name}")))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + self.config.rms_norm_eps)?.sqrt()?;
        Ok(x.broadcast_div(&root)?.broadcast_mul(self.weight(name)?)?)
    }

    /// x (rows, in) times a map's weight, with its factors where it has some.
    fn map(&self, x: &Tensor, path: &str) -> Result<Tensor> {
        let y = x.matmul(&self.weight(&format!("{path}.weight"))?.t()?)?;
        let factor = |kind: &str| {
            let name = format!("base_model.model.{path}.lora_{kind}.weight");
            self.factors.iter().find(|(known, _)| *known == name).map(|(_, var)| var.as_tensor())
        };
        match (factor("A"), factor("B")) {
            (Some(a), Some(b)) => {
                let product = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
                Ok((y + (product * config().scale())?)?)
            }
            _ => Ok(y),
        }
    }

    fn loss(&self, inputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (b, s) = inputs.dims2()?;
        let (h, kv, d) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let table = self.weight("model.embed_tokens.weight")?;
        let mut x = table.index_select(&inputs.flatten_all()?, 0)?;
        // in f32 on every side, as the model's table is: other angles are another model
        let inverse: Vec<f32> = (0..d / 2).map(|i| 1.0 / c.rope_theta.powf((2 * i) as f32 / d as f32)).collect();
        let angles: Vec<f32> = (0..s).flat_map(|p| inverse.iter().map(move |f| p as f32 * f)).collect();
        let table_of = |f: fn(f32) -> f32| -> Result<Tensor> {
            let values: Vec<f32> = angles.iter().copied().map(f).collect();
            Ok(Tensor::from_vec(values, (s, d / 2), &Device::Cpu)?.to_dtype(self.dtype)?)
        };
        let (cos, sin) = (table_of(f32::cos)?, table_of(f32::sin)?);
        let hidden: Vec<f32> =
            (0..s).flat_map(|i| (0..s).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
        let mask = Tensor::from_vec(hidden, (s, s), &Device::Cpu)?.to_dtype(self.dtype)?;
        for layer in 0..c.num_hidden_layers {
            let at = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = self.norm(&x, &at("input_layernorm.weight"))?;
            let heads = |t: Tensor, n: usize| t.reshape((b, s, n, d))?.transpose(1, 2)?.contiguous();
            let q = heads(self.map(&normed, &at("self_attn.q_proj"))?, h)?;
            let k = heads(self.map(&normed, &at("self_attn.k_proj"))?, kv)?;
            let v = heads(self.map(&normed, &at("self_attn.v_proj"))?, kv)?;
            let (q, k) =
                (candle_nn::rotary_emb::rope_slow(&q, &cos, &sin)?, candle_nn::rotary_emb::rope_slow(&k, &cos, &sin)?);
            let (k, v) =
                (candle_transformers::utils::repeat_kv(k, h / kv)?, candle_transformers::utils::repeat_kv(v, h / kv)?);
            let scores = (q.matmul(&k.t()?)? / (d as f64).sqrt())?.broadcast_add(&mask)?;
            let y = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v.contiguous()?)?;
            let y = y.transpose(1, 2)?.reshape((b * s, h * d))?;
            x = (x + self.map(&y, &at("self_attn.o_proj"))?)?;
            let normed = self.norm(&x, &at("post_attention_layernorm.weight"))?;
            let gate = self.map(&normed, &at("mlp.gate_proj"))?.silu()?;
            let up = self.map(&normed, &at("mlp.up_proj"))?;
            x = (x + self.map(&(gate * up)?, &at("mlp.down_proj"))?)?;
        }
        let x = self.norm(&x, "model.norm.weight")?;
        let head = if c.tie_word_embeddings { table } else { self.weight("lm_head.weight")? };
        Ok(candle_nn::loss::cross_entropy(&x.matmul(&head.t()?)?, targets)?)
    }

    fn step(&mut self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (inputs, targets) = tensors(ids)?;
        let loss = self.loss(&inputs, &targets)?;
        let store = loss.backward()?;
        self.optimizer.step(&store)?;
        let mut all = vec![loss];
        for (name, var) in &self.factors {
            let gradient = store.get(var.as_tensor());
            all.push(gradient.ok_or_else(|| Error::NoTwin(format!("no gradient of {name}")))?.clone());
        }
        joined(all.into_iter())
    }
}
