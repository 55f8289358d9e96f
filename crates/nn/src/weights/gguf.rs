//! Models in GGUF files: config from the metadata, weights dequantised as they are read.
//!
//! The tensors get Hugging Face's names. Converters store the q and k rows of Llama models permuted, for a rotary
//! embedding that turns neighbouring pairs; here they are put back for the one that turns the two halves of a head.
//! Qwen2's are stored as they are. Source: `convert_hf_to_gguf.py` of llama.cpp (`LlamaModel.permute`).

use super::gguf_header::{GgufHeader, GgufTensorInfo};
use super::read::{read_into, weight_vec};
use crate::error::{Error, Result};
use crate::models::causal_lm_config::CausalLmConfig;
use crate::rope::RopeScaling;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{ggml_file::qtensor_from_ggml, GgmlDType};
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_exec::buffer::HugePages;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use half::{bf16, f16};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const ARCHITECTURES: &str = "llama, qwen2";
/// Elements dequantised at once: what is in flight beside the weights stays small.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// A tensor under its Hugging Face name.
#[derive(Debug)]
struct Mapped {
    info: GgufTensorInfo,
    /// Rows per head where the rows of each head are stored permuted.
    permuted: Option<usize>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: Mutex<File>,
    tensors: BTreeMap<String, Mapped>,
}

/// An open GGUF file of a supported architecture.
#[derive(Debug, Clone)]
pub struct Gguf {
    inner: Arc<Inner>,
    metadata: Arc<BTreeMap<String, Value>>,
    config: CausalLmConfig,
    architecture: String,
}

/// The Hugging Face name of a tensor, `None` for one that no model here uses.
fn hugging_face_name(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    if kind != "weight" && kind != "bias" {
        return None;
    }
    let stem = match stem {
        "token_embd" => "model.embed_tokens".to_string(),
        "output_norm" => "model.norm".to_string(),
        "output" => "lm_head".to_string(),
        _ => {
            let (index, part) = stem.strip_prefix("blk.")?.split_once('.')?;
            let index: usize = index.parse().ok()?;
            let part = match part {
                "attn_norm" => "input_layernorm",
                "ffn_norm" => "post_attention_layernorm",
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                _ => return None,
            };
            format!("model.layers.{index}.{part}")
        }
    };
    Some(format!("{stem}.{kind}"))
}

/// Metadata with the architecture's prefix, and errors that name the key.
struct Keys<'a> {
    path: &'a Path,
    architecture: &'a str,
    metadata: &'a BTreeMap<String, Value>,
}

impl Keys<'_> {
    fn wrong(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::config(self.path.display(), format_args!("metadata `{}.{key}` {message}", self.architecture))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&format!("{}.{key}", self.architecture))
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match as_u64(value).and_then(|v| usize::try_from(v).ok()) {
            Some(size) => Ok(Some(size)),
            None => Err(self.wrong(key, format_args!("is no size: {value:?}"))),
        }
    }

    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "is missing"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(value)) => Ok(Some(f64::from(*value))),
            Some(Value::F64(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong(key, format_args!("is no number: {other:?}"))),
        }
    }
}

/// A non-negative integer of any width.
pub(crate) fn as_u64(value: &Value) -> Option<u64> {
    match *value {
        Value::I8(v) => u64::try_from(v).ok(),
        Value::I16(v) => u64::try_from(v).ok(),
        Value::I32(v) => u64::try_from(v).ok(),
        Value::I64(v) => u64::try_from(v).ok(),
        Value::U8(v) => Some(u64::from(v)),
        Value::U16(v) => Some(u64::from(v)),
        Value::U32(v) => Some(u64::from(v)),
        Value::U64(v) => Some(v),
        _ => None,
    }
}

/// A token id of the metadata.
fn token_id(metadata: &BTreeMap<String, Value>, key: &str) -> Option<u32> {
    metadata.get(key).and_then(as_u64).and_then(|id| u32::try_from(id).ok())
}

impl Gguf {
    /// Opens a file, checks its header and reads the model's config from it. No weight is read yet.
    ///
    /// # Errors
    /// [`Error::Format`] for a corrupt or truncated file, [`Error::Unsupported`] (by name) for another architecture or
    /// rope scaling, [`Error::Config`] for metadata that is missing or contradicts itself.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let header = GgufHeader::read(path)?;
        let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
        let architecture = match header.metadata.get("general.architecture") {
            Some(Value::String(name)) => name.clone(),
            _ => return Err(Error::config(path.display(), "metadata `general.architecture` is missing")),
        };
        let permuted = match architecture.as_str() {
            "llama" => true,
            "qwen2" => false,
            _ => {
                return Err(Error::Unsupported { what: "architecture", found: architecture, supported: ARCHITECTURES })
            }
        };
        let config = config_of(path, &architecture, &header, &mut file)?;
        let mut tensors = BTreeMap::new();
        for (name, info) in header.tensors {
            let Some(full) = hugging_face_name(&name) else {
                continue;
            };
            let rotated = full.contains(".self_attn.q_proj.") || full.contains(".self_attn.k_proj.");
            let permuted = (permuted && rotated).then_some(config.head_dim);
            tensors.insert(full, Mapped { info, permuted });
        }
        let inner = Inner { path: path.to_path_buf(), file: Mutex::new(file), tensors };
        Ok(Self { inner: Arc::new(inner), metadata: Arc::new(header.metadata), config, architecture })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// All metadata.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The architecture's name, `llama` or `qwen2`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The model's config, from the metadata and the list of tensors.
    pub fn config(&self) -> &CausalLmConfig {
        &self.config
    }

    /// Names (Hugging Face's) and shapes of the tensors, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.inner.tensors.iter().map(|(name, mapped)| (name.as_str(), mapped.info.shape.as_slice()))
    }

    /// A `VarBuilder` that dequantises each tensor when a model asks for it.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(
            Box::new(Backend { inner: self.inner.clone(), pages: HugePages::default() }),
            dtype,
            device.clone(),
        )
    }
}

/// The model's config; `file` is read where a tensor belongs to it.
fn config_of(path: &Path, architecture: &str, header: &GgufHeader, file: &mut File) -> Result<CausalLmConfig> {
    let metadata = &header.metadata;
    let keys = Keys { path, architecture, metadata };
    let hidden_size = keys.need("embedding_length")?;
    let heads = keys.need("attention.head_count")?;
    let head_dim = match keys.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(heads).unwrap_or(0),
    };
    if let Some(rotary) = keys.size("rope.dimension_count")?.filter(|rotary| *rotary != head_dim) {
        return Err(keys.wrong(
            "rope.dimension_count",
            format_args!("is {rotary}, the head dim {head_dim}: partly rotated heads are not supported"),
        ));
    }
    let embedding = header.tensors.get("token_embd.weight").and_then(|info| info.shape.first().copied());
    let vocab_size = match embedding {
        Some(vocab_size) => vocab_size,
        None => return Err(Error::MissingTensor { name: "token_embd.weight".into(), file: Some(path.to_path_buf()) }),
    };
    let rope_scaling = rope_scaling_of(path, &keys, header, file)?;
    let has = |name: &str| header.tensors.contains_key(name);
    let config = CausalLmConfig {
        vocab_size,
        hidden_size,
        intermediate_size: keys.need("feed_forward_length")?,
        num_hidden_layers: keys.need("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        max_position_embeddings: keys.need("context_length")?,
        rms_norm_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.wrong("attention.layer_norm_rms_epsilon", "is missing"))?,
        rope_theta: keys.float("rope.freq_base")?.unwrap_or(10_000.) as f32,
        rope_scaling,
        tie_word_embeddings: !has("output.weight"),
        qkv_bias: has("blk.0.attn_q.bias"),
        out_bias: has("blk.0.attn_output.bias"),
        mlp_bias: has("blk.0.ffn_up.bias"),
        sliding_window: keys.size("attention.sliding_window")?.filter(|window| *window > 0),
        bos_token_id: token_id(metadata, "tokenizer.ggml.bos_token_id"),
        eos_token_ids: token_id(metadata, "tokenizer.ggml.eos_token_id").into_iter().collect(),
    };
    config.validate(&path.display().to_string())?;
    Ok(config)
}

fn rope_scaling_of(path: &Path, keys: &Keys<'_>, header: &GgufHeader, file: &mut File) -> Result<RopeScaling> {
    if let Some(info) = header.tensors.get("rope_freqs.weight") {
        if info.dtype != GgmlDType::F32 || info.shape.len() != 1 {
            return Err(Error::Tensor {
                name: "rope_freqs.weight".into(),
                file: Some(path.to_path_buf()),
                message: format!("expected a vector of F32, found {:?} of {:?}", info.shape, info.dtype),
            });
        }
        let mut factors = Vec::new();
        read_into(file, info.offset, info.elem_count(), &mut factors, |v: f32| v).map_err(|e| Error::io(path, e))?;
        return Ok(RopeScaling::Factors(factors));
    }
    match keys.get("rope.scaling.type") {
        None => Ok(RopeScaling::None),
        Some(Value::String(kind)) if kind == "none" => Ok(RopeScaling::None),
        Some(Value::String(kind)) if kind == "linear" => match keys.float("rope.scaling.factor")? {
            Some(factor) if factor.is_finite() && factor > 0. => Ok(RopeScaling::Linear { factor: factor as f32 }),
            other => Err(keys.wrong("rope.scaling.factor", format_args!("is {other:?}"))),
        },
        Some(other) => Err(Error::Unsupported {
            what: "rope scaling",
            found: match other {
                Value::String(kind) => kind.clone(),
                other => format!("{other:?}"),
            },
            supported: "none, linear, and factors in rope_freqs.weight",
        }),
    }
}

struct Backend {
    inner: Arc<Inner>,
    /// Where the tensors lie that were read: they go to huge pages when the model has all it wants.
    pages: HugePages,
}

impl Backend {
    fn read(&self, name: &str, expected: Option<&Shape>, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        let inner = &self.inner;
        let mapped = inner
            .tensors
            .get(name)
            .ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.to_string() }.with_path(&inner.path))?;
        let shape = Shape::from(mapped.info.shape.as_slice());
        if let Some(expected) = expected.filter(|expected| *expected != &shape) {
            return Err(candle_core::Error::UnexpectedShape {
                msg: format!("shape mismatch for {name}"),
                expected: expected.clone(),
                got: shape,
            }
            .with_path(&inner.path));
        }
        let values = dequantize(&mut inner.file.lock(), mapped).map_err(|e| e.with_path(&inner.path))?;
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(dev)?;
        self.pages.note(&tensor);
        Ok(tensor)
    }
}

/// The file's row that belongs at `row`, for heads of `head` rows.
///
/// Stored row `2j + t` of a head is row `j + t·head/2` of Hugging Face's layout.
fn stored_row(row: usize, head: usize) -> usize {
    let half = head / 2;
    let (base, within) = (row - row % head, row % head);
    base + 2 * (within % half) + within / half
}

/// All values of a tensor in f32, rows in Hugging Face's order.
fn dequantize(file: &mut File, mapped: &Mapped) -> candle_core::Result<Vec<f32>> {
    let info = &mapped.info;
    let count = info.elem_count();
    let mut out = weight_vec::<f32>(count);
    let rows = info.shape.first().copied().unwrap_or(1);
    if count == 0 {
        return Ok(out);
    }
    let width = count / rows;
    let rows_at_once = match mapped.permuted {
        None => (CHUNK_ELEMENTS / width.max(1)).max(1),
        // A head is put in order within one chunk.
        Some(head) if head >= 2 && head.is_multiple_of(2) && rows.is_multiple_of(head) => head,
        Some(head) => candle_core::bail!("{rows} rows do not divide into heads of {head}"),
    };
    let mut chunk = Vec::new();
    let mut first = 0;
    while first < rows {
        let now = rows_at_once.min(rows - first);
        chunk.clear();
        read_rows(file, info, first * width, now * width, &mut chunk)?;
        match mapped.permuted {
            None => out.extend_from_slice(&chunk),
            Some(head) => {
                for row in 0..now {
                    let at = stored_row(row, head) * width;
                    match chunk.get(at..at + width) {
                        Some(values) => out.extend_from_slice(values),
                        None => candle_core::bail!("row {row} is outside of its head"),
                    }
                }
            }
        }
        first += now;
    }
    Ok(out)
}

/// Appends `count` values from element `first` on; both lie on block boundaries, as the header's check of rows ensures.
fn read_rows(
    file: &mut File,
    info: &GgufTensorInfo,
    first: usize,
    count: usize,
    out: &mut Vec<f32>,
) -> candle_core::Result<()> {
    let (block, bytes) = (info.dtype.block_size(), info.dtype.type_size());
    let offset = info.offset + (first / block * bytes) as u64;
    match info.dtype {
        GgmlDType::F32 => read_into(file, offset, count, out, |v: f32| v)?,
        GgmlDType::F16 => read_into(file, offset, count, out, |v: f16| v.to_f32())?,
        GgmlDType::BF16 => read_into(file, offset, count, out, |v: bf16| v.to_f32())?,
        _ => {
            let mut raw = vec![0u8; count / block * bytes];
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut raw)?;
            let blocks = qtensor_from_ggml(info.dtype, &raw, vec![count], &Device::Cpu)?;
            out.extend(blocks.dequantize(&Device::Cpu)?.to_vec1::<f32>()?);
        }
    }
    Ok(())
}

impl SimpleBackend for Backend {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.read(name, Some(&s), dtype, dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.read(name, None, dtype, dev)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.inner.tensors.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mapped() {
        let name = |n: &str| hugging_face_name(n);
        assert_eq!(name("token_embd.weight").as_deref(), Some("model.embed_tokens.weight"));
        assert_eq!(name("output.weight").as_deref(), Some("lm_head.weight"));
        assert_eq!(name("blk.12.attn_k.bias").as_deref(), Some("model.layers.12.self_attn.k_proj.bias"));
        assert_eq!(name("blk.0.ffn_down.weight").as_deref(), Some("model.layers.0.mlp.down_proj.weight"));
        assert_eq!(name("blk.x.ffn_down.weight"), None);
        assert_eq!(name("rope_freqs.weight"), None);
        assert_eq!(name("weight"), None);
    }

    #[test]
    fn rows_of_a_head_are_put_back() {
        // The converter views a head's rows as (2, d/2) and swaps the two axes.
        let (head, heads) = (6, 2);
        let mut stored = vec![0; head * heads];
        for h in 0..heads {
            for half in 0..2 {
                for j in 0..head / 2 {
                    stored[h * head + 2 * j + half] = h * head + half * (head / 2) + j;
                }
            }
        }
        let back: Vec<usize> = (0..head * heads).map(|row| stored[stored_row(row, head)]).collect();
        assert_eq!(back, (0..head * heads).collect::<Vec<_>>());
    }
}
