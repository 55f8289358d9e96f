//! Key/value caches, append by append, against Candle's.

use super::{at_line, random, same};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::candle_nn::kv_cache::{Cache, ConcatKvCache, KvCache, RotatingCache, RotatingKvCache};
use candle_lazy_nn::LazyTensor;
use candle_nn::kv_cache as eager;

/// Appends of these lengths.
fn pieces(dim: usize, lens: &[usize]) -> Vec<Tensor> {
    lens.iter()
        .enumerate()
        .map(|(seed, len)| {
            let mut dims = [2, 3, 2, 3];
            dims[dim] = *len;
            random(&dims, seed as u64)
        })
        .collect()
}

#[test]
fn a_cache_grows_as_candles() {
    for dim in [1, 2] {
        let (mut ours, mut theirs) = (Cache::new(dim, 4), eager::Cache::new(dim, 4));
        assert!(ours.current_data().unwrap().is_none() && ours.all_data().is_none());
        for piece in pieces(dim, &[3, 1, 1, 6, 2, 12]) {
            ours.append(&LazyTensor::from(&piece)).unwrap();
            theirs.append(&piece).unwrap();
            assert_eq!(ours.current_seq_len(), theirs.current_seq_len());
            assert_eq!(ours.max_seq_len(), theirs.max_seq_len());
            same(Ok(ours.current_data().unwrap().unwrap()), Ok(theirs.current_data().unwrap().unwrap()));
        }
        ours.reset();
        assert_eq!((ours.current_seq_len(), ours.dim()), (0, dim));
    }
}

#[test]
fn keys_and_values_are_candles_and_written_in_place() {
    let (mut ours, mut theirs) = (KvCache::new(2, 16), eager::KvCache::new(2, 16));
    let mut in_place = 0;
    for piece in pieces(2, &[5, 1, 1, 1, 4]) {
        let values = (&piece * 2.0).unwrap();
        let (k, v) = ours.append(&LazyTensor::from(&piece), &LazyTensor::from(&values)).unwrap();
        let (want_k, want_v) = theirs.append(&piece, &values).unwrap();
        let sum = (&k + &v).unwrap();
        drop((k, v));
        let (got, report) = sum.eval_with_report().unwrap();
        assert_eq!(report.copies, 0, "{report}");
        in_place += report.in_place;
        same(Ok(got.into()), &want_k + &want_v);
        assert_eq!(ours.current_seq_len(), theirs.current_seq_len());
    }
    assert_eq!(in_place, 10, "two caches, five appends");
    same(Ok(ours.k().unwrap().unwrap()), Ok(theirs.k().unwrap().unwrap()));
    same(Ok(ours.v_cache().current_data().unwrap().unwrap()), Ok(theirs.v().unwrap().unwrap()));
}

#[test]
fn a_clone_keeps_what_it_saw() {
    let mut cache = KvCache::new(2, 8);
    let piece = LazyTensor::from(random(&[1, 1, 2, 3], 1));
    cache.append(&piece, &piece).unwrap();
    let before = cache.clone();
    let more = LazyTensor::from(random(&[1, 1, 3, 3], 2));
    cache.append(&more, &more).unwrap();
    assert_eq!(cache.k().unwrap().unwrap().to_vec1_len(), 15);
    same(Ok(before.k().unwrap().unwrap()), piece.eval().map_err(Into::into));
}

trait Count {
    fn to_vec1_len(&self) -> usize;
}

impl Count for LazyTensor {
    fn to_vec1_len(&self) -> usize {
        self.flatten_all().unwrap().to_vec1::<f32>().unwrap().len()
    }
}

#[test]
fn concatenation_is_candles() {
    let (mut ours, mut theirs) = (ConcatKvCache::new(2), eager::ConcatKvCache::new(2));
    assert!(ours.is_empty() && ours.k().is_none());
    for piece in pieces(2, &[4, 1, 2]) {
        let lazy = LazyTensor::from(&piece);
        let (k, _) = ours.append(&lazy, &lazy).unwrap();
        let (want, _) = theirs.append(&piece, &piece).unwrap();
        same(Ok(k), Ok(want));
        assert_eq!(ours.current_seq_len(), theirs.current_seq_len());
    }
    let (_, v) = ours.clone().into_inner().unwrap();
    same(Ok(v), Ok(theirs.v().unwrap().clone()));
    ours.reset();
    assert!(ours.into_inner().is_none());
}

#[test]
fn rings_are_candles() {
    // shorter and longer than the ring, over its end, and exactly as long
    for lens in [vec![3, 1, 1, 1, 4, 2], vec![9, 1, 6, 5, 1], vec![6, 6, 1, 13, 2], vec![1; 15]] {
        let (mut ours, mut theirs) = (RotatingCache::new(2, 6), eager::RotatingCache::new(2, 6));
        for piece in pieces(2, &lens) {
            let len = piece.dim(2).unwrap();
            assert_eq!(ours.positions(len), theirs.positions(len));
            let flat = |mask: Tensor| (mask.dims().to_vec(), mask.flatten_all().unwrap().to_vec1::<u8>().unwrap());
            let mask = ours.attn_mask(len, &Device::Cpu).unwrap().map(|mask| flat(mask.eval().unwrap()));
            assert_eq!(mask, theirs.attn_mask(len, &Device::Cpu).unwrap().map(flat));
            same(ours.append(&LazyTensor::from(&piece)), theirs.append(&piece));
            assert_eq!(
                (ours.offset(), ours.current_seq_len(), ours.max_seq_len()),
                (theirs.offset(), theirs.current_seq_len(), 6)
            );
            same(Ok(ours.current_data().unwrap().unwrap()), Ok(theirs.current_data().unwrap().unwrap()));
        }
    }
    let (mut ours, mut theirs) = (RotatingKvCache::new(2, 4), eager::RotatingKvCache::new(2, 4));
    for piece in pieces(2, &[3, 3]) {
        let lazy = LazyTensor::from(&piece);
        let (_, v) = ours.append(&lazy, &lazy).unwrap();
        same(Ok(v), theirs.append(&piece, &piece).map(|(_, v)| v));
    }
    ours.reset();
    assert_eq!((ours.offset(), ours.current_seq_len()), (0, 0));
}

#[test]
fn what_does_not_fit_is_refused_and_the_cache_stays() {
    let zeros = |dims: (usize, usize, usize, usize), dtype| LazyTensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let fitting = zeros((1, 2, 1, 3), DType::F32);
    let mut cache = KvCache::new(2, 4);
    cache.append(&fitting, &fitting).unwrap();
    for (wrong, said) in [
        (zeros((1, 3, 1, 3), DType::F32), "kv cache(f32 [1, 3, 1, 3]): shape mismatch, it holds [1, 2, 4, 3]"),
        (zeros((1, 2, 1, 3), DType::F16), "kv cache: holds f32, got f16 [1, 2, 1, 3]: add .to_dtype(DType::F32)"),
    ] {
        let error = cache.append(&wrong, &wrong).unwrap_err();
        at_line(&error, line!() - 1);
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(cache.current_seq_len(), 1);
    }
    cache.append(&fitting, &fitting).unwrap();
    assert_eq!(cache.k().unwrap().unwrap().dims(), [1, 2, 2, 3]);
    assert!(Cache::new(2, 0).append(&fitting).is_err());
    assert!(RotatingCache::new(2, 0).append(&fitting).is_err());
    assert!(Cache::new(4, 4).append(&fitting).is_err(), "no such dim");
}
