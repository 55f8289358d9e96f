//! `cargo xtask stress`: many callers of one batching executor at once, who change their minds, ask for what fails and for what panics.
//!
//! Every answer is compared, bit for bit, with that of the same request alone. At the end no recorded node may be alive that was not
//! before, and no byte of the engine's memory in use.

use crate::output::{self, complain, say};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use candle_lazy::exec::batch::{BatchExecutor, BatchOptions, Priority, Shutdown, SubmissionAll, SubmitOptions};
use candle_lazy::exec::buffer::memory_stats;
use candle_lazy::exec::{Error, LazyTensor, QueueError, Result};
use candle_lazy::graph::live_nodes;
use candle_lazy_parity::rng::Rng;
use clap::Args;
use futures::executor::block_on;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long, and by how many.
#[derive(Debug, Args)]
pub struct StressArgs {
    /// For how many seconds.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// How many threads submit.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub submitters: u32,
    /// What the threads draw their requests from.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// The text that stands in the panics and errors that are on purpose.
const ON_PURPOSE: &str = "on purpose";
const WIDTH: usize = 48;
/// Requests of each kind that are told apart by their input.
const INPUTS: usize = 8;

/// What a request computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Softmax,
    Norm,
    Lora,
    Block,
    Fails,
    Panics,
}

const GOOD: [Kind; 4] = [Kind::Softmax, Kind::Norm, Kind::Lora, Kind::Block];

/// Fails or panics.
struct Bad {
    panics: bool,
}

impl CustomOp1 for Bad {
    fn name(&self) -> &'static str {
        "bad"
    }

    #[allow(clippy::panic)] // what is tested is that it is contained
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        if self.panics {
            panic!("{ON_PURPOSE}");
        }
        Err(candle_core::Error::Msg(ON_PURPOSE.into()))
    }
}

/// The weights that all requests share.
struct Weights {
    norm: LazyTensor,
    up: LazyTensor,
    down: LazyTensor,
    a: LazyTensor,
    b: LazyTensor,
    xs: Vec<Tensor>,
}

impl Weights {
    fn new() -> Result<Self> {
        let randn = |dims: &[usize]| Tensor::randn(0f32, 1f32, dims, &Device::Cpu);
        let lazy = |dims: &[usize]| Ok::<_, Error>(LazyTensor::from(randn(dims)?));
        // one row, several, and more than are gathered
        let rows = [1, 1, 2, 3, 5, 17, 40, 90];
        Ok(Self {
            norm: lazy(&[WIDTH])?,
            up: lazy(&[2 * WIDTH, WIDTH])?,
            down: lazy(&[WIDTH, 2 * WIDTH])?,
            a: lazy(&[WIDTH, 8])?,
            b: lazy(&[8, WIDTH])?,
            xs: rows.iter().map(|&n| randn(&[n, WIDTH])).collect::<candle_core::Result<_>>()?,
        })
    }

    fn record(&self, kind: Kind, input: usize) -> Result<LazyTensor> {
        let x = LazyTensor::from(self.xs.get(input % INPUTS).ok_or_else(|| Error::msg("no such input"))?);
        Ok(match kind {
            Kind::Softmax => x.softmax(1)?,
            Kind::Norm => x.rms_norm(Some(&self.norm), 1e-5)?.sqr()?,
            Kind::Lora => x.lora(&self.a, &self.b, 0.5)?,
            Kind::Block => {
                let hidden = x.rms_norm(Some(&self.norm), 1e-5)?.linear(&self.up, None)?.silu()?;
                (hidden.linear(&self.down, None)? + &x)?
            }
            Kind::Fails | Kind::Panics => {
                let hidden = x.linear(&self.up, None)?.exp()?;
                let (shape, panics) = (hidden.shape().clone(), kind == Kind::Panics);
                hidden.custom_op1(Bad { panics }, shape, DType::F32)?
            }
        })
    }
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.iter().map(|x| x.to_bits()).collect())
}

/// What one thread saw.
#[derive(Debug, Default)]
struct Tally {
    answered: u64,
    dropped: u64,
    refused: u64,
    failed: u64,
    /// What should not have been.
    wrong: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.dropped += other.dropped;
        self.refused += other.refused;
        self.failed += other.failed;
        self.wrong.extend(other.wrong);
    }
}

type Alone = BTreeMap<(Kind, usize), Vec<u32>>;

/// One thread's requests until it is told to stop.
fn submitter(executor: &BatchExecutor, weights: &Weights, alone: &Alone, stop: &AtomicBool, mut rng: Rng) -> Tally {
    let mut tally = Tally::default();
    let mut waiting: Vec<(Kind, usize, SubmissionAll)> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let kind = match rng.below(20) {
            0 => Kind::Fails,
            1 => Kind::Panics,
            n => GOOD[n % GOOD.len()],
        };
        let input = rng.below(INPUTS);
        let asked = weights.record(kind, input).and_then(|x| ask(executor, &x, &mut rng));
        match asked {
            Ok(ticket) if rng.below(6) == 0 => {
                tally.dropped += 1;
                drop(ticket);
            }
            Ok(ticket) => waiting.push((kind, input, ticket)),
            Err(Error::Queue(QueueError::Full { .. } | QueueError::Deadline)) => tally.refused += 1,
            Err(error) => tally.wrong.push(format!("{kind:?} was not let in: {error}")),
        }
        if waiting.len() > rng.below(24) {
            for one in waiting.drain(..) {
                settle(one, alone, &mut tally, rng.below(2) == 0);
            }
        }
    }
    for one in waiting {
        settle(one, alone, &mut tally, true);
    }
    tally
}

fn ask(executor: &BatchExecutor, x: &LazyTensor, rng: &mut Rng) -> Result<SubmissionAll> {
    let priority = [Priority::High, Priority::Normal, Priority::Low][rng.below(3)];
    let deadline = (rng.below(8) == 0).then(|| Instant::now() + Duration::from_micros(rng.below(500) as u64));
    let how = SubmitOptions { priority, deadline, lane: rng.below(4) as u64 };
    match rng.below(3) {
        0 => executor.submit_all(&[x], &how),
        1 => executor.try_submit_all(&[x], &how),
        _ => block_on(executor.submit_async(&[x], &how)),
    }
}

fn settle((kind, input, ticket): (Kind, usize, SubmissionAll), alone: &Alone, tally: &mut Tally, polls: bool) {
    let answer = if polls { block_on(ticket) } else { ticket.wait() };
    let wrong = match (kind, answer) {
        (_, Err(Error::Queue(QueueError::Deadline))) => {
            tally.refused += 1;
            return;
        }
        (Kind::Fails | Kind::Panics, Err(error)) if error.to_string().contains(ON_PURPOSE) => {
            tally.failed += 1;
            return;
        }
        (Kind::Fails | Kind::Panics, other) => format!("{other:?}"),
        (_, Err(error)) => error.to_string(),
        (_, Ok(values)) => {
            let got = values.first().map(bits);
            tally.answered += 1;
            match (got, alone.get(&(kind, input))) {
                (Some(Ok(got)), Some(want)) if got == *want => return,
                _ => "other bits than alone".into(),
            }
        }
    };
    tally.wrong.push(format!("{kind:?} of input {input}: {wrong}"));
}

/// Why it did not come to an end.
#[derive(Debug, thiserror::Error)]
enum StressError {
    #[error(transparent)]
    Lazy(#[from] Error),
    #[error(transparent)]
    Output(#[from] output::Error),
}

fn stress(args: &StressArgs) -> std::result::Result<bool, StressError> {
    let weights = Weights::new()?;
    let mut alone = Alone::new();
    for kind in GOOD {
        for input in 0..INPUTS {
            alone.insert((kind, input), bits(&weights.record(kind, input)?.eval()?)?);
        }
    }
    let nodes_before = live_nodes();
    let options = BatchOptions { capacity: 64, ..BatchOptions::default() };
    let executor = BatchExecutor::with_options(&options)?;
    let stop = AtomicBool::new(false);
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let (executor, weights, alone, stop) = (&executor, &weights, &alone, &stop);
        let threads: Vec<_> = (0..args.submitters)
            .map(|i| {
                let rng = Rng::named(args.seed, &format!("submitter {i}"));
                scope.spawn(move || submitter(executor, weights, alone, stop, rng))
            })
            .collect();
        std::thread::sleep(Duration::from_secs(args.seconds));
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            match thread.join() {
                Ok(seen) => tally.add(seen),
                Err(_) => tally.wrong.push("a submitter panicked".into()),
            }
        }
    });
    executor.shutdown(Shutdown::Drain);
    let stats = executor.stats();
    drop(executor);
    let (nodes, bytes) = (live_nodes().abs_diff(nodes_before), memory_stats().active);
    for wrong in tally.wrong.iter().take(10) {
        say!("WRONG {wrong}")?;
    }
    say!(
        "{} answered, {} failed on purpose, {} dropped, {} refused; {} batches of {:.1}, {} products merged, waited {:.0} us",
        tally.answered,
        tally.failed,
        tally.dropped,
        tally.refused,
        stats.batch_sizes.count(),
        stats.batch_sizes.mean(),
        stats.merged_products,
        stats.wait_us.mean()
    )?;
    say!("stress: {} wrong, {nodes} live nodes, {bytes} bytes in use", tally.wrong.len())?;
    // a run in which one of these never happened has shown nothing
    let shown = tally.answered > 0 && tally.failed > 0 && tally.dropped > 0 && stats.merged_products > 0;
    if !shown {
        complain!("stress: too little happened");
    }
    Ok(shown && tally.wrong.is_empty() && nodes == 0 && bytes == 0)
}

/// Runs it; the exit code is 1 if an answer was wrong or something was left behind.
#[must_use]
pub fn run(args: &StressArgs) -> i32 {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
        if !text.contains(ON_PURPOSE) {
            before(info);
        }
    }));
    match stress(args) {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(StressError::Output(error)) => output::failed("stress", &error),
        Err(error) => {
            complain!("stress: {error}");
            1
        }
    }
}
