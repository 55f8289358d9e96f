//! Composites over rows: softmax, norms, gated units, rotary embedding.

use super::elementwise::unary_at;
use super::{bad, strides, Acc, Arr, Result, Summed, Unary};

/// Calls `f` with the row of every position outside `dim` and writes what it returns.
fn along(x: &Arr, dim: usize, f: impl Fn(&[f64]) -> Vec<f64>) -> Arr {
    let (n, step) = (x.dims[dim], strides(&x.dims)[dim]);
    let mut out = x.clone();
    if x.data.is_empty() {
        return out;
    }
    for start in (0..x.data.len()).filter(|at| at / step % n == 0) {
        let row: Vec<f64> = (0..n).map(|i| x.data[start + i * step]).collect();
        for (i, value) in f(&row).into_iter().enumerate() {
            out.data[start + i * step] = value;
        }
    }
    out
}

fn sum(row: impl Iterator<Item = f64>) -> f64 {
    let mut acc = Acc::default();
    row.for_each(|x| acc.add(x));
    acc.value()
}

fn largest(row: &[f64]) -> f64 {
    row.iter().fold(f64::NEG_INFINITY, |m, &x| if x.is_nan() || x > m { x } else { m })
}

/// exp(x − max)/Σexp(x − max) over `dim`.
#[must_use]
pub fn softmax(x: &Arr, dim: usize) -> Arr {
    along(x, dim, |row| {
        let max = largest(row);
        let e: Vec<f64> = row.iter().map(|x| libm::exp(x - max)).collect();
        let total = sum(e.iter().copied());
        e.iter().map(|e| e / total).collect()
    })
}

/// x − max − ln Σexp(x − max) over `dim`.
#[must_use]
pub fn log_softmax(x: &Arr, dim: usize) -> Arr {
    along(x, dim, |row| {
        let max = largest(row);
        let log = libm::log(sum(row.iter().map(|x| libm::exp(x - max))));
        row.iter().map(|x| x - max - log).collect()
    })
}

/// x/√(mean(x²) + eps)·w over the last dim.
///
/// # Errors
/// For a scalar.
pub fn rms_norm(x: &Arr, w: Option<&Arr>, eps: f64) -> Result<Arr> {
    let Some(last) = x.dims.len().checked_sub(1) else {
        return bad("a norm needs a dim");
    };
    Ok(along(x, last, |row| {
        let mut acc = Acc::default();
        row.iter().for_each(|&x| acc.add_product(x, x));
        let root = libm::sqrt(acc.value() / row.len() as f64 + eps);
        row.iter().enumerate().map(|(i, x)| x / root * w.map_or(1.0, |w| w.data[i])).collect()
    }))
}

/// (x − mean)/√(var + eps)·w + b over the last dim, biased variance. The magnitude is |(x − mean)/√(…)·w| + |b|; the inner one
/// has (|x| + |mean|) in place of |x − mean|, which a row of nearly equal numbers cancels.
///
/// # Errors
/// For a scalar.
pub fn layer_norm(x: &Arr, w: Option<&Arr>, b: Option<&Arr>, eps: f64) -> Result<Summed> {
    let Some(last) = x.dims.len().checked_sub(1) else {
        return bad("a norm needs a dim");
    };
    // (x − mean)·factor, with the difference as given
    let scaled = |difference: fn(f64, f64) -> f64| {
        along(x, last, |row| {
            let n = row.len() as f64;
            let mean = sum(row.iter().copied()) / n;
            let mut acc = Acc::default();
            row.iter().for_each(|&x| acc.add_product(x - mean, x - mean));
            let root = libm::sqrt(acc.value() / n + eps);
            let weight = |i: usize| w.map_or(1.0, |w| w.data[i]);
            row.iter().enumerate().map(|(i, x)| difference(*x, mean) / root * weight(i)).collect()
        })
    };
    let n = x.dims[last].max(1);
    let bias = |i: usize| b.map_or(0.0, |b| b.data[i % n]);
    let plus = |y: &Arr, f: fn(f64) -> f64| Arr {
        dims: y.dims.clone(),
        data: y.data.iter().enumerate().map(|(i, &y)| f(y) + f(bias(i))).collect(),
    };
    let y = scaled(|x, mean| x - mean);
    let inner = scaled(|x, mean| x.abs() + mean.abs());
    Ok(Summed { value: plus(&y, |v| v), magnitude: plus(&y, f64::abs), inner: Some(plus(&inner, f64::abs)) })
}

/// act(gate)·up.
#[must_use]
pub fn glu(act: Unary, gate: &Arr, up: &Arr) -> Arr {
    let data = gate.data.iter().zip(&up.data).map(|(&g, &u)| unary_at(act, g) * u).collect();
    Arr { dims: gate.dims.clone(), data }
}

/// Pairs of the last dim of x (b, h, s, d) turned by the angles whose cosine and sine are in (s, d/2) or (b, s, d/2): pairs
/// (i, i + d/2), or (2i, 2i + 1) when `interleaved`.
///
/// # Errors
/// When x does not have four dims.
pub fn rope(x: &Arr, cos: &Arr, sin: &Arr, interleaved: bool) -> Result<Summed> {
    let [b, h, s, d] = x.dims[..] else {
        return bad("rope needs four dims");
    };
    let half = d / 2;
    let mut value = x.clone();
    let mut magnitude = x.clone();
    for ib in 0..b {
        for ih in 0..h {
            for is in 0..s {
                let row = ((ib * h + ih) * s + is) * d;
                for i in 0..half {
                    let table = if cos.dims.len() == 3 { (ib * s + is) * half + i } else { is * half + i };
                    let (c, n) = (cos.data[table], sin.data[table]);
                    let (p, q) = if interleaved { (row + 2 * i, row + 2 * i + 1) } else { (row + i, row + i + half) };
                    let (u, v) = (x.data[p], x.data[q]);
                    let (mut first, mut second) = (Acc::default(), Acc::default());
                    first.add_product(u, c);
                    first.add_product(-v, n);
                    second.add_product(u, n);
                    second.add_product(v, c);
                    (value.data[p], value.data[q]) = (first.value(), second.value());
                    (magnitude.data[p], magnitude.data[q]) = (first.magnitude(), second.magnitude());
                }
            }
        }
    }
    Ok(Summed { value, magnitude, inner: None })
}
