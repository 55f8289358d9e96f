//! `cargo xtask COMMAND`: see `cargo xtask --help`.

use candle_lazy_parity::alloc::CountingAlloc;
use clap::{Parser, Subcommand};
use std::process::exit;

/// Counts what the demo and `verify --models` say about memory.
#[global_allocator]
static ALLOC: CountingAlloc = CountingAlloc;

/// Maintainers' commands of candle-lazy.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run two real models lazily, and eagerly beside it.
    Demo(xtask::demo::DemoArgs),
    /// Compare eager and lazy for every op, over shapes, layouts, dtypes and modes.
    Verify(xtask::verify::VerifyArgs),
    /// Time lazy against eager Candle, row by row.
    Bench(xtask::bench::BenchArgs),
    /// Port four models of candle-transformers by their `use` lines and compare them with the originals.
    Port(xtask::port::PortArgs),
    /// Check the repository itself: crate edges, docs, names, places of `unsafe`.
    Tidy,
    /// Compare the façade's public API with the listing that is checked in.
    Api(xtask::api::ApiArgs),
    /// Many callers of one batching executor at once, with errors, panics and changes of mind.
    Stress(xtask::stress::StressArgs),
    /// Bring the two real models into the cache.
    Fetch,
}

fn main() {
    let code = match Args::parse().command {
        Command::Demo(args) => xtask::demo::run(&args),
        Command::Verify(args) => xtask::verify::run(args),
        Command::Bench(args) => xtask::bench::run(&args),
        Command::Port(args) => xtask::port::run(&args),
        Command::Tidy => xtask::tidy::run(),
        Command::Api(args) => xtask::api::run(&args),
        Command::Stress(args) => xtask::stress::run(&args),
        Command::Fetch => xtask::fetch::run(),
    };
    exit(code);
}
