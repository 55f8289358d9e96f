//! Composites over rows: softmax, norms, gated units, rotary embedding.

use super::double::Double;
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
        let squares = row.iter().fold(Double::from(0.0), |sum, &x| sum + Double::from(x) * x.into());
        let root = (squares / Double::from(row.len() as f64) + eps.into()).sqrt();
        let weight = |i: usize| w.map_or(1.0, |w| w.data[i]);
        row.iter().enumerate().map(|(i, &x)| (Double::from(x) / root * weight(i).into()).round()).collect()
    }))
}

/// (x − mean)/√(var + eps)·w + b over the last dim, biased variance. The magnitude is |(x − mean)/√(…)·w| + |b|; the inner one
/// has (|x| + |mean|) in place of |x − mean|, which a row of nearly equal numbers cancels.
///
/// # Errors
/// For a scalar.
pub fn layer_norm(x: &Arr, w: Option<&Arr>, b: Option<&Arr>, eps: f64) -> Result<Summed> {
    let Some(&n) = x.dims.last() else {
        return bad("a norm needs a dim");
    };
    let at = |v: Option<&Arr>, flat: usize, none: f64| v.map_or(none, |v| v.data[flat % n.max(1)]);
    Ok(normed(x, n, eps, |flat| (at(w, flat, 1.0), at(b, flat, 0.0))))
}

/// Rows of `n` elements centred, divided by the root of their variance plus eps, and scaled and shifted by what `affine` says for
/// each element.
fn normed(x: &Arr, n: usize, eps: f64, affine: impl Fn(usize) -> (f64, f64)) -> Summed {
    let (mut value, mut magnitude, mut inner) = (Vec::new(), Vec::new(), Vec::new());
    for (r, row) in x.data.chunks(n.max(1)).enumerate() {
        let count = Double::from(row.len() as f64);
        let zero = Double::from(0.0);
        let mean = row.iter().fold(zero, |sum, &x| sum + x.into()) / count;
        let squares = row.iter().fold(zero, |sum, &x| sum + (Double::from(x) - mean) * (Double::from(x) - mean));
        let root = (squares / count + eps.into()).sqrt();
        for (i, &x) in row.iter().enumerate() {
            let (w, b) = affine(r * n + i);
            let y = (Double::from(x) - mean) / root * w.into();
            value.push((y + b.into()).round());
            magnitude.push(y.round().abs() + b.abs());
            inner.push((x.abs() + mean.round().abs()) / root.round() * w.abs() + b.abs());
        }
    }
    let arr = |data| Arr { dims: x.dims.clone(), data };
    Summed { value: arr(value), magnitude: arr(magnitude), inner: Some(arr(inner)) }
}

/// Layer norm over groups of channels of x (b, c, …), then w and b per channel.
///
/// # Errors
/// When the channels do not split.
pub fn group_norm(x: &Arr, groups: usize, w: Option<&Arr>, b: Option<&Arr>, eps: f64) -> Result<Summed> {
    let channels = match x.dims[..] {
        [_, channels, ..] if groups > 0 && channels % groups == 0 => channels,
        _ => return bad(format!("{groups} groups of {:?}", x.dims)),
    };
    let behind: usize = x.dims[2..].iter().product();
    let channel = |flat: usize| flat / behind.max(1) % channels;
    let at = |v: Option<&Arr>, flat: usize, none: f64| v.map_or(none, |v| v.data[channel(flat)]);
    Ok(normed(x, channels / groups * behind, eps, |flat| (at(w, flat, 1.0), at(b, flat, 0.0))))
}

/// The mean of −log softmax(logits)\[target\]; the inner magnitude has max|logit| where the largest one cancels.
///
/// # Errors
/// When a target is out of range.
pub fn cross_entropy(logits: &Arr, targets: &Arr) -> Result<Summed> {
    let (n, classes) = match logits.dims[..] {
        [n, classes] => (n, classes),
        _ => return bad(format!("logits {:?}", logits.dims)),
    };
    let log = log_softmax(logits, 1);
    let (mut total, mut inner) = (Acc::default(), 0.0);
    for (row, &target) in targets.data.iter().enumerate() {
        if target < 0.0 || target >= classes as f64 {
            return bad(format!("target {target} of {classes}"));
        }
        total.add(-log.data[row * classes + target as usize]);
        // a logit of −∞ is a class that cannot be
        let finite = logits.data[row * classes..][..classes].iter().filter(|x| x.is_finite());
        inner += finite.fold(0.0, |m: f64, x| m.max(x.abs()));
    }
    let scalar = |x: f64| Arr { dims: Vec::new(), data: vec![x / n as f64] };
    Ok(Summed { value: scalar(total.value()), magnitude: scalar(total.magnitude()), inner: Some(scalar(inner)) })
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
