//! The key/value cache.

use crate::common::{close, Rng, TestResult};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::{Error, KvCache, LazyTensor};
use proptest::prelude::*;

fn pair(rng: &mut Rng, shape: &[usize]) -> candle_core::Result<(Tensor, Tensor)> {
    Ok((rng.tensor(shape, 1.)?, rng.tensor(shape, 1.)?))
}

fn append(cache: &mut KvCache, pair: &(Tensor, Tensor)) -> candle_lazy_nn::Result<(LazyTensor, LazyTensor)> {
    cache.append(&pair.0.clone().into(), &pair.1.clone().into())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn what_was_appended_comes_back(
        b in 1usize..3, h in 1usize..4, d in 1usize..9,
        pieces in prop::collection::vec(1usize..5, 1..6),
        spare in 0usize..4, seed in any::<u64>(),
    ) {
        let run = || -> TestResult {
            let mut rng = Rng::new(seed);
            let mut cache = KvCache::new(pieces.iter().sum::<usize>() + spare);
            let (mut ks, mut vs) = (Vec::new(), Vec::new());
            for s in &pieces {
                let piece = pair(&mut rng, &[b, h, *s, d])?;
                let (k, v) = append(&mut cache, &piece)?;
                ks.push(piece.0);
                vs.push(piece.1);
                let mut roots: Vec<LazyTensor> = cache.handles().cloned().collect();
                roots.extend([k.clone(), v.clone()]);
                candle_lazy_exec::materialize(&roots.iter().collect::<Vec<_>>())?;
                drop(roots);
                close(&k.eval()?, &Tensor::cat(&ks, 2)?, 0.)?;
                close(&v.eval()?, &Tensor::cat(&vs, 2)?, 0.)?;
            }
            assert_eq!(cache.current_seq_len(), pieces.iter().sum::<usize>());
            Ok(())
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

#[test]
fn a_full_cache_names_position_and_capacity_and_stays_as_it_is() -> TestResult {
    let mut rng = Rng::new(1);
    let mut cache = KvCache::new(5);
    let first = pair(&mut rng, &[1, 2, 3, 4])?;
    append(&mut cache, &first)?;
    let error = append(&mut cache, &pair(&mut rng, &[1, 2, 3, 4])?).map(|_| ());
    assert!(matches!(error, Err(Error::CacheFull { position: 3, added: 3, capacity: 5, .. })), "{error:?}");
    assert_eq!(cache.current_seq_len(), 3);
    let second = pair(&mut rng, &[1, 2, 2, 4])?;
    let (k, _) = append(&mut cache, &second)?;
    close(&k.eval()?, &Tensor::cat(&[&first.0, &second.0], 2)?, 0.)
}

#[test]
fn what_does_not_fit_is_refused_and_the_cache_stays_as_it_is() -> TestResult {
    let mut rng = Rng::new(2);
    let mut cache = KvCache::new(8);
    let first = pair(&mut rng, &[1, 2, 3, 4])?;
    append(&mut cache, &first)?;
    for shape in [[2, 2, 1, 4], [1, 3, 1, 4], [1, 2, 1, 5]] {
        let error = append(&mut cache, &pair(&mut rng, &shape)?).map(|_| ());
        assert!(matches!(error, Err(Error::Cache { .. })), "{shape:?}: {error:?}");
    }
    let f64s = Tensor::zeros((1, 2, 1, 4), DType::F64, &Device::Cpu)?;
    assert!(matches!(append(&mut cache, &(f64s.clone(), f64s)), Err(Error::Cache { .. })));
    let (k, v) = (rng.tensor(&[1, 2, 1, 4], 1.)?, rng.tensor(&[1, 2, 2, 4], 1.)?);
    assert!(matches!(append(&mut cache, &(k, v)), Err(Error::Cache { .. })), "keys and values differ");
    assert_eq!(cache.current_seq_len(), 3);
    let more = pair(&mut rng, &[1, 2, 1, 4])?;
    let (_, v) = append(&mut cache, &more)?;
    close(&v.eval()?, &Tensor::cat(&[&first.1, &more.1], 2)?, 0.)
}

#[test]
fn reset_and_truncate_forget() -> TestResult {
    let mut rng = Rng::new(3);
    let mut cache = KvCache::new(4);
    let first = pair(&mut rng, &[1, 1, 4, 2])?;
    append(&mut cache, &first)?;
    cache.truncate(9);
    assert_eq!(cache.current_seq_len(), 4);
    cache.truncate(1);
    let second = pair(&mut rng, &[1, 1, 2, 2])?;
    let (k, _) = append(&mut cache, &second)?;
    close(&k.eval()?, &Tensor::cat(&[&first.0.narrow(2, 0, 1)?, &second.0], 2)?, 0.)?;
    drop(k);
    cache.reset();
    assert_eq!((cache.current_seq_len(), cache.capacity()), (0, 4));
    let third = pair(&mut rng, &[1, 1, 4, 2])?;
    let (k, _) = append(&mut cache, &third)?;
    close(&k.eval()?, &third.0, 0.)
}

#[test]
fn the_wrong_rank_is_an_error() -> TestResult {
    let k = Rng::new(4).tensor(&[2, 3, 4], 1.)?;
    let mut cache = KvCache::new(4);
    assert!(append(&mut cache, &(k.clone(), k)).is_err());
    assert_eq!(cache.handles().count(), 0);
    Ok(())
}

#[test]
fn a_view_that_somebody_keeps_costs_a_copy_and_keeps_its_values() -> TestResult {
    let mut rng = Rng::new(5);
    let mut cache = KvCache::new(4);
    let (first, second) = (pair(&mut rng, &[1, 2, 2, 3])?, pair(&mut rng, &[1, 2, 1, 3])?);
    append(&mut cache, &first)?;
    let kept: Vec<LazyTensor> = cache.handles().cloned().collect();
    candle_lazy_exec::materialize(&kept.iter().collect::<Vec<_>>())?;
    let before = kept[0].eval()?.copy()?;
    cache.truncate(1);
    append(&mut cache, &second)?;
    let report = candle_lazy_exec::materialize(&cache.handles().collect::<Vec<_>>())?;
    assert_eq!((report.in_place, report.copies), (0, 2), "{report}");
    close(&kept[0].eval()?, &before, 0.)
}

#[test]
fn a_cache_grows_with_what_it_holds() -> TestResult {
    let mut rng = Rng::new(6);
    let mut cache = KvCache::new(2);
    cache.grow(3)?; // nothing is held yet
    let (first, second) = (pair(&mut rng, &[2, 1, 3, 2])?, pair(&mut rng, &[2, 1, 2, 2])?);
    append(&mut cache, &first)?;
    assert!(matches!(append(&mut cache, &second).map(|_| ()), Err(Error::CacheFull { position: 3, capacity: 3, .. })));
    cache.grow(1)?;
    assert_eq!(cache.capacity(), 3);
    cache.grow(8)?;
    assert_eq!((cache.capacity(), cache.current_seq_len()), (8, 3));
    let (k, v) = append(&mut cache, &second)?;
    close(&k.eval()?, &Tensor::cat(&[&first.0, &second.0], 2)?, 0.)?;
    close(&v.eval()?, &Tensor::cat(&[&first.1, &second.1], 2)?, 0.)?;
    cache.reset();
    cache.grow(9)?; // of what was forgotten nothing is copied
    let (k, _) = append(&mut cache, &second)?;
    close(&k.eval()?, &second.0, 0.)
}
