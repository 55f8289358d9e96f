//! Decoders of the Llama family: Llama, SmolLM2, Mistral, Qwen2.
//!
//! Weight names are Hugging Face's (`model.embed_tokens.weight`, `model.layers.N.self_attn.q_proj.weight`, …,
//! `lm_head.weight`); GGUF files are given those names when they are opened ([`crate::weights::Gguf`]).

use super::causal_lm_config::CausalLmConfig;
use super::decoder_block::{DecoderBlock, PROJECTIONS};
use crate::attention::Positions;
use crate::embedding::{embedding, Embedding};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::kv_cache::KvCache;
use crate::linear::{linear_no_bias, Linear};
use crate::lora::{LoraLinear, LoraWeights};
use crate::loss::{linear_cross_entropy, TokenLoss, TokenLossOptions};
use crate::module::Module;
use crate::norm::{rms_norm, RmsNorm};
use crate::rope::{RopeScaling, RopeTable};
use crate::scope;
use candle_core::{DType, Device};
use candle_lazy_exec::{eval_all, CheckpointRegion, LazyTensor};
use candle_nn::VarBuilder;

/// The state of one sequence (or one batch of equally long ones): keys and values of all blocks, and the rotary table.
#[derive(Debug)]
pub struct Cache {
    blocks: Vec<KvCache>,
    rope: Rope,
    capacity: usize,
}

/// Rows of the rotary table that are made at first: enough for most texts, small beside any model.
const FIRST_POSITIONS: usize = 4096;

/// The rotary table as far as it was needed: a context of millions of positions costs nothing until a text reaches them.
#[derive(Debug)]
pub(super) struct Rope {
    table: Option<RopeTable>,
    head_dim: usize,
    theta: f32,
    scaling: RopeScaling,
    dtype: DType,
    device: Device,
}

impl Rope {
    fn new(config: &CausalLmConfig, dtype: DType, device: &Device) -> Self {
        let (head_dim, theta, scaling) = (config.head_dim, config.rope_theta, config.rope_scaling.clone());
        Self { table: None, head_dim, theta, scaling, dtype, device: device.clone() }
    }

    /// The table with rows for the first `end` positions, of which there are `capacity` at most.
    #[track_caller]
    pub(super) fn up_to(&mut self, end: usize, capacity: usize) -> Result<&RopeTable> {
        let table = match self.table.take().filter(|table| table.positions() >= end) {
            Some(table) => table,
            None => {
                let positions = end.checked_next_power_of_two().unwrap_or(end).max(FIRST_POSITIONS).min(capacity);
                RopeTable::new(self.head_dim, self.theta, &self.scaling, positions, self.dtype, &self.device)?
            }
        };
        Ok(self.table.insert(table))
    }

    /// As [`RopeTable::slice`], for any position below `capacity`.
    #[track_caller]
    fn slice(&mut self, start: usize, len: usize, capacity: usize) -> Result<(LazyTensor, LazyTensor)> {
        self.up_to(start.saturating_add(len), capacity)?.slice(start, len)
    }
}

impl Cache {
    /// A cache for up to `capacity` positions.
    ///
    /// The buffers, 2 · layers · batch · kv heads · capacity · head dim elements of `dtype`, are made at the first use.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where `capacity` exceeds the model's context, [`Error::Config`] where it is 0, [`Error::Cache`]
    /// where it needs more memory (for one sequence) than the system grants at once.
    #[track_caller]
    pub fn new(config: &CausalLmConfig, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        if capacity == 0 {
            return Err(Error::config("the cache", "a capacity of 0 positions holds nothing"));
        }
        if capacity > config.max_position_embeddings {
            return Err(Error::prompt_too_long(capacity, config.max_position_embeddings));
        }
        room_for(config, capacity, dtype)?;
        let mut rope = Rope::new(config, dtype, device);
        // a config without a table is refused here; the table itself is made when a text needs it
        rope.up_to(1, 1)?;
        let mut blocks = Vec::new();
        if blocks.try_reserve_exact(config.num_hidden_layers).is_err() {
            let layers = config.num_hidden_layers;
            return Err(Error::config(
                "the cache",
                format_args!("num_hidden_layers is {layers}: no memory for that many"),
            ));
        }
        blocks.extend((0..config.num_hidden_layers).map(|_| KvCache::new(capacity)));
        Ok(Self { blocks, rope, capacity })
    }

    /// Number of positions held.
    pub fn position(&self) -> usize {
        self.blocks.first().map_or(0, KvCache::current_seq_len)
    }

    /// Number of positions there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions; the buffers stay.
    pub fn reset(&mut self) {
        for block in &mut self.blocks {
            block.reset();
        }
    }

    /// Forgets the positions from `position` on, to continue from there in another way.
    pub fn truncate(&mut self, position: usize) {
        for block in &mut self.blocks {
            block.truncate(position);
        }
    }

    /// Number of blocks that it was made for.
    pub(super) fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// What each block holds.
    pub(super) fn blocks_mut(&mut self) -> &mut [KvCache] {
        &mut self.blocks
    }

    /// The handles of all buffers, to be evaluated together with a step's logits.
    pub fn handles(&self) -> Vec<&LazyTensor> {
        self.blocks.iter().flat_map(KvCache::handles).collect()
    }
}

/// Refuses a cache that no memory holds, before a part of it is made: sizes come from a config, and a request of the engine or of
/// Candle that the system refuses could end the process.
#[track_caller]
fn room_for(config: &CausalLmConfig, capacity: usize, dtype: DType) -> Result<()> {
    let held = [2, config.num_hidden_layers, config.num_key_value_heads, config.head_dim, dtype.size_in_bytes()];
    let bytes = held.into_iter().try_fold(capacity, usize::checked_mul);
    let mut probe = Vec::<u8>::new();
    let granted = bytes.is_some_and(|bytes| probe.try_reserve_exact(bytes).is_ok());
    // the optimiser may remove an allocation that nobody looks at
    std::hint::black_box(&probe);
    if granted {
        return Ok(());
    }
    let bytes = bytes.map_or("more bytes than can be counted".to_string(), |bytes| format!("{bytes} bytes"));
    Err(Error::cache(format_args!("there is no memory for {capacity} positions: keys and values need {bytes}")))
}

/// Refuses weights that would change the result and that the config says nothing of: biases that it denies, norms, sinks and
/// experts of related architectures. A model without them answers, but not as it was trained to.
fn no_denied_tensor(config: &CausalLmConfig, vb: &VarBuilder<'_>) -> Result<()> {
    let qkv = (config.qkv_bias, "attention_bias");
    let out = (config.out_bias, "attention_bias");
    let mlp = (config.mlp_bias, "mlp_bias");
    let norm = (false, "the architecture");
    let tensors = [
        ("self_attn.q_proj.bias", qkv),
        ("self_attn.k_proj.bias", qkv),
        ("self_attn.v_proj.bias", qkv),
        ("self_attn.o_proj.bias", out),
        ("self_attn.q_norm.weight", norm),
        ("self_attn.k_norm.weight", norm),
        ("mlp.gate_proj.bias", mlp),
        ("mlp.up_proj.bias", mlp),
        ("mlp.down_proj.bias", mlp),
        ("self_attn.q_norm.bias", norm),
        ("self_attn.k_norm.bias", norm),
        ("self_attn.sinks", norm),
        ("input_layernorm.bias", norm),
        ("post_attention_layernorm.bias", norm),
        ("pre_feedforward_layernorm.weight", norm),
        ("post_feedforward_layernorm.weight", norm),
        ("mlp.experts.0.up_proj.weight", norm),
    ];
    for (part, name) in [(vb.pp("model.norm"), "bias"), (vb.pp("lm_head"), "bias")] {
        if part.contains_tensor(name) {
            let prefix = part.prefix();
            return Err(Error::config(
                "the model",
                format_args!("the weights have `{prefix}.{name}`, the architecture has no place for it"),
            ));
        }
    }
    let layers = vb.pp("model.layers");
    for index in 0..config.num_hidden_layers {
        let block = layers.pp(index);
        for (name, (wanted, says)) in tensors {
            if !wanted && block.contains_tensor(name) {
                return Err(Error::config(
                    "the model",
                    format_args!("the weights have `{}.{name}`, {says} has no place for it", block.prefix()),
                ));
            }
        }
    }
    Ok(())
}

/// The last norm and the head of a model.
struct Head<'a>(&'a CausalLm);

impl Module for Head<'_> {
    #[track_caller]
    fn forward(&self, hidden: &LazyTensor) -> Result<LazyTensor> {
        self.0.logits(hidden)
    }
}

/// The length of `ids` (batch, s), which is not 0.
#[track_caller]
fn check_ids(ids: &LazyTensor) -> Result<usize> {
    match ids.dims() {
        [_, 0] => Err(Error::empty_prompt()),
        [_, s] => Ok(*s),
        _ => {
            let message = format_args!("ids must have shape (batch, length), found {:?}", ids.shape());
            Err(Error::module("causal_lm", "model", message))
        }
    }
}

/// A decoder.
#[derive(Debug, Clone)]
pub struct CausalLm {
    embed: Embedding,
    blocks: Vec<DecoderBlock>,
    norm: RmsNorm,
    head: Linear,
    config: CausalLmConfig,
    dtype: DType,
    device: Device,
    checkpointed: bool,
}

impl CausalLm {
    /// From the weights of the builder, in its dtype and on its device.
    ///
    /// # Errors
    /// [`Error::Config`] where the config contradicts itself or describes fewer blocks than the weights have,
    /// [`Error::MissingTensor`] and [`Error::TensorShape`] where it does not fit the weights.
    #[track_caller]
    pub fn load(vb: VarBuilder<'_>, config: &CausalLmConfig) -> Result<Self> {
        config.validate("the model")?;
        let (dtype, device) = (vb.dtype(), vb.device().clone());
        if !dtype.is_float() {
            return Err(Error::float_expected("causal_lm", "", "the weights", dtype));
        }
        let model = vb.pp("model");
        let embed = embedding(config.vocab_size, config.hidden_size, model.pp("embed_tokens"))?;
        let layers = model.pp("layers");
        let mut blocks = Vec::new();
        for index in 0..config.num_hidden_layers {
            blocks.push(DecoderBlock::load(config, layers.pp(index))?);
        }
        // A `VarBuilder` of zeros or a `VarMap` has every name; only stored weights can tell what is left over.
        let one_more = |index: usize| layers.pp(index).pp("input_layernorm").contains_tensor("weight");
        let stored = !one_more(usize::MAX);
        if stored {
            no_denied_tensor(config, &vb)?;
        }
        if one_more(config.num_hidden_layers) && stored {
            return Err(Error::config(
                "the model",
                format_args!(
                    "num_hidden_layers is {}, the weights have `model.layers.{}` and more",
                    config.num_hidden_layers, config.num_hidden_layers
                ),
            ));
        }
        let norm = rms_norm(config.hidden_size, config.rms_norm_eps, model.pp("norm"))?;
        let head = if config.tie_word_embeddings {
            Linear::with_path(embed.embeddings().clone(), None, "lm_head")?
        } else {
            linear_no_bias(config.hidden_size, config.vocab_size, vb.pp("lm_head"))?
        };
        Ok(Self { embed, blocks, norm, head, config: config.clone(), dtype, device, checkpointed: false })
    }

    /// What the model was loaded with.
    pub fn config(&self) -> &CausalLmConfig {
        &self.config
    }

    /// The device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The dtype of the weights and of the logits.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A cache for up to `capacity` positions of this model.
    ///
    /// # Errors
    /// As [`Cache::new`].
    #[track_caller]
    pub fn new_cache(&self, capacity: usize) -> Result<Cache> {
        Cache::new(&self.config, capacity, self.dtype, &self.device)
    }

    /// Sets, replaces (`Some`) or removes (`None`) the adapter of one linear map.
    ///
    /// `path` is the map's name in the checkpoint without `.weight`, e.g. `model.layers.3.self_attn.q_proj`;
    /// q, k, v, o, gate, up and down of every block can carry one.
    ///
    /// # Errors
    /// [`Error::Module`] where there is no such map, or the factors do not fit it.
    #[track_caller]
    pub fn set_lora(&mut self, path: &str, adapter: Option<LoraWeights>) -> Result<()> {
        match self.projection_mut(path) {
            Some(projection) => projection.set_adapter(adapter),
            None => Err(Error::module(
                "lora",
                path,
                "the model has no such linear map (expected e.g. model.layers.0.self_attn.q_proj or model.layers.0.mlp.up_proj)",
            )),
        }
    }

    /// Removes all adapters.
    ///
    /// # Errors
    /// None in practice: taking an adapter away needs nothing to fit.
    pub fn clear_lora(&mut self) -> Result<()> {
        for block in &mut self.blocks {
            block.clear_lora()?;
        }
        Ok(())
    }

    /// The paths of the linear maps that can carry an adapter, block by block.
    pub fn projection_paths(&self) -> Vec<String> {
        let of_block =
            |index| PROJECTIONS.iter().map(move |(part, name)| format!("model.layers.{index}.{part}.{name}"));
        (0..self.blocks.len()).flat_map(of_block).collect()
    }

    /// A number that models of other weights hardly share: of the first rows of the embeddings, of each linear map and of the head.
    pub(crate) fn fingerprint(&self) -> Result<u64> {
        let maps = self.blocks.iter().flat_map(DecoderBlock::projections).map(|map| map.base().weight());
        let mut rows = Vec::new();
        for weight in [self.embed.embeddings(), self.head.weight()].into_iter().chain(maps) {
            if !weight.node().is_quantized() && weight.elem_count() > 0 {
                rows.push(weight.narrow(0, 0, 1)?.detach());
            }
        }
        let mut print = Fingerprint::default();
        for row in eval_all(&rows.iter().collect::<Vec<_>>())? {
            // not every device has every dtype
            let numbers = row.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            numbers.into_iter().for_each(|x| print.add(x.to_bits()));
        }
        Ok(print.value())
    }

    /// The blocks, first to last.
    pub(crate) fn blocks(&self) -> &[DecoderBlock] {
        &self.blocks
    }

    pub(super) fn embed(&self) -> &Embedding {
        &self.embed
    }

    /// A rotary table of this model.
    pub(super) fn rope(&self) -> Rope {
        Rope::new(&self.config, self.dtype, &self.device)
    }

    pub(crate) fn projection_mut(&mut self, path: &str) -> Option<&mut LoraLinear> {
        let rest = path.strip_prefix("model.layers.")?;
        let (index, rest) = rest.split_once('.')?;
        let block = self.blocks.get_mut(index.parse::<usize>().ok()?)?;
        match rest.split_once('.')? {
            ("self_attn", name) => block.attention_mut().projection_mut(name),
            ("mlp", name) => block.mlp_mut().projection_mut(name),
            _ => None,
        }
    }

    /// Logits (batch, vocab) of the last of the positions `ids` (batch, s) adds.
    ///
    /// A long prompt may be given in pieces: the cache knows where the next one begins.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for s = 0, [`Error::CacheFull`] where the cache has no room, [`Error::Cache`] where it
    /// belongs to another model or batch. After an error the cache holds what it held before.
    #[track_caller]
    pub fn forward(&self, ids: &LazyTensor, cache: &mut Cache) -> Result<LazyTensor> {
        let hidden = self.hidden(ids, cache)?;
        let (b, s, width) = hidden.dims3()?;
        // Only the last row meets the vocabulary: of a long prompt the other rows' logits are not wanted.
        let last = hidden.narrow(1, s.saturating_sub(1), 1)?.reshape((b, width))?;
        self.logits(&last)
    }

    /// Logits (batch, s, vocab) of all the positions `ids` (batch, s) adds.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    #[track_caller]
    pub fn forward_all(&self, ids: &LazyTensor, cache: &mut Cache) -> Result<LazyTensor> {
        let hidden = self.hidden(ids, cache)?;
        self.logits(&hidden)
    }

    /// From now on, [`CausalLm::forward_causal`] makes a checkpoint of each block or does not, as in a new model: a backward pass computes
    /// a block's inner values again instead of keeping those of all blocks. Losses and gradients have the same bits
    /// ([`candle_lazy_exec::checkpoint`]).
    pub fn set_gradient_checkpointing(&mut self, on: bool) {
        self.checkpointed = on;
    }

    /// The rotary table of the first `len` positions, for [`CausalLm::forward_causal`].
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] where the model's context is shorter.
    #[track_caller]
    pub fn positions(&self, len: usize) -> Result<Positions> {
        let context = self.config.max_position_embeddings;
        if len > context {
            return Err(Error::prompt_too_long(len, context));
        }
        let (cos, sin) = self.rope().slice(0, len, len)?;
        Ok(Positions { cos, sin })
    }

    /// Logits (batch, s, vocab) of all positions of whole sequences `ids` (batch, s) without a cache, as training wants them: each
    /// position sees itself and those before it. `at` are the positions' rows of the rotary table ([`CausalLm::positions`] of s).
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for s = 0, and as its ops: where `at` is not of s positions.
    #[track_caller]
    pub fn forward_causal(&self, ids: &LazyTensor, at: &Positions) -> Result<LazyTensor> {
        self.logits(&self.hidden_causal(ids, at)?)
    }

    /// The loss of whole sequences `ids` (batch, s), as [`CausalLm::forward_causal`] computes them, for targets (batch, s) of i64 and weights
    /// (batch, s) of f32: [`linear_cross_entropy`] with the model's head, which never holds all logits and makes none where nothing is
    /// learned.
    ///
    /// # Errors
    /// As [`CausalLm::forward_causal`] and [`linear_cross_entropy`].
    #[track_caller]
    pub fn token_loss(
        &self,
        ids: &LazyTensor,
        at: &Positions,
        targets: &LazyTensor,
        weights: Option<&LazyTensor>,
        options: &TokenLossOptions,
    ) -> Result<TokenLoss> {
        let hidden = self.hidden_causal(ids, at)?;
        linear_cross_entropy(&hidden, &Head(self), self.config.vocab_size, targets, weights, options)
    }

    /// The residual stream (batch, s, hidden) of whole sequences after all blocks, before the last norm.
    #[track_caller]
    fn hidden_causal(&self, ids: &LazyTensor, at: &Positions) -> Result<LazyTensor> {
        check_ids(ids)?;
        let _scope = scope::enter("model");
        let mut xs = self.embed.forward(ids)?;
        for block in &self.blocks {
            let region = self.checkpointed.then(CheckpointRegion::begin);
            xs = block.forward_causal(&xs, at)?;
            if let Some(region) = region {
                xs = region.end(xs)?;
            }
        }
        Ok(xs)
    }

    #[track_caller]
    pub(super) fn logits(&self, hidden: &LazyTensor) -> Result<LazyTensor> {
        let normed = {
            let _scope = scope::enter("model");
            self.norm.forward(hidden)?
        };
        self.head.forward(&normed)
    }

    /// The residual stream (batch, s, hidden) after all blocks, before the last norm.
    #[track_caller]
    fn hidden(&self, ids: &LazyTensor, cache: &mut Cache) -> Result<LazyTensor> {
        let s = check_ids(ids)?;
        if cache.blocks.len() != self.blocks.len() {
            let (made, has) = (cache.blocks.len(), self.blocks.len());
            return Err(Error::cache(format_args!("made for {made} blocks, the model has {has}")));
        }
        let position = cache.position();
        if position.checked_add(s).is_none_or(|end| end > cache.capacity) {
            return Err(Error::cache_full(position, s, cache.capacity));
        }
        let recorded = self.blocks_forward(ids, position, s, cache);
        if recorded.is_err() {
            // Some blocks may have taken the new positions: all of them go back to where the call began.
            cache.truncate(position);
        }
        recorded
    }

    #[track_caller]
    fn blocks_forward(&self, ids: &LazyTensor, position: usize, s: usize, cache: &mut Cache) -> Result<LazyTensor> {
        let _scope = scope::enter("model");
        let (cos, sin) = cache.rope.slice(position, s, cache.capacity)?;
        let at = Positions { cos, sin };
        let mut xs = self.embed.forward(ids)?;
        for (block, kv) in self.blocks.iter().zip(&mut cache.blocks) {
            xs = block.forward(&xs, &at, kv)?;
        }
        Ok(xs)
    }
}
