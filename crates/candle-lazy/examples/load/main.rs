//! Many clients of the example `serve` at once: each answer must be the one that the same request gets alone.
//!
//! ```text
//! cargo run --release -p candle-lazy --example serve -- --listen 127.0.0.1:8080
//! cargo run --release -p candle-lazy --example load -- --url http://127.0.0.1:8080 --clients 16 --requests 20
//! ```
//!
//! The clients ask for embeddings, completions and chats, whole and streamed, of every model and adapter that the server has; some go away
//! in the middle, some ask for nonsense. What each request gets alone is asked for first. At the end nothing may be left on the server.
//! Printed are throughput and the 50th and 99th percentile of the time from a request to the end of its answer (for streams, to the first
//! piece too).

pub(crate) mod clients;
mod report;

use clap::Parser;
use clients::{Failed, Load};
use report::Report;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(about = "Load for the example server, with every answer checked")]
struct Arguments {
    /// Where the server is.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Clients at once.
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// Requests of each, one after the other.
    #[arg(long, default_value_t = 20)]
    requests: usize,
    /// New tokens of a text at most.
    #[arg(long, default_value_t = 32)]
    max_tokens: u32,
    /// Of the mix.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What is embedded and continued.
const TEXTS: [&str; 8] = [
    "The capital of France is",
    "A man is eating food.",
    "Once upon a time, in a village by the sea, there lived a keeper of lights who",
    "Water boils at",
    "The three primary colours are red,",
    "A recipe for bread: take flour, water, salt and yeast. First",
    "In the year 1969,",
    "The opposite of hot is",
];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<Report, Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let (models, embedding_model) = clients::models(&arguments.url).await?;
        let load = Load {
            url: arguments.url.clone(),
            models,
            embedding_model,
            texts: TEXTS.iter().map(ToString::to_string).collect(),
            clients: arguments.clients,
            requests: arguments.requests,
            max_tokens: arguments.max_tokens,
            seed: arguments.seed,
        };
        load.run().await
    })
}
