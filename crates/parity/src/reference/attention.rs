//! Attention and its masks.

use super::{bad, broadcast_offset, Acc, Arr, Result, Summed};

/// What attention does besides the two products.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSpec {
    /// The factor of the scores.
    pub scale: f64,
    /// Query i of s sees keys 0..=t−s+i of t.
    pub causal: bool,
    /// Scores pass through cap·tanh(score/cap).
    pub softcap: Option<f64>,
    /// With `causal`, the number of keys that a query sees, its own included.
    pub window: Option<usize>,
}

impl AttentionSpec {
    fn sees(&self, query: usize, key: usize, s: usize, t: usize) -> bool {
        !self.causal || sees(query, key, s, t, self.window)
    }
}

fn sees(query: usize, key: usize, queries: usize, keys: usize, window: Option<usize>) -> bool {
    let own = keys - queries + query;
    key <= own && window.is_none_or(|w| own - key < w)
}

/// 0 where a query sees a key, −∞ elsewhere.
#[must_use]
pub fn causal_mask(queries: usize, keys: usize, window: Option<usize>) -> Arr {
    let data = (0..queries * keys)
        .map(|at| if sees(at / keys, at % keys, queries, keys, window) { 0.0 } else { f64::NEG_INFINITY })
        .collect();
    Arr { dims: vec![queries, keys], data }
}

/// softmax(softcap(q·kᵀ·scale) + mask)·v with q (b, h, s, d), k (b, hk, t, d), v (b, hk, t, dv).
///
/// The magnitude is Σ wᵢ·|vᵢ|; the inner one is that times the largest Σ|qᵢ·kᵢ|·scale of the row where that is above one: a
/// score is a sum of products too, and what it is off by is the relative error of its weight (the derivative of the exponential).
///
/// # Errors
/// When the shapes do not fit.
pub fn attention(q: &Arr, k: &Arr, v: &Arr, mask: Option<&Arr>, spec: &AttentionSpec) -> Result<Summed> {
    let ([b, h, s, d], [_, hk, t, _], [_, _, _, dv]) = (&q.dims[..], &k.dims[..], &v.dims[..]) else {
        return bad("attention needs four dims");
    };
    let (b, h, s, d, hk, t, dv) = (*b, *h, *s, *d, *hk, *t, *dv);
    let dims = vec![b, h, s, dv];
    let mut value = Arr::full(&dims, 0.0);
    let mut magnitude = Arr::full(&dims, 0.0);
    let mut inner = Arr::full(&dims, 0.0);
    for ib in 0..b {
        for ih in 0..h {
            let kv = ib * hk + ih / (h / hk);
            for i in 0..s {
                let row = (ib * h + ih) * s + i;
                let at = |j: usize| spec.sees(i, j, s, t).then_some((row * d, (kv * t + j) * d));
                let own = row_of(q, k, d, (0..t).map(at), spec, |j| {
                    mask.map_or(0.0, |m| m.data[broadcast_offset(&m.dims, &[ib, ih, i, j])])
                });
                for c in 0..dv {
                    let mut acc = Acc::default();
                    for (j, w) in own.weights.iter().enumerate() {
                        acc.add_product(*w, v.data[(kv * t + j) * dv + c]);
                    }
                    value.data[row * dv + c] = acc.value();
                    magnitude.data[row * dv + c] = acc.magnitude();
                    inner.data[row * dv + c] = acc.magnitude() * own.widest;
                }
            }
        }
    }
    Ok(Summed { value, magnitude, inner: Some(inner) })
}

/// The weights of a query.
struct Row {
    weights: Vec<f64>,
    /// tanh(score/cap) of each key; 0 without a softcap.
    tanh: Vec<f64>,
    /// The largest Σ|qᵢ·kᵢ|·scale where that is above one.
    widest: f64,
}

/// Of a query that has `added` to its scores: `at` says of each key where the query and the key begin, if it is seen.
fn row_of(
    q: &Arr,
    k: &Arr,
    d: usize,
    at: impl Iterator<Item = Option<(usize, usize)>>,
    spec: &AttentionSpec,
    added: impl Fn(usize) -> f64,
) -> Row {
    let (mut scores, mut tanh, mut widest) = (Vec::new(), Vec::new(), 1.0f64);
    for (j, at) in at.enumerate() {
        let Some((query, key)) = at else {
            scores.push(f64::NEG_INFINITY);
            tanh.push(0.0);
            continue;
        };
        let mut acc = Acc::default();
        for l in 0..d {
            acc.add_product(q.data[query + l], k.data[key + l]);
        }
        let raw = acc.value() * spec.scale;
        widest = widest.max(acc.magnitude() * spec.scale.abs());
        tanh.push(spec.softcap.map_or(0.0, |cap| libm::tanh(raw / cap)));
        let capped = spec.softcap.map_or(raw, |cap| cap * libm::tanh(raw / cap));
        scores.push(capped + added(j));
    }
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|x| libm::exp(x - max)).collect();
    let mut total = Acc::default();
    weights.iter().for_each(|&w| total.add(w));
    Row { weights: weights.iter().map(|w| w / total.value()).collect(), tanh, widest }
}

/// A sum of products beside what its rounding is measured by: its terms without signs, and those as a row's scores see them.
#[derive(Clone, Copy, Default)]
struct Measured {
    sum: Acc,
    magnitude: f64,
    inner: f64,
}

impl Measured {
    fn add(&mut self, a: f64, b: f64, magnitude: f64, widest: f64) {
        self.sum.add_product(a, b);
        self.magnitude += magnitude * b.abs();
        self.inner += magnitude * b.abs() * widest;
    }
}

/// The gradients of [`attention`] with respect to q, k and v, behind one another, given the gradient g (b, h, s, dv) of its result: with
/// P the weights, dP = g·vᵀ and dS = P·(dP − Σ P·dP)·(1 − tanh²)·scale they are dS·k, dSᵀ·q and Pᵀ·g.
///
/// Every difference counts as the sum of its terms; magnitudes are the largest of their tensor's row along its last dim.
///
/// # Errors
/// When the shapes do not fit.
pub fn attention_backward([q, k, v, g]: [&Arr; 4], mask: Option<&Arr>, spec: &AttentionSpec) -> Result<Summed> {
    let ([b, h, s, d], [_, hk, t, _], [_, _, _, dv]) = (&q.dims[..], &k.dims[..], &v.dims[..]) else {
        return bad("attention needs four dims");
    };
    let (b, h, s, d, hk, t, dv) = (*b, *h, *s, *d, *hk, *t, *dv);
    let [mut dq, mut dk, mut dvs] = [q, k, v].map(|x| vec![Measured::default(); x.data.len()]);
    for ib in 0..b {
        for ih in 0..h {
            let kv = ib * hk + ih / (h / hk);
            for i in 0..s {
                let row = (ib * h + ih) * s + i;
                let at = |j: usize| spec.sees(i, j, s, t).then_some((row * d, (kv * t + j) * d));
                let own = row_of(q, k, d, (0..t).map(at), spec, |j| {
                    mask.map_or(0.0, |m| m.data[broadcast_offset(&m.dims, &[ib, ih, i, j])])
                });
                let through: Vec<Acc> = (0..t)
                    .map(|j| {
                        let mut acc = Acc::default();
                        for c in 0..dv {
                            acc.add_product(g.data[row * dv + c], v.data[(kv * t + j) * dv + c]);
                        }
                        acc
                    })
                    .collect();
                let (mut mean, mut terms) = (Acc::default(), 0.0);
                for (w, through) in own.weights.iter().zip(&through) {
                    mean.add_product(*w, through.value());
                    terms += w * through.magnitude();
                }
                for j in 0..t {
                    let (w, tanh) = (own.weights[j], own.tanh[j]);
                    let ds = w * (through[j].value() - mean.value()) * (1.0 - tanh * tanh) * spec.scale;
                    let size = w * (through[j].magnitude() + terms) * (1.0 + tanh * tanh) * spec.scale.abs();
                    for l in 0..d {
                        let (query, key) = (row * d + l, (kv * t + j) * d + l);
                        dq[query].add(ds, k.data[key], size, own.widest);
                        dk[key].add(ds, q.data[query], size, own.widest);
                    }
                    for c in 0..dv {
                        dvs[(kv * t + j) * dv + c].add(w, g.data[row * dv + c], w, own.widest);
                    }
                }
            }
        }
    }
    let (mut value, mut magnitude, mut inner) = (Vec::new(), Vec::new(), Vec::new());
    for (part, width) in [(dq, d), (dk, d), (dvs, dv)] {
        for row in part.chunks(width.max(1)) {
            let largest = |of: fn(&Measured) -> f64| row.iter().map(of).fold(0.0, f64::max);
            let (outer, inside) = (largest(|m| m.magnitude), largest(|m| m.inner));
            for measured in row {
                value.push(measured.sum.value());
                magnitude.push(outer);
                inner.push(inside);
            }
        }
    }
    let dims = [value.len()];
    Ok(Summed {
        value: Arr::new(&dims, value)?,
        magnitude: Arr::new(&dims, magnitude)?,
        inner: Some(Arr::new(&dims, inner)?),
    })
}
