//! LoRA training with v1's `Trainer`: SmolLM2's own token vectors learn, through one low-rank layer, which token follows which in a text.
//!
//! ```text
//! cargo run --release -p candle-lazy-compat --example lora_training
//! ```
//!
//! Logits are (e + ((e·A)·B)·scaling)·Eᵀ with the model's frozen embedding E. The same loop in Candle's ops stands beside it.

mod shared;
#[path = "shared/smollm2.rs"]
#[allow(dead_code)] // of the model only the embedding is used here
mod smollm2;

use candle_core::{Device, Tensor, Var};
use candle_lazy_compat::{
    AdamWConfig, LRScheduler, LoRAAdapter, LoRAAdapterConfig, StepMetrics, TargetModule, Trainer, TrainingConfig,
};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::Parser;
use shared::{compare, exit, measured, Outcome};
use smollm2::SmolLm2;
use std::path::PathBuf;
use std::process::ExitCode;

const TEXT: &str =
    "A lazy engine records what is asked of it, plans it as a whole, and computes it once it is wanted. \
    What nobody wants is never computed. What is asked twice in the same form is planned once.";
const EPOCHS: usize = 6;
const LEARNING_RATE: f32 = 5e-3;

#[derive(Parser)]
#[command(about = "LoRA training through the names of metal-candle 1.x")]
struct Arguments {
    /// A directory with the model, instead of the published one.
    #[arg(long)]
    model_dir: Option<PathBuf>,
    /// Where to save the adapter, as one safetensors file.
    #[arg(long)]
    save: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn adapter_config() -> LoRAAdapterConfig {
    LoRAAdapterConfig { target_modules: vec![TargetModule::OProj], ..LoRAAdapterConfig::default() }
}

fn optimizer_config() -> AdamWConfig {
    AdamWConfig { learning_rate: LEARNING_RATE, weight_decay: 0.0, ..AdamWConfig::default() }
}

fn trainer(hidden: usize, ffn: usize) -> Outcome<Trainer> {
    let config = TrainingConfig {
        num_epochs: EPOCHS,
        lr_scheduler: LRScheduler::constant(LEARNING_RATE),
        optimizer_config: optimizer_config(),
        max_grad_norm: None,
    };
    Ok(Trainer::new(hidden, ffn, 1, &adapter_config(), config, &Device::Cpu)?)
}

/// (1, s, hidden) to (1, s, vocab).
fn logits(adapter: &LoRAAdapter, inputs: &Tensor, table: &Tensor) -> candle_lazy_compat::Result<Tensor> {
    let xs = match adapter.forward(0, &TargetModule::OProj, inputs)? {
        Some(delta) => (inputs + delta)?,
        None => inputs.clone(),
    };
    Ok(xs.broadcast_matmul(&table.t()?)?)
}

fn run(arguments: &Arguments) -> Outcome<()> {
    let files = SmolLm2::open(arguments.model_dir.as_deref())?;
    let Some(table) = files.weights.get("model.embed_tokens.weight") else {
        return Err("the model has no embedding".into());
    };
    let ids = files.tokenizer.encode(TEXT, false)?;
    let s = ids.len().saturating_sub(1);
    let all = Tensor::from_slice(&ids, ids.len(), &Device::Cpu)?;
    let inputs = table.embedding(&all.narrow(0, 0, s)?)?.unsqueeze(0)?;
    let targets = all.narrow(0, 1, s)?.unsqueeze(0)?;
    let dataset = vec![(inputs.clone(), targets.clone())];
    let (hidden, ffn) = (files.config.hidden_size, files.config.intermediate_size);

    let (metrics, lazy) = measured(1, || {
        let mut trainer = trainer(hidden, ffn)?;
        let metrics = trainer.train_adapter(&dataset, |adapter, input| logits(adapter, input, table))?;
        if let Some(path) = &arguments.save {
            candle_lazy_compat::training::checkpoint::save_checkpoint(trainer.lora_adapter(), path, None)?;
        }
        Ok(metrics)
    })?;
    for StepMetrics { loss, step, learning_rate } in &metrics {
        println!("step {step}: loss {loss:.4}, learning rate {learning_rate}");
    }

    // The same in Candle's ops.
    let (losses, eager) = measured(1, || {
        let config = adapter_config();
        let a = Var::randn(0f32, 1.0 / (config.rank as f32).sqrt(), (hidden, config.rank), &Device::Cpu)?;
        let b = Var::zeros((config.rank, hidden), candle_core::DType::F32, &Device::Cpu)?;
        let params = ParamsAdamW { lr: f64::from(LEARNING_RATE), weight_decay: 0.0, ..ParamsAdamW::default() };
        let mut optimizer = AdamW::new(vec![a.clone(), b.clone()], params)?;
        let scaling = f64::from(config.alpha) / config.rank as f64;
        let mut losses = Vec::new();
        for _ in 0..EPOCHS {
            let delta = (inputs.broadcast_matmul(&a)?.broadcast_matmul(&b)? * scaling)?;
            let logits = (&inputs + delta)?.broadcast_matmul(&table.t()?)?;
            let loss = candle_nn::loss::cross_entropy(&logits.squeeze(0)?, &targets.squeeze(0)?)?;
            optimizer.backward_step(&loss)?;
            losses.push(loss.to_scalar::<f32>()?);
        }
        Ok(losses)
    })?;
    compare(&format!("{EPOCHS} steps over {s} tokens"), eager, lazy);
    if let (Some(first), Some(last), Some(eager)) = (metrics.first(), metrics.last(), losses.last()) {
        println!("loss {:.4} -> {:.4}; eager, from another A: {eager:.4}", first.loss, last.loss);
        if last.loss >= first.loss {
            return Err("nothing was learnt".into());
        }
    }
    Ok(())
}
