//! `cargo xtask bench`: lazy against eager Candle, row by row, each with a floor.
//!
//! Both sides run in one process in turns, on all threads, with the system's allocator as it is (an executor of batches,
//! once there is one, has glibc keep what was freed). A call records fresh nodes over a
//! ring of inputs and ends when the result is there. Results are checked against f64 after the timing. A row whose measurement
//! something else disturbed, or that beats what the machine can do, is void and measured again.

mod machine;
mod measure;
mod peers;
mod report;
mod rows;

use crate::output::{self, complain, say};
use candle_core::{DType, Tensor};
use machine::Machine;
use measure::{paired, Effort};
use report::Line;
use rows::{Floor, Job, Row, Run, Work};
use std::io::Read;
use std::path::PathBuf;

/// What `cargo xtask bench` takes.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Rows whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Fewer repetitions: for a look, not for a claim.
    #[arg(long)]
    quick: bool,
    /// Writes the rows as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Other frameworks on the same rows, where they are installed (`benches/peers`).
    #[arg(long)]
    peers: bool,
    /// Keeps a core busy until it is killed: what `busy/` rows run beside themselves.
    #[arg(long, hide = true)]
    spin: bool,
}

/// Why the bench ends without a verdict.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Lazy(#[from] candle_lazy::exec::Error),
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    #[error(transparent)]
    Parity(#[from] candle_lazy_parity::Error),
    #[error(transparent)]
    Models(#[from] crate::demo::Error),
    #[error("{0}")]
    Wrong(String),
    #[error("no row is named {0:?}; there are: {1}")]
    Filter(String, String),
    #[error(transparent)]
    Output(#[from] output::Error),
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: std::io::Error },
}

/// More than the limit by this much says that the limit was measured wrongly.
const BEYOND_LIMIT: f64 = 1.05;

/// Runs the rows; the exit code is 1 if one is below its floor, void or wrong.
#[must_use]
pub fn run(args: &BenchArgs) -> i32 {
    if args.spin {
        spin();
    }
    match bench(args) {
        Ok(0) => 0,
        Ok(_) => 1,
        Err(Error::Output(error)) => output::failed("bench", &error),
        Err(error) => {
            complain!("bench: {error}");
            1
        }
    }
}

/// Spins once a byte has come, until the parent kills it or is gone.
fn spin() -> ! {
    let (mut stdin, mut byte) = (std::io::stdin(), [0u8; 1]);
    let begun = stdin.read(&mut byte).is_ok_and(|n| n == 1);
    // the end of the parent ends its side of the pipe
    std::thread::spawn(move || {
        let _ = stdin.read(&mut byte);
        std::process::exit(0);
    });
    if !begun {
        std::process::exit(0);
    }
    loop {
        std::hint::spin_loop();
    }
}

/// The number of rows below their floor.
fn bench(args: &BenchArgs) -> Result<usize, Error> {
    let rows = chosen(args.filter.as_deref())?;
    let effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    let machine = Machine::measure()?;
    say!("{} threads, {:.0} GFLOP/s of arithmetic; system allocator; medians", machine.threads(), machine.flops / 1e9)?;
    say!("{}", report::HEAD)?;
    let mut lines = Vec::new();
    for row in &rows {
        let line = match measured(row, effort, &machine) {
            Ok(line) => line,
            Err(Error::Output(error)) => return Err(error.into()),
            Err(error) => Line::failed(row, error.to_string().lines().next().unwrap_or_default().to_string()),
        };
        say!("{line}")?;
        lines.push(line);
    }
    let peers = if args.peers { Some(peers::run(args.filter.as_deref(), args.quick)?) } else { None };
    if let Some(peers) = &peers {
        say!("{}", peers.table(&lines))?;
    }
    if let Some(path) = &args.json {
        let text = report::json(&lines, peers.as_ref().map(peers::Peers::json));
        std::fs::write(path, text).map_err(|error| Error::File { path: path.clone(), error })?;
    }
    let below = lines.iter().filter(|line| line.is_below()).count();
    say!("bench: {} rows, {below} below their floor", lines.len())?;
    Ok(below)
}

fn chosen(filter: Option<&str>) -> Result<Vec<Row>, Error> {
    let all = rows::all();
    let Some(filter) = filter else { return Ok(all) };
    let names = all.iter().map(|row| row.name.as_str()).collect::<Vec<_>>().join(", ");
    let some: Vec<Row> = all.into_iter().filter(|row| row.name.contains(filter)).collect();
    if some.is_empty() {
        return Err(Error::Filter(filter.to_string(), names));
    }
    Ok(some)
}

/// Times a row until a measurement counts, and checks its results.
fn measured(row: &Row, effort: Effort, machine: &Machine) -> Result<Line, Error> {
    let make = match &row.job {
        Job::Pair(make) => make,
        Job::Own(measure) => {
            let mut line = Line::new(row);
            line.set(&measure(effort)?, 1.0, None);
            return Ok(line);
        }
    };
    let work = make()?;
    let run = |f: &Run, i: usize| f(i).map(|y| drop(std::hint::black_box(y)));
    let eager = fastest(&work)?;
    let limit_us = (work.footprint > 0).then(|| machine.limit_us(work.bytes, work.footprint, work.flops));
    let mut line = Line::new(row);
    for _ in 0..effort.tries {
        let both = paired(effort, &|i| run(eager, i), &|i| run(&work.lazy, i))?;
        let fraction = limit_us.map(|limit| limit / both.lazy_us);
        let judged_by_ratio = !matches!(row.floor, Some(Floor::MostUs(_)));
        line.set(&both, work.per, fraction);
        line.void = (judged_by_ratio && both.disturbed() && !row.name.starts_with("overhead/"))
            || fraction.is_some_and(|f| f > BEYOND_LIMIT);
        if !line.void {
            break;
        }
    }
    check(&work, work.rough.as_ref().unwrap_or(eager))?;
    Ok(line)
}

/// The fastest of Candle's ways, each tried a few times in turn.
fn fastest(work: &Work) -> Result<&Run, Error> {
    let mut best: Option<(f64, &Run)> = None;
    for eager in &work.eager {
        let us = measure::alone(Effort::QUICK, &|i| eager(i).map(drop))?;
        if best.is_none_or(|(least, _)| us < least) {
            best = Some((us, eager));
        }
    }
    best.map(|(_, eager)| eager).ok_or_else(|| Error::Wrong("no eager side".into()))
}

/// Lazy's error may be 1.5 times eager's, or two units in the last place at the scale of a row or of a sum's terms.
fn check(work: &Work, eager: &Run) -> Result<(), Error> {
    for i in [0, 3] {
        let (want, scale) = (work.exact)(i)?;
        let (eager, lazy) = (eager(i)?, (work.lazy)(i)?);
        let ulp = match lazy.dtype() {
            DType::BF16 => 1.0 / 128.0,
            DType::F16 => 1.0 / 1024.0,
            _ => f64::from(f32::EPSILON),
        };
        let (off, allowed) = (worst(&lazy, &want, &scale)?, 1.5 * worst(&eager, &want, &scale)?);
        let right = off <= allowed.max(2.0 * ulp);
        if !right {
            return Err(Error::Wrong(format!("wrong: lazy is off by {off:e} of its scale, {allowed:e} allowed")));
        }
    }
    Ok(())
}

/// The largest difference from f64 as a part of the scale.
fn worst(got: &Tensor, want: &Tensor, scale: &Tensor) -> Result<f64, Error> {
    let off = got.to_dtype(DType::F64)?.sub(want)?.abs()?;
    let part = off.broadcast_div(&(scale + f64::MIN_POSITIVE)?)?;
    Ok(part.flatten_all()?.to_vec1::<f64>()?.into_iter().fold(0.0, |m, x| if x.is_nan() || x > m { x } else { m }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_names_nothing_is_an_error_that_lists_the_rows() {
        let error = chosen(Some("sofmax")).map(|rows| rows.len()).unwrap_err().to_string();
        assert!(error.contains("softmax/4x16x1024") && error.contains("sofmax"), "{error}");
        assert_eq!(chosen(Some("softmax-mid")).unwrap().len(), 1);
    }

    #[test]
    fn names_are_there_once() {
        let mut names: Vec<String> = rows::all().into_iter().map(|row| row.name).collect();
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_wrong_result_is_told() {
        let row = rows::all().into_iter().find(|row| row.name == "overhead/add-1280").unwrap();
        let Job::Pair(make) = row.job else { panic!("two sides") };
        let work = make().unwrap();
        assert!(check(&work, &work.eager[0]).is_ok());
        let right = make().unwrap().lazy;
        let wrong = Work { lazy: Box::new(move |i| Ok((right(i)? * 1.0001)?)), ..work };
        assert!(check(&wrong, &wrong.eager[0]).is_err());
    }
}
