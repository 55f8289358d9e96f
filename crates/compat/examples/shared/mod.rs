//! What the examples share: the time and the memory of a piece of work, and how a program ends.

use candle_lazy_exec::buffer;
use peak_alloc::PeakAlloc;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Counts what is allocated, by Candle and by the engine alike.
#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

pub(crate) type Outcome<T> = Result<T, Box<dyn Error>>;

/// What a piece of work took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    time: Duration,
    bytes: usize,
}

/// Does `work` `runs` times; the last result, the shortest time, and the most memory of the first run beyond what there was before it.
pub(crate) fn measured<T>(runs: usize, mut work: impl FnMut() -> Outcome<T>) -> Outcome<(T, Cost)> {
    // what the engine keeps for reuse would hide what it takes
    buffer::trim();
    ALLOCATED.reset_peak_usage();
    let before = ALLOCATED.current_usage();
    let start = Instant::now();
    let mut result = work()?;
    let mut best = start.elapsed();
    let bytes = ALLOCATED.peak_usage().saturating_sub(before);
    for _ in 1..runs {
        let start = Instant::now();
        result = work()?;
        best = best.min(start.elapsed());
    }
    Ok((result, Cost { time: best, bytes }))
}

/// Two lines: what the work took the eager way and the lazy way.
pub(crate) fn compare(what: &str, eager: Cost, lazy: Cost) {
    for (way, cost) in [("eager", eager), ("lazy", lazy)] {
        let (ms, mib) = (cost.time.as_secs_f64() * 1e3, cost.bytes as f64 / f64::from(1 << 20));
        println!("{way:<6}{what}: {ms:.3} ms, {mib:.2} MiB at most");
    }
}

/// Ends the program: an error goes to stderr, its causes behind it.
pub(crate) fn exit(outcome: Outcome<()>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    eprint!("error: {error}");
    let mut cause = error.source();
    while let Some(next) = cause {
        eprint!(": {next}");
        cause = next.source();
    }
    eprintln!();
    ExitCode::FAILURE
}
