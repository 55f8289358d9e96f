//! Blocks of `nn` that stand for no single op, against the same made of candle-nn's modules.
//!
//! The measure is the composition in f64. A block of several roundings may be off by two units for each of them, at the scale of
//! its last sum of products, or by 1.5 × what candle-nn's is.

use super::{Cell, Mode, Outcome};
use crate::case::{Domain, InputSpec, Layout};
use crate::cases::FLOATS;
use crate::compare::{rounding, same_bits};
use crate::referee::Judged;
use crate::reference::Arr;
use crate::rng::Rng;
use crate::value::to_arr;
use crate::verify::{caught, Options, Summary};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_nn::{self as ours, Module as _};
use candle_nn::{self as theirs, Module as _};

type Lazily = fn(&[LazyTensor]) -> ours::Result<Vec<LazyTensor>>;
/// The results, and what their rounding is measured by.
type Eagerly = fn(&[Tensor]) -> candle_core::Result<(Vec<Tensor>, Vec<Tensor>)>;

struct Block {
    name: &'static str,
    /// The first is the input, which comes in every layout.
    inputs: &'static [&'static [usize]],
    lazily: Lazily,
    eagerly: Eagerly,
    /// How many roundings there are; none for what only moves.
    roundings: f64,
}

fn linear(w: &Tensor, b: Option<&Tensor>, x: &Tensor) -> candle_core::Result<Tensor> {
    theirs::Linear::new(w.clone(), b.cloned()).forward(&x.contiguous()?)
}

fn magnitude(w: &Tensor, b: Option<&Tensor>, hidden: &Tensor) -> candle_core::Result<Tensor> {
    linear(&w.abs()?, b.map(Tensor::abs).transpose()?.as_ref(), &hidden.abs()?)
}

const TABLE: (usize, f32, usize) = (6, 100.0, 16);

const BLOCKS: &[Block] = &[
    Block {
        name: "Mlp",
        inputs: &[&[2, 3, 8], &[12, 8], &[12, 8], &[8, 12]],
        lazily: |x| {
            let linear = |at: usize| ours::Linear::new(x[at].clone(), None);
            Ok(vec![ours::Mlp::new(linear(1)?, linear(2)?, linear(3)?).forward(&x[0])?])
        },
        eagerly: |x| {
            let hidden = (linear(&x[1], None, &x[0])?.silu()? * linear(&x[2], None, &x[0])?)?;
            Ok((vec![linear(&x[3], None, &hidden)?], vec![magnitude(&x[3], None, &hidden)?]))
        },
        roundings: 5.0,
    },
    Block {
        name: "FeedForward",
        inputs: &[&[2, 3, 8], &[12, 8], &[12], &[8, 12], &[8]],
        lazily: |x| {
            let up = ours::Linear::new(x[1].clone(), Some(x[2].clone()))?;
            let down = ours::Linear::new(x[3].clone(), Some(x[4].clone()))?;
            Ok(vec![ours::FeedForward::new(up, ours::Activation::Gelu, down).forward(&x[0])?])
        },
        eagerly: |x| {
            let hidden = theirs::Activation::Gelu.forward(&linear(&x[1], Some(&x[2]), &x[0])?)?;
            Ok((vec![linear(&x[3], Some(&x[4]), &hidden)?], vec![magnitude(&x[3], Some(&x[4]), &hidden)?]))
        },
        roundings: 5.0,
    },
    Block {
        name: "RopeTable, whole and partial",
        inputs: &[&[2, 3, 5, 6], &[2, 3, 5, 10]],
        lazily: |x| {
            let (dim, theta, rows) = TABLE;
            let none = ours::RopeScaling::None;
            let table = ours::RopeTable::new(dim, theta, &none, rows, x[0].dtype(), &Device::Cpu)?;
            Ok(vec![table.apply(&x[0], 2)?, table.apply(&x[1], 2)?])
        },
        eagerly: |x| {
            let (dim, theta, rows) = TABLE;
            // angles are f32 in any dtype, as a table's are
            let frequency = |pair: usize| 1.0 / theta.powf((pair * 2) as f32 / dim as f32);
            let angle = |at: usize| (at / (dim / 2)) as f32 * frequency(at % (dim / 2));
            let table = |f: fn(f32) -> f32| {
                let numbers: Vec<f32> = (0..rows * dim / 2).map(|at| f(angle(at))).collect();
                Tensor::from_vec(numbers, (rows, dim / 2), &Device::Cpu)?.narrow(0, 2, 5)?.to_dtype(x[0].dtype())
            };
            let (cos, sin) = (table(f32::cos)?, table(f32::sin)?);
            let turned = |x: &Tensor| theirs::rotary_emb::rope_slow(&x.contiguous()?, &cos, &sin);
            let partial = Tensor::cat(&[turned(&x[1].narrow(3, 0, dim)?)?, x[1].narrow(3, dim, 4)?], 3)?;
            Ok((vec![turned(&x[0])?, partial], vec![(x[0].abs()? * 2.0)?, (x[1].abs()? * 2.0)?]))
        },
        roundings: 2.0,
    },
    Block {
        name: "KvCache",
        inputs: &[&[2, 3, 5, 4], &[2, 3, 5, 4], &[2, 3, 1, 4], &[2, 3, 1, 4]],
        lazily: |x| {
            let mut cache = ours::KvCache::new(9);
            let (k, v) = cache.append(&x[0], &x[1])?;
            let (all_k, all_v) = cache.append(&x[2], &x[3])?;
            Ok(vec![k, v, all_k, all_v])
        },
        eagerly: |x| {
            let mut cache = theirs::kv_cache::KvCache::new(2, 9);
            let (k, v) = cache.append(&x[0].contiguous()?, &x[1].contiguous()?)?;
            // its results are views of what the next append writes behind
            let first = vec![k.force_contiguous()?, v.force_contiguous()?];
            let (all_k, all_v) = cache.append(&x[2].contiguous()?, &x[3].contiguous()?)?;
            Ok((first.into_iter().chain([all_k, all_v]).collect(), Vec::new()))
        },
        roundings: 0.0,
    },
];

/// What is wrong with a block on inputs of this dtype and layout, if anything.
fn check(block: &Block, dtype: DType, layout: Layout, seed: u64) -> Result<Option<Cell>> {
    let mut rng = Rng::named(seed, block.name);
    let mut inputs = Vec::new();
    for (i, dims) in block.inputs.iter().enumerate() {
        let layout = if i == 0 { layout } else { Layout::Contiguous };
        let spec = InputSpec::new(dims, dtype, layout, Domain::Any);
        let (stored, low) = (spec.storage_dims(), if i == 0 { 3.0 } else { 0.5 });
        let data = (0..stored.iter().product()).map(|_| rng.range(-low, low)).collect();
        inputs.push(spec.view(&crate::value::to_tensor(&Arr { dims: stored, data }, dtype)?)?);
    }
    let leaves: Vec<LazyTensor> = inputs.iter().map(LazyTensor::from).collect();
    let lazy = (block.lazily)(&leaves)?;
    let mut got = Vec::new();
    let mut cell = Cell::of(Outcome::Passed);
    for tensor in &lazy {
        let (tensor, report) = tensor.eval_with_report()?;
        for (name, count) in report.kernels {
            *cell.kernels.entry(name).or_default() += count;
        }
        got.push(tensor);
    }
    let (eager, _) = (block.eagerly)(&inputs)?;
    let wide: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(DType::F64)).collect::<candle_core::Result<_>>()?;
    let (exact, magnitudes) = (block.eagerly)(&wide)?;
    for (i, (got, eager)) in got.iter().zip(&eager).enumerate() {
        let wrong = match magnitudes.get(i) {
            None => same_bits(block.name, got, eager)?.err(),
            Some(magnitude) => {
                let (value, magnitude) = (to_arr(&exact[i])?, to_arr(magnitude)?);
                let judged = Judged { row: value.dims.len().saturating_sub(1), value, magnitude };
                let verdict = rounding(block.name, got, Some(eager), &judged, block.roundings)?;
                if verdict.share() > cell.share {
                    (cell.share, cell.ulp) = (verdict.share(), verdict.ours.ulp);
                }
                verdict.wrong
            }
        };
        if let Some(wrong) = wrong {
            cell.outcome = Outcome::Failed(wrong);
            break;
        }
    }
    Ok(Some(cell))
}

/// Runs every block in every dtype and layout.
pub(crate) fn run(options: &Options, modes: &[Mode], summary: &mut Summary) {
    if !modes.contains(&Mode::NnModule) {
        return;
    }
    for dtype in FLOATS.into_iter().filter(|d| options.dtype.is_none_or(|only| only == *d)) {
        for block in BLOCKS {
            for layout in Layout::ALL {
                let name = format!("{}, {} {}", block.name, dtype.as_str(), layout.name());
                if let Some(cell) = caught(|| check(block, dtype, layout, options.seed)) {
                    summary.count("block", &name, &Mode::NnModule.name(), &cell);
                }
            }
        }
    }
}
