//! The embedding service: a text has the vector that it has alone, whatever it is computed with.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::bert::{config, weights};
use crate::common::{builder, text, Rng};
use candle_core::Tensor;
use candle_lazy_nn::models::SentenceEncoder;
use candle_lazy_nn::service::{
    EmbeddingOptions, EmbeddingService, Embeddings, MaxWait, Shutdown, SubmitOptions, Window,
};
use candle_lazy_nn::Error;
use proptest::prelude::*;
use std::time::Duration;

fn encoder() -> SentenceEncoder {
    let config = config().unwrap();
    SentenceEncoder::load(builder(&weights(&config, 1).unwrap()), &config).unwrap()
}

fn how() -> SubmitOptions {
    SubmitOptions::default()
}

fn bits(vectors: &[Vec<f32>]) -> Vec<Vec<u32>> {
    vectors.iter().map(|vector| vector.iter().map(|value| value.to_bits()).collect()).collect()
}

fn alone(encoder: &SentenceEncoder, text: &[u32]) -> Vec<f32> {
    encoder.embed(&[text]).unwrap().to_vec2::<f32>().unwrap().remove(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_text_has_the_bits_that_it_has_alone(
        seed in 0u64..1000,
        max_batch in 1usize..9,
        batch_tokens in 1usize..40,
        requests in prop::collection::vec((prop::collection::vec(1usize..17, 1..4), 0u64..4), 1..12),
    ) {
        let encoder = encoder();
        let window = Window { max_batch, max_wait: MaxWait::Fixed(Duration::from_micros(200)) };
        let options = EmbeddingOptions { window, batch_tokens, ..EmbeddingOptions::default() };
        let service = EmbeddingService::new(encoder.clone(), options).unwrap();
        let mut rng = Rng::new(seed);
        let requests: Vec<(Vec<Vec<u32>>, u64)> = requests.into_iter()
            .map(|(lengths, pause)| (lengths.into_iter().map(|len| rng.ids(len, 50)).collect(), pause)).collect();
        let service = &service;
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = requests.iter().map(|(texts, pause)| scope.spawn(move || {
                std::thread::sleep(Duration::from_micros(150 * pause));
                service.submit(texts.clone(), &how()).unwrap().wait().unwrap()
            })).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for ((texts, _), got) in requests.iter().zip(&results) {
            let want: Vec<Vec<f32>> = texts.iter().map(|text| alone(&encoder, text)).collect();
            prop_assert_eq!(bits(got), bits(&want));
        }
        let stats = service.stats();
        prop_assert_eq!((stats.completed, stats.running, stats.queued), (requests.len() as u64, 0, 0));
    }
}

#[test]
fn what_cannot_be_embedded_is_an_error_to_its_caller() {
    let service = EmbeddingService::new(encoder(), EmbeddingOptions::default()).unwrap();
    for (texts, says) in [
        (vec![], "empty"),
        (vec![vec![1], vec![]], "empty"),
        (vec![vec![50]], "outside of the vocabulary of 50"),
        (vec![vec![1; 17]], "17 tokens, the context has room for 16"),
    ] {
        let message = text(service.submit(texts.clone(), &how()));
        assert!(message.contains(says), "{message}");
        assert!(service.try_submit(texts, &how()).is_err());
    }
    assert_eq!(service.stats().refused, 8);
    assert_eq!(service.submit(vec![vec![1, 2]], &how()).unwrap().wait().unwrap().len(), 1);
    let zero = EmbeddingOptions { batch_tokens: 0, ..EmbeddingOptions::default() };
    assert!(text(EmbeddingService::new(encoder(), zero)).contains("batch_tokens is 0"));
}

#[test]
fn a_text_without_a_vector_fails_its_own_request_only() {
    // word 7 has no numbers
    let config = config().unwrap();
    let mut vars = weights(&config, 1).unwrap();
    let name = "embeddings.word_embeddings.weight";
    let mut table = vars[name].to_vec2::<f32>().unwrap();
    table[7].fill(f32::NAN);
    vars.insert(name.into(), Tensor::new(table, &candle_core::Device::Cpu).unwrap());
    let encoder = SentenceEncoder::load(builder(&vars), &config).unwrap();
    let service = EmbeddingService::new(encoder.clone(), EmbeddingOptions::default()).unwrap();
    let pending: Vec<_> = [vec![vec![1, 2]], vec![vec![3, 4], vec![7, 1]], vec![vec![5, 6]]]
        .into_iter()
        .map(|texts| service.submit(texts, &how()).unwrap())
        .collect();
    let results: Vec<_> = pending.into_iter().map(Embeddings::wait).collect();
    assert_eq!(bits(results[0].as_ref().unwrap()), bits(&[alone(&encoder, &[1, 2])]));
    assert_eq!(bits(results[2].as_ref().unwrap()), bits(&[alone(&encoder, &[5, 6])]));
    match &results[1] {
        Err(Error::NonFinite { text: 1, first: Some(_) }) => {}
        other => panic!("{other:?}"),
    }
    let stats = service.stats();
    assert_eq!((stats.completed, stats.failed), (2, 1));
}

#[test]
fn futures_of_any_runtime_and_dropped_ones() {
    let encoder = encoder();
    let service = EmbeddingService::new(encoder.clone(), EmbeddingOptions::default()).unwrap();
    let got = futures::executor::block_on(async {
        let kept = service.submit_async(vec![vec![1, 2, 3]], &how()).await.unwrap();
        drop(service.submit_async(vec![vec![4]], &how()).await.unwrap());
        kept.await.unwrap()
    });
    assert_eq!(bits(&got), bits(&[alone(&encoder, &[1, 2, 3])]));
    service.shutdown(Shutdown::Drain);
    let stats = service.stats();
    assert_eq!((stats.submitted, stats.completed + stats.cancelled), (2, 2));
}

#[test]
fn a_shutdown_serves_or_refuses_what_waits() {
    for (shutdown, served) in [(Shutdown::Drain, true), (Shutdown::Cancel, false)] {
        let window = Window { max_batch: 1, max_wait: MaxWait::Fixed(Duration::ZERO) };
        let options = EmbeddingOptions { window, ..EmbeddingOptions::default() };
        let service = EmbeddingService::new(encoder(), options).unwrap();
        let pending: Vec<_> = (0..64).map(|_| service.submit(vec![vec![1; 16]], &how()).unwrap()).collect();
        service.shutdown(shutdown);
        let results: Vec<_> = pending.into_iter().map(Embeddings::wait).collect();
        assert_eq!(results.last().unwrap().is_ok(), served);
        if served {
            assert!(results.iter().all(Result::is_ok));
        }
        assert!(service.submit(vec![vec![1]], &how()).is_err());
    }
}
