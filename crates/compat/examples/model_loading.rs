//! Loading and checking weights with v1's `ModelLoader`, on all-MiniLM-L6-v2.
//!
//! ```text
//! cargo run --release -p candle-lazy-compat --example model_loading
//! ```

mod shared;

use candle_core::Device as CandleDevice;
use candle_lazy_compat::models::ModelLoader;
use candle_lazy_compat::Device;
use candle_lazy_nn::hub::{open_or_fetch, NoProgress, ALL_MINILM_L6_V2};
use clap::Parser;
use shared::{compare, exit, measured, Outcome};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Loading weights through the names of metal-candle 1.x")]
struct Arguments {
    /// A directory with `model.safetensors`, instead of the published model.
    #[arg(long)]
    model_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Outcome<()> {
    let file =
        open_or_fetch(arguments.model_dir.as_deref(), &ALL_MINILM_L6_V2, &NoProgress)?.file("model.safetensors")?;
    let loader = ModelLoader::new(Device::new_with_fallback(0));

    let shapes = loader.inspect(&file)?;
    let mut names: Vec<&String> = shapes.keys().collect();
    names.sort();
    println!("{} tensors, among them", names.len());
    for name in names.iter().take(3) {
        println!("  {name} {:?}", shapes.get(*name));
    }

    let (tensors, lazy) = measured(3, || Ok(loader.load(&file)?))?;
    let (expected, eager) = measured(3, || Ok(candle_core::safetensors::load(&file, &CandleDevice::Cpu)?))?;
    compare("loading", eager, lazy);
    println!("as many as Candle loads: {}", tensors.len() == expected.len());

    // What is missing or has another shape is named.
    let wanted = HashMap::from([("embeddings.word_embeddings.weight".to_string(), vec![1, 2])]);
    match loader.load_with_validation(&file, &wanted) {
        Ok(_) => Err("a wrong shape was not noticed".into()),
        Err(error) => {
            println!("checked against a wrong shape: {error}");
            Ok(())
        }
    }
}
