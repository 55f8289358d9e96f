//! Steps of training: forward, backward and AdamW.
//!
//! Candle's side is its autograd with candle-nn's AdamW, ours the graph transform with a recorded step, as one plan. The learning rate is
//! so small that the parameters stay where they are: every call gives the same loss and gradients, which are what is checked.

use super::super::measure::{self, Paired};
use super::super::Error;
use super::model::ids;
use super::{bytes_of, eagerly, exactly, f64s, randn, ring, Floor, Row, Run, Work, RING};
use crate::demo::sources;
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy::exec::{eval_all, grad, LazyTensor};
use candle_lazy::nn::optim::{OnNonFinite, Optimizer, OptimizerOptions, ParamsAdamW, Rule};
use candle_lazy::nn::params::Params;
use candle_lazy_parity::models::TrainingPair;
use candle_nn::{AdamW, Optimizer as _};
use std::cell::{OnceCell, RefCell};
use std::rc::Rc;

const STILL: ParamsAdamW = ParamsAdamW { lr: 1e-12, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
const SCALE: f64 = 2.0;

fn nn(error: candle_lazy::nn::Error) -> Error {
    Error::from(candle_core::Error::wrap(error))
}

fn flat(tensors: &[Tensor]) -> candle_core::Result<Tensor> {
    let flat: Vec<Tensor> = tensors.iter().map(|t| t.detach().flatten_all()).collect::<candle_core::Result<_>>()?;
    Tensor::cat(&flat, 0)
}

/// Everything at the scale of the largest gradient: they are sums over all tokens.
fn scaled(value: Tensor) -> candle_core::Result<(Tensor, Tensor)> {
    let scale = value.abs()?.max_all()?.broadcast_as(value.shape())?;
    Ok((value, scale))
}

fn eager_loss(x: &Tensor, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    (x.broadcast_matmul(a)?.broadcast_matmul(b)? * SCALE)?.sqr()?.mean_all()
}

fn eager_gradients(loss: &Tensor, vars: &[&Var]) -> candle_core::Result<(candle_core::backprop::GradStore, Tensor)> {
    let store = loss.backward()?;
    let mut all = vec![loss.clone()];
    for var in vars {
        all.push(store.get(var.as_tensor()).ok_or(candle_core::Error::Msg("no gradient".into()))?.clone());
    }
    let all = flat(&all)?;
    Ok((store, all))
}

/// The mean square of a low-rank product, with respect to its factors.
fn lora_step(dims: [usize; 3], rank: usize) -> Result<Work, Error> {
    let xs = ring(&dims, DType::F32)?;
    let width = dims[2];
    let (a, b) = ((randn(&[width, rank], DType::F32)? * 0.05)?, (randn(&[rank, width], DType::F32)? * 0.05)?);
    let (wa, wb) = (f64s(&a)?, f64s(&b)?);
    let eager: Run = {
        let (a, b) = (Var::from_tensor(&a)?, Var::from_tensor(&b)?);
        let optimizer = RefCell::new(AdamW::new(vec![a.clone(), b.clone()], STILL)?);
        let xs = xs.clone();
        Box::new(move |i| {
            let loss = eager_loss(&xs[i % RING], a.as_tensor(), b.as_tensor())?;
            let (store, all) = eager_gradients(&loss, &[&a, &b])?;
            optimizer.borrow_mut().step(&store)?;
            Ok(all)
        })
    };
    let lazy: Run = {
        let mut params = Params::new();
        let (a, b) = (params.insert("a", a.clone()).map_err(nn)?, params.insert("b", b.clone()).map_err(nn)?);
        let options = OptimizerOptions { on_non_finite: OnNonFinite::Apply, ..OptimizerOptions::default() };
        let optimizer = RefCell::new(Optimizer::new(&params, Rule::AdamW(STILL), options).map_err(nn)?);
        let xs = xs.clone();
        Box::new(move |i| {
            let y = LazyTensor::from(&xs[i % RING]).lora(&a.value(), &b.value(), SCALE)?;
            let loss = y.sqr()?.mean_all()?;
            let gradients = params.grad(&loss).map_err(nn)?;
            let mut all = vec![loss.detach()];
            all.extend(gradients.iter().map(|(_, gradient)| gradient.clone()));
            drop((y, loss));
            optimizer.borrow_mut().step(gradients, &[&all[0]]).map_err(nn)?;
            Ok(flat(&eval_all(&all.iter().collect::<Vec<_>>())?)?)
        })
    };
    let one: usize = dims.iter().product::<usize>() * DType::F32.size_in_bytes();
    // factor, gradient and two moments, the moments read and written
    let state = 6 * (bytes_of(&a) + bytes_of(&b));
    Ok(Work {
        eager: vec![eager],
        lazy,
        rough: None,
        exact: exactly(&xs, move |x| {
            let (a, b) = (Var::from_tensor(&wa)?, Var::from_tensor(&wb)?);
            Ok(scaled(eager_gradients(&eager_loss(x, a.as_tensor(), b.as_tensor())?, &[&a, &b])?.1)?)
        }),
        bytes: one + state,
        footprint: RING * one + state,
        flops: 10.0 * (dims.iter().product::<usize>() * rank) as f64,
        per: 1.0,
    })
}

/// Cross entropy of logits, with respect to the logits.
fn cross_entropy(dims: [usize; 3]) -> Result<Work, Error> {
    let xs = ring(&[dims[0] * dims[1], dims[2]], DType::F32)?;
    let targets: Vec<u32> = (0..dims[0] * dims[1]).map(|i| (i * 37 % dims[2]) as u32).collect();
    let targets = Tensor::from_vec(targets, dims[0] * dims[1], &Device::Cpu)?;
    let eager = |x: &Tensor, targets: &Tensor| -> candle_core::Result<Tensor> {
        let var = Var::from_tensor(x)?;
        Ok(eager_gradients(&candle_nn::loss::cross_entropy(var.as_tensor(), targets)?, &[&var])?.1)
    };
    let (lazy_targets, exact_targets, ring) = (targets.clone(), targets.clone(), xs.clone());
    let one = bytes_of(&xs[0]);
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| eager(x, &targets))],
        lazy: Box::new(move |i| {
            let x = LazyTensor::from(&ring[i % RING]).variable()?;
            let loss = x.cross_entropy(&LazyTensor::from(&lazy_targets))?;
            let gradient = grad(&loss, &[&x])?.remove(0);
            Ok(flat(&eval_all(&[&loss, &gradient])?)?)
        }),
        rough: None,
        exact: exactly(&xs, move |x| Ok(scaled(eager(x, &exact_targets)?)?)),
        bytes: 2 * one,
        footprint: (RING + 1) * one,
        flops: 0.0,
        per: 1.0,
    })
}

type Pair = Rc<OnceCell<TrainingPair>>;

fn pair(cell: &Pair) -> Result<&TrainingPair, Error> {
    if let Some(pair) = cell.get() {
        return Ok(pair);
    }
    let pair = TrainingPair::load(&sources::decoder(&[])?.dir)?;
    Ok(cell.get_or_init(|| pair))
}

fn batch(seed: usize, count: usize, len: usize) -> Vec<Vec<u32>> {
    // one more: what follows the last
    (0..count).map(|i| ids(seed * 1000 + i, len + 1)).collect()
}

/// A step of a decoder with factors on q and v.
fn decoder(cell: &Pair, count: usize, len: usize) -> Result<Work, Error> {
    let weights = pair(cell)?.weight_elements();
    let side = |f: fn(&TrainingPair, &[Vec<u32>]) -> candle_lazy_parity::Result<Tensor>| -> Run {
        let cell = cell.clone();
        Box::new(move |i| Ok(f(pair(&cell)?, &batch(i % RING, count, len))?))
    };
    let exact = side(TrainingPair::exact);
    Ok(Work {
        eager: vec![side(TrainingPair::eager)],
        lazy: side(TrainingPair::lazy),
        rough: None,
        exact: Box::new(move |i| Ok(scaled(exact(i)?)?)),
        bytes: 2 * weights * 4,
        footprint: weights * 4,
        flops: 4.0 * (weights * count * len) as f64,
        per: 1.0,
    })
}

/// Eager's peak beyond the weights over lazy's.
fn memory(cell: &Pair) -> Result<Paired, Error> {
    let (eager, lazy) = pair(cell)?.peaks(&batch(0, 4, 128))?;
    if eager == 0 || lazy == 0 {
        return Err(Error::Wrong("no allocator counts the memory".into()));
    }
    Ok(measure::single(f64::NAN, eager as f64 / lazy as f64))
}

/// The peak beyond the weights with all inner values kept over that with checkpointed blocks.
fn checkpoint(cell: &Pair) -> Result<Paired, Error> {
    let (kept, again) = pair(cell)?.checkpoint_peaks(&batch(0, 4, 128))?;
    if kept == 0 || again == 0 {
        return Err(Error::Wrong("no allocator counts the memory".into()));
    }
    Ok(measure::single(f64::NAN, kept as f64 / again as f64))
}

pub(super) fn rows() -> Vec<Row> {
    let cell = Pair::default();
    let (step, held, again) = (cell.clone(), cell.clone(), cell);
    vec![
        Row::new("train/lora-step/4x64x512-r8", 2.5, || lora_step([4, 64, 512], 8)),
        Row::new("train/cross-entropy/2x16x512", 2.5, || cross_entropy([2, 16, 512])),
        Row::new("train/smollm2-lora/4x128", 2.0, move || decoder(&step, 4, 128)),
        Row::own("memory/smollm2-lora/4x128", Floor::Ratio(2.0), move |_| memory(&held)),
        Row::own("memory/checkpoint", Floor::Ratio(1.6), move |_| checkpoint(&again)),
    ]
}
