//! The decoder: prefill and greedy decode.

use super::measure::{measure, relative_difference, Way};
use super::twin::{self, Twin};
use super::{ModelRow, DECODE_STEPS, TOLERANCE};
use crate::{Error, Result};
use candle_core::{DType, Device};
use candle_lazy_exec::{materialize, EvalReport, LazyTensor};
use candle_lazy_nn::models::{Cache, CausalLm};
use candle_lazy_nn::ModelDir;

/// The chat prompt whose answer is known.
const PROMPT: &str = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";

/// Texts and the ids that llama.cpp and Hugging Face's tokenizer agree on.
const IDS: [(&str, &[u32]); 4] = [
    ("The capital of France is", &[504, 3575, 282, 4649, 314]),
    ("Born in 1984.", &[25212, 281, 216, 33, 41, 40, 36, 30]),
    (PROMPT, &[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]),
    (
        "x  = 3.14159;\n\treturn naïve 日本",
        &[104, 216, 446, 216, 35, 30, 33, 36, 33, 37, 41, 43, 198, 197, 5406, 15486, 46494, 17097, 241, 115, 40993],
    ),
];

/// A longer text for the prefill: its length is what matters.
const TEXT: &str =
    "A lazy tensor records what is asked of it and computes nothing until a value is needed. The recorded \
graph is captured, rewritten, lowered to a plan and run; the same graph at another length uses the same plan. ";

fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &x) in logits.iter().enumerate() {
        if x > best.1 {
            best = (id, x);
        }
    }
    u32::try_from(best.0).map_err(|e| Error::NoTwin(e.to_string()))
}

/// One way of continuing a text.
trait Decode {
    /// Forgets the text, to read another of up to `capacity` positions.
    fn begin(&mut self, capacity: usize) -> Result<()>;

    /// The logits after the new ids.
    fn logits(&mut self, ids: &[u32]) -> Result<(Vec<f32>, Option<EvalReport>)>;

    /// Drops what the text left behind.
    fn end(&mut self);
}

impl Decode for Twin {
    fn begin(&mut self, _: usize) -> Result<()> {
        Twin::begin(self)
    }

    fn logits(&mut self, ids: &[u32]) -> Result<(Vec<f32>, Option<EvalReport>)> {
        Ok((Twin::logits(self, ids)?, None))
    }

    fn end(&mut self) {
        Twin::end(self);
    }
}

/// The logits (vocabulary) after new ids, recorded.
pub(super) fn record(model: &CausalLm, cache: &mut Cache, ids: &[u32]) -> Result<LazyTensor> {
    let input = LazyTensor::from_slice(ids, (1, ids.len()), &Device::Cpu)?;
    Ok(model.forward(&input, cache)?.flatten_all()?)
}

/// Evaluates logits together with the cache that the next step reads.
pub(super) fn run(cache: &Cache, logits: &LazyTensor) -> Result<EvalReport> {
    let mut roots = cache.handles();
    roots.push(logits);
    Ok(materialize(&roots)?)
}

struct Lazy<'m> {
    model: &'m CausalLm,
    cache: Option<Cache>,
}

impl Decode for Lazy<'_> {
    fn begin(&mut self, capacity: usize) -> Result<()> {
        self.cache = None;
        self.cache = Some(self.model.new_cache(capacity)?);
        Ok(())
    }

    fn logits(&mut self, ids: &[u32]) -> Result<(Vec<f32>, Option<EvalReport>)> {
        let Some(cache) = &mut self.cache else {
            return Err(Error::NoTwin("a text that was not begun".into()));
        };
        let logits = record(self.model, cache, ids)?;
        let report = run(cache, &logits)?;
        Ok((logits.to_vec1()?, Some(report)))
    }

    fn end(&mut self) {
        self.cache = None;
    }
}

/// The prompt and `steps` greedy tokens: the ids, and the logits before each.
fn greedy(decode: &mut impl Decode, prompt: &[u32], steps: usize) -> Result<(Vec<u32>, Vec<Vec<f32>>)> {
    decode.begin(prompt.len() + steps)?;
    let mut ids = Vec::new();
    let mut all = vec![decode.logits(prompt)?.0];
    while let (true, Some(last)) = (ids.len() < steps, all.last()) {
        let id = argmax(last)?;
        ids.push(id);
        all.push(decode.logits(&[id])?.0);
    }
    decode.end();
    Ok((ids, all))
}

/// A prompt and what is generated after it: the prompt is the first step, each new token another.
struct Text<'a, D> {
    decode: &'a mut D,
    prompt: &'a [u32],
    capacity: usize,
    last: u32,
}

impl<'a, D: Decode> Text<'a, D> {
    fn new(decode: &'a mut D, prompt: &'a [u32], steps: usize) -> Self {
        Self { decode, prompt, capacity: prompt.len() + steps, last: 0 }
    }
}

impl<D: Decode> Way for Text<'_, D> {
    fn begin(&mut self) -> Result<()> {
        self.decode.begin(self.capacity)
    }

    fn step(&mut self, index: usize) -> Result<Option<EvalReport>> {
        let last = [self.last];
        let (logits, report) = self.decode.logits(if index == 0 { self.prompt } else { &last })?;
        self.last = argmax(&logits)?;
        Ok(report)
    }

    fn end(&mut self) {
        self.decode.end();
    }
}

/// A row per number of new tokens: none is a prefill.
fn row(
    name: String,
    twin: &mut std::result::Result<Twin, String>,
    lazy: &CausalLm,
    prompt: &[u32],
    steps: usize,
    repetitions: usize,
) -> Result<ModelRow> {
    let mut lazy = Lazy { model: lazy, cache: None };
    let compared = match twin {
        Ok(twin) => {
            let (want_ids, want) = greedy(twin, prompt, steps)?;
            let (got_ids, got) = greedy(&mut lazy, prompt, steps)?;
            let difference = got.iter().zip(&want).map(|(g, w)| relative_difference(g, w)).fold(0.0, f64::max);
            Ok((difference, difference <= TOLERANCE && got_ids == want_ids))
        }
        Err(why) => Err(why.clone()),
    };
    let mut eager = twin.as_mut().ok().map(|twin| Text::new(twin, prompt, steps));
    let mut lazy = Text::new(&mut lazy, prompt, steps);
    let eager = eager.as_mut().map(|eager| eager as &mut dyn Way);
    Ok(measure(repetitions, steps + 1, eager, &mut lazy)?.row(name, compared))
}

/// At most the first `most` ids.
fn first(ids: &[u32], most: usize) -> &[u32] {
    ids.get(..most).unwrap_or(ids)
}

/// A prefill of a longer text, and a greedy decode after the chat prompt; both shorter where the model sees fewer positions.
pub(super) fn compare(dir: &ModelDir, repetitions: usize) -> Result<Vec<ModelRow>> {
    let lazy = dir.causal_lm(DType::F32, &Device::Cpu)?;
    let config = lazy.config();
    let mut twin = match twin::kind(config) {
        Ok(kind) => Ok(Twin::load(kind, dir, config, DType::F32)?),
        Err(why) => Err(why),
    };
    let tokenizer = dir.tokenizer()?;
    // beyond its window a model forgets, and candle-transformers forgets otherwise than Hugging Face does
    let most = config.sliding_window.map_or(config.max_position_embeddings, |w| w.min(config.max_position_embeddings));
    let text = tokenizer.encode(&TEXT.repeat(3), false)?;
    let text = first(&text, most);
    let steps = DECODE_STEPS.min(most / 2);
    let chat = tokenizer.encode(PROMPT, true)?;
    let chat = first(&chat, most - steps);
    Ok(vec![
        row(format!("decoder, prefill {}", text.len()), &mut twin, &lazy, text, 0, repetitions)?,
        row(format!("decoder, {steps} tokens"), &mut twin, &lazy, chat, steps, repetitions)?,
    ])
}

/// The tokenizer's ids and the answer.
pub(super) fn facts(dir: &ModelDir) -> Result<Vec<(String, Option<String>)>> {
    let tokenizer = dir.tokenizer()?;
    let mut facts = Vec::new();
    for (text, want) in IDS {
        let got = tokenizer.encode(text, true)?;
        facts.push((format!("the ids of {text:?}"), (got != want).then(|| format!("{got:?} instead of {want:?}"))));
    }
    let model = dir.causal_lm(DType::F32, &Device::Cpu)?;
    let want = tokenizer.encode("The capital of France is Paris.", false)?;
    let prompt = tokenizer.encode(PROMPT, true)?;
    let (got, _) = greedy(&mut Lazy { model: &model, cache: None }, &prompt, want.len())?;
    let text = tokenizer.decode(&got)?;
    facts.push((
        "SmolLM2 answers \"The capital of France is Paris.\"".into(),
        (got != want).then(|| format!("{text:?}")),
    ));
    Ok(facts)
}
