//! Medians of softmax, RMS norm and gelu against Candle's best path: `cargo run --release --example quick_bench`.

use candle_core::{DType, Device, Result, Tensor};
use candle_lazy_ops as ops;
use std::time::Instant;

/// Median time of one call in microseconds, over about half a second.
fn median(f: &dyn Fn() -> Result<Tensor>) -> Result<f64> {
    for _ in 0..3 {
        f()?;
    }
    let mut times = Vec::new();
    let begin = Instant::now();
    while begin.elapsed().as_millis() < 500 {
        let t = Instant::now();
        std::hint::black_box(f()?);
        times.push(t.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or(f64::NAN))
}

fn line(name: &str, ours: &dyn Fn() -> Result<Tensor>, candles: &dyn Fn() -> Result<Tensor>) -> Result<()> {
    // Alternate, so that a slow moment of the machine hits both.
    let (a, b) = (median(ours)?, median(candles)?);
    let (a, b) = (a.min(median(ours)?), b.min(median(candles)?));
    println!("{name:<44} ours {a:>10.1} us   candle {b:>10.1} us   x{:.2}", b / a);
    Ok(())
}

fn main() -> Result<()> {
    let dev = Device::Cpu;
    for dims in [(4usize, 16usize, 1024usize), (8, 128, 4096)] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = Tensor::randn(0f32, 1.0, dims, &dev)?.to_dtype(dtype)?;
            let w = Tensor::ones(dims.2, dtype, &dev)?;
            let tag = format!("{dims:?} {}", dtype.as_str());
            line(&format!("softmax {tag}"), &|| ops::softmax(&x, 2), &|| candle_nn::ops::softmax_last_dim(&x))?;
            line(&format!("rms_norm {tag}"), &|| ops::rms_norm(&x, Some(&w), 1e-6), &|| {
                candle_nn::ops::rms_norm(&x, &w, 1e-6)
            })?;
            line(&format!("layer_norm {tag}"), &|| ops::layer_norm(&x, Some(&w), Some(&w), 1e-6), &|| {
                candle_nn::ops::layer_norm(&x, &w, &w, 1e-6)
            })?;
            line(&format!("gelu {tag}"), &|| ops::gelu(&x), &|| x.gelu())?;
            line(&format!("silu_mul {tag}"), &|| ops::silu_mul(&x, &x), &|| x.silu()?.mul(&x))?;
        }
    }
    for (sq, skv) in [(1usize, 128usize), (1, 1024), (40, 40), (256, 256)] {
        let q = Tensor::randn(0f32, 1.0, (1, 9, sq, 64), &dev)?;
        let k = Tensor::randn(0f32, 1.0, (1, 3, skv, 64), &dev)?;
        let p = ops::AttentionParams::new(0.125).causal();
        let bias: Vec<f32> =
            (0..sq * skv).map(|i| if i % skv > i / skv + skv - sq { f32::NEG_INFINITY } else { 0.0 }).collect();
        let bias = Tensor::from_vec(bias, (sq, skv), &dev)?;
        line(&format!("attention {sq} x {skv}"), &|| ops::attention(&q, &k, &k, None, &p), &|| {
            let k = k.unsqueeze(2)?.expand((1, 3, 3, skv, 64))?.reshape((1, 9, skv, 64))?;
            let s = (q.matmul(&k.t()?)? * 0.125)?.broadcast_add(&bias)?;
            candle_nn::ops::softmax_last_dim(&s)?.matmul(&k)
        })?;
    }
    Ok(())
}
