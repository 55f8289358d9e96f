//! The generation service: whatever runs beside a text, it gets the tokens that it gets alone.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::{builder, decoder_vars, row, text, tiny_config, Rng};
use candle_core::{Device, Tensor};
use candle_lazy_exec::materialize;
use candle_lazy_nn::models::{CausalLm, GenerateOptions, PackedDecoder, Segment, StopReason};
use candle_lazy_nn::sampling::{Sampling, SamplingOptions};
use candle_lazy_nn::service::{
    Generating, GenerationOptions, GenerationRequest, GenerationService, Shutdown, SubmitOptions,
};
use candle_lazy_nn::{Error, LoraAdapter, LoraConfig, LoraSet, LoraTargets, LoraWeights};
use proptest::prelude::*;
use std::time::{Duration, Instant};

fn model(seed: u64) -> CausalLm {
    let config = tiny_config();
    CausalLm::load(builder(&decoder_vars(&config, seed).unwrap()), &config).unwrap()
}

/// The model with random factors on its maps; on q and v alone for an odd seed.
fn adapted(model: &CausalLm, seed: u64, scale: f32) -> CausalLm {
    let mut adapted = model.clone();
    let mut rng = Rng::new(seed);
    for path in model.projection_paths() {
        if seed % 2 == 1 && !(path.ends_with("q_proj") || path.ends_with("v_proj")) {
            continue;
        }
        let (input, output) = match path.rsplit('.').next().unwrap() {
            "q_proj" | "o_proj" => (24, 24),
            "k_proj" | "v_proj" => (24, 8),
            "down_proj" => (40, 24),
            _ => (24, 40),
        };
        let rank = 2 + seed as usize % 3;
        let (a, b) = (rng.tensor(&[input, rank], scale).unwrap(), rng.tensor(&[rank, output], scale).unwrap());
        adapted.set_lora(&path, Some(LoraWeights::new(a, b, 0.7).unwrap())).unwrap();
    }
    adapted
}

fn how() -> SubmitOptions {
    SubmitOptions::default()
}

fn options() -> GenerationOptions {
    GenerationOptions { max_context: 64, ..GenerationOptions::default() }
}

/// The tokens that a model gives one text.
fn alone(model: &CausalLm, request: &GenerationRequest) -> Vec<u32> {
    let options = GenerateOptions {
        max_new_tokens: request.max_new_tokens,
        eos_token_ids: request.stop_ids.clone(),
        ..GenerateOptions::default()
    };
    let run = model.generate(&request.prompt, options).unwrap().sampled(&request.sampling).unwrap();
    run.collect::<Result<_, _>>().unwrap()
}

fn bits(values: &Tensor) -> Vec<u32> {
    values.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_packed_step_gives_each_text_the_bits_that_it_gets_alone(
        seed in 0u64..1000,
        texts in prop::collection::vec((0usize..9, 1usize..6, 0usize..4), 1..6),
    ) {
        let base = model(1);
        let models: Vec<CausalLm> = (0..4).map(|i| if i == 0 { base.clone() } else { adapted(&base, i, 0.4) }).collect();
        let sets: Vec<LoraSet> = models.iter().map(|model| LoraSet::of(model).unwrap()).collect();
        let mut rng = Rng::new(seed);
        let texts: Vec<(Vec<u32>, Vec<u32>, usize)> =
            texts.into_iter().map(|(held, more, of)| (rng.ids(held, 61), rng.ids(more, 61), of)).collect();
        let mut packed = PackedDecoder::new(base.clone());
        let mut caches: Vec<_> = texts.iter().map(|_| base.new_cache(20).unwrap()).collect();
        for ((held, _, of), cache) in texts.iter().zip(&mut caches) {
            if !held.is_empty() {
                let logits = models[*of].forward(&row(held).unwrap().into(), cache).unwrap();
                let mut roots = cache.handles();
                roots.push(&logits);
                materialize(&roots).unwrap();
            }
        }
        let mut segments: Vec<Segment<'_>> = texts.iter().zip(&mut caches).map(|((_, more, of), cache)| {
            let adapter = (*of > 0).then(|| &sets[*of]);
            Segment { ids: more, cache, adapter, logits: true }
        }).collect();
        let logits = packed.forward(&mut segments).unwrap().unwrap().eval().unwrap();
        prop_assert_eq!(logits.dims(), &[texts.len(), 61]);
        for (at, (held, more, of)) in texts.iter().enumerate() {
            let ids = [held.as_slice(), more].concat();
            let want = models[*of].forward(&row(&ids).unwrap().into(), &mut base.new_cache(20).unwrap()).unwrap();
            prop_assert_eq!(bits(&logits.get(at).unwrap()), bits(&want.eval().unwrap()), "text {}", at);
        }
    }

    #[test]
    fn texts_that_join_and_leave_get_the_tokens_that_they_get_alone(
        seed in 0u64..1000,
        max_running in 1usize..5,
        prefill_tokens in 1usize..9,
        texts in prop::collection::vec((1usize..20, 0usize..14, 0u64..4, 0u64..3, 0u64..4), 1..9),
    ) {
        let base = model(2);
        let models: Vec<CausalLm> = (0..4).map(|i| if i == 0 { base.clone() } else { adapted(&base, i, 0.4) }).collect();
        let cache_positions = 64 * max_running.min(3);
        let options = GenerationOptions { max_running, prefill_tokens, cache_positions, ..options() };
        let service = GenerationService::new(base.clone(), options).unwrap();
        for (number, model) in models.iter().enumerate().skip(1) {
            service.add_adapter_set(number.to_string(), LoraSet::of(model).unwrap());
        }
        let mut rng = Rng::new(seed);
        let requests: Vec<(GenerationRequest, usize, u64)> = texts.into_iter().map(|(len, new, of, kind, pause)| {
            let sampling = match kind {
                0 => Sampling::greedy(),
                1 => Sampling { seed: Some(rng.bits()), ..Sampling::default() },
                _ => {
                    let options = SamplingOptions { temperature: 0.7, top_k: Some(20), top_p: Some(0.9) };
                    Sampling { options, repetition_penalty: 1.2, seed: Some(rng.bits()) }
                }
            };
            let request = GenerationRequest::new(rng.ids(len, 61)).max_new_tokens(new).sampling(sampling).stop_ids(vec![2]);
            (if of > 0 { request.adapter(of.to_string()) } else { request }, of as usize, pause)
        }).collect();
        let service = &service;
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = requests.iter().map(|(request, _, pause)| scope.spawn(move || {
                std::thread::sleep(Duration::from_micros(300 * pause));
                service.submit(request.clone(), &how()).unwrap().wait().unwrap()
            })).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for ((request, of, _), got) in requests.iter().zip(&results) {
            prop_assert_eq!(&got.tokens, &alone(&models[*of], request));
            prop_assert_eq!(got.finish.new_tokens, got.tokens.len());
            prop_assert_eq!(got.finish.prompt_tokens, request.prompt.len());
        }
        let stats = service.stats();
        prop_assert_eq!((stats.completed, stats.failed, stats.cancelled), (requests.len() as u64, 0, 0));
        prop_assert_eq!((stats.queued, stats.running), (0, 0));
        prop_assert_eq!(stats.tokens_out as usize, results.iter().map(|got| got.tokens.len()).sum::<usize>());
    }
}

#[test]
fn a_text_ends_for_the_reason_for_which_it_ends_alone() {
    let model = model(3);
    let service = GenerationService::new(model.clone(), options()).unwrap();
    let prompt = Rng::new(4).ids(5, 61);
    let run = |request: GenerationRequest| service.submit(request, &how()).unwrap().wait().unwrap();
    let free = run(GenerationRequest::new(prompt.clone()).max_new_tokens(6));
    assert_eq!((free.tokens.len(), free.finish.reason), (6, StopReason::MaxNewTokens));
    let stopped = run(GenerationRequest::new(prompt.clone()).max_new_tokens(6).stop_ids(vec![free.tokens[3]]));
    let first = free.tokens.iter().position(|token| *token == free.tokens[3]).unwrap();
    assert_eq!((stopped.tokens.as_slice(), stopped.finish.reason), (&free.tokens[..first], StopReason::EndOfText));
    let none = run(GenerationRequest::new(prompt.clone()).max_new_tokens(0));
    assert_eq!((none.tokens.len(), none.finish.reason), (0, StopReason::MaxNewTokens));
    let full = GenerationRequest::new(prompt).max_new_tokens(1000);
    let got = run(full.clone());
    assert_eq!(got.finish.reason, StopReason::ContextFull);
    assert_eq!(got.tokens, alone(&model, &full));
}

#[test]
fn what_cannot_be_served_is_an_error_to_its_caller() {
    let options = GenerationOptions { max_context: 32, cache_positions: 32, ..options() };
    let service = GenerationService::new(model(5), options).unwrap();
    let refused = |request: GenerationRequest| {
        let message = text(service.submit(request.clone(), &how()));
        assert_eq!(text(service.try_submit(request, &how())).split(", at ").next(), message.split(", at ").next());
        message
    };
    assert!(refused(GenerationRequest::new(vec![])).contains("empty"));
    assert!(refused(GenerationRequest::new(vec![61])).contains("outside of the vocabulary of 61"));
    assert!(refused(GenerationRequest::new(vec![1; 32])).contains("32 tokens, the context has room for 32"));
    assert!(refused(GenerationRequest::new(vec![1]).adapter("x")).contains("no adapter `x` (the service has none)"));
    let cold = Sampling {
        options: SamplingOptions { temperature: -1.0, ..SamplingOptions::default() },
        ..Sampling::default()
    };
    assert!(refused(GenerationRequest::new(vec![1]).sampling(cold)).contains("temperature"));
    let shrinking = Sampling { repetition_penalty: 0.0, ..Sampling::default() };
    assert!(refused(GenerationRequest::new(vec![1]).sampling(shrinking)).contains("penalty"));
    assert!(refused(GenerationRequest::new(vec![1]).stop(vec!["x".into()])).contains("no tokenizer"));
    let late = SubmitOptions { deadline: Some(Instant::now() - Duration::from_secs(1)), ..how() };
    assert!(service.submit(GenerationRequest::new(vec![1]), &late).and_then(Generating::wait).is_err());
    assert_eq!(
        service.submit(GenerationRequest::new(vec![1]).max_new_tokens(2), &how()).unwrap().wait().unwrap().tokens.len(),
        2
    );
    let zero = GenerationOptions { prefill_tokens: 0, ..options };
    assert!(text(GenerationService::new(model(5), zero)).contains("prefill_tokens is 0"));
    let carries = adapted(&model(5), 2, 0.1);
    assert!(text(GenerationService::new(carries, options)).contains("carries an adapter"));
    let small = GenerationOptions { cache_positions: 16, ..options };
    let small = GenerationService::new(model(5), small).unwrap();
    assert!(text(small.submit(GenerationRequest::new(vec![1]), &how())).contains("all caches have 16"));
}

#[test]
fn an_adapter_of_another_model_is_refused_and_one_without_numbers_fails_its_own_text_only() {
    let base = model(6);
    let service = GenerationService::new(base.clone(), options()).unwrap();
    let config = LoraConfig { targets: LoraTargets::AllLinear, ..LoraConfig::default() };
    let adapter = LoraAdapter::attach(&mut base.clone(), &config, 1).unwrap();
    service.add_adapter("fresh", &adapter).unwrap();
    let mut other = tiny_config();
    other.hidden_size = 48;
    let mut other = CausalLm::load(builder(&decoder_vars(&other, 1).unwrap()), &other).unwrap();
    let wide = LoraAdapter::attach(&mut other, &config, 1).unwrap();
    assert!(text(service.add_adapter("wide", &wide)).contains("needs a (24"));
    service.add_adapter_set("broken", LoraSet::of(&adapted(&base, 2, f32::NAN)).unwrap());
    assert_eq!(service.adapters(), ["broken", "fresh"]);
    let request = GenerationRequest::new(vec![3, 4, 5]).max_new_tokens(12);
    let want = alone(&base, &request);
    let pending: Vec<_> = ["fresh", "broken", "fresh"]
        .iter()
        .map(|name| service.submit(request.clone().adapter(*name), &how()).unwrap())
        .collect();
    let results: Vec<_> = pending.into_iter().map(Generating::wait).collect();
    assert!(matches!(results[1], Err(Error::Logits { .. })), "{:?}", results[1]);
    // a new adapter adds zeros
    assert_eq!(results[0].as_ref().unwrap().tokens, want);
    assert_eq!(results[2].as_ref().unwrap().tokens, want);
    assert!(service.remove_adapter("fresh") && !service.remove_adapter("fresh"));
    let message = text(service.submit(request.adapter("fresh"), &how()));
    assert!(message.contains("no adapter `fresh` (the service has broken)"), "{message}");
}

/// Waits until `done`.
fn until(done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "it never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn who_goes_away_is_not_computed_any_more() {
    let service = GenerationService::new(model(7), options()).unwrap();
    let mut leaver = service.submit(GenerationRequest::new(vec![1, 2]).max_new_tokens(1000), &how()).unwrap();
    assert!(leaver.wait_pieces().next().unwrap().unwrap().token.is_some());
    drop(leaver);
    until(|| service.stats().running == 0);
    let stats = service.stats();
    // it may have ended by itself before it was looked at
    assert_eq!(stats.cancelled + stats.completed, 1);
    let request = GenerationRequest::new(vec![1, 2]).max_new_tokens(3);
    assert_eq!(service.submit(request, &how()).unwrap().wait().unwrap().tokens.len(), 3);
}

#[test]
fn pieces_come_one_by_one_in_any_runtime() {
    use futures::StreamExt;
    let model = model(8);
    let service = GenerationService::new(model.clone(), options()).unwrap();
    let request = GenerationRequest::new(vec![9, 8, 7]).max_new_tokens(10);
    let want = alone(&model, &request);
    let (streamed, awaited) = futures::executor::block_on(async {
        let one = service.submit_async(request.clone(), &how()).await.unwrap();
        let two = service.submit_async(request.clone(), &how()).await.unwrap();
        let streamed: Vec<u32> = one.filter_map(|piece| async { piece.unwrap().token }).collect().await;
        (streamed, two.complete().await.unwrap().tokens)
    });
    assert_eq!((&streamed, &awaited), (&want, &want));
    let mut iterated = service.submit(request, &how()).unwrap();
    let tokens: Vec<u32> = iterated.wait_pieces().filter_map(|piece| piece.unwrap().token).collect();
    assert_eq!(tokens, want);
    assert_eq!(iterated.finish().map(|finish| finish.new_tokens), Some(10));
}

#[test]
fn a_shutdown_serves_or_refuses_what_there_is() {
    for (shutdown, served) in [(Shutdown::Drain, true), (Shutdown::Cancel, false)] {
        let service = GenerationService::new(model(9), GenerationOptions { max_running: 1, ..options() }).unwrap();
        let request = GenerationRequest::new(vec![1]).max_new_tokens(40);
        let pending: Vec<_> = (0..6).map(|_| service.submit(request.clone(), &how()).unwrap()).collect();
        service.shutdown(shutdown);
        let results: Vec<_> = pending.into_iter().map(Generating::wait).collect();
        assert_eq!(results.iter().all(Result::is_ok), served, "{results:?}");
        assert!(results.last().unwrap().is_ok() == served);
        assert!(service.submit(request, &how()).is_err());
    }
}

#[test]
fn the_longest_text_does_not_keep_others_from_their_turns() {
    // a prompt of many pieces beside a text that runs: both end, and the one that runs gets a token in every step
    let model = model(10);
    let service = GenerationService::new(model.clone(), GenerationOptions { prefill_tokens: 2, ..options() }).unwrap();
    let mut runner = service.submit(GenerationRequest::new(vec![5]).max_new_tokens(40), &how()).unwrap();
    runner.wait_pieces().next().unwrap().unwrap();
    let long = GenerationRequest::new(Rng::new(1).ids(50, 61)).max_new_tokens(4);
    let late = service.submit(long.clone(), &how()).unwrap();
    assert_eq!(late.wait().unwrap().tokens, alone(&model, &long));
    assert_eq!(runner.wait().unwrap().finish.new_tokens, 40);
}

#[test]
fn a_packed_step_refuses_what_does_not_fit_and_changes_nothing() {
    let model = model(11);
    let mut packed = PackedDecoder::new(model.clone());
    let (mut one, mut two) = (model.new_cache(4).unwrap(), model.new_cache(4).unwrap());
    let mut step = |ids: [&[u32]; 2]| {
        let [a, b] = ids;
        let result = packed.forward(&mut [
            Segment { ids: a, cache: &mut one, adapter: None, logits: false },
            Segment { ids: b, cache: &mut two, adapter: None, logits: false },
        ]);
        (result.map(|logits| logits.is_none()), one.position(), two.position())
    };
    assert!(matches!(step([&[1], &[]]), (Err(Error::EmptyPrompt { .. }), 0, 0)));
    assert!(matches!(step([&[1], &[99]]), (Err(Error::TokenOutOfRange { .. }), 0, 0)));
    assert!(matches!(step([&[1], &[1, 2, 3, 4, 5]]), (Err(Error::CacheFull { .. }), 0, 0)));
    assert!(matches!(step([&[1], &[1, 2]]), (Ok(true), 1, 2)));
    assert!(matches!(packed.forward(&mut []), Err(Error::EmptyPrompt { .. })));
    let mut config = tiny_config();
    config.num_hidden_layers = 2;
    let mut shallow = candle_lazy_nn::models::Cache::new(&config, 4, model.dtype(), &Device::Cpu).unwrap();
    let mut segments = [Segment { ids: &[1], cache: &mut shallow, adapter: None, logits: true }];
    assert!(text(packed.forward(&mut segments)).contains("made for 2 blocks, the model has 3"));
}
