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
                let mut scores = vec![f64::NEG_INFINITY; t];
                let mut widest = 1.0f64;
                for (j, score) in scores.iter_mut().enumerate() {
                    if !spec.sees(i, j, s, t) {
                        continue;
                    }
                    let mut acc = Acc::default();
                    for l in 0..d {
                        acc.add_product(q.data[row * d + l], k.data[(kv * t + j) * d + l]);
                    }
                    let raw = acc.value() * spec.scale;
                    widest = widest.max(acc.magnitude() * spec.scale.abs());
                    let capped = spec.softcap.map_or(raw, |cap| cap * libm::tanh(raw / cap));
                    *score = capped + mask.map_or(0.0, |m| m.data[broadcast_offset(&m.dims, &[ib, ih, i, j])]);
                }
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|x| libm::exp(x - max)).collect();
                let mut total = Acc::default();
                weights.iter().for_each(|&w| total.add(w));
                for c in 0..dv {
                    let mut acc = Acc::default();
                    for (j, w) in weights.iter().enumerate() {
                        acc.add_product(w / total.value(), v.data[(kv * t + j) * dv + c]);
                    }
                    value.data[row * dv + c] = acc.value();
                    magnitude.data[row * dv + c] = acc.magnitude();
                    inner.data[row * dv + c] = acc.magnitude() * widest;
                }
            }
        }
    }
    Ok(Summed { value, magnitude, inner: Some(inner) })
}
