//! What the models say, computed lazily.

use super::adapter;
use super::sources::Models;
use super::{DemoArgs, Error};
use crate::output::{self, say};
use candle_lazy::nn::models::{CausalLm, GenerateOptions, StopReason};
use candle_lazy::nn::tokenizer::{ChatMessage, Tokenizer};
use candle_lazy::prelude::*;

/// The question whose answer is known.
pub(super) const QUESTION: &str = "What is the capital of France?";
const ANSWER: &str = "The capital of France is Paris.";

/// Three sentences, and what the published encoder makes of the first with each of the others.
const SENTENCES: [&str; 3] = ["A man is eating food.", "A man is eating a meal.", "The stock market fell sharply."];
const SIMILARITIES: [f64; 2] = [0.9262, -0.0044];

/// Half a unit of the last printed digit, and what f32 may add to it.
const TOLERANCE: f64 = 6e-5;

/// Embeds three sentences and prints their similarities; returns what is wrong with them.
pub(super) fn sentences(models: &Models) -> Result<Vec<String>, Error> {
    let source = &models.encoder;
    say!("sentence encoder: {}", source.dir.path().display())?;
    let tokenizer = source.dir.tokenizer()?;
    let encoder = source.dir.sentence_encoder(DType::F32, &Device::Cpu)?;
    let mut ids = Vec::new();
    for sentence in SENTENCES {
        ids.push(tokenizer.encode_for_model(sentence)?);
    }
    let vectors = encoder.embed(&ids)?.to_vec2::<f32>()?;
    let mut faults = Vec::new();
    let [first, others @ ..] = vectors.as_slice() else {
        return Ok(vec!["no vector came back".to_string()]);
    };
    for ((vector, sentence), expected) in others.iter().zip(&SENTENCES[1..]).zip(SIMILARITIES) {
        let similarity = cosine(first, vector);
        say!("  {similarity:>7.4}  {:?} and {sentence:?}", SENTENCES[0])?;
        let off = (similarity - expected).abs();
        if !similarity.is_finite() {
            faults.push(format!("the similarity to {sentence:?} is no number: are the encoder's weights?"));
        } else if source.published && off > TOLERANCE {
            faults.push(format!("the similarity to {sentence:?} is {similarity:.4}, expected {expected:.4}"));
        }
    }
    Ok(faults)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The question as the model is given it: in its chat template, or as plain text where none is known.
fn prompt(tokenizer: &Tokenizer, question: &str) -> Result<Vec<u32>, Error> {
    Ok(match tokenizer.chat_template() {
        Some(_) => tokenizer.encode_chat(&[ChatMessage::user(question)])?,
        None => tokenizer.encode_for_model(question)?,
    })
}

/// Streams the answer to the question, without and with an adapter; returns what is wrong with the first.
pub(super) fn question(models: &Models, args: &DemoArgs) -> Result<Vec<String>, Error> {
    let source = &models.decoder;
    say!("\nlanguage model: {}", source.dir.path().display())?;
    let tokenizer = source.dir.tokenizer()?;
    let mut model = source.dir.causal_lm(DType::F32, &Device::Cpu)?;
    if tokenizer.chat_template().is_none() {
        say!("  the tokenizer has no chat marks that are known: the model continues the question as plain text")?;
    }
    let prompt = prompt(&tokenizer, &args.question)?;
    say!("> {}", args.question)?;
    let answer = stream(&model, &tokenizer, &prompt, args)?;
    let mut faults = Vec::new();
    if source.published && args.question == QUESTION {
        faults.extend(wrong_answer(&answer));
    }
    let without = logits(&model, &prompt)?;
    let adapters = adapter::attach(&mut model)?;
    say!("> {} (with {adapters})", args.question)?;
    stream(&model, &tokenizer, &prompt, args)?;
    // what is said may be the same; the numbers behind it may not
    let moved = largest_difference(&without, &logits(&model, &prompt)?);
    say!("  the adapter moves a logit of the first token by up to {moved:.2}")?;
    if moved == 0. || !moved.is_finite() {
        faults.push(format!("the adapter moves the logits by {moved}"));
    }
    Ok(faults)
}

/// What a model said, and whether the limit of tokens ended it.
struct Answer {
    text: String,
    cut: bool,
}

/// What is wrong with the answer to the known question; one that was cut off must be how the known one begins.
fn wrong_answer(answer: &Answer) -> Option<String> {
    let text = &answer.text;
    match answer.cut {
        false => (text != ANSWER).then(|| format!("the answer is {text:?}, expected {ANSWER:?}")),
        true => (!ANSWER.starts_with(text.as_str()))
            .then(|| format!("the answer begins with {text:?}, {ANSWER:?} is expected")),
    }
}

/// The logits of the first token of an answer.
fn logits(model: &CausalLm, prompt: &[u32]) -> Result<Vec<f32>, Error> {
    let mut cache = model.new_cache(prompt.len())?;
    let ids = LazyTensor::from_slice(prompt, (1, prompt.len()), model.device())?;
    Ok(model.forward(&ids, &mut cache)?.flatten_all()?.to_vec1()?)
}

/// The largest |a − b|; NaN where one is.
fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., |most, d| if d > most || d.is_nan() { d } else { most })
}

/// Prints the answer token by token and returns it whole.
fn stream(model: &CausalLm, tokenizer: &Tokenizer, prompt: &[u32], args: &DemoArgs) -> Result<Answer, Error> {
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        eos_token_ids: model.config().eos_token_ids.clone(),
        ..GenerateOptions::default()
    };
    let mut pieces = tokenizer.stream();
    let mut text = String::new();
    let mut show = |piece: String| -> Result<(), Error> {
        output::text(format_args!("{piece}"))?;
        text.push_str(&piece);
        Ok(())
    };
    let mut generation = model.generate(prompt, options)?;
    let mut count = 0;
    for id in generation.by_ref() {
        show(pieces.push(id?)?)?;
        count += 1;
    }
    show(pieces.finish()?)?;
    let cut = generation.stop_reason() != Some(StopReason::EndOfText);
    say!("")?;
    if cut {
        say!("  (cut off after {count} tokens)")?;
    }
    Ok(Answer { text, cut })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_difference_is_not_lost_behind_a_nan() {
        assert_eq!(largest_difference(&[1., 5.], &[2., 2.]), 3.);
        assert_eq!(largest_difference(&[1.], &[1.]), 0.);
        assert!(largest_difference(&[f32::NAN], &[1.]).is_nan());
    }

    #[test]
    fn an_answer_that_the_limit_cut_off_is_judged_as_far_as_it_goes() {
        let wrong = |text: &str, cut| wrong_answer(&Answer { text: text.to_string(), cut }).is_some();
        assert!(!wrong(ANSWER, false) && !wrong(ANSWER, true) && !wrong("The capital", true) && !wrong("", true));
        assert!(wrong("The capital", false) && wrong("The town", true) && wrong("", false));
    }

    #[test]
    fn cosines() {
        assert!((cosine(&[1., 0.], &[2., 0.]) - 1.).abs() < 1e-12);
        assert!(cosine(&[1., 0.], &[0., 3.]).abs() < 1e-12);
        assert!((cosine(&[1., 1.], &[-1., -1.]) + 1.).abs() < 1e-12);
    }
}
