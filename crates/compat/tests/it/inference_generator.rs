//! The generator's rules, one by one, on models whose logits are known, and on the decoder.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::decoder::{builder, causal, config, logits, weights};
use candle_core::{DType, Device, Tensor};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, InferenceError};
use metal_candle::inference::StreamToken;
use metal_candle::models::{LanguageModel, ModelConfig, Qwen};
use metal_candle::{Generator, GeneratorConfig, SamplingStrategy};
use std::cell::RefCell;
use std::rc::Rc;

/// What a [`Counting`] model was asked: ids, and the mask's shape and values.
type Calls = Rc<RefCell<Vec<(Vec<u32>, Vec<usize>, Vec<f32>)>>>;

/// After token t comes t + 1 of 8 with logit 4, t + 2 with 3, and all others with −1.
struct Counting {
    device: Device,
    calls: Calls,
    /// The shape that the logits are given as, where another than (1, s, 8).
    shape: Option<Vec<usize>>,
}

impl LanguageModel for Counting {
    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> metal_candle::Result<Tensor> {
        let ids = input_ids.squeeze(0)?.to_vec1::<u32>()?;
        let (dims, mask) = match attention_mask {
            Some(mask) => (mask.dims().to_vec(), mask.flatten_all()?.to_vec1()?),
            None => (Vec::new(), Vec::new()),
        };
        let mut values = vec![-1f32; ids.len() * 8];
        for (at, id) in ids.iter().enumerate() {
            values[at * 8 + (*id as usize + 1) % 8] = 4.0;
            values[at * 8 + (*id as usize + 2) % 8] = 3.0;
        }
        let shape = self.shape.clone().unwrap_or_else(|| vec![1, ids.len(), 8]);
        self.calls.borrow_mut().push((ids, dims, mask));
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn vocab_size(&self) -> usize {
        8
    }
}

fn counting(config: GeneratorConfig) -> (Generator, Calls) {
    let calls = Calls::default();
    let model = Counting { device: Device::Cpu, calls: Rc::clone(&calls), shape: None };
    (Generator::new(Box::new(model), config).unwrap(), calls)
}

fn generated(config: GeneratorConfig, prompt: &[u32]) -> Vec<u32> {
    counting(config).0.generate(prompt).unwrap()
}

fn at_most(max_tokens: usize) -> GeneratorConfig {
    GeneratorConfig { max_tokens, ..Default::default() }
}

#[test]
fn defaults_are_v1s() {
    let config = GeneratorConfig::default();
    assert_eq!((config.max_tokens, config.temperature, config.eos_token_id), (100, 1.0, None));
    assert!(matches!(config.sampling, SamplingStrategy::Greedy));
    assert_eq!((config.top_p, config.top_k, config.repetition_penalty), (None, None, 1.0));
    assert!(config.stop_on_eos && config.stop_tokens.is_empty());
    assert_eq!(counting(at_most(3)).0.config().max_tokens, 3);
}

#[test]
fn the_prompt_comes_first_and_max_tokens_more() {
    assert_eq!(generated(at_most(4), &[6, 0]), [6, 0, 1, 2, 3, 4]);
    assert_eq!(generated(at_most(0), &[6, 0]), [6, 0]);
    assert_eq!(generated(at_most(4), &[]), Vec::<u32>::new());
    assert_eq!(generated(GeneratorConfig::default(), &[0]).len(), 101);
    // a generator may be used again
    let (mut generator, _) = counting(at_most(1));
    assert_eq!((generator.generate(&[1]).unwrap(), generator.generate(&[5]).unwrap()), (vec![1, 2], vec![5, 6]));
}

#[test]
fn a_model_without_a_session_gets_the_sequence_and_a_causal_mask() {
    let (mut generator, calls) = counting(at_most(2));
    generator.generate(&[3, 1]).unwrap();
    let calls = calls.borrow();
    let no = f32::NEG_INFINITY;
    assert_eq!(calls.len(), 2);
    assert_eq!(calls[0], (vec![3, 1], vec![1, 1, 2, 2], vec![0.0, no, 0.0, 0.0]));
    let mask = vec![0.0, no, no, 0.0, 0.0, no, 0.0, 0.0, 0.0];
    assert_eq!(calls[1], (vec![3, 1, 2], vec![1, 1, 3, 3], mask));
}

#[test]
fn end_and_stop_tokens_end_the_text_and_are_part_of_it() {
    let eos = GeneratorConfig { eos_token_id: Some(3), ..at_most(20) };
    assert_eq!(generated(eos.clone(), &[0]), [0, 1, 2, 3]);
    // one in the prompt ends nothing
    assert_eq!(generated(GeneratorConfig { max_tokens: 2, ..eos.clone() }, &[3]), [3, 4, 5]);
    let on = GeneratorConfig { stop_on_eos: false, max_tokens: 4, ..eos.clone() };
    assert_eq!(generated(on.clone(), &[0]), [0, 1, 2, 3, 4]);
    // among the stop tokens it still does
    assert_eq!(generated(GeneratorConfig { stop_tokens: vec![7, 2], ..on }, &[0]), [0, 1, 2]);
    assert_eq!(generated(GeneratorConfig { stop_tokens: vec![2], ..eos }, &[0]), [0, 1, 2]);
}

#[test]
fn a_callback_sees_each_token_and_may_stop() {
    let config = GeneratorConfig { eos_token_id: Some(3), ..at_most(20) };
    let mut seen: Vec<StreamToken> = Vec::new();
    let all = counting(config.clone()).0.generate_stream(&[0], |token| {
        seen.push(token);
        true
    });
    assert_eq!(all.unwrap(), [0, 1, 2, 3]);
    let ids: Vec<(u32, bool)> = seen.iter().map(|token| (token.token_id, token.is_eos)).collect();
    assert_eq!(ids, [(1, false), (2, false), (3, true)]);
    // softmax of 4, 3 and six times −1
    let probability = 4f64.exp() / (4f64.exp() + 3f64.exp() + 6.0 * (-1f64).exp());
    for token in &seen {
        assert!((f64::from(token.probability) - probability).abs() < 1e-6, "{token:?}");
        assert_eq!((token.logit, token.text.as_deref()), (4.0, None));
    }
    let mut left = 2;
    let some = counting(config.clone()).0.generate_stream(&[0], |_| {
        left -= 1;
        left > 0
    });
    assert_eq!(some.unwrap(), [0, 1, 2], "the token that was answered with false stays");
    let none = counting(config).0.generate_stream(&[], |token| panic!("{token:?}"));
    assert_eq!(none.unwrap(), Vec::<u32>::new());
    // a token is an end token whether it ends the text or not
    let config = GeneratorConfig { stop_on_eos: false, eos_token_id: Some(1), ..at_most(1) };
    let mut ends = Vec::new();
    counting(config)
        .0
        .generate_stream(&[0], |token| {
            ends.push(token.is_eos);
            true
        })
        .unwrap();
    assert_eq!(ends, [true]);
}

#[test]
fn the_penalty_holds_for_the_prompt_too() {
    // after 0: token 1 has 4/2, token 2 has 3
    let config = GeneratorConfig { repetition_penalty: 2.0, ..at_most(1) };
    assert_eq!(generated(config.clone(), &[1, 0]), [1, 0, 2]);
    assert_eq!(generated(config.clone(), &[0]), [0, 1]);
    let mut tokens = Vec::new();
    counting(config)
        .0
        .generate_stream(&[1, 2, 0], |token| {
            tokens.push(token);
            true
        })
        .unwrap();
    // 4/2 against 3/2; the penalised logit is told, and its probability beside 3/2, −2 for token 0 and five times −1
    let probability = 2f64.exp() / (2f64.exp() + 1.5f64.exp() + (-2f64).exp() + 5.0 * (-1f64).exp());
    assert_eq!((tokens[0].token_id, tokens[0].logit), (1, 2.0));
    assert!((f64::from(tokens[0].probability) - probability).abs() < 1e-6);
}

/// The share of token 1 after 0 in 2000 texts.
fn share_of_the_first(config: GeneratorConfig) -> f64 {
    let (mut generator, _) = counting(GeneratorConfig { max_tokens: 1, ..config });
    let first = (0..2000).filter(|_| generator.generate(&[0]).unwrap() == [0, 1]).count();
    first as f64 / 2000.0
}

#[track_caller]
fn assert_share(config: GeneratorConfig, want: f64) {
    let got = share_of_the_first(config);
    assert!((got - want).abs() <= 6.0 * (want * (1.0 - want) / 2000.0).sqrt(), "{got} against {want}");
}

#[test]
fn temperature_top_k_and_top_p_act_together_with_the_strategy() {
    let drawn =
        GeneratorConfig { sampling: SamplingStrategy::Temperature { temperature: 1.0 }, ..GeneratorConfig::default() };
    let (a, b, c) = (4f64, 3f64, -1f64);
    let softmax = |t: f64| (a / t).exp() / ((a / t).exp() + (b / t).exp() + 6.0 * (c / t).exp());
    let best_two = |t: f64| (a / t).exp() / ((a / t).exp() + (b / t).exp());
    assert_share(drawn.clone(), softmax(1.0));
    assert_share(GeneratorConfig { temperature: 2.0, ..drawn.clone() }, softmax(2.0));
    assert_share(GeneratorConfig { top_k: Some(2), ..drawn.clone() }, best_two(1.0));
    assert_share(GeneratorConfig { top_k: Some(2), temperature: 3.0, ..drawn.clone() }, best_two(3.0));
    assert_share(GeneratorConfig { top_p: Some(0.9), ..drawn.clone() }, best_two(1.0));
    assert_share(GeneratorConfig { top_p: Some(0.5), ..drawn }, 1.0);
    // the likeliest token is the same whatever they say
    let greedy = GeneratorConfig::default();
    assert_share(greedy.clone(), 1.0);
    assert_share(GeneratorConfig { temperature: 5.0, top_k: Some(7), top_p: Some(0.99), ..greedy.clone() }, 1.0);
    let of = |sampling: SamplingStrategy| GeneratorConfig { sampling, ..GeneratorConfig::default() };
    assert_share(of(SamplingStrategy::Temperature { temperature: 2.0 }), softmax(2.0));
    assert_share(
        GeneratorConfig { temperature: 3.0, ..of(SamplingStrategy::Temperature { temperature: 2.0 }) },
        softmax(6.0),
    );
    assert_share(GeneratorConfig { top_k: Some(2), ..of(SamplingStrategy::TopK { k: 5 }) }, best_two(1.0));
    assert_share(GeneratorConfig { top_k: Some(5), ..of(SamplingStrategy::TopK { k: 2 }) }, best_two(1.0));
    assert_share(GeneratorConfig { top_p: Some(0.99), ..of(SamplingStrategy::TopP { p: 0.5 }) }, 1.0);
    assert_share(GeneratorConfig { top_p: Some(0.5), ..of(SamplingStrategy::TopP { p: 0.99 }) }, 1.0);
    // 0 is greedy, whatever the strategy
    assert_share(GeneratorConfig { temperature: 0.0, ..greedy }, 1.0);
    assert_share(GeneratorConfig { temperature: 0.0, ..of(SamplingStrategy::TopK { k: 5 }) }, 1.0);
    assert_share(of(SamplingStrategy::Temperature { temperature: 0.0 }), 1.0);
}

#[test]
fn a_config_that_means_nothing_makes_no_generator() {
    let ok = GeneratorConfig::default;
    let all = [
        (GeneratorConfig { temperature: -1.0, ..ok() }, "temperature of -1"),
        (GeneratorConfig { temperature: f64::NAN, ..ok() }, "temperature of NaN"),
        (GeneratorConfig { top_k: Some(0), ..ok() }, "top-k of 0"),
        (GeneratorConfig { top_p: Some(1.5), ..ok() }, "top-p of 1.5"),
        (GeneratorConfig { repetition_penalty: 0.0, ..ok() }, "repetition penalty of 0"),
        (GeneratorConfig { repetition_penalty: f32::NAN, ..ok() }, "repetition penalty of NaN"),
        (GeneratorConfig { sampling: SamplingStrategy::TopK { k: 0 }, ..ok() }, "top-k of 0"),
    ];
    for (config, words) in all {
        let model = Counting { device: Device::Cpu, calls: Calls::default(), shape: None };
        let error = Generator::new(Box::new(model), config).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Inference(InferenceError::InvalidConfig { .. })), "{error:?}");
        assert!(error.to_string().contains("invalid inference configuration"), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn logits_of_another_shape_are_an_error() {
    let model = Counting { device: Device::Cpu, calls: Calls::default(), shape: Some(vec![2, 8]) };
    let error = Generator::new(Box::new(model), at_most(3)).unwrap().generate(&[1, 2]).unwrap_err();
    assert!(matches!(error, Error::Inference(InferenceError::Failed { .. })), "{error:?}");
    assert!(error.to_string().contains("(batch, positions, vocab), got [2, 8]"), "{error}");
}

/// The index of the largest of the last row, in f64.
fn greedy_next(ids: &[u32], config: &ModelConfig) -> u32 {
    let all = logits(ids, &weights(config), config, Some(&causal(ids.len())));
    let best = all.last().unwrap().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as u32
}

#[test]
fn the_decoder_generates_what_its_formula_says() {
    let config = config();
    let mut want: Vec<u32> = vec![5, 11, 2];
    for _ in 0..12 {
        want.push(greedy_next(&want, &config));
    }
    let model = Qwen::new(&config, builder(&weights(&config))).unwrap();
    let mut generator = Generator::new(Box::new(model), at_most(12)).unwrap();
    assert_eq!(generator.generate(&[5, 11, 2]).unwrap(), want);
    // a second text does not see the first
    assert_eq!(generator.generate(&[5, 11, 2]).unwrap(), want);
    let mut streamed = Vec::new();
    generator
        .generate_stream(&[5, 11, 2], |token| {
            streamed.push(token.token_id);
            true
        })
        .unwrap();
    assert_eq!(streamed, want[3..]);
}

#[test]
fn a_text_ends_with_an_error_where_the_models_positions_end() {
    let model = || Box::new(Qwen::new(&config(), builder(&weights(&config()))).unwrap());
    // 38 given, 40 positions: the third new token comes from the last position
    let mut generator = Generator::new(model(), at_most(3)).unwrap();
    assert_eq!(generator.generate(&[1; 38]).unwrap().len(), 41);
    let mut generator = Generator::new(model(), at_most(4)).unwrap();
    let error = generator.generate(&[1; 38]).unwrap_err();
    assert!(matches!(error, Error::Inference(InferenceError::CacheFull { position: 40, max_len: 40 })), "{error:?}");
    let error = generator.generate(&[19]).unwrap_err();
    assert!(error.to_string().contains("token id 19 is outside of the vocabulary of 19"), "{error}");
}

/// The decoder without its session.
struct Whole(Qwen);

impl LanguageModel for Whole {
    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> metal_candle::Result<Tensor> {
        self.0.forward(input_ids, attention_mask)
    }

    fn device(&self) -> &Device {
        self.0.device()
    }

    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }
}

#[test]
fn with_and_without_a_session_the_text_is_one() {
    for dtype in [DType::F32, DType::F64] {
        let vb = || candle_lazy_nn::VarBuilder::from_tensors(weights(&config()), dtype, &Device::Cpu);
        let model = || Qwen::new(&config(), vb()).unwrap();
        let mut with = Generator::new(Box::new(model()), at_most(20)).unwrap();
        let mut without = Generator::new(Box::new(Whole(model())), at_most(20)).unwrap();
        assert_eq!(with.generate(&[4, 4, 17]).unwrap(), without.generate(&[4, 4, 17]).unwrap());
    }
}
