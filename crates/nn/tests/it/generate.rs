//! Greedy generation.

use crate::common::{builder, decoder_vars, row, tiny_config, Rng, TestResult};
use candle_lazy_nn::models::{CausalLm, GenerateOptions, StopReason};
use candle_lazy_nn::Error;

fn model(seed: u64) -> Result<CausalLm, Error> {
    let config = tiny_config();
    CausalLm::load(builder(&decoder_vars(&config, seed)?), &config)
}

fn options(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, ..GenerateOptions::default() }
}

/// The ids that come from computing the whole text again for every token.
fn by_hand(model: &CausalLm, prompt: &[u32], count: usize) -> Result<Vec<u32>, Error> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let logits = model.forward(&row(&ids)?.into(), &mut model.new_cache(ids.len())?)?;
        let logits = logits.eval()?.flatten_all()?.to_vec1::<f32>()?;
        let mut best = 0;
        for (index, value) in logits.iter().enumerate() {
            if *value > logits[best] {
                best = index;
            }
        }
        ids.push(best as u32);
    }
    Ok(ids.split_off(prompt.len()))
}

#[test]
fn generated_ids_are_those_of_a_model_without_cache() -> TestResult {
    let model = model(1)?;
    let prompt = Rng::new(2).ids(6, 61);
    let got: Vec<u32> = model.generate(&prompt, options(20))?.collect::<Result<_, _>>()?;
    assert_eq!(got, by_hand(&model, &prompt, 20)?);
    Ok(())
}

#[test]
fn the_prompts_pieces_do_not_matter() -> TestResult {
    let model = model(3)?;
    let prompt = Rng::new(4).ids(13, 61);
    let want: Vec<u32> = model.generate(&prompt, options(8))?.collect::<Result<_, _>>()?;
    for prefill_chunk in [0, 1, 5, 13] {
        let options = GenerateOptions { prefill_chunk, ..options(8) };
        let got: Vec<u32> = model.generate(&prompt, options)?.collect::<Result<_, _>>()?;
        assert_eq!(got, want, "pieces of {prefill_chunk}");
    }
    Ok(())
}

#[test]
fn an_end_token_ends_the_text_and_is_not_part_of_it() -> TestResult {
    let model = model(5)?;
    let prompt = Rng::new(6).ids(4, 61);
    let free: Vec<u32> = model.generate(&prompt, options(6))?.collect::<Result<_, _>>()?;
    let end = free[3];
    let first = free.iter().position(|id| *id == end).ok_or("not found")?;
    let mut run = model.generate(&prompt, GenerateOptions { eos_token_ids: vec![end], ..options(6) })?;
    let got: Vec<u32> = run.by_ref().collect::<Result<_, _>>()?;
    assert_eq!(got, free[..first]);
    assert_eq!(run.stop_reason(), Some(StopReason::EndOfText));
    assert!(run.next().is_none(), "it stays ended");
    Ok(())
}

#[test]
fn the_length_ends_the_text() -> TestResult {
    let model = model(7)?;
    let mut run = model.generate(&[1, 2], options(3))?;
    assert_eq!(run.stop_reason(), None);
    assert_eq!(run.by_ref().count(), 3);
    assert_eq!(run.stop_reason(), Some(StopReason::MaxNewTokens));
    assert!(run.report().is_some());
    let mut none = model.generate(&[1, 2], options(0))?;
    assert!(none.next().is_none());
    assert_eq!(none.stop_reason(), Some(StopReason::MaxNewTokens));
    Ok(())
}

#[test]
fn the_context_ends_the_text() -> TestResult {
    let model = model(8)?;
    let prompt = Rng::new(9).ids(60, 61);
    let mut run = model.generate(&prompt, options(100))?;
    let ids: Vec<u32> = run.by_ref().collect::<Result<_, _>>()?;
    // 64 positions: the tokens after positions 59 to 63 can be told, the last of them cannot be read again.
    assert_eq!(ids.len(), 5);
    assert_eq!(run.stop_reason(), Some(StopReason::ContextFull));
    assert_eq!(run.position(), 64);
    Ok(())
}

#[test]
fn prompts_that_do_not_fit_are_refused() -> TestResult {
    let model = model(10)?;
    assert!(matches!(model.generate(&[], options(3)), Err(Error::EmptyPrompt { .. })));
    let long = vec![1; 65];
    assert!(matches!(model.generate(&long, options(3)), Err(Error::PromptTooLong { len: 65, context: 64, .. })));
    assert!(matches!(model.generate(&[1, 61], options(3)), Err(Error::TokenOutOfRange { id: 61, vocab: 61, .. })));
    Ok(())
}

#[test]
fn a_hundred_steps_write_the_cache_in_place() -> TestResult {
    let config = candle_lazy_nn::models::CausalLmConfig { max_position_embeddings: 160, ..tiny_config() };
    let model = CausalLm::load(builder(&decoder_vars(&config, 11)?), &config)?;
    let prompt = Rng::new(12).ids(5, 61);
    let mut run = model.generate(&prompt, options(102))?;
    let mut hits = 0;
    for step in 0..102 {
        run.next().ok_or("it ended early")??;
        let report = run.report().ok_or("no report")?;
        assert_eq!(report.copies, 0, "step {step} copied the cache: {report}");
        assert_eq!(report.in_place, 2 * config.num_hidden_layers, "step {step}: {report}");
        assert!(report.fallbacks.is_empty(), "step {step}: {report}");
        hits += usize::from(report.cache_hit);
    }
    // A plan's key says which dims are equal: a length that happens to equal a width or a number of heads has its own.
    assert!(hits >= 85, "only {hits} of 102 steps found their plan");
    Ok(())
}
