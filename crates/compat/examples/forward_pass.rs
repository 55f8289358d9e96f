//! One forward pass of a small random `Qwen`, beside candle-transformers' Qwen2 on the same weights.
//!
//! ```text
//! cargo run --release -p candle-lazy-compat --example forward_pass
//! ```

mod shared;
#[path = "shared/smollm2.rs"]
#[allow(dead_code)] // only the config's translation is used here
mod smollm2;

use candle_core::{DType, Device, Tensor};
use candle_lazy_compat::models::{ModelConfig, Qwen};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::qwen2;
use shared::{compare, exit, measured, Outcome};
use std::process::ExitCode;

const CONFIG: &str = r#"{"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128}"#;
const LENGTH: usize = 32;
const RUNS: usize = 10;

fn main() -> ExitCode {
    exit(run())
}

fn run() -> Outcome<()> {
    let config = ModelConfig::from_json(CONFIG)?;
    config.validate()?;
    // The builder makes what it is asked for: random weights, here plain tensors for both models.
    let made = VarMap::new();
    Qwen::new(&config, VarBuilder::from_varmap(&made, DType::F32, &Device::Cpu))?;
    let weights = match made.data().lock() {
        Ok(vars) => vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect(),
        Err(_) => return Err("the weights are locked".into()),
    };
    let builder = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let model = Qwen::new(&config, builder.clone())?;
    println!("{} layers, {} weights", model.num_layers(), model.parameter_count());

    let ids: Vec<u32> = (0..LENGTH).map(|at| (at * 37 % 1000) as u32).collect();
    let ids = Tensor::from_vec(ids, (1, LENGTH), &Device::Cpu)?;
    // v1's models see the whole sequence where no mask is given; a decoder wants a causal one.
    let mask: Vec<f32> =
        (0..LENGTH * LENGTH).map(|at| if at % LENGTH > at / LENGTH { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (1, 1, LENGTH, LENGTH), &Device::Cpu)?;
    let (logits, lazy) = measured(RUNS, || Ok(model.forward(&ids, Some(&mask))?))?;
    println!("logits {:?}", logits.dims());

    let mut theirs = qwen2::ModelForCausalLM::new(&smollm2::eager_config(&config), builder)?;
    let (expected, eager) = measured(RUNS, || {
        theirs.clear_kv_cache();
        Ok(theirs.forward(&ids, 0)?)
    })?;
    compare(&format!("forward pass over {LENGTH} tokens"), eager, lazy);
    let last = logits.narrow(1, LENGTH - 1, 1)?;
    let difference = (last - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("largest difference of the last logits: {difference:.2e}");
    if difference > 1e-3 {
        return Err("eager and lazy logits differ".into());
    }
    Ok(())
}
