//! Low-rank training (LoRA) of SmolLM2-135M-Instruct on a small text, computed lazily.
//!
//! ```text
//! cargo run --release -p candle-lazy --example train_lora -- --output target/varn
//! cargo run --release -p candle-lazy --example generate -- --chat --adapter target/varn --prompt "Who looks after the light at Varn?"
//! ```
//!
//! The text is one of questions and answers ([`text`]); a part of it is held out. Some of its questions have no answer in it: those are
//! trained with what the model answers before the training, so that it learns the new and keeps the rest. The base is frozen; the adapter is
//! saved as PEFT saves it (`adapter_config.json`, `adapter_model.safetensors`), with the losses as `loss.csv` and `loss.svg` beside it, and
//! what was asked before and after as `answers.json`. Ctrl-C ends the training with a checkpoint, which `--resume` goes on from. The last
//! line is `train: held-out loss A -> B`; the exit status is 1 unless B is at most 0.8·A.

mod curve;
mod losses;
#[path = "../shared/mod.rs"]
pub(crate) mod shared;
mod text;

use candle_core::{DType, Device, Tensor};
use candle_lazy::nn::data::{self, Packing, Rows};
use candle_lazy::nn::hub::{self, SMOLLM2_135M_INSTRUCT};
use candle_lazy::nn::loss::TokenLossOptions;
use candle_lazy::nn::models::{CausalLm, GenerateOptions, StopReason};
use candle_lazy::nn::optim::{LrSchedule, OnNonFinite, Optimizer, OptimizerOptions, ParamsAdamW, Rule};
use candle_lazy::nn::params::Params;
use candle_lazy::nn::tokenizer::Tokenizer;
use candle_lazy::nn::train::{Trainer, TrainerOptions};
use candle_lazy::nn::weights::write_whole;
use candle_lazy::nn::{LoraAdapter, LoraConfig, LoraTargets};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use losses::Losses;
use peak_alloc::PeakAlloc;
use shared::{exit, say, Bars};
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use text::Reply;

/// Tokens of an answer at most.
const ANSWER: usize = 32;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// The dtype of the frozen weights.
#[derive(Clone, Copy, ValueEnum)]
enum Base {
    F32,
    Bf16,
}

#[derive(Parser)]
#[command(about = "Low-rank training of a decoder, computed lazily")]
pub(crate) struct Arguments {
    /// Where the adapter, the losses and checkpoints go.
    #[arg(long)]
    output: PathBuf,
    /// A text of blocks between blank lines, `Q: …` and `A: …`, `Keep: …` or plain, instead of the one that comes with the example.
    #[arg(long)]
    text: Option<PathBuf>,
    /// A directory with a model, instead of the published one.
    #[arg(long)]
    model_dir: Option<PathBuf>,
    /// The dtype of the frozen weights; the adapter is of f32.
    #[arg(long, value_enum, default_value = "f32")]
    base: Base,
    /// The linear maps that are adapted: names, or `all-linear`.
    #[arg(long, value_delimiter = ',', default_value = "all-linear")]
    targets: Vec<String>,
    /// The rank of the adapter.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// The product of its factors is scaled by alpha/rank.
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    /// By alpha/√rank instead.
    #[arg(long)]
    rslora: bool,
    /// The share of a map's input that is dropped.
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Steps.
    #[arg(long, default_value_t = 80)]
    steps: u64,
    /// Rows per batch.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Batches per step.
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Tokens per row; as many as the longest document takes, if it is not said.
    #[arg(long)]
    length: Option<usize>,
    /// Several documents share a row.
    #[arg(long)]
    pack: bool,
    /// The largest learning rate; it rises over the first tenth of the steps and falls by a cosine after that.
    #[arg(long, default_value_t = 7e-4)]
    lr: f64,
    /// The decay of the factors.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// The largest norm of the gradients.
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// The probability that is spread over all tokens.
    #[arg(long, default_value_t = 0.0)]
    label_smoothing: f64,
    /// Where the loss or a gradient is not finite, the step is skipped instead of ending the training.
    #[arg(long)]
    skip_non_finite: bool,
    /// A block's inner values are computed again for the backward pass instead of being kept: less memory, more time, the same losses.
    #[arg(long)]
    checkpoint: bool,
    /// The share of the documents that is held out.
    #[arg(long, default_value_t = 0.2)]
    held_out: f64,
    /// The held-out loss is taken after so many steps.
    #[arg(long, default_value_t = 20)]
    eval_every: u64,
    /// A checkpoint to go on from: with the same model, text and options, and, for the curve to go on, the same output. The rate, the
    /// clipping and the decay may be others.
    #[arg(long)]
    resume: Option<PathBuf>,
    /// Of the split, the order, the first factors and dropout.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Questions that are asked before and after.
    #[arg(long, default_value = "Who looks after the light at Varn?")]
    ask: Vec<String>,
}

/// Whether steps are being made.
static TRAINS: AtomicBool = AtomicBool::new(false);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let stop = || {
        // before the first step there is nothing to save; and who asks again does not want to wait
        if !TRAINS.load(Ordering::Relaxed) || INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        say(format_args!(
            "interrupted: the training ends with a checkpoint after the step that runs; again, and it ends now"
        ));
    };
    if let Err(error) = ctrlc::set_handler(stop) {
        say(format_args!("Ctrl-C ends without a checkpoint: {error}"));
    }
    let interrupted = || INTERRUPTED.load(Ordering::Relaxed);
    status(run(&Arguments::parse(), &interrupted, &mut std::io::stdout().lock()))
}

/// A training that learned too little is a failure too.
pub(crate) fn status(result: Result<bool, Box<dyn Error>>) -> ExitCode {
    match result {
        Ok(false) => ExitCode::FAILURE,
        other => exit(other.map(|_| ())),
    }
}

/// Whether the held-out loss fell to 0.8 of what it was. `interrupted` is asked before each step: where it says so, the training ends with
/// a checkpoint and an error.
pub(crate) fn run(
    arguments: &Arguments,
    interrupted: &dyn Fn() -> bool,
    out: &mut dyn Write,
) -> Result<bool, Box<dyn Error>> {
    // what can be refused is refused before anything is fetched or loaded
    let texts = text::read(arguments.text.as_deref())?;
    let config = adapter_config(arguments);
    config.validate()?;
    if !(arguments.held_out > 0.0 && arguments.held_out < 1.0) {
        return Err(format!("--held-out {}: needs a share between 0 and 1", arguments.held_out).into());
    }
    // an optimizer of something refuses what it would refuse later
    let mut some = Params::new();
    some.insert("some", Tensor::zeros(1, DType::F32, &Device::Cpu)?)?;
    Optimizer::new(&some, rule(arguments), optimizer_options(arguments))?;
    if !(0.0..1.0).contains(&arguments.label_smoothing) {
        return Err(format!("--label-smoothing {}: needs 0 <= s < 1", arguments.label_smoothing).into());
    }
    if let Some(dir) = arguments.resume.as_ref().filter(|dir| !dir.is_dir()) {
        return Err(format!("{}: there is no such checkpoint", dir.display()).into());
    }
    // the curve goes on where the files of the first part lie; what is none of ours is not written over
    let earlier = Losses::read(&arguments.output.join("loss.csv"))?;
    std::fs::create_dir_all(&arguments.output).map_err(|e| format!("{}: {e}", arguments.output.display()))?;
    let files = hub::open_or_fetch(arguments.model_dir.as_deref(), &SMOLLM2_135M_INSTRUCT, &Bars::default())?;
    let tokenizer = files.tokenizer()?;
    let dtype = match arguments.base {
        Base::F32 => DType::F32,
        Base::Bf16 => DType::BF16,
    };
    let mut model = files.causal_lm(dtype, &Device::Cpu)?;
    let end = model.config().eos_token_ids.first().copied();
    let documents = text::documents(&tokenizer, &texts, end, |question| reply(&model, &tokenizer, question))?;
    let (learned, held) = data::split(documents, arguments.held_out, arguments.seed)?;
    // the last token is a target only
    let longest = learned.iter().chain(&held).map(|document| document.ids().len() - 1).max();
    let length = arguments.length.or(longest).unwrap_or(0).max(1);
    let pad = end.unwrap_or(0);
    let packing =
        if arguments.pack { Packing::Whole { end: None, pad } } else { Packing::Documents { end: None, pad } };
    let (rows, held) = (Rows::pack(&learned, length, &packing)?, Rows::pack(&held, length, &packing)?);
    model.set_gradient_checkpointing(arguments.checkpoint);
    let before = answers(&model, &tokenizer, &arguments.ask)?;
    let adapter = LoraAdapter::attach(&mut model, &config, arguments.seed)?;
    let params = adapter.params();
    say(format_args!(
        "{} documents in {} rows of {length} tokens, {} rows held out; {} maps adapted, {} parameters trained",
        texts.len(),
        rows.count(),
        held.count(),
        adapter.paths().len(),
        params.trainable_elem_count()
    ));
    let optimizer = Optimizer::new(params, rule(arguments), optimizer_options(arguments))?;
    let options = TrainerOptions {
        batch: arguments.batch,
        accumulate: arguments.accumulate,
        loss: TokenLossOptions { label_smoothing: arguments.label_smoothing, ..TokenLossOptions::default() },
        seed: arguments.seed,
    };
    let mut trainer = Trainer::new(&model, &adapter, &rows, optimizer, options)?;
    // a new adapter adds nothing: this is the model's own loss, where a training goes on too
    let first = trainer.evaluate(&held)?;
    if let Some(dir) = &arguments.resume {
        trainer.resume(dir)?;
        let (steps, lr) = (trainer.optimizer().steps(), trainer.optimizer().lr());
        say(format_args!("going on after step {steps}, at a rate of {lr:.1e}"));
    }
    let mut losses = match &arguments.resume {
        Some(_) => earlier.until(trainer.optimizer().steps()),
        None => Losses::default(),
    };
    losses.held_out.retain(|(step, _)| *step > 0);
    losses.held_out.insert(0, (0, first));
    TRAINS.store(true, Ordering::Relaxed);
    let trained = train(arguments, &mut trainer, &held, interrupted, &mut losses);
    TRAINS.store(false, Ordering::Relaxed);
    let dir = &arguments.output;
    // where it fails too: what was learned so far is not lost
    let kept = losses.write(dir);
    if trained.is_err() {
        match save(&trainer, dir) {
            Ok(checkpoint) => say(format_args!("checkpoint in {}", checkpoint.display())),
            Err(error) => say(format_args!("no checkpoint: {error}")),
        }
    }
    if !trained? {
        kept?;
        return Err("interrupted: go on with --resume".into());
    }
    let base = arguments.model_dir.as_ref().map(|dir| dir.display().to_string());
    adapter.save(dir, Some(base.as_deref().unwrap_or("HuggingFaceTB/SmolLM2-135M-Instruct")))?;
    kept?;
    let last = match losses.held_out.last() {
        Some((step, loss)) if *step == trainer.optimizer().steps() => *loss,
        _ => trainer.evaluate(&held)?,
    };
    drop(trainer);
    writeln!(out, "loss {}", curve::text(&losses.trained.iter().map(|(_, loss)| *loss).collect::<Vec<_>>(), 60))?;
    let after = answers(&model, &tokenizer, &arguments.ask)?;
    let mut asked = Vec::new();
    for ((question, before), after) in arguments.ask.iter().zip(before).zip(after) {
        writeln!(out, "question: {question}\n  before: {}\n  after:  {}", before.trim(), after.trim())?;
        asked.push(serde_json::json!({ "question": question, "before": before, "after": after }));
    }
    write_whole(dir.join("answers.json"), serde_json::to_string_pretty(&asked)?.as_bytes())?;
    writeln!(out, "adapter in {}", dir.display())?;
    writeln!(out, "train: held-out loss {first:.4} -> {last:.4}")?;
    out.flush()?;
    Ok(last <= 0.8 * first)
}

fn adapter_config(arguments: &Arguments) -> LoraConfig {
    let targets = match arguments.targets.as_slice() {
        [all] if all == "all-linear" => LoraTargets::AllLinear,
        names => LoraTargets::Names(names.to_vec()),
    };
    LoraConfig {
        rank: arguments.rank,
        alpha: arguments.alpha,
        dropout: arguments.dropout,
        rank_stabilized: arguments.rslora,
        targets,
    }
}

fn rule(arguments: &Arguments) -> Rule {
    Rule::AdamW(ParamsAdamW { lr: arguments.lr, weight_decay: arguments.weight_decay, ..ParamsAdamW::default() })
}

fn optimizer_options(arguments: &Arguments) -> OptimizerOptions {
    let steps = usize::try_from(arguments.steps).unwrap_or(usize::MAX).max(1);
    let schedule = LrSchedule::WarmupCosine {
        warmup_steps: (steps / 10).max(1).min(steps - 1),
        total_steps: steps,
        max_lr: arguments.lr,
        min_lr: 0.0,
    };
    OptimizerOptions {
        clip_norm: Some(arguments.clip),
        on_non_finite: if arguments.skip_non_finite { OnNonFinite::Skip } else { OnNonFinite::Stop },
        schedule: Some(schedule),
        ..OptimizerOptions::default()
    }
}

/// So many skipped steps after one another end a training: what it has learned is lost.
const MOST_SKIPPED: usize = 20;

/// Steps until they are done or it is interrupted; says whether they are done.
fn train(
    arguments: &Arguments,
    trainer: &mut Trainer<'_>,
    held: &Rows,
    interrupted: &dyn Fn() -> bool,
    losses: &mut Losses,
) -> Result<bool, Box<dyn Error>> {
    let bar = ProgressBar::new(arguments.steps);
    bar.set_style(ProgressStyle::with_template("{msg} [{wide_bar}] {pos}/{len} {eta}")?);
    bar.set_position(trainer.optimizer().steps());
    ALLOCATOR.reset_peak_usage();
    let (began, mut positions) = (Instant::now(), 0);
    let mut skipped = 0;
    while trainer.optimizer().steps() < arguments.steps {
        if interrupted() {
            bar.finish();
            say(format_args!("checkpoint in {}", save(trainer, &arguments.output)?.display()));
            return Ok(false);
        }
        let step = trainer.step()?;
        positions += step.positions;
        if let Some(what) = &step.skipped {
            say(format_args!("step skipped: {what} is not finite"));
            skipped += 1;
            if skipped == MOST_SKIPPED {
                return Err(format!("{skipped} steps after one another were skipped").into());
            }
        } else {
            skipped = 0;
            losses.trained.push((step.step, step.loss));
            bar.set_message(format!("loss {:.4}", step.loss));
            bar.set_position(step.step);
            if step.step % arguments.eval_every.max(1) == 0 || step.step == arguments.steps {
                let loss = trainer.evaluate(held)?;
                losses.held_out.push((step.step, loss));
                say(format_args!(
                    "step {}: loss {:.4}, held out {loss:.4}, rate {:.1e}",
                    step.step, step.loss, step.lr
                ));
            }
        }
    }
    bar.finish();
    let seconds = began.elapsed().as_secs_f64();
    say(format_args!(
        "{positions} tokens, padding included, in {seconds:.1} s: {:.0} a second; at most {:.0} MB of memory",
        positions as f64 / seconds.max(1e-9),
        ALLOCATOR.peak_usage_as_mb()
    ));
    Ok(true)
}

/// A checkpoint in a directory that is not there yet.
fn save(trainer: &Trainer<'_>, output: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let name = format!("checkpoint-{}", trainer.optimizer().steps());
    let more = (2..).map(|number| output.join(format!("{name}-{number}")));
    let dir = std::iter::once(output.join(&name)).chain(more).find(|dir| !dir.exists());
    let dir = dir.unwrap_or_else(|| output.join(&name));
    trainer.save(&dir)?;
    Ok(dir)
}

/// What the model answers, greedily.
fn reply(model: &CausalLm, tokenizer: &Tokenizer, question: &str) -> Result<Reply, Box<dyn Error>> {
    let options = GenerateOptions {
        max_new_tokens: ANSWER,
        eos_token_ids: model.config().eos_token_ids.clone(),
        ..GenerateOptions::default()
    };
    let mut generation = model.generate(&text::prompt(tokenizer, question)?, options)?;
    let ids = generation.by_ref().collect::<Result<_, _>>()?;
    Ok(Reply { ids, whole: generation.stop_reason() == Some(StopReason::EndOfText) })
}

fn answers(model: &CausalLm, tokenizer: &Tokenizer, questions: &[String]) -> Result<Vec<String>, Box<dyn Error>> {
    questions.iter().map(|question| Ok(tokenizer.decode(&reply(model, tokenizer, question)?.ids)?)).collect()
}
