//! The decoder: prefill and greedy decode.

use super::measure::{measure, relative_difference, Work};
use super::{ModelRow, DECODE_STEPS, TOLERANCE};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::{materialize, EvalReport, LazyTensor};
use candle_lazy_nn::models::{Cache, CausalLm, CausalLmConfig};
use candle_lazy_nn::{ModelDir, RopeScaling};
use candle_transformers::models::llama;

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

/// The config of candle-transformers for a config of ours.
fn eager_config(config: &CausalLmConfig) -> Result<llama::Config> {
    let odd = config.qkv_bias
        || config.out_bias
        || config.mlp_bias
        || config.sliding_window.is_some()
        || config.rope_scaling != RopeScaling::None
        || config.head_dim * config.num_attention_heads != config.hidden_size;
    if odd {
        return Err(Error::NoTwin("candle-transformers' llama has no biases, windows or scaled positions".into()));
    }
    Ok(llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta,
        bos_token_id: config.bos_token_id,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
    })
}

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
    /// The logits after the new ids.
    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>>;
}

struct Eager<'m> {
    model: &'m llama::Llama,
    cache: llama::Cache,
    position: usize,
}

impl<'m> Eager<'m> {
    fn new(model: &'m llama::Llama, config: &llama::Config) -> Result<Self> {
        Ok(Self { model, cache: llama::Cache::new(true, DType::F32, config, &Device::Cpu)?, position: 0 })
    }
}

impl Decode for Eager<'_> {
    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let input = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.model.forward(&input, self.position, &mut self.cache)?;
        self.position += ids.len();
        Ok(logits.flatten_all()?.to_vec1()?)
    }
}

struct Lazy<'m> {
    model: &'m CausalLm,
    cache: Cache,
    reports: Vec<EvalReport>,
}

impl<'m> Lazy<'m> {
    fn new(model: &'m CausalLm, capacity: usize) -> Result<Self> {
        Ok(Self { model, cache: model.new_cache(capacity)?, reports: Vec::new() })
    }
}

impl Decode for Lazy<'_> {
    fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let input = LazyTensor::from_slice(ids, (1, ids.len()), &Device::Cpu)?;
        let logits = self.model.forward(&input, &mut self.cache)?.flatten_all()?;
        let mut roots = self.cache.handles();
        roots.push(&logits);
        self.reports.push(materialize(&roots)?);
        Ok(logits.to_vec1()?)
    }
}

/// The prompt and `steps` greedy tokens: the ids, and the logits before each.
fn greedy(decode: &mut impl Decode, prompt: &[u32], steps: usize) -> Result<(Vec<u32>, Vec<Vec<f32>>)> {
    let mut ids = Vec::new();
    let mut all = vec![decode.logits(prompt)?];
    while let (true, Some(last)) = (ids.len() < steps, all.last()) {
        let id = argmax(last)?;
        ids.push(id);
        all.push(decode.logits(&[id])?);
    }
    Ok((ids, all))
}

/// A row per number of new tokens: none is a prefill.
fn row(
    name: &str,
    (model, config): (&llama::Llama, &llama::Config),
    lazy: &CausalLm,
    prompt: &[u32],
    steps: usize,
    repetitions: usize,
) -> Result<ModelRow> {
    let capacity = prompt.len() + steps;
    let (want_ids, want) = greedy(&mut Eager::new(model, config)?, prompt, steps)?;
    let (got_ids, got) = greedy(&mut Lazy::new(lazy, capacity)?, prompt, steps)?;
    let difference = got.iter().zip(&want).map(|(g, w)| relative_difference(g, w)).fold(0.0, f64::max);
    let agrees = difference <= TOLERANCE && got_ids == want_ids;
    drop((want, got));
    let measured = measure(
        repetitions,
        || {
            let mut eager = Eager::new(model, config)?;
            let mut id = argmax(&eager.logits(prompt)?)?;
            for _ in 0..steps {
                id = argmax(&eager.logits(&[id])?)?;
            }
            Ok(())
        },
        || {
            let mut lazy = Lazy::new(lazy, capacity)?;
            let mut id = argmax(&lazy.logits(prompt)?)?;
            for _ in 0..steps {
                id = argmax(&lazy.logits(&[id])?)?;
            }
            Ok(Work { reports: lazy.reports })
        },
    )?;
    Ok(measured.row(name.to_string(), difference, agrees))
}

/// A prefill of a longer text, and a greedy decode after the chat prompt.
pub(super) fn compare(dir: &ModelDir, repetitions: usize) -> Result<Vec<ModelRow>> {
    let lazy = dir.causal_lm(DType::F32, &Device::Cpu)?;
    let config = eager_config(lazy.config())?;
    let model = llama::Llama::load(dir.var_builder(DType::F32, &Device::Cpu)?, &config)?;
    let tokenizer = dir.tokenizer()?;
    let text = tokenizer.encode(&TEXT.repeat(3), false)?;
    let chat = tokenizer.encode(PROMPT, true)?;
    let eager = (&model, &config);
    Ok(vec![
        row(&format!("decoder, prefill {}", text.len()), eager, &lazy, &text, 0, repetitions)?,
        row(&format!("decoder, {DECODE_STEPS} tokens"), eager, &lazy, &chat, DECODE_STEPS, repetitions)?,
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
    let (got, _) = greedy(&mut Lazy::new(&model, prompt.len() + want.len())?, &prompt, want.len())?;
    let text = tokenizer.decode(&got)?;
    facts.push((
        "SmolLM2 answers \"The capital of France is Paris.\"".into(),
        (got != want).then(|| format!("{text:?}")),
    ));
    Ok(facts)
}
