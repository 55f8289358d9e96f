//! Whole models: a sentence encoder and a decoder with their published weights.

use super::super::measure::{self, Effort, Paired};
use super::super::Error;
use super::{Row, Run, Work, RING};
use crate::demo::sources;
use candle_core::{DType, Tensor};
use candle_lazy_parity::models::{DecoderPair, EncoderPair};
use std::cell::OnceCell;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

/// Tokens of the prompt that a decode goes on from.
const PROMPT: usize = 128;
/// Ids of ordinary words in both vocabularies.
const WORDS: std::ops::Range<u32> = 2000..28000;

/// The models, loaded when a row first asks.
#[derive(Default)]
struct Models {
    encoder: OnceCell<EncoderPair>,
    decoder: OnceCell<DecoderPair>,
}

fn get<T>(cell: &OnceCell<T>, load: impl FnOnce() -> Result<T, Error>) -> Result<&T, Error> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = load()?;
    Ok(cell.get_or_init(|| value))
}

impl Models {
    fn encoder(&self) -> Result<&EncoderPair, Error> {
        get(&self.encoder, || Ok(EncoderPair::load(&sources::encoder(&[])?.dir)?))
    }

    fn decoder(&self) -> Result<&DecoderPair, Error> {
        get(&self.decoder, || Ok(DecoderPair::load(&sources::decoder(&[])?.dir, &ids(0, PROMPT))?))
    }
}

/// Some ids; others for another seed.
pub(super) fn ids(seed: usize, count: usize) -> Vec<u32> {
    let span = (WORDS.end - WORDS.start) as usize;
    (0..count).map(|i| WORDS.start + ((seed * 7919 + i * 104_729 + i * i * 31) % span) as u32).collect()
}

fn texts(seed: usize, count: usize, len: usize) -> Vec<Vec<u32>> {
    (0..count).map(|i| ids(seed * 1000 + i, len)).collect()
}

/// A row of the result against the largest of that row.
fn exactly(f: impl Fn(usize) -> Result<Tensor, Error> + 'static) -> super::Exact {
    Box::new(move |i| super::by_row(f(i)?))
}

fn minilm(models: &Rc<Models>, count: usize, len: usize) -> Result<Work, Error> {
    models.encoder()?;
    let ring: Rc<Vec<_>> = Rc::new((0..RING).map(|i| texts(i, count, len)).collect());
    let side = |f: fn(&EncoderPair, &[Vec<u32>]) -> candle_lazy_parity::Result<Tensor>| -> Run {
        let (models, ring) = (models.clone(), ring.clone());
        Box::new(move |i| Ok(f(models.encoder()?, &ring[i % RING])?))
    };
    // hidden 384, inner 1536, six layers
    let weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536);
    Ok(Work {
        eager: vec![side(EncoderPair::eager)],
        lazy: side(EncoderPair::lazy),
        rough: None,
        exact: exactly(side(EncoderPair::exact)),
        bytes: weights * 4,
        footprint: weights * 4,
        flops: 2.0 * (weights * count * len) as f64,
        per: 1.0,
    })
}

fn prefill(models: &Rc<Models>) -> Result<Work, Error> {
    let weights = models.decoder()?.weight_elements();
    let side = |f: fn(&DecoderPair, &[u32]) -> candle_lazy_parity::Result<Tensor>| -> Run {
        let models = models.clone();
        Box::new(move |i| Ok(f(models.decoder()?, &ids(i % RING, PROMPT))?.flatten_all()?))
    };
    Ok(Work {
        eager: vec![side(DecoderPair::eager_prefill)],
        lazy: side(|pair, ids| pair.prefill(DType::F32, ids)),
        rough: None,
        exact: exactly(side(|pair, ids| pair.prefill(DType::F64, ids))),
        bytes: weights * 4,
        footprint: weights * 4,
        flops: 2.0 * (weights * PROMPT) as f64,
        per: 1.0,
    })
}

/// One decode step of a side.
type Step = Box<dyn Fn(&DecoderPair, u32) -> candle_lazy_parity::Result<Tensor>>;

fn decode(models: &Rc<Models>, dtype: DType) -> Result<Work, Error> {
    let pair = models.decoder()?;
    let weights = pair.weight_elements();
    // a prefill may have replaced it
    pair.read_prompt(&ids(0, PROMPT))?;
    let side = |f: Step| -> Run {
        let models = models.clone();
        Box::new(move |i| Ok(f(models.decoder()?, ids(i % RING, 1)[0])?.flatten_all()?))
    };
    let bytes = weights * dtype.size_in_bytes();
    Ok(Work {
        eager: vec![side(Box::new(|pair, id| pair.eager_decode(DType::F32, id)))],
        lazy: side(Box::new(move |pair, id| pair.decode(dtype, id))),
        rough: (dtype != DType::F32).then(|| side(Box::new(move |pair, id| pair.eager_decode(dtype, id)))),
        exact: exactly(side(Box::new(|pair, id| pair.decode(DType::F64, id)))),
        bytes,
        footprint: bytes,
        flops: 2.0 * weights as f64,
        per: 1.0,
    })
}

/// Another process that keeps one core busy, until it is dropped.
struct Busy(Child);

impl Busy {
    fn start() -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::Wrong(format!("no second process: {error}"));
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["bench", "--spin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(failed)?;
        // it spins from its first byte on
        if let Some(stdin) = &mut child.stdin {
            stdin.write_all(b"x").map_err(failed)?;
        }
        std::thread::sleep(Duration::from_millis(100));
        Ok(Self(child))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // a process that is gone already needs neither
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lazy's idle time over its time beside a busy process.
fn busy(models: &Rc<Models>, effort: Effort) -> Result<Paired, Error> {
    let pair = models.encoder()?;
    let ring: Vec<_> = (0..RING).map(|i| texts(i, 8, 32)).collect();
    let lazy = |i: usize| {
        std::hint::black_box(pair.lazy(&ring[i % RING])?);
        Ok(())
    };
    let (mut ratios, mut times) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let idle = measure::alone(effort, &lazy)?;
        let other = Busy::start()?;
        let beside = measure::alone(effort, &lazy)?;
        drop(other);
        ratios.push(idle / beside);
        times.push(beside);
    }
    let paired = measure::single(measure::median(&times), measure::median(&ratios));
    Ok(Paired { ratio_hi: measure::median_hi(&ratios), ..paired })
}

/// What one plan of a decode step costs.
fn plan(models: &Rc<Models>, effort: Effort, cached: bool) -> Result<Paired, Error> {
    let plan = models.decoder()?.planner(cached)?;
    let us = measure::alone(effort, &|_| Ok(plan()?))?;
    Ok(measure::single(us, f64::NAN))
}

/// Eager's peak over lazy's.
fn memory(models: &Rc<Models>) -> Result<Paired, Error> {
    let (eager, lazy) = models.encoder()?.peaks(&texts(0, 32, 128))?;
    if eager == 0 || lazy == 0 {
        return Err(Error::Wrong("no allocator counts the memory".into()));
    }
    Ok(measure::single(f64::NAN, eager as f64 / lazy as f64))
}

pub(super) fn rows() -> Vec<Row> {
    let models = Rc::new(Models::default());
    let mut rows = Vec::new();
    for (count, len, floor) in [(1, 16, 2.5), (8, 32, 1.9), (32, 128, 2.3)] {
        let models = models.clone();
        rows.push(Row::new(format!("minilm/{count}x{len}"), floor, move || minilm(&models, count, len)));
    }
    let of = models.clone();
    rows.push(Row::new("smollm2/prefill128", 1.5, move || prefill(&of)));
    for (name, dtype, floor) in [("smollm2/decode", DType::F32, 1.8), ("smollm2-bf16/decode", DType::BF16, 3.0)] {
        let of = models.clone();
        rows.push(Row::new(name, floor, move || decode(&of, dtype)));
    }
    let of = models.clone();
    rows.push(Row::own("busy/minilm/8x32", super::Floor::Ratio(0.4), move |effort| busy(&of, effort)));
    for (name, cached, most) in [("overhead/plan-cold", false, 2000.0), ("overhead/plan-hit", true, 50.0)] {
        let of = models.clone();
        rows.push(Row::own(name, super::Floor::MostUs(most), move |effort| plan(&of, effort, cached)));
    }
    rows.push(Row::own("memory/minilm/32x128", super::Floor::Ratio(1.7), move |_| memory(&models)));
    rows
}
