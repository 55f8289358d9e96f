//! The published models on both sides, for programs that time them.

use super::decoder;
use super::encoder::{self, eager_embed, Batch};
use super::measure::{measure, Side, Way};
use super::twin::{self, Mark, Twin};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_lazy_exec::{materialize, prepare, EvalOptions, EvalReport, LazyTensor};
use candle_lazy_nn::models::{Cache, CausalLm, SentenceEncoder};
use candle_lazy_nn::ModelDir;
use candle_transformers::models::bert::BertModel;
use std::cell::RefCell;

/// A sentence encoder: eager, lazy, and lazy in f64 (candle-nn's fused norms have no f64).
pub struct EncoderPair {
    eager: BertModel,
    lazy: SentenceEncoder,
    exact: SentenceEncoder,
    pad: u32,
}

impl EncoderPair {
    /// Loads all three.
    ///
    /// # Errors
    /// When the model cannot be loaded, or candle-transformers has no twin.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        let eager = encoder::eager(dir)?.map_err(Error::NoTwin)?;
        let lazy = dir.sentence_encoder(DType::F32, &Device::Cpu)?;
        let exact = dir.sentence_encoder(DType::F64, &Device::Cpu)?;
        let pad = lazy.model().pad_token_id();
        Ok(Self { eager, lazy, exact, pad })
    }

    /// The embeddings (texts, hidden) by candle-transformers.
    ///
    /// # Errors
    /// When the forward pass fails.
    pub fn eager(&self, texts: &[Vec<u32>]) -> Result<Tensor> {
        eager_embed(&self.eager, &Batch::new(texts, self.pad)?)
    }

    /// The same by the lazy model, evaluated.
    ///
    /// # Errors
    /// When recording or evaluation fails.
    pub fn lazy(&self, texts: &[Vec<u32>]) -> Result<Tensor> {
        Ok(self.lazy.embed(texts)?.eval()?)
    }

    /// The lazy model.
    #[must_use]
    pub fn model(&self) -> &SentenceEncoder {
        &self.lazy
    }

    /// As [`EncoderPair::lazy`], in f64.
    ///
    /// # Errors
    /// As there.
    pub fn exact(&self, texts: &[Vec<u32>]) -> Result<Tensor> {
        Ok(self.exact.embed(texts)?.eval()?)
    }

    /// The most bytes that each side had at once beyond the weights, eager's first; 0 where nothing counts them.
    ///
    /// # Errors
    /// When a side fails.
    pub fn peaks(&self, texts: &[Vec<u32>]) -> Result<(u64, u64)> {
        peaks(&|| self.eager(texts), &|| self.lazy(texts))
    }
}

/// The most bytes that either side had allocated at once, beyond what was alive when it began.
pub(super) fn peaks(eager: &dyn Fn() -> Result<Tensor>, lazy: &dyn Fn() -> Result<Tensor>) -> Result<(u64, u64)> {
    struct Pass<'a>(&'a dyn Fn() -> Result<Tensor>);
    impl Way for Pass<'_> {
        fn begin(&mut self) -> Result<()> {
            Ok(())
        }
        fn step(&mut self, _: usize) -> Result<Option<EvalReport>> {
            (self.0)()?;
            Ok(None)
        }
        fn end(&mut self) {}
    }
    let measured = measure(1, 1, Some(&mut Pass(eager)), &mut Pass(lazy))?;
    Ok((measured.eager.map_or(0, |Side { peak, .. }| peak), measured.lazy.peak))
}

/// A lazy decoder that has read a text of its own choice.
struct Reader {
    model: CausalLm,
    cache: RefCell<Cache>,
}

impl Reader {
    /// The logits (vocabulary) after new ids, recorded; the text goes on.
    fn record(&self, ids: &[u32]) -> Result<LazyTensor> {
        decoder::record(&self.model, &mut self.cache.borrow_mut(), ids)
    }

    /// The logits after ids at a position of the text, evaluated together with the cache that the next step reads.
    fn logits(&self, position: usize, ids: &[u32]) -> Result<Tensor> {
        self.cache.borrow_mut().truncate(position);
        let logits = self.record(ids)?;
        decoder::run(&self.cache.borrow(), &logits)?;
        Ok(logits.eval()?)
    }
}

/// An eager decoder that has read a text, and can go back in it.
struct Text {
    twin: RefCell<Twin>,
    empty: Mark,
    read: Mark,
}

impl Text {
    fn read(mut twin: Twin, prompt: &[u32]) -> Result<Self> {
        let mark = |twin: &Twin| twin.mark().ok_or_else(|| Error::NoTwin("its text cannot be gone back in".into()));
        twin.begin()?;
        let empty = mark(&twin)?;
        twin.forward(prompt)?;
        let read = mark(&twin)?;
        Ok(Self { twin: RefCell::new(twin), empty, read })
    }

    /// The logits (1, vocabulary) after what stood at a mark and more ids.
    fn after(&self, mark: &Mark, ids: &[u32]) -> Result<Tensor> {
        let mut twin = self.twin.borrow_mut();
        twin.back(mark);
        twin.forward(ids)
    }
}

/// A decoder: eager in f32 and bf16, lazy in f32, bf16 and f64, all after the same prompt.
pub struct DecoderPair {
    eager: Text,
    eager_half: Text,
    lazy: Reader,
    half: Reader,
    exact: Reader,
    prompt: usize,
}

impl DecoderPair {
    /// Loads all of them and lets them read `prompt`.
    ///
    /// # Errors
    /// When the model cannot be loaded or run, or candle-transformers has no twin that can go back in its text.
    pub fn load(dir: &ModelDir, prompt: &[u32]) -> Result<Self> {
        let reader = |dtype| -> Result<Reader> {
            let model = dir.causal_lm(dtype, &Device::Cpu)?;
            let cache = model.new_cache(2 * prompt.len().max(1))?;
            let reader = Reader { model, cache: RefCell::new(cache) };
            reader.logits(0, prompt)?;
            Ok(reader)
        };
        let (lazy, half, exact) = (reader(DType::F32)?, reader(DType::BF16)?, reader(DType::F64)?);
        let config = lazy.model.config();
        let kind = twin::kind(config).map_err(Error::NoTwin)?;
        let text = |dtype| Text::read(Twin::load(kind, dir, config, dtype)?, prompt);
        let (eager, eager_half) = (text(DType::F32)?, text(DType::BF16)?);
        Ok(Self { eager, eager_half, lazy, half, exact, prompt: prompt.len() })
    }

    /// Eager's logits (1, vocabulary) after a text.
    ///
    /// # Errors
    /// When the forward pass fails.
    pub fn eager_prefill(&self, ids: &[u32]) -> Result<Tensor> {
        self.eager.after(&self.eager.empty, ids)
    }

    /// Eager's logits (1, vocabulary) after the prompt and one more id. `dtype` is f32 or bf16.
    ///
    /// # Errors
    /// When the forward pass fails.
    pub fn eager_decode(&self, dtype: DType, id: u32) -> Result<Tensor> {
        let text = if dtype == DType::BF16 { &self.eager_half } else { &self.eager };
        text.after(&text.read, &[id])
    }

    /// `count` greedy tokens after a text, one by one, by the eager model of f32.
    ///
    /// # Errors
    /// When a forward pass fails.
    pub fn eager_generate(&self, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
        let mut logits = self.eager_prefill(prompt)?;
        let mut tokens = Vec::with_capacity(count);
        loop {
            let token = logits.argmax(D::Minus1)?.squeeze(0)?.to_scalar::<u32>()?;
            tokens.push(token);
            if tokens.len() >= count {
                return Ok(tokens);
            }
            logits = self.eager.twin.borrow_mut().forward(&[token])?;
        }
    }

    /// The lazy model of f32.
    #[must_use]
    pub fn model(&self) -> &CausalLm {
        &self.lazy.model
    }

    fn reader(&self, dtype: DType) -> &Reader {
        match dtype {
            DType::BF16 => &self.half,
            DType::F64 => &self.exact,
            _ => &self.lazy,
        }
    }

    /// The lazy model's logits (vocabulary) after a text that replaces the prompt, as long as [`DecoderPair::read_prompt`] does not
    /// bring it back. `dtype` is f32, bf16 or f64.
    ///
    /// # Errors
    /// When recording or evaluation fails.
    pub fn prefill(&self, dtype: DType, ids: &[u32]) -> Result<Tensor> {
        self.reader(dtype).logits(0, ids)
    }

    /// Reads the prompt again.
    ///
    /// # Errors
    /// When recording or evaluation fails.
    pub fn read_prompt(&self, prompt: &[u32]) -> Result<()> {
        for reader in [&self.lazy, &self.half, &self.exact] {
            reader.logits(0, prompt)?;
        }
        Ok(())
    }

    /// The lazy model's logits (vocabulary) after the prompt and one more id. `dtype` is f32, bf16 or f64.
    ///
    /// # Errors
    /// When recording or evaluation fails.
    pub fn decode(&self, dtype: DType, id: u32) -> Result<Tensor> {
        self.reader(dtype).logits(self.prompt, &[id])
    }

    /// A function that plans one decode step of the f32 model and runs nothing; `cached` says whether it may take the plan from the cache.
    ///
    /// # Errors
    /// When recording fails; what it returns, when planning fails.
    pub fn planner(&self, cached: bool) -> Result<impl Fn() -> Result<()>> {
        let reader = self.reader(DType::F32);
        // a step that was recorded and never ran, as one that was planned here before, is not to be a part of this one
        materialize(&reader.cache.borrow().handles())?;
        reader.cache.borrow_mut().truncate(self.prompt);
        let logits = reader.record(&[1])?;
        let mut roots: Vec<LazyTensor> = reader.cache.borrow().handles().into_iter().cloned().collect();
        roots.push(logits);
        let options = EvalOptions { cache: cached, ..EvalOptions::default() };
        Ok(move || {
            prepare(&roots.iter().collect::<Vec<_>>(), &options)?;
            Ok(())
        })
    }

    /// How many weights a step reads: all matrices once, of the embedding table one row or, where it is
    /// also the head, all of it.
    #[must_use]
    pub fn weight_elements(&self) -> usize {
        let c = self.lazy.model.config();
        let (h, kv) = (c.hidden_size, c.num_key_value_heads * c.head_dim);
        let q = c.num_attention_heads * c.head_dim;
        c.num_hidden_layers * (2 * h * q + 2 * h * kv + 3 * h * c.intermediate_size) + c.vocab_size * h
    }
}
