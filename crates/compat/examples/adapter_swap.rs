//! Several LoRA adapters for one loaded SmolLM2, swapped between texts with v1's `AdapterRegistry` and `ApplyAdapter`.
//!
//! ```text
//! cargo run --release -p candle-lazy-compat --example adapter_swap
//! ```
//!
//! The eager way to swap is to merge an adapter into the weights: W + (A·B)ᵀ·scaling for every projection that it has.

mod shared;
#[path = "shared/smollm2.rs"]
#[allow(dead_code)] // the eager side is another here
mod smollm2;

use candle_core::{Device, Tensor};
use candle_lazy_compat::inference::{Generator, GeneratorConfig};
use candle_lazy_compat::models::Qwen;
use candle_lazy_compat::training::{AdapterRegistry, ApplyAdapter, LoRAAdapter, LoRAAdapterConfig, TargetModule};
use clap::Parser;
use shared::{compare, exit, measured, Outcome};
use smollm2::SmolLm2;
use std::path::PathBuf;
use std::process::ExitCode;

const NEW_TOKENS: usize = 10;
const PROMPT: &str = "The capital of France is";

#[derive(Parser)]
#[command(about = "Swapping adapters through the names of metal-candle 1.x")]
struct Arguments {
    /// A directory with the model, instead of the published one.
    #[arg(long)]
    model_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

/// An adapter whose B is not zero, as training would leave it.
fn adapter(files: &SmolLm2, config: &LoRAAdapterConfig, strength: f32) -> Outcome<LoRAAdapter> {
    let adapter = LoRAAdapter::for_model(&files.config, config, &Device::Cpu)?;
    for (_, layer) in adapter.layers() {
        let b = layer.lora_b();
        b.set(&Tensor::randn(0f32, strength, b.shape(), &Device::Cpu)?)?;
    }
    Ok(adapter)
}

fn text(files: &SmolLm2, model: Qwen) -> Outcome<String> {
    let config = GeneratorConfig { max_tokens: NEW_TOKENS, ..GeneratorConfig::default() };
    let prompt = files.tokenizer.encode(PROMPT, false)?;
    let ids = Generator::new(Box::new(model), config)?.generate(&prompt)?;
    Ok(files.tokenizer.decode(&ids)?)
}

fn run(arguments: &Arguments) -> Outcome<()> {
    let files = SmolLm2::open(arguments.model_dir.as_deref())?;
    let config = LoRAAdapterConfig {
        target_modules: vec![TargetModule::QProj, TargetModule::VProj, TargetModule::DownProj],
        ..LoRAAdapterConfig::default()
    };
    let mut registry = AdapterRegistry::new();
    registry.add_adapter("weak".to_string(), adapter(&files, &config, 1e-3)?)?;
    registry.add_adapter("strong".to_string(), adapter(&files, &config, 3e-2)?)?;
    println!("none: {}", text(&files, files.qwen()?)?);
    for name in registry.list_adapters() {
        registry.activate(&name)?;
        let Some(active) = registry.get_active() else {
            return Err("no adapter is active".into());
        };
        let mut model = files.qwen()?;
        model.apply_adapter(active.clone())?;
        println!("{name}: {}", text(&files, model)?);
    }

    let Some(strong) = registry.get_adapter("strong") else {
        return Err("an adapter was lost".into());
    };
    let mut model = files.qwen()?;
    let ((), lazy) = measured(3, || {
        model.remove_adapter()?;
        Ok(model.apply_adapter(strong.clone())?)
    })?;
    let (merged, eager) = measured(3, || {
        let mut merged = Vec::new();
        for layer in 0..files.config.num_hidden_layers {
            for target in &config.target_modules {
                let block = if *target == TargetModule::DownProj { "mlp" } else { "self_attn" };
                let name = format!("model.layers.{layer}.{block}.{}.weight", target.name());
                if let Some(base) = files.weights.get(&name) {
                    merged.push(strong.merge_weights(base, layer, target)?);
                }
            }
        }
        Ok(merged)
    })?;
    compare(&format!("swap of {} projections", merged.len()), eager, lazy);
    Ok(())
}
