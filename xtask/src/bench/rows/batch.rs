//! A hundred callers' requests through the batching executor, against the same hundred one by one.

use super::super::Error;
use super::{bytes_of, exactly, f64s, randn, Row, Run, Work};
use candle_core::{DType, Tensor, D};
use candle_lazy::exec::batch::BatchExecutor;
use candle_lazy::exec::LazyTensor;

/// How many requests are submitted before the first is waited for.
const REQUESTS: usize = 100;

type Lazy = Box<dyn Fn(&LazyTensor) -> candle_lazy::exec::Result<LazyTensor>>;
type Eager = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor>>;

fn inputs(dims: &[usize]) -> Result<Vec<Tensor>, Error> {
    (0..REQUESTS).map(|_| randn(dims, DType::F32)).collect()
}

/// Candle's side: every result is kept until the last is there.
fn one_by_one(xs: &[Tensor], f: Eager) -> Run {
    let xs = xs.to_vec();
    Box::new(move |i| {
        let kept = xs.iter().map(&f).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(kept[i % REQUESTS].clone())
    })
}

/// Ours: recorded, submitted and waited for, every result kept until the last is there.
fn batched(xs: &[Tensor], f: Lazy) -> Result<Run, Error> {
    let (xs, executor) = (xs.to_vec(), BatchExecutor::new()?);
    Ok(Box::new(move |i| {
        let submit = |x: &Tensor| executor.submit(&f(&LazyTensor::from(x))?);
        let asked = xs.iter().map(submit).collect::<candle_lazy::exec::Result<Vec<_>>>()?;
        let kept = asked.into_iter().map(|one| one.wait()).collect::<candle_lazy::exec::Result<Vec<_>>>()?;
        Ok(kept[i % REQUESTS].clone())
    }))
}

fn lora(rows: usize, width: usize, rank: usize) -> Result<Work, Error> {
    const SCALE: f64 = 2.0;
    let xs = inputs(&[1, rows, width])?;
    let (a, b) = (randn(&[width, rank], DType::F32)?, randn(&[rank, width], DType::F32)?);
    let (wa, wb) = (f64s(&a)?, f64s(&b)?);
    let (la, lb) = (LazyTensor::from(&a), LazyTensor::from(&b));
    let weights = bytes_of(&a) + bytes_of(&b);
    let one = rows * width * DType::F32.size_in_bytes();
    let flat = move |x: &Tensor| x.flatten_to(1)?.matmul(&a)?.matmul(&b)?.affine(SCALE, 0.0)?.reshape(x.shape());
    Ok(Work {
        eager: vec![one_by_one(&xs, Box::new(flat))],
        lazy: batched(&xs, Box::new(move |x| x.lora(&la, &lb, SCALE)))?,
        rough: None,
        exact: exactly(&xs, move |x| {
            let value = (x.broadcast_matmul(&wa)?.broadcast_matmul(&wb)? * SCALE)?;
            let scale = (x.abs()?.broadcast_matmul(&wa.abs()?)?.broadcast_matmul(&wb.abs()?)? * SCALE)?;
            Ok((value, scale))
        }),
        bytes: REQUESTS * 2 * one + weights,
        footprint: REQUESTS * 2 * one + weights,
        flops: 4.0 * (REQUESTS * rows * width * rank) as f64,
        per: REQUESTS as f64,
    })
}

fn softmax(dims: &[usize]) -> Result<Work, Error> {
    let xs = inputs(dims)?;
    let all = xs.iter().map(bytes_of).sum::<usize>();
    Ok(Work {
        eager: vec![
            one_by_one(&xs, Box::new(candle_nn::ops::softmax_last_dim)),
            one_by_one(&xs, Box::new(|x| candle_nn::ops::softmax(x, D::Minus1))),
        ],
        lazy: batched(&xs, Box::new(|x| x.softmax(2)))?,
        rough: None,
        exact: exactly(&xs, |x| super::by_row(candle_nn::ops::softmax(x, D::Minus1)?)),
        bytes: 2 * all,
        footprint: 2 * all,
        flops: 0.0,
        per: REQUESTS as f64,
    })
}

fn rms_norm(dims: &[usize]) -> Result<Work, Error> {
    const EPS: f64 = 1e-5;
    let xs = inputs(dims)?;
    let w = randn(&dims[dims.len() - 1..], DType::F32)?;
    let (wide, lw) = (f64s(&w)?, LazyTensor::from(&w));
    let all = xs.iter().map(bytes_of).sum::<usize>();
    Ok(Work {
        eager: vec![one_by_one(&xs, Box::new(move |x| candle_nn::ops::rms_norm(x, &w, EPS as f32)))],
        lazy: batched(&xs, Box::new(move |x| x.rms_norm(Some(&lw), EPS)))?,
        rough: None,
        exact: exactly(&xs, move |x| {
            let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
            super::by_row(x.broadcast_div(&mean)?.broadcast_mul(&wide)?)
        }),
        bytes: 2 * all,
        footprint: 2 * all,
        flops: 0.0,
        per: REQUESTS as f64,
    })
}

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new("async/lora/1x1x512-r8", 25.0, || lora(1, 512, 8)),
        Row::new("async/lora/1x128x512-r8", 3.0, || lora(128, 512, 8)),
        Row::new("async/softmax/1x128x1024", 4.0, || softmax(&[1, 128, 1024])),
        Row::new("async/rms_norm/1x128x1024", 1.7, || rms_norm(&[1, 128, 1024])),
    ]
}
