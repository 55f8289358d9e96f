//! The services: many callers' requests beside eager Candle's way, which is one after the other.
//!
//! What a row computes is checked after it was timed: vectors and tokens of the service are, bit for bit, those that the model gives for
//! each request alone (the models themselves are compared with f64 in their own rows).

use super::super::measure::{self, Effort, Paired};
use super::super::Error;
use super::model::ids;
use super::{Floor, Row, RING};
use crate::demo::sources;
use candle_core::{Device, Tensor};
use candle_lazy::nn::models::{CausalLm, GenerateOptions};
use candle_lazy::nn::service::{
    EmbeddingOptions, EmbeddingService, Embeddings, GenerationOptions, GenerationRequest, GenerationService,
    SubmitOptions,
};
use candle_lazy::nn::{LoraAdapter, LoraConfig, LoraTargets};
use candle_lazy_parity::models::{DecoderPair, EncoderPair};
use std::cell::OnceCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Requests that are there at once.
const SENTENCES: usize = 64;
/// Generations at once.
const TEXTS: usize = 8;
/// Tokens of a prompt.
const PROMPT: usize = 32;
/// New tokens of each.
const NEW: usize = 32;
/// Requests of which the slowest hundredth is looked for.
const ARRIVALS: usize = 2000;
/// The share of the service's throughput at which they arrive.
const LOAD: f64 = 0.8;
/// By batches that are timed afterwards it must not have been lighter than this.
const LIGHTEST: f64 = 0.75;

#[derive(Default)]
struct Models {
    encoder: OnceCell<EncoderPair>,
    decoder: OnceCell<DecoderPair>,
}

fn nn(error: candle_lazy::nn::Error) -> Error {
    Error::from(candle_core::Error::wrap(error))
}

impl Models {
    fn encoder(&self) -> Result<&EncoderPair, Error> {
        if let Some(pair) = self.encoder.get() {
            return Ok(pair);
        }
        let pair = EncoderPair::load(&sources::encoder(&[])?.dir)?;
        Ok(self.encoder.get_or_init(|| pair))
    }

    fn decoder(&self) -> Result<&DecoderPair, Error> {
        if let Some(pair) = self.decoder.get() {
            return Ok(pair);
        }
        let pair = DecoderPair::load(&sources::decoder(&[])?.dir, &ids(0, PROMPT))?;
        Ok(self.decoder.get_or_init(|| pair))
    }
}

/// A sentence of 8 to 24 tokens, as texts of one sentence have them.
fn sentence(number: usize) -> Vec<u32> {
    ids(number, 8 + number * 7 % 17)
}

fn sentences(seed: usize) -> Vec<Vec<u32>> {
    (0..SENTENCES).map(|i| sentence(seed * SENTENCES + i)).collect()
}

/// All of them submitted, each a request of its own, then all awaited.
fn embed(service: &EmbeddingService, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Error> {
    let how = SubmitOptions::default();
    let pending: Vec<_> =
        texts.iter().map(|text| service.submit(vec![text.clone()], &how)).collect::<Result<_, _>>().map_err(nn)?;
    pending.into_iter().map(|one| Ok(one.wait().map_err(nn)?.remove(0))).collect()
}

fn check_vectors(pair: &EncoderPair, texts: &[Vec<u32>], got: &[Vec<f32>]) -> Result<(), Error> {
    for (text, got) in texts.iter().zip(got) {
        let want = pair.lazy(std::slice::from_ref(text))?.flatten_all()?.to_vec1::<f32>()?;
        if want.iter().map(|x| x.to_bits()).ne(got.iter().map(|x| x.to_bits())) {
            return Err(Error::Wrong("a vector of the service is not the one that the text has alone".into()));
        }
    }
    Ok(())
}

fn embed_64(models: &Models, effort: Effort) -> Result<Paired, Error> {
    let pair = models.encoder()?;
    let service = EmbeddingService::new(pair.model().clone(), EmbeddingOptions::default()).map_err(nn)?;
    let ring: Vec<_> = (0..RING).map(sentences).collect();
    let paired = measure::paired(
        effort,
        &|i| {
            for text in &ring[i % RING] {
                std::hint::black_box(pair.eager(std::slice::from_ref(text))?);
            }
            Ok(())
        },
        &|i| {
            std::hint::black_box(embed(&service, &ring[i % RING])?);
            Ok(())
        },
    )?;
    for texts in &ring {
        check_vectors(pair, texts, &embed(&service, texts)?)?;
    }
    Ok(paired.per(SENTENCES))
}

/// Time of a full batch over the time that 99 of 100 requests have been answered in, at most, while they arrive at random (a Poisson
/// process) at 80 % of what full batches serve.
///
/// A machine that becomes quicker meanwhile makes the load lighter than that, and the batch, which was timed before, slow: batches are timed
/// again afterwards, the quicker time counts, and a load that was too light by it is void.
fn embed_p99(models: &Models, effort: Effort) -> Result<Paired, Error> {
    const TRIES: usize = 4;
    let pair = models.encoder()?;
    let service = EmbeddingService::new(pair.model().clone(), EmbeddingOptions::default()).map_err(nn)?;
    let ring: Vec<_> = (0..RING).map(sentences).collect();
    let batch = || {
        measure::alone(effort, &|i| {
            std::hint::black_box(embed(&service, &ring[i % RING])?);
            Ok(())
        })
    };
    let mut before = batch()?;
    for _ in 0..TRIES {
        let mut times = arrivals(&service, before / SENTENCES as f64 / LOAD)?;
        let after = batch()?;
        if after >= before * (LIGHTEST / LOAD) {
            times.sort_unstable_by(f64::total_cmp);
            let p99 = times[times.len() * 99 / 100];
            return Ok(measure::single(p99, before.min(after) / p99));
        }
        before = after;
    }
    Err(Error::Wrong(format!("the load was below {LIGHTEST} of what the service can do, {TRIES} times")))
}

/// How long each of [`ARRIVALS`] requests takes, in microseconds, where one comes every `mean` of them.
fn arrivals(service: &EmbeddingService, mean: f64) -> Result<Vec<f64>, Error> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| -> Result<Vec<f64>, Error> {
        // in the order of arrival: an answer that overtakes another counts as late as that
        let waiter = scope.spawn(move || {
            let wait =
                |(begin, pending): (Instant, Embeddings)| pending.wait().map(|_| begin.elapsed().as_secs_f64() * 1e6);
            receiver.into_iter().map(wait).collect::<Vec<_>>()
        });
        let begin = Instant::now();
        let (mut due, mut state) = (Duration::ZERO, 1u64);
        for number in 0..ARRIVALS {
            // an exponential gap of this mean, by a linear congruential generator (Knuth's MMIX)
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let uniform = ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            due += Duration::from_secs_f64(-mean * uniform.ln() / 1e6);
            while let Some(left) = due.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
                std::thread::sleep(left);
            }
            // from when it was due: a submitter that is late does not make the service look quick
            let pending = service.submit(vec![sentence(number)], &SubmitOptions::default()).map_err(nn)?;
            sender.send((begin + due, pending)).map_err(|_| Error::Wrong("nobody waits for the answers".into()))?;
        }
        drop(sender);
        let times = waiter.join().map_err(|_| Error::Wrong("who waits for the answers panicked".into()))?;
        times.into_iter().collect::<Result<_, _>>().map_err(nn)
    })
}

fn request(number: usize) -> GenerationRequest {
    GenerationRequest::new(ids(number, PROMPT)).max_new_tokens(NEW)
}

/// All of them at once.
fn generate(service: &GenerationService, requests: &[GenerationRequest]) -> Result<Vec<Vec<u32>>, Error> {
    let how = SubmitOptions::default();
    let pending: Vec<_> =
        requests.iter().map(|request| service.submit(request.clone(), &how)).collect::<Result<_, _>>().map_err(nn)?;
    pending.into_iter().map(|one| Ok(one.wait().map_err(nn)?.tokens)).collect()
}

fn check_tokens(model: &CausalLm, request: &GenerationRequest, got: &[u32]) -> Result<(), Error> {
    let options = GenerateOptions { max_new_tokens: NEW, ..GenerateOptions::default() };
    let want: Vec<u32> = model.generate(&request.prompt, options).and_then(|run| run.collect()).map_err(nn)?;
    if want != got {
        return Err(Error::Wrong("a text of the service is not the one that it is alone".into()));
    }
    Ok(())
}

fn service(model: &CausalLm) -> Result<GenerationService, Error> {
    GenerationService::new(model.clone(), GenerationOptions::default()).map_err(nn)
}

fn generate_8(models: &Models, effort: Effort) -> Result<Paired, Error> {
    let pair = models.decoder()?;
    let service = service(pair.model())?;
    let ring: Vec<Vec<_>> = (0..2).map(|i| (0..TEXTS).map(|text| request(i * TEXTS + text)).collect()).collect();
    // seconds each: few pairs say enough
    let effort = Effort { pairs: effort.pairs.min(5), ..effort };
    let paired = measure::paired(
        effort,
        &|i| {
            // one of the eight stands for them, so that the row takes minutes and not an hour
            std::hint::black_box(pair.eager_generate(&ring[i / TEXTS % 2][i % TEXTS].prompt, NEW)?);
            Ok(())
        },
        &|i| {
            std::hint::black_box(generate(&service, &ring[i % 2])?);
            Ok(())
        },
    )?;
    for (request, got) in ring[0].iter().zip(generate(&service, &ring[0])?) {
        check_tokens(pair.model(), request, &got)?;
    }
    let (texts, tokens) = (TEXTS as f64, NEW as f64);
    Ok(Paired {
        eager_us: paired.eager_us / tokens,
        lazy_us: paired.lazy_us / texts / tokens,
        ratio: paired.ratio * texts,
        ratio_hi: paired.ratio_hi * texts,
        idle_us: paired.idle_us / tokens,
    })
}

/// Eight texts without an adapter over eight with one each: PEFT's default for Llama (q and v) at rank 8, or all maps.
fn generate_8_lora(models: &Models, effort: Effort, targets: &LoraTargets) -> Result<Paired, Error> {
    let model = models.decoder()?.model();
    let service = service(model)?;
    let config = LoraConfig { rank: 8, alpha: 16.0, targets: targets.clone(), ..LoraConfig::default() };
    let mut adapted = Vec::new();
    for number in 0..TEXTS {
        let mut carrier = model.clone();
        let adapter = LoraAdapter::attach(&mut carrier, &config, number as u64).map_err(nn)?;
        // a new adapter adds zeros
        for param in adapter.params().iter() {
            if param.name().contains("lora_B") {
                param.set(Tensor::randn(0f32, 0.02, param.shape(), &Device::Cpu)?).map_err(nn)?;
            }
        }
        service.add_adapter(number.to_string(), &adapter).map_err(nn)?;
        adapted.push(carrier);
    }
    let none: Vec<_> = (0..TEXTS).map(request).collect();
    let different: Vec<_> = (0..TEXTS).map(|number| request(number).adapter(number.to_string())).collect();
    let effort = Effort { pairs: effort.pairs.min(5), ..effort };
    let paired = measure::paired(
        effort,
        &|_| {
            std::hint::black_box(generate(&service, &none)?);
            Ok(())
        },
        &|_| {
            std::hint::black_box(generate(&service, &different)?);
            Ok(())
        },
    )?;
    for ((request, model), got) in different.iter().zip(&adapted).zip(generate(&service, &different)?) {
        check_tokens(model, request, &got)?;
    }
    Ok(paired.per(TEXTS * NEW))
}

/// One request at a time, over the same by a direct call.
fn overhead(models: &Models, effort: Effort) -> Result<Paired, Error> {
    let pair = models.encoder()?;
    let service = EmbeddingService::new(pair.model().clone(), EmbeddingOptions::default()).map_err(nn)?;
    let texts: Vec<_> = (0..RING).map(sentence).collect();
    measure::paired(
        effort,
        &|i| {
            std::hint::black_box(pair.lazy(std::slice::from_ref(&texts[i % RING]))?.to_vec2::<f32>()?);
            Ok(())
        },
        &|i| {
            std::hint::black_box(embed(&service, std::slice::from_ref(&texts[i % RING]))?);
            Ok(())
        },
    )
}

pub(super) fn rows() -> Vec<Row> {
    let models = Rc::new(Models::default());
    let row = |name: &str, floor: f64, measure: fn(&Models, Effort) -> Result<Paired, Error>| {
        let models = models.clone();
        Row::own(name, Floor::Ratio(floor), move |effort| measure(&models, effort))
    };
    let all = Row {
        floor: None,
        ..row("service/generate-8-lora-all", 0.0, |models, effort| {
            generate_8_lora(models, effort, &LoraTargets::AllLinear)
        })
    };
    vec![
        row("service/embed-64", 4.0, embed_64),
        row("service/embed-p99", 0.4, embed_p99),
        row("service/generate-8", 4.0, generate_8),
        row("service/generate-8-lora", 0.9, |models, effort| {
            let peft = LoraTargets::Names(vec!["q_proj".into(), "v_proj".into()]);
            generate_8_lora(models, effort, &peft)
        }),
        all,
        row("service/overhead", 0.95, overhead),
    ]
}
