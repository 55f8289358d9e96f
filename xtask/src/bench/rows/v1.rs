//! The calls of metal-candle 1.x on the shapes that it was measured on: v1's way, which is eager Candle, against the façade.
//!
//! Factors of low-rank layers are variables on both sides, as v1's are: Candle's tape is recorded too. B is not zero.

use super::super::Error;
use super::{by_row, bytes_of, eagerly, exactly, f64s, randn, ring, Row, Run, Work, RING};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_lazy::compat::backend::CustomMetalOps;
use candle_lazy::compat::graph::LazyTensor;
use candle_lazy::compat::training::{cross_entropy_loss, AdamW, AdamWConfig, LoRAConfig, LoRALayer};
use candle_lazy::compat::{KVCache, KVCacheConfig, TensorExt};
use std::cell::RefCell;
use std::rc::Rc;

const EPS: f64 = 1e-5;
/// alpha / rank, as in all of v1's benchmarks.
const SCALING: f64 = 2.0;

fn compat(error: candle_lazy::compat::Error) -> Error {
    Error::from(candle_core::Error::wrap(error))
}

/// The façade's side.
fn facade(xs: &[Tensor], f: impl Fn(&Tensor) -> candle_lazy::compat::Result<Tensor> + 'static) -> Run {
    let xs = xs.to_vec();
    Box::new(move |i| f(&xs[i % RING]).map_err(compat))
}

/// A layer with a B of its own.
fn layer(width: usize, rank: usize) -> Result<LoRALayer, Error> {
    let config = LoRAConfig { rank, alpha: SCALING as f32 * rank as f32, dropout: 0.0 };
    let layer = LoRALayer::new(width, width, &config, &Device::Cpu).map_err(compat)?;
    // as small as v1 drew it: logits of tens would make gradients a matter of their last digits
    layer.lora_b().set(&(randn(&[rank, width], DType::F32)? * 0.01)?)?;
    Ok(layer)
}

fn eager_lora(x: &Tensor, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    x.broadcast_matmul(a)?.broadcast_matmul(b)? * SCALING
}

fn lora(dims: [usize; 3], rank: usize, lazily: bool) -> Result<Work, Error> {
    let width = dims[2];
    let xs = ring(&dims, DType::F32)?;
    let layer = layer(width, rank)?;
    let (a, b) = (layer.lora_a().clone(), layer.lora_b().clone());
    let (wa, wb) = (f64s(&a.as_detached_tensor())?, f64s(&b.as_detached_tensor())?);
    let one: usize = dims.iter().product::<usize>() * DType::F32.size_in_bytes();
    let weights = bytes_of(&a) + bytes_of(&b);
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| eager_lora(x, &a, &b))],
        lazy: facade(&xs, move |x| {
            if lazily {
                let y = layer.forward_lazy(&LazyTensor::from_tensor(x.clone())?)?;
                return Ok(y.eval()?);
            }
            layer.forward(x)
        }),
        rough: None,
        exact: exactly(&xs, move |x| {
            let scale = eager_lora(&x.abs()?, &wa.abs()?, &wb.abs()?)?;
            Ok((eager_lora(x, &wa, &wb)?, scale))
        }),
        bytes: 2 * one + weights,
        footprint: (RING + 1) * one + weights,
        flops: 4.0 * (dims.iter().product::<usize>() * rank) as f64,
        per: 1.0,
    })
}

/// An op over the last dim.
fn over_rows(
    dims: [usize; 3],
    eager: &[fn(&Tensor) -> candle_core::Result<Tensor>],
    lazy: fn(&Tensor) -> candle_lazy::compat::Result<Tensor>,
    exact: fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Work, Error> {
    let xs = ring(&dims, DType::F32)?;
    let one: usize = dims.iter().product::<usize>() * DType::F32.size_in_bytes();
    Ok(Work {
        eager: eager.iter().map(|f| eagerly(&xs, *f)).collect(),
        lazy: facade(&xs, lazy),
        rough: None,
        exact: exactly(&xs, move |x| by_row(exact(x)?)),
        bytes: 2 * one,
        footprint: (RING + 1) * one,
        flops: 0.0,
        per: 1.0,
    })
}

fn plain_softmax(x: &Tensor) -> candle_core::Result<Tensor> {
    candle_nn::ops::softmax(x, D::Minus1)
}

fn plain_rms_norm(x: &Tensor) -> candle_core::Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?)
}

/// Candle's fused op, with the weight of ones that it wants.
fn fused_rms_norm(x: &Tensor) -> candle_core::Result<Tensor> {
    let ones = Tensor::ones(x.dim(D::Minus1)?, x.dtype(), x.device())?;
    candle_nn::ops::rms_norm(x, &ones, EPS as f32)
}

fn plain_layer_norm(x: &Tensor) -> candle_core::Result<Tensor> {
    plain_rms_norm(&x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?)
}

fn fused_layer_norm(x: &Tensor) -> candle_core::Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let (ones, zeros) = (Tensor::ones(width, x.dtype(), x.device())?, Tensor::zeros(width, x.dtype(), x.device())?);
    candle_nn::ops::layer_norm(x, &ones, &zeros, EPS as f32)
}

/// The gradients of A and B, one behind the other.
fn joined(loss: &Tensor, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let store = loss.backward()?;
    let of = |t: &Tensor| store.get(t).ok_or(candle_core::Error::Msg("no gradient".into()))?.flatten_all();
    Tensor::cat(&[of(a)?, of(b)?], 0)
}

fn targets(dims: [usize; 3]) -> candle_core::Result<Tensor> {
    Tensor::zeros((dims[0], dims[1]), DType::U32, &Device::Cpu)
}

/// Forward, cross entropy over as many classes as the layer is wide, backward.
fn gradient(dims: [usize; 3], rank: usize) -> Result<Work, Error> {
    let xs = ring(&dims, DType::F32)?;
    let layer = layer(dims[2], rank)?;
    let (a, b) = (layer.lora_a().clone(), layer.lora_b().clone());
    let (wa, wb) = (f64s(&a.as_detached_tensor())?, f64s(&b.as_detached_tensor())?);
    let targets = targets(dims)?;
    let flat = targets.flatten_all()?;
    let entropy = |logits: &Tensor, flat: &Tensor| candle_nn::loss::cross_entropy(&logits.flatten_to(1)?, flat);
    let eager_targets = flat.clone();
    let one: usize = dims.iter().product::<usize>() * DType::F32.size_in_bytes();
    let weights = 2 * (bytes_of(&a) + bytes_of(&b));
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| joined(&entropy(&eager_lora(x, &a, &b)?, &eager_targets)?, &a, &b))],
        lazy: facade(&xs, move |x| {
            let loss = cross_entropy_loss(&layer.forward(x)?, &targets, None)?;
            Ok(joined(&loss, layer.lora_a_tensor(), layer.lora_b_tensor())?)
        }),
        rough: None,
        exact: exactly(&xs, move |x| {
            let (a, b) = (Var::from_tensor(&wa)?, Var::from_tensor(&wb)?);
            let value = joined(&entropy(&eager_lora(x, &a, &b)?, &flat)?, &a, &b)?;
            // sums over all tokens: measured by the largest
            let scale = value.abs()?.max_keepdim(0)?;
            Ok((value, scale))
        }),
        bytes: one + weights,
        footprint: RING * one + weights,
        flops: 12.0 * (dims.iter().product::<usize>() * rank) as f64,
        per: 1.0,
    })
}

/// One update of a matrix.
fn adamw(rows: usize, cols: usize) -> Result<Work, Error> {
    let xs = ring(&[rows, cols], DType::F32)?;
    let config = AdamWConfig::default();
    let (lr, b1, b2) = (f64::from(config.learning_rate), f64::from(config.beta1), f64::from(config.beta2));
    let (eps, decay) = (f64::from(config.epsilon), f64::from(config.weight_decay));
    let start = randn(&[rows, cols], DType::F32)?;
    // θ − lr·m̂/(√v̂ + ε) − lr·λ·θ, the state being (m, v, t)
    let step = move |theta: &Tensor, g: &Tensor, state: &mut Option<(Tensor, Tensor, i32)>| {
        let (m, v, t) = match state.take() {
            Some((m, v, t)) => (m, v, t),
            None => (g.zeros_like()?, g.zeros_like()?, 0),
        };
        let t = t + 1;
        let m = ((m * b1)? + (g * (1.0 - b1))?)?;
        let v = ((v * b2)? + (g.sqr()? * (1.0 - b2))?)?;
        let root = ((&v / (1.0 - b2.powi(t)))?.sqrt()? + eps)?;
        let update = ((&m / (1.0 - b1.powi(t)))?.div(&root)? * lr)?;
        let next = ((theta - update)? - (theta * (lr * decay))?)?;
        *state = Some((m, v, t));
        candle_core::Result::Ok(next)
    };
    let eager: Run = {
        let (xs, var, state) = (xs.clone(), Var::from_tensor(&start)?, RefCell::new(None));
        Box::new(move |i| {
            let next = step(&var.as_detached_tensor(), &xs[i % RING], &mut state.borrow_mut())?;
            var.set(&next)?;
            Ok(next)
        })
    };
    let lazy: Run = {
        let (xs, var) = (xs.clone(), Var::from_tensor(&start)?);
        let optimizer = Rc::new(RefCell::new(AdamW::new(config).map_err(compat)?));
        Box::new(move |i| {
            optimizer.borrow_mut().step_var(&var, &xs[i % RING]).map_err(compat)?;
            Ok(var.as_detached_tensor())
        })
    };
    let bytes = 4 * bytes_of(&start);
    Ok(Work {
        eager: vec![eager],
        lazy,
        rough: None,
        // The parameter goes on from call to call. Rates are so small that it stays where it was to a hundredth of its scale; what an
        // update is worth, `verify --mode compat` says.
        exact: {
            let start = f64s(&start)?;
            Box::new(move |_| Ok((start.clone(), (start.abs()?.max_all()? * 1e6)?.broadcast_as(start.shape())?)))
        },
        bytes: bytes + 3 * bytes_of(&start),
        footprint: RING * bytes_of(&start) + bytes,
        flops: 0.0,
        per: 1.0,
    })
}

/// Positions appended one by one to the caches of so many layers.
fn kv_cache(layers: usize, heads: usize, head_dim: usize, positions: usize) -> Result<Work, Error> {
    let xs = ring(&[1, heads, 1, head_dim], DType::F32)?;
    let config =
        KVCacheConfig { max_seq_len: positions, num_layers: layers, num_heads: heads, head_dim, batch_size: 1 };
    let all = layers * positions * 2 * bytes_of(&xs[0]);
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| {
            let mut held: Vec<(Tensor, Tensor)> = vec![(x.clone(), x.clone()); layers];
            for _ in 1..positions {
                for (k, v) in &mut held {
                    *k = Tensor::cat(&[&*k, x], 2)?;
                    *v = Tensor::cat(&[&*v, x], 2)?;
                }
            }
            held.pop().map(|(k, _)| k).ok_or(candle_core::Error::Msg("no layer".into()))
        })],
        lazy: facade(&xs, move |x| {
            let mut cache = KVCache::new(config.clone(), &Device::Cpu)?;
            let mut last = x.clone();
            for _ in 0..positions {
                for layer in 0..layers {
                    (last, _) = cache.update(layer, x, x)?;
                }
            }
            Ok(last)
        }),
        rough: None,
        exact: exactly(&xs, move |x| by_row(x.repeat((1, 1, positions, 1))?)),
        bytes: all,
        footprint: all,
        flops: 0.0,
        per: 1.0,
    })
}

/// softmax((a·b + c)·2) of square matrices, by v1's lazy tensors.
fn chain(n: usize) -> Result<Work, Error> {
    let xs = ring(&[n, n], DType::F32)?;
    let (b, c) = (randn(&[n, n], DType::F32)?, randn(&[n, n], DType::F32)?);
    let (wb, wc) = (f64s(&b)?, f64s(&c)?);
    let (lb, lc) = (b.clone(), c.clone());
    let one = bytes_of(&b);
    Ok(Work {
        eager: vec![eagerly(&xs, move |a| candle_nn::ops::softmax_last_dim(&((a.matmul(&b)? + &c)? * 2.0)?))],
        lazy: facade(&xs, move |a| {
            let lazy = |t: &Tensor| LazyTensor::from_tensor(t.clone());
            let y = lazy(a)?.matmul(&lazy(&lb)?)?.add(&lazy(&lc)?)?.mul_scalar(2.0)?.softmax(1)?;
            Ok(y.eval()?)
        }),
        rough: None,
        exact: exactly(&xs, move |a| by_row(plain_softmax(&((a.matmul(&wb)? + &wc)? * 2.0)?)?)),
        bytes: 4 * one,
        footprint: (RING + 3) * one,
        flops: 2.0 * (n * n * n) as f64,
        per: 1.0,
    })
}

pub(super) fn rows() -> Vec<Row> {
    let row = |name: String, make: Box<dyn Fn() -> Result<Work, Error>>| Row::new(name, 1.0, make);
    let named = |dims: [usize; 3]| dims.map(|n| n.to_string()).join("x");
    let mut rows = Vec::new();
    for (dims, rank) in [
        ([1, 128, 512], 8),
        ([1, 1, 512], 8),
        ([1, 1, 1024], 8),
        ([1, 1, 2048], 8),
        ([4, 16, 512], 8),
        ([4, 16, 1024], 8),
        ([4, 16, 2048], 8),
        ([4, 16, 512], 16),
        ([2, 32, 1024], 32),
        ([2, 32, 1024], 64),
    ] {
        let suffix = if rank == 8 { String::new() } else { format!("-r{rank}") };
        rows.push(row(format!("v1/lora/{}{suffix}", named(dims)), Box::new(move || lora(dims, rank, false))));
    }
    rows.push(row("v1/lora-lazy/4x16x512".into(), Box::new(|| lora([4, 16, 512], 8, true))));
    for width in [256, 512, 1024, 2048, 4096] {
        let dims = [1, 128, width];
        rows.push(row(
            format!("v1/softmax/{}", named(dims)),
            Box::new(move || {
                let eager: &[fn(&Tensor) -> candle_core::Result<Tensor>] =
                    &[candle_nn::ops::softmax_last_dim, plain_softmax];
                over_rows(dims, eager, |x| Ok(x.softmax_fused()?), plain_softmax)
            }),
        ));
        rows.push(row(
            format!("v1/rms_norm/{}", named(dims)),
            Box::new(move || {
                let eager: &[fn(&Tensor) -> candle_core::Result<Tensor>] = &[fused_rms_norm, plain_rms_norm];
                over_rows(dims, eager, |x| Ok(x.rms_norm_fused(EPS as f32)?), plain_rms_norm)
            }),
        ));
    }
    let dims = [4, 16, 1024];
    type Eager = fn(&Tensor) -> candle_core::Result<Tensor>;
    type Ours = fn(&Tensor) -> candle_lazy::compat::Result<Tensor>;
    let ops: [(&str, Eager, Ours, Eager); 3] = [
        ("softmax_stable", candle_nn::ops::softmax_last_dim, |x| Ok(x.softmax_stable()?), plain_softmax),
        ("layer_norm", fused_layer_norm, |x| Ok(TensorExt::layer_norm(x, EPS)?), plain_layer_norm),
        ("rms_norm", fused_rms_norm, |x| Ok(TensorExt::rms_norm(x, EPS)?), plain_rms_norm),
    ];
    for (name, fused, ours, plain) in ops {
        rows.push(row(
            format!("v1/{name}/{}", named(dims)),
            Box::new(move || over_rows(dims, &[fused, plain], ours, plain)),
        ));
    }
    rows.push(row("v1/gradient/2x16x512".into(), Box::new(|| gradient([2, 16, 512], 8))));
    rows.push(row("v1/adamw/512x512".into(), Box::new(|| adamw(512, 512))));
    rows.push(row("v1/kv_cache/24x14x64".into(), Box::new(|| kv_cache(24, 14, 64, 256))));
    rows.push(row("v1/chain/64x64".into(), Box::new(|| chain(64))));
    rows
}
