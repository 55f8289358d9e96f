//! `inference`: penalties, probabilities, the cache, generation.

use super::ops::softmax;
use super::{Call, Dtypes};
use candle_core::Tensor;
use candle_lazy_compat::inference::{
    apply_repetition_penalty, sample_token, sample_token_with_metadata, KVCache, KVCacheConfig, SamplingStrategy,
};

const PENALTY: f32 = 1.25;
const SEEN: [u32; 4] = [1, 4, 1, 90];
const LOGITS: &[&[usize]] = &[&[9]];

/// Seen tokens' positive logits over the penalty, negative ones times it, each once (Keskar et al. 2019).
fn penalized(x: &Tensor) -> candle_core::Result<Tensor> {
    let n = x.dim(0)?;
    let seen: Vec<u8> = (0..n).map(|at| u8::from(SEEN.iter().any(|id| *id as usize == at))).collect();
    let seen = Tensor::from_vec(seen, n, x.device())?;
    let lowered = x.ge(0.0)?.where_cond(&(x / f64::from(PENALTY))?, &(x * f64::from(PENALTY))?)?;
    seen.where_cond(&lowered, x)
}

/// The place of the last of the largest logits, as a number.
fn likeliest(logits: &Tensor) -> candle_core::Result<Tensor> {
    let values = logits.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?;
    let last = values
        .iter()
        .enumerate()
        .fold((0, f64::NEG_INFINITY), |best, (at, &v)| if v >= best.1 { (at, v) } else { best });
    Tensor::new(last.0 as f64, logits.device())?.to_dtype(logits.dtype())
}

const CACHE: &[&[usize]] = &[&[1, 2, 3, 4], &[1, 2, 3, 4], &[1, 2, 1, 4], &[1, 2, 1, 4]];

pub(super) const CALLS: &[Call] = &[
    Call {
        name: "apply_repetition_penalty(&mut logits, ids, 1.25)",
        inputs: LOGITS,
        dtypes: Dtypes::Floats,
        ours: |x| {
            let mut logits = x[0].clone();
            apply_repetition_penalty(&mut logits, &SEEN, PENALTY)?;
            Ok(vec![logits])
        },
        formula: |x| Ok((vec![penalized(&x[0])?], Vec::new())),
        roundings: 1.0,
        gradients: false,
    },
    Call {
        name: "sample_token(logits, Greedy, ids, 1.25)",
        inputs: LOGITS,
        dtypes: Dtypes::Floats,
        ours: |x| {
            let token = sample_token(&x[0], &SamplingStrategy::Greedy, &SEEN, PENALTY)?;
            Ok(vec![Tensor::new(f64::from(token), x[0].device())?.to_dtype(x[0].dtype())?])
        },
        // narrow floats are penalised in f32
        formula: |x| {
            Ok((
                vec![likeliest(&penalized(&x[0].to_dtype(candle_core::DType::F64)?)?)?.to_dtype(x[0].dtype())?],
                Vec::new(),
            ))
        },
        roundings: 0.0,
        gradients: false,
    },
    Call {
        name: "sample_token_with_metadata(logits, Greedy, ids, 1.25): logit and probability",
        inputs: LOGITS,
        dtypes: Dtypes::F32,
        ours: |x| {
            let token = sample_token_with_metadata(&x[0], &SamplingStrategy::Greedy, &SEEN, PENALTY, None)?;
            Ok(vec![Tensor::new(&[token.logit, token.probability], x[0].device())?])
        },
        formula: |x| {
            let logits = penalized(&x[0])?;
            let logit = logits.max_keepdim(0)?;
            let probability = softmax(&logits, 0)?.max_keepdim(0)?;
            Ok((vec![Tensor::cat(&[logit, probability], 0)?], Vec::new()))
        },
        roundings: 2.0,
        gradients: false,
    },
    Call {
        name: "KVCache::update, two steps",
        inputs: CACHE,
        dtypes: Dtypes::Floats,
        ours: |x| {
            let config = KVCacheConfig { max_seq_len: 4, num_layers: 1, num_heads: 2, head_dim: 4, batch_size: 1 };
            let mut cache = KVCache::new(config, x[0].device())?;
            cache.update(0, &x[0], &x[1])?;
            let (k, v) = cache.update(0, &x[2], &x[3])?;
            Ok(vec![k, v])
        },
        formula: |x| {
            let joined = |a: usize| Tensor::cat(&[x[a].contiguous()?, x[a + 2].clone()], 2);
            Ok((vec![joined(0)?, joined(1)?], Vec::new()))
        },
        roundings: 0.0,
        gradients: true,
    },
];
