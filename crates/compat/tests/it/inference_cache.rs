//! `KVCache`: what it gives back, where it is full, what it refuses.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, InferenceError};
use metal_candle::{KVCache, KVCacheConfig};

fn cache(max_seq_len: usize) -> KVCache {
    KVCache::new(KVCacheConfig { max_seq_len, ..Default::default() }, &Device::Cpu).unwrap()
}

/// (2, 3, positions, 4), counted upwards from `first`.
fn counted(positions: usize, first: f32) -> Tensor {
    let n = 2 * 3 * positions * 4;
    let values: Vec<f32> = (0..n).map(|i| first + i as f32).collect();
    Tensor::from_vec(values, (2, 3, positions, 4), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn full(result: metal_candle::Result<(Tensor, Tensor)>, at: usize, len: usize) {
    let error = result.unwrap_err();
    let Error::Inference(InferenceError::CacheFull { position, max_len }) = &error else { panic!("{error:?}") };
    assert_eq!((*position, *max_len), (at, len));
    let words = format!("KV cache is full: position {at}, maximum length {len}");
    assert!(error.to_string().contains(&words), "{error}");
}

#[test]
fn defaults_are_v1s() {
    let KVCacheConfig { max_seq_len, num_layers, num_heads, head_dim, batch_size } = KVCacheConfig::default();
    assert_eq!((max_seq_len, num_layers, num_heads, head_dim, batch_size), (2048, 24, 14, 64, 1));
    let cache = cache(7);
    assert!(cache.is_empty() && cache.get(0).is_none());
    assert_eq!((cache.position(), cache.max_seq_len(), cache.num_cached_layers()), (0, 7, 0));
    assert!(format!("{cache:?}").contains("KVCache"));
}

#[test]
fn a_layer_gives_back_everything_in_order() {
    let mut cache = cache(64);
    let (mut keys, mut all_values): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
    let mut handed_out = Vec::new();
    for (step, positions) in [3, 1, 1, 1, 5, 1, 20, 1].into_iter().enumerate() {
        let (k, v) = (counted(positions, step as f32 * 1e3), counted(positions, -1e4 * step as f32));
        keys.push(k.clone());
        all_values.push(v.clone());
        let got = cache.update(0, &k, &v).unwrap();
        let want = (Tensor::cat(&keys, 2).unwrap(), Tensor::cat(&all_values, 2).unwrap());
        assert_eq!((got.0.dims(), values(&got.0), values(&got.1)), (want.0.dims(), values(&want.0), values(&want.1)));
        let held = cache.get(0).unwrap();
        assert_eq!((values(&held.0), values(&held.1)), (values(&want.0), values(&want.1)));
        assert_eq!(cache.position(), want.0.dim(2).unwrap());
        handed_out.push((got, want));
    }
    // what was handed out before later steps wrote is as it was
    for (got, want) in handed_out {
        assert_eq!((values(&got.0), values(&got.1)), (values(&want.0), values(&want.1)));
    }
}

#[test]
fn every_layer_takes_max_seq_len_positions_in_any_order() {
    let mut cache = cache(8);
    for layer in [1, 0, 2] {
        cache.update(layer, &counted(6, 0.0), &counted(6, 0.0)).unwrap();
        assert_eq!(cache.position(), 6);
    }
    for layer in [0, 1, 2] {
        for step in 1..=2 {
            cache.update(layer, &counted(1, 0.0), &counted(1, 0.0)).unwrap();
            assert_eq!(cache.position(), if layer == 0 { 6 + step } else { 8 });
        }
        full(cache.update(layer, &counted(1, 0.0), &counted(1, 0.0)), 8, 8);
    }
    assert_eq!((cache.num_cached_layers(), cache.get(2).unwrap().0.dim(2).unwrap()), (3, 8));
    cache.clear();
    assert!(cache.is_empty() && cache.get(0).is_none());
    assert_eq!(cache.num_cached_layers(), 0);
    full(cache.update(0, &counted(9, 0.0), &counted(9, 0.0)), 0, 8);
    // another batch size may follow
    let other = Tensor::zeros((1, 3, 2, 4), DType::F32, &Device::Cpu).unwrap();
    cache.update(0, &other, &other).unwrap();
    assert_eq!(cache.position(), 2);
}

#[test]
fn what_was_handed_out_survives_a_clear() {
    let mut cache = cache(64);
    cache.update(0, &counted(2, 0.0), &counted(2, 0.0)).unwrap();
    let (k, _) = cache.update(0, &counted(1, 100.0), &counted(1, 0.0)).unwrap();
    let before = values(&k);
    cache.clear();
    for _ in 0..4 {
        cache.update(0, &counted(1, -1.0), &counted(1, -1.0)).unwrap();
    }
    assert_eq!(values(&k), before);
}

#[test]
fn the_callers_tensors_are_not_written_to() {
    let mut cache = cache(64);
    // a view with room behind it
    let wide = counted(8, 0.0);
    let first = wide.narrow(2, 0, 4).unwrap();
    cache.update(0, &first, &first).unwrap();
    cache.update(0, &counted(2, 500.0), &counted(2, 500.0)).unwrap();
    assert_eq!(values(&wide), values(&counted(8, 0.0)));
}

#[test]
fn gradients_pass_through() {
    let mut cache = cache(8);
    let key = Var::from_tensor(&counted(2, 1.0)).unwrap();
    cache.update(0, key.as_tensor(), &counted(2, 0.0)).unwrap();
    let (k, _) = cache.update(0, &counted(1, 0.0), &counted(1, 0.0)).unwrap();
    let (k, _) = cache.update(0, &k.narrow(2, 0, 1).unwrap(), &counted(1, 0.0)).unwrap();
    let grads = (&k * 3.0).unwrap().sum_all().unwrap().backward().unwrap();
    // position 0 is there twice, position 1 once
    let want: Vec<f32> = (0..2 * 3 * 2 * 4).map(|i| if i / 4 % 2 == 0 { 6.0 } else { 3.0 }).collect();
    assert_eq!(values(grads.get(&key).unwrap()), want);
}

#[test]
fn what_does_not_fit_is_refused_and_the_cache_stays() {
    let mut cache = cache(8);
    cache.update(3, &counted(2, 0.0), &counted(2, 0.0)).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let ok = zeros(&[2, 3, 1, 4]);
    let cases = [
        (zeros(&[2, 3]), zeros(&[2, 3]), "must have a dim 2 with as many positions in both, got [2, 3] and [2, 3]"),
        (
            zeros(&[2, 3, 1]),
            zeros(&[2, 3]),
            "must have a dim 2 with as many positions in both, got [2, 3, 1] and [2, 3]",
        ),
        (ok.clone(), zeros(&[2, 3, 2, 4]), "must have a dim 2 with as many positions in both"),
        (zeros(&[2, 3, 1]), zeros(&[2, 3, 1]), "layer 3 holds keys [2, 3, 2, 4] (F32), cannot take [2, 3, 1] (F32)"),
        (ok.clone(), ok.to_dtype(DType::F64).unwrap(), "layer 3 holds values"),
        (
            zeros(&[1, 3, 1, 4]),
            zeros(&[1, 3, 1, 4]),
            "layer 3 holds keys [2, 3, 2, 4] (F32), cannot take [1, 3, 1, 4] (F32)",
        ),
        (ok.clone(), zeros(&[2, 3, 1, 5]), "layer 3 holds values"),
    ];
    for (key, value, words) in cases {
        let error = cache.update(3, &key, &value).unwrap_err();
        assert!(matches!(error, Error::Inference(InferenceError::Failed { .. })), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(values(&cache.get(3).unwrap().0), values(&counted(2, 0.0)));
    }
}

/// v1 looked at nothing but dim 2.
#[test]
fn keys_and_values_of_other_ranks_widths_and_dtypes() {
    let mut cache = cache(8);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    cache.update(0, &zeros(&[1, 1, 1, 4]), &zeros(&[1, 2, 1, 6]).to_dtype(DType::F16).unwrap()).unwrap();
    let (k, v) = cache.update(0, &zeros(&[1, 1, 2, 4]), &zeros(&[1, 2, 2, 6]).to_dtype(DType::F16).unwrap()).unwrap();
    assert_eq!((k.dims(), v.dims(), v.dtype()), (&[1, 1, 3, 4][..], &[1, 2, 3, 6][..], DType::F16));
    cache.clear();
    for (at, shape) in [&[2, 3, 1][..], &[2, 3, 1, 2, 2]].into_iter().enumerate() {
        let n: usize = shape.iter().product();
        let piece = |first: f32| {
            Tensor::from_vec((0..n).map(|i| first + i as f32).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
        };
        // the first step, one that makes room, one in place
        let steps = [piece(0.0), piece(100.0), piece(200.0)];
        let (k, v) = steps.iter().map(|step| cache.update(at, step, &step.neg().unwrap()).unwrap()).last().unwrap();
        let want = Tensor::cat(&steps, 2).unwrap();
        assert_eq!((k.dims(), values(&k)), (want.dims(), values(&want)));
        assert_eq!(values(&v), values(&want.neg().unwrap()));
        assert_eq!((cache.position(), cache.num_cached_layers()), (3, at + 1));
    }
}
