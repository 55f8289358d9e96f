//! An HTTP server that clients of OpenAI's API talk to: texts and embeddings for many callers at once, computed lazily.
//!
//! ```text
//! cargo run --release -p candle-lazy --example serve -- --listen 127.0.0.1:8080 --adapter varn=target/varn
//! curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \
//!     -d '{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello!"}], "stream": true}'
//! ```
//!
//! `/v1/models`, `/v1/embeddings`, `/v1/completions` and `/v1/chat/completions` take and give what OpenAI's do, streams as server-sent
//! events included. An adapter is chosen by its name in `model`. What is not supported is refused by name. `/health/live` and
//! `/health/ready` (or `/health`) say how the server is, `/metrics` what it has done, for Prometheus. Ctrl-C and SIGTERM let it finish
//! what it answers, for at most `--grace` seconds; a second one ends that. Nothing asks who a caller is: it listens to this machine
//! only, unless `--listen` says otherwise. [`docs/serving.md`](../../../../docs/serving.md) says more.

pub(crate) mod app;
mod completions;
mod embeddings;
mod failure;
mod fields;
pub(crate) mod http;
mod messages;
mod metrics;
#[path = "../shared/mod.rs"]
pub(crate) mod shared;
mod texts;
#[path = "../shared/timeline.rs"]
mod timeline;

use app::{App, Limits};
use candle_core::{DType, Device};
use candle_lazy::nn::hub::{self, ALL_MINILM_L6_V2, SMOLLM2_135M_INSTRUCT};
use candle_lazy::nn::service::{
    EmbeddingOptions, EmbeddingService, GenerationOptions, GenerationService, MaxWait, Window,
};
use candle_lazy::nn::{LoraAdapter, LoraConfig, ModelDir};
use clap::Parser;
use shared::{exit, say, Bars};
use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

#[derive(Debug, Clone, Parser)]
#[command(about = "An OpenAI-style HTTP server, computed lazily")]
pub(crate) struct Arguments {
    /// A directory with a decoder (as the example `generate` takes), instead of the published SmolLM2-135M-Instruct. Its name is the
    /// model's.
    #[arg(long)]
    model: Option<PathBuf>,
    /// A directory with a sentence encoder, instead of the published all-MiniLM-L6-v2. Its name is the model's.
    #[arg(long)]
    embedding_model: Option<PathBuf>,
    /// A LoRA adapter in PEFT's format, which is used where a request's `model` is its name. As often as there are adapters.
    #[arg(long, value_name = "NAME=DIR", value_parser = adapter)]
    adapter: Vec<(String, PathBuf)>,
    /// The address.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Bytes of a request's body at most.
    #[arg(long, default_value_t = 1 << 20)]
    max_body: usize,
    /// Requests that are answered at once at most, streams included; more are refused.
    #[arg(long, default_value_t = 512)]
    max_concurrency: usize,
    /// Requests that may wait in front of each service, each text of `/v1/completions` for itself; more are refused.
    #[arg(long, default_value_t = 256)]
    queue: usize,
    /// Texts that are continued at once at most; requests for embeddings that are computed together, of which 64 always may.
    #[arg(long, default_value_t = 8)]
    max_batch: usize,
    /// Tokens of a text at most, prompt included; no more than the model's context.
    #[arg(long, default_value_t = 2048)]
    max_context: usize,
    /// Seconds from a request's head to the end of its answer at most.
    #[arg(long, default_value_t = 120.0, value_parser = seconds)]
    timeout: f64,
    /// Seconds that answers get to be finished after Ctrl-C or SIGTERM.
    #[arg(long, default_value_t = 30.0, value_parser = seconds)]
    grace: f64,
    /// A file for the timeline of batches, evaluations and their steps, which ui.perfetto.dev and chrome://tracing open.
    #[arg(long)]
    timeline: Option<PathBuf>,
}

fn adapter(argument: &str) -> Result<(String, PathBuf), String> {
    match argument.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => Ok((name.to_string(), dir.into())),
        _ => Err("an adapter is given as NAME=DIR".to_string()),
    }
}

fn seconds(argument: &str) -> Result<f64, String> {
    let seconds: f64 = argument.parse().map_err(|_| "no number".to_string())?;
    // a year, so that the time of its end exists
    if (0.0..=31_536_000.0).contains(&seconds) {
        Ok(seconds)
    } else {
        Err("it must be from 0 to 31536000 seconds".to_string())
    }
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let _timeline = arguments.timeline.as_deref().map(timeline::begin).transpose()?;
    let app = Arc::new(load(arguments)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(arguments.listen)
            .await
            .map_err(|error| format!("listening at {}: {error}", arguments.listen))?;
        // before anybody may be told that it is there
        let (mut first, mut second) = (Interrupts::new()?, Interrupts::new()?);
        say(format_args!("serving {} at http://{}", app.names().join(", "), listener.local_addr()?));
        let grace = Duration::from_secs_f64(arguments.grace);
        let stop = async move {
            first.next().await;
            say(format_args!("finishing what is being answered; once more to end it"));
        };
        let enough = async {
            let again = async {
                // where signals are streams, the first one arrives here too; elsewhere this listens from now on
                if cfg!(unix) {
                    second.next().await;
                }
                second.next().await;
            };
            tokio::select! { () = tokio::time::sleep(grace) => {}, () = again => {} }
        };
        http::serve(listener, app, stop, enough).await?;
        say(format_args!("stopped"));
        Ok(())
    })
}

/// Loads what the arguments name. What can be refused is refused before anything is fetched or loaded.
pub(crate) fn load(arguments: &Arguments) -> Result<App, Box<dyn Error>> {
    let limits = Limits {
        max_body: arguments.max_body,
        max_concurrency: arguments.max_concurrency,
        timeout: Duration::from_secs_f64(arguments.timeout),
    };
    limits.check()?;
    for (index, (name, dir)) in arguments.adapter.iter().enumerate() {
        if arguments.adapter.iter().take(index).any(|(other, _)| other == name) {
            return Err(format!("two adapters are named {name}").into());
        }
        LoraConfig::from_dir(dir)?;
    }
    let bars = Bars::default();
    let decoder = hub::open_or_fetch(arguments.model.as_deref(), &SMOLLM2_135M_INSTRUCT, &bars)?;
    let encoder = hub::open_or_fetch(arguments.embedding_model.as_deref(), &ALL_MINILM_L6_V2, &bars)?;
    let options = GenerationOptions {
        max_running: arguments.max_batch,
        queue: arguments.queue,
        max_context: arguments.max_context,
        ..GenerationOptions::default()
    };
    // every text that the other limits let in has room for its cache, alone at least
    let options = GenerationOptions { cache_positions: options.cache_positions.max(options.max_context), ..options };
    let model = decoder.causal_lm(DType::F32, &Device::Cpu)?;
    let generation = GenerationService::with_tokenizer(model.clone(), Arc::new(decoder.tokenizer()?), options)?;
    let (context, asked) = (generation.options().max_context, arguments.max_context);
    if context < asked {
        say(format_args!("texts have {context} tokens at most, the model's context, and not --max-context's {asked}"));
    }
    for (name, dir) in &arguments.adapter {
        generation.add_adapter(name.as_str(), &LoraAdapter::load(&mut model.clone(), dir)?)?;
    }
    let window = Window { max_batch: arguments.max_batch.max(64), max_wait: MaxWait::Adaptive };
    let options = EmbeddingOptions { window, queue: arguments.queue, ..EmbeddingOptions::default() };
    let embedding = EmbeddingService::new(encoder.sentence_encoder(DType::F32, &Device::Cpu)?, options)?
        .with_tokenizer(Arc::new(encoder.tokenizer()?));
    Ok(App::new(generation, embedding, name(&decoder), name(&encoder), limits)?)
}

/// The name of a model: its directory's.
fn name(files: &ModelDir) -> String {
    let whole = files.path().canonicalize();
    let path: &Path = whole.as_deref().unwrap_or_else(|_| files.path());
    path.file_name().map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned())
}

/// Ctrl-C and SIGTERM, from when this is made.
struct Interrupts {
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

impl Interrupts {
    fn new() -> std::io::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{signal, SignalKind};
            Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! { _ = self.interrupt.recv() => {}, _ = self.terminate.recv() => {} }
        #[cfg(not(unix))]
        tokio::signal::ctrl_c().await.unwrap_or_default();
    }
}
