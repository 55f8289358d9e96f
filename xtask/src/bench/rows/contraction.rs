//! Products: LoRA, linear, attention.

use super::super::Error;
use super::{bytes_of, eagerly, exactly, f64s, lazily, randn, ring, weights, Row, Work, RING};
use candle_core::{DType, Tensor, D};
use candle_lazy::exec::{AttentionOptions, LazyTensor};

/// (x·A·B)·scale.
fn lora(rows: usize, width: usize, rank: usize) -> Result<Work, Error> {
    const SCALE: f64 = 2.0;
    let xs = ring(&[rows, width], DType::F32)?;
    let (a, b) = (randn(&[width, rank], DType::F32)?, randn(&[rank, width], DType::F32)?);
    let (wa, wb) = (f64s(&a)?, f64s(&b)?);
    let (la, lb) = (LazyTensor::from(&a), LazyTensor::from(&b));
    let weights = bytes_of(&a) + bytes_of(&b);
    let one = rows * width * DType::F32.size_in_bytes();
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| x.matmul(&a)?.matmul(&b)? * SCALE)],
        lazy: lazily(&xs, move |x| x.lora(&la, &lb, SCALE)),
        rough: None,
        exact: exactly(&xs, move |x| {
            let value = (x.matmul(&wa)?.matmul(&wb)? * SCALE)?;
            let scale = (x.abs()?.matmul(&wa.abs()?)?.matmul(&wb.abs()?)? * SCALE)?;
            Ok((value, scale))
        }),
        bytes: 2 * one + weights,
        footprint: (RING + 1) * one + weights,
        flops: 4.0 * (rows * width * rank) as f64,
        per: 1.0,
    })
}

/// x·Wᵀ.
fn linear(rows: usize, features: usize, out: usize, dtype: DType) -> Result<Work, Error> {
    let xs = ring(&[rows, features], dtype)?;
    let w = weights(&[out, features], dtype)?;
    let (wide, lw) = (f64s(&w)?.t()?.contiguous()?, LazyTensor::from(&w));
    let size = dtype.size_in_bytes();
    let (read, written, weight) = (rows * features * size, rows * out * size, bytes_of(&w));
    Ok(Work {
        eager: vec![eagerly(&xs, move |x| x.matmul(&w.t()?))],
        lazy: lazily(&xs, move |x| x.linear(&lw, None)),
        rough: None,
        exact: exactly(&xs, move |x| Ok((x.matmul(&wide)?, x.abs()?.matmul(&wide.abs()?)?))),
        bytes: read + weight + written,
        footprint: RING * read + weight + written,
        flops: 2.0 * (rows * features * out) as f64,
        per: 1.0,
    })
}

/// softmax(q·kᵀ/√d)·v.
fn attention(heads: usize, queries: usize, keys: usize, d: usize) -> Result<Work, Error> {
    let scale = 1.0 / (d as f64).sqrt();
    let xs = ring(&[1, heads, queries, d], DType::F32)?;
    let (k, v) = (randn(&[1, heads, keys, d], DType::F32)?, randn(&[1, heads, keys, d], DType::F32)?);
    let (wk, wv) = (f64s(&k)?, f64s(&v)?);
    let (lk, lv) = (LazyTensor::from(&k), LazyTensor::from(&v));
    let cache = bytes_of(&k) + bytes_of(&v);
    let one = heads * queries * d * DType::F32.size_in_bytes();
    Ok(Work {
        eager: vec![eagerly(&xs, move |q| {
            candle_nn::ops::softmax_last_dim(&(q.matmul(&k.t()?)? * scale)?)?.matmul(&v)
        })],
        lazy: lazily(&xs, move |q| LazyTensor::attention(q, &lk, &lv, None, &AttentionOptions::new(scale))),
        rough: None,
        exact: exactly(&xs, move |q| {
            let p: Tensor = candle_nn::ops::softmax(&(q.matmul(&wk.t()?)? * scale)?, D::Minus1)?;
            Ok((p.matmul(&wv)?, p.matmul(&wv.abs()?)?))
        }),
        bytes: 2 * one + cache,
        footprint: (RING + 1) * one + cache,
        flops: 4.0 * (heads * queries * keys * d) as f64,
        per: 1.0,
    })
}

pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (width, rank, count, floor) in [
        (512, 8, 1, Some(40.0)),
        (2048, 8, 1, Some(25.0)),
        (512, 8, 64, Some(4.0)),
        (512, 8, 512, Some(3.0)),
        (512, 4, 1, None),
        (512, 16, 1, None),
        (512, 64, 1, None),
        (512, 4, 64, None),
        (512, 16, 64, None),
        (512, 64, 64, None),
    ] {
        rows.push(Row::new(format!("lora/{width}-r{rank}/{count}"), floor, move || lora(count, width, rank)));
    }
    for (count, floor) in [(1, 0.97), (4, 4.0), (32, 1.5), (128, 0.95)] {
        rows.push(Row::new(format!("linear/{count}x1024x4096"), floor, move || linear(count, 1024, 4096, DType::F32)));
    }
    for (count, floor) in [(1, 4.0), (4, 4.0)] {
        let name = format!("linear-bf16/{count}x1024x4096");
        rows.push(Row::new(name, floor, move || linear(count, 1024, 4096, DType::BF16)));
    }
    rows.push(Row::new("attention/12x512x64", 2.0, || attention(12, 512, 512, 64)));
    rows.push(Row::new("attention-decode/12x4096x64", 1.7, || attention(12, 1, 4096, 64)));
    rows
}
