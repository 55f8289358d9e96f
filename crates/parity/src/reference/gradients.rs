//! Gradients of row composites, in plain loops: sums in twice the precision of f64, where a chain of f64 roundings would leave a
//! measure no better than the f64 gradients that it judges.

use super::double::Double;
use super::{broadcast_offset, indices, log_softmax, softmax, strides, Arr};
use std::collections::BTreeMap;

/// Calls `f` with the flat positions of every row along `dim`.
fn rows(x: &Arr, dim: usize, mut f: impl FnMut(&[usize])) {
    let (n, step) = (x.dims[dim], strides(&x.dims)[dim]);
    if x.data.is_empty() {
        return;
    }
    for start in (0..x.data.len()).filter(|at| at / step % n == 0) {
        f(&(0..n).map(|i| start + i * step).collect::<Vec<_>>());
    }
}

fn total(terms: impl Iterator<Item = Double>) -> Double {
    terms.fold(Double::from(0.0), |sum, x| sum + x)
}

/// Of softmax over `dim`: y·(g − Σ g·y).
#[must_use]
pub fn softmax_gradient(x: &Arr, g: &Arr, dim: usize) -> Arr {
    let y = softmax(x, dim);
    let mut out = g.clone();
    rows(x, dim, |row| {
        let sum = total(row.iter().map(|&i| Double::from(g.data[i]) * y.data[i].into()));
        for &i in row {
            out.data[i] = (Double::from(y.data[i]) * (Double::from(g.data[i]) - sum)).round();
        }
    });
    out
}

/// Of log-softmax over `dim`: g − y·Σ g.
#[must_use]
pub fn log_softmax_gradient(x: &Arr, g: &Arr, dim: usize) -> Arr {
    let y = log_softmax(x, dim).map(libm::exp);
    let mut out = g.clone();
    rows(x, dim, |row| {
        let sum = total(row.iter().map(|&i| g.data[i].into()));
        for &i in row {
            out.data[i] = (Double::from(g.data[i]) - sum * y.data[i].into()).round();
        }
    });
    out
}

/// Of cross entropy: g·(y − 1 at the target)/n.
#[must_use]
pub fn cross_entropy_gradient(logits: &Arr, targets: &Arr, g: f64) -> Arr {
    let n = targets.data.len() as f64;
    let classes = logits.dims.last().copied().unwrap_or(1);
    let mut out = softmax(logits, 1);
    for (row, &target) in targets.data.iter().enumerate() {
        out.data[row * classes + target as usize] -= 1.0;
    }
    out.map(|x| x * g / n)
}

/// A norm over rows of `width` elements, whose weight and bias belong to `channel` of an element.
#[derive(Debug, Clone, Copy)]
pub struct NormShape {
    /// Elements of a row.
    pub width: usize,
    /// Length of weight and bias.
    pub channels: usize,
    /// Elements behind one another that share a channel.
    pub behind: usize,
    /// Whether the mean is subtracted.
    pub centred: bool,
    /// What is added to the mean square.
    pub eps: f64,
}

/// Of a norm, for x, weight and bias: inv·(g·w − mean(g·w) − x̂·mean(g·w·x̂)), Σ g·x̂ and Σ g.
#[must_use]
pub fn norm_gradient(x: &Arr, w: Option<&Arr>, g: &Arr, shape: NormShape) -> [Arr; 3] {
    let zero = Double::from(0.0);
    let (mut dx, mut dw, mut db) = (Vec::new(), vec![zero; shape.channels], vec![zero; shape.channels]);
    for (r, row) in x.data.chunks(shape.width.max(1)).enumerate() {
        let n = Double::from(row.len() as f64);
        let mean = if shape.centred { total(row.iter().map(|&x| x.into())) / n } else { zero };
        let centred: Vec<Double> = row.iter().map(|&x| Double::from(x) - mean).collect();
        let root = (total(centred.iter().map(|&d| d * d)) / n + shape.eps.into()).sqrt();
        let unit: Vec<Double> = centred.into_iter().map(|d| d / root).collect();
        let mut inner = Vec::with_capacity(row.len());
        for (i, &unit) in unit.iter().enumerate() {
            let at = r * shape.width + i;
            let channel = at / shape.behind.max(1) % shape.channels.max(1);
            let g = Double::from(g.data[at]);
            dw[channel] = dw[channel] + g * unit;
            db[channel] = db[channel] + g;
            inner.push(g * w.map_or(1.0, |w| w.data[channel]).into());
        }
        let first = if shape.centred { total(inner.iter().copied()) / n } else { zero };
        let along = total(inner.iter().zip(&unit).map(|(&g, &u)| g * u)) / n;
        dx.extend(inner.iter().zip(&unit).map(|(&g, &u)| ((g - first - u * along) / root).round()));
    }
    let vector = |v: Vec<Double>| Arr { dims: vec![shape.channels], data: v.into_iter().map(Double::round).collect() };
    [Arr { dims: x.dims.clone(), data: dx }, vector(dw), vector(db)]
}

/// The flat positions of the elements that each result of a reduction over the dims in `axes` is made of, in the results' order.
fn groups(dims: &[usize], axes: u32) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
    for (flat, mut at) in indices(dims).enumerate() {
        at.iter_mut().enumerate().filter(|(d, _)| axes & 1 << d != 0).for_each(|(_, i)| *i = 0);
        groups.entry(at).or_default().push(flat);
    }
    groups.into_values().collect()
}

/// Of log Σ exp over the dims in `axes`: g·exp(x − max)/Σ exp(x − max), with one gradient per result.
#[must_use]
pub fn log_sum_exp_gradient(x: &Arr, g: &Arr, axes: u32) -> Arr {
    let mut out = x.clone();
    for (group, &g) in groups(&x.dims, axes).iter().zip(&g.data) {
        let max = group.iter().map(|&i| x.data[i]).fold(f64::NEG_INFINITY, f64::max);
        let weight = |&i: &usize| libm::exp(x.data[i] - max);
        let sum = total(group.iter().map(|i| weight(i).into())).round();
        for i in group {
            out.data[*i] = g * weight(i) / sum;
        }
    }
    out
}

/// Of the variance over the dims in `axes`: g·2·(x − mean)/(n − 1), with one gradient per result.
#[must_use]
pub fn variance_gradient(x: &Arr, g: &Arr, axes: u32) -> Arr {
    let mut out = x.clone();
    for (group, &g) in groups(&x.dims, axes).iter().zip(&g.data) {
        let n = group.len() as f64;
        let mean = total(group.iter().map(|&i| x.data[i].into())) / n.into();
        let share = Double::from(2.0 * g) / (n - 1.0).into();
        for &i in group {
            out.data[i] = ((Double::from(x.data[i]) - mean) * share).round();
        }
    }
    out
}

/// Of aᵇ for positive a, summed over where an operand is broadcast: g·b·aᵇ/a and g·aᵇ·ln a.
#[must_use]
pub fn power_gradient(a: &Arr, b: &Arr, g: &Arr) -> [Arr; 2] {
    let (mut da, mut db) = (vec![Double::from(0.0); a.data.len()], vec![Double::from(0.0); b.data.len()]);
    for (at, &g) in indices(&g.dims).zip(&g.data) {
        let (i, j) = (broadcast_offset(&a.dims, &at), broadcast_offset(&b.dims, &at));
        let (x, y) = (a.data[i], b.data[j]);
        let scaled = Double::from(libm::pow(x, y)) * g.into();
        da[i] = da[i] + scaled * y.into() / x.into();
        db[j] = db[j] + scaled * libm::log(x).into();
    }
    let whole = |like: &Arr, sums: Vec<Double>| Arr {
        dims: like.dims.clone(),
        data: sums.into_iter().map(Double::round).collect(),
    };
    [whole(a, da), whole(b, db)]
}

/// The flat place in an array of `dims` that element `at` of ids of `id_dims` names along `dim`.
fn named(dims: &[usize], ids: &Arr, at: &[usize], flat: usize, dim: usize) -> usize {
    let place =
        |(d, (&i, step)): (usize, (&usize, usize))| if d == dim { ids.data[flat] as usize * step } else { i * step };
    at.iter().zip(strides(dims)).enumerate().map(place).sum()
}

/// Of gather along `dim` from an array of `dims`: each gradient goes where its element came from.
#[must_use]
pub fn gather_gradient(dims: &[usize], ids: &Arr, g: &Arr, dim: usize) -> Arr {
    let mut dx = Arr::full(dims, 0.0);
    for (flat, at) in indices(&ids.dims).enumerate() {
        dx.data[named(dims, ids, &at, flat, dim)] += g.data[flat];
    }
    dx
}

/// Of scatter along `dim` (`adds`: scatter-add), of the array and of the source: what was replaced, in the array or by a later source,
/// has no part in the result.
#[must_use]
pub fn scatter_gradient(ids: &Arr, g: &Arr, dim: usize, adds: bool) -> [Arr; 2] {
    let (mut dx, mut dsrc) = (g.clone(), Arr::full(&ids.dims, 0.0));
    let places: Vec<usize> =
        indices(&ids.dims).enumerate().map(|(flat, at)| named(&g.dims, ids, &at, flat, dim)).collect();
    for (flat, &place) in places.iter().enumerate() {
        let last = !places[flat + 1..].contains(&place);
        if adds || last {
            dsrc.data[flat] = g.data[place];
        }
        if !adds {
            dx.data[place] = 0.0;
        }
    }
    [dx, dsrc]
}
