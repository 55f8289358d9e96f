//! Generation as an asynchronous stream.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use candle_core::{Device, Tensor};
use candle_lazy_compat as metal_candle;
use futures::executor::block_on;
use futures::{pin_mut, StreamExt};
use metal_candle::error::{Error, InferenceError};
use metal_candle::inference::StreamToken;
use metal_candle::models::LanguageModel;
use metal_candle::{Generator, GeneratorConfig};

/// After token t comes t + 1 of 8; after 6 all logits are NaN.
struct Counting(Device);

impl LanguageModel for Counting {
    fn forward(&self, input_ids: &Tensor, _attention_mask: Option<&Tensor>) -> metal_candle::Result<Tensor> {
        let ids = input_ids.squeeze(0)?.to_vec1::<u32>()?;
        let mut values = vec![0f32; ids.len() * 8];
        for (at, id) in ids.iter().enumerate() {
            values[at * 8 + (*id as usize + 1) % 8] = if *id == 6 { f32::NAN } else { 2.0 };
        }
        Ok(Tensor::from_vec(values, (1, ids.len(), 8), &self.0)?)
    }

    fn device(&self) -> &Device {
        &self.0
    }

    fn vocab_size(&self) -> usize {
        8
    }
}

fn generator(max_tokens: usize, eos_token_id: Option<u32>) -> Generator {
    let config = GeneratorConfig { max_tokens, eos_token_id, ..Default::default() };
    Generator::new(Box::new(Counting(Device::Cpu)), config).unwrap()
}

fn collected(mut generator: Generator, prompt: &[u32]) -> Vec<metal_candle::Result<StreamToken>> {
    block_on(generator.generate_stream_async(prompt).collect())
}

#[test]
fn tokens_come_one_by_one_until_the_end_token() {
    let tokens: Vec<StreamToken> = collected(generator(20, Some(3)), &[0]).into_iter().map(Result::unwrap).collect();
    let ids: Vec<(u32, bool)> = tokens.iter().map(|token| (token.token_id, token.is_eos)).collect();
    assert_eq!(ids, [(1, false), (2, false), (3, true)]);
    // the same as a callback sees
    let mut seen = Vec::new();
    generator(20, Some(3))
        .generate_stream(&[0], |token| {
            seen.push(token);
            true
        })
        .unwrap();
    assert_eq!(tokens, seen);
    // e² of e² and seven times 1
    let probability = 2f64.exp() / (2f64.exp() + 7.0);
    assert!(tokens.iter().all(|token| (f64::from(token.probability) - probability).abs() < 1e-6 && token.logit == 2.0));
}

#[test]
fn the_number_of_tokens_and_an_empty_prompt_end_it() {
    assert_eq!(collected(generator(2, None), &[0]).len(), 2);
    assert_eq!(collected(generator(0, None), &[0]).len(), 0);
    assert_eq!(collected(generator(5, None), &[]).len(), 0);
}

#[test]
fn an_error_is_the_last_item() {
    let mut items = collected(generator(20, None), &[4]);
    let last = items.pop().unwrap().unwrap_err();
    assert!(matches!(last, Error::Inference(InferenceError::SamplingError { .. })), "{last:?}");
    assert!(last.to_string().contains("sampling error: logit 7 of 8 is NaN"), "{last}");
    let ids: Vec<u32> = items.into_iter().map(|item| item.unwrap().token_id).collect();
    assert_eq!(ids, [5, 6]);
}

#[test]
fn a_stream_that_is_dropped_leaves_the_generator_usable() {
    let mut generator = generator(20, None);
    {
        let prompt = vec![1, 2];
        let stream = generator.generate_stream_async(&prompt);
        drop(prompt); // the stream has its own
        pin_mut!(stream);
        assert_eq!(block_on(stream.next()).unwrap().unwrap().token_id, 3);
    }
    let config = GeneratorConfig { max_tokens: 1, ..generator.config().clone() };
    assert_eq!(config.max_tokens, 1);
    assert_eq!(block_on(generator.generate_stream_async(&[5]).next()).unwrap().unwrap().token_id, 6);
}

#[tokio::test]
async fn other_tasks_have_their_turn_between_two_tokens() {
    let mut generator = generator(5, None);
    let stream = generator.generate_stream_async(&[0]);
    let turns = std::cell::Cell::new(0);
    let other = async {
        for _ in 0..5 {
            turns.set(turns.get() + 1);
            tokio::task::yield_now().await;
        }
    };
    let tokens = async {
        pin_mut!(stream);
        let mut turns_at_tokens = Vec::new();
        while let Some(token) = stream.next().await {
            token.unwrap();
            turns_at_tokens.push(turns.get());
        }
        turns_at_tokens
    };
    let (at, ()) = futures::join!(tokens, other);
    // the first token comes before the other task runs at all, each further one after another turn of it
    assert_eq!(at, [0, 1, 2, 3, 4]);
}
