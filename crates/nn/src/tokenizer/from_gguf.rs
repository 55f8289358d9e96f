//! A byte-level BPE tokenizer from the metadata of a GGUF file.
//!
//! Sources: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> for the keys; the `tokenizer.json` files of the
//! models for how their pre-tokenizers split. An unknown pre-tokenizer is refused: the wrong one gives wrong ids
//! without any sign of it.

use super::{wrap, ChatTemplate, Tokenizer};
use crate::error::{Error, Result};
use crate::weights::Gguf;
use candle_core::quantized::gguf_file::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::models::bpe::{Vocab, BPE};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::AddedToken;

const PRE_TOKENIZERS: &str = "smollm, qwen2, llama-bpe, gpt-2";

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// How a text is split before pairs are merged within the pieces.
struct Splitting {
    pre_tokenizer: PreTokenizerWrapper,
    nfc: bool,
    ignore_merges: bool,
}

/// Byte level, no space put in front.
fn byte_level(use_regex: bool) -> ByteLevel {
    ByteLevel::new(false, true, use_regex)
}

/// A split by pattern, then byte level. `digits` is how many digits at most stay together.
fn by_pattern(digits: &str) -> Result<PreTokenizerWrapper> {
    // Contractions; a word with at most one other character in front; digits; punctuation with a space in front and
    // line ends behind; line ends; spaces but the last one before a word; spaces.
    let parts = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ];
    let pattern = SplitPattern::Regex(parts.join("|"));
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(wrap)?;
    Ok(Sequence::new(vec![split.into(), byte_level(false).into()]).into())
}

fn splitting(pre: &str) -> Result<Splitting> {
    let plain = |pre_tokenizer| Splitting { pre_tokenizer, nfc: false, ignore_merges: false };
    Ok(match pre {
        "smollm" => plain(Sequence::new(vec![Digits::new(true).into(), byte_level(true).into()]).into()),
        "gpt-2" | "gpt2" => plain(byte_level(true).into()),
        "qwen2" => Splitting { pre_tokenizer: by_pattern(r"\p{N}")?, nfc: true, ignore_merges: false },
        "llama-bpe" | "llama3" | "llama-v3" => {
            Splitting { pre_tokenizer: by_pattern(r"\p{N}{1,3}")?, nfc: false, ignore_merges: true }
        }
        other => {
            return Err(Error::Unsupported {
                what: "pre-tokenizer",
                found: other.to_string(),
                supported: PRE_TOKENIZERS,
            })
        }
    })
}

/// Metadata of the tokenizer, and errors that name file and key.
struct Keys<'a> {
    path: &'a Path,
    metadata: &'a BTreeMap<String, Value>,
}

impl Keys<'_> {
    fn wrong(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::config(self.path.display(), format_args!("metadata `{key}` {message}"))
    }

    fn string(&self, key: &str) -> Result<&str> {
        match self.metadata.get(key) {
            Some(Value::String(value)) => Ok(value),
            Some(_) => Err(self.wrong(key, "is no string")),
            None => Err(self.wrong(key, "is missing")),
        }
    }

    fn strings(&self, key: &str) -> Result<Vec<&str>> {
        let Some(Value::Array(values)) = self.metadata.get(key) else {
            return Err(self.wrong(key, "is missing or no array"));
        };
        let mut strings = Vec::with_capacity(values.len());
        for value in values {
            match value {
                Value::String(value) => strings.push(value.as_str()),
                _ => return Err(self.wrong(key, "holds something that is no string")),
            }
        }
        Ok(strings)
    }

    fn flag(&self, key: &str) -> bool {
        matches!(self.metadata.get(key), Some(Value::Bool(true)))
    }
}

impl Tokenizer {
    /// From the metadata of an open GGUF file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] (by name) for another tokenizer model than BPE or an unknown pre-tokenizer,
    /// [`Error::Config`] for metadata that is missing or contradicts itself.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::from_gguf_metadata(gguf.path(), gguf.metadata())
    }

    /// As [`Tokenizer::from_gguf`], from metadata alone; `path` names them in errors.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`].
    pub fn from_gguf_metadata(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<Self> {
        let keys = Keys { path, metadata };
        let model = keys.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(Error::Unsupported {
                what: "tokenizer model",
                found: model.to_string(),
                supported: "gpt2 (byte-level BPE)",
            });
        }
        let splitting = splitting(keys.string("tokenizer.ggml.pre")?)?;
        let tokens = keys.strings("tokenizer.ggml.tokens")?;
        let mut vocab = Vocab::default();
        for (id, token) in tokens.iter().enumerate() {
            let id = u32::try_from(id).map_err(|e| keys.wrong("tokenizer.ggml.tokens", e))?;
            vocab.insert((*token).to_string(), id);
        }
        let mut merges = Vec::new();
        for merge in keys.strings("tokenizer.ggml.merges")? {
            let Some((left, right)) = merge.split_once(' ') else {
                return Err(keys.wrong("tokenizer.ggml.merges", format_args!("has `{merge}`, which is no pair")));
            };
            // The `tokenizers` crate indexes its vocabulary by the merged token: a pair without one is refused here.
            for token in [left, right, &[left, right].concat()] {
                if !vocab.contains_key(token) {
                    return Err(keys.wrong(
                        "tokenizer.ggml.merges",
                        format_args!("has `{merge}`, but `{token}` is not in the vocabulary"),
                    ));
                }
            }
            merges.push((left.to_string(), right.to_string()));
        }
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(splitting.ignore_merges)
            .build()
            .map_err(wrap)?;
        let mut tokenizer = tokenizers::Tokenizer::new(bpe);
        if splitting.nfc {
            tokenizer.with_normalizer(Some(NFC)).map_err(wrap)?;
        }
        tokenizer.with_pre_tokenizer(Some(splitting.pre_tokenizer));
        tokenizer.with_decoder(Some(byte_level(true)));
        add_special_tokens(&mut tokenizer, &keys, &tokens)?;
        add_begin_and_end(&mut tokenizer, &keys, &tokens)?;
        let template = match metadata.get("tokenizer.chat_template") {
            Some(Value::String(template)) if template.contains("<|im_start|>") => Some(ChatTemplate::ChatMl),
            _ => None,
        };
        Ok(Self::from_parts(tokenizer, template))
    }
}

/// Control tokens (and the unknown one) become special, user-defined ones are found in texts but stay visible.
fn add_special_tokens(tokenizer: &mut tokenizers::Tokenizer, keys: &Keys<'_>, tokens: &[&str]) -> Result<()> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let Some(types) = keys.metadata.get(KEY) else {
        return Ok(());
    };
    let Value::Array(types) = types else {
        return Err(keys.wrong(KEY, "is no array"));
    };
    if types.len() != tokens.len() {
        return Err(keys.wrong(KEY, format_args!("has {} entries for {} tokens", types.len(), tokens.len())));
    }
    let (mut special, mut visible) = (Vec::new(), Vec::new());
    for (token, kind) in tokens.iter().zip(types) {
        match crate::weights::as_u64(kind) {
            Some(UNKNOWN | CONTROL) => special.push(AddedToken::from(*token, true)),
            Some(USER_DEFINED) => visible.push(AddedToken::from(*token, false).normalized(false)),
            Some(_) => {}
            None => return Err(keys.wrong(KEY, format_args!("holds {kind:?}, which is no type"))),
        }
    }
    tokenizer.add_special_tokens(special).map_err(wrap)?;
    tokenizer.add_tokens(visible).map_err(wrap)?;
    Ok(())
}

/// What `encode_for_model` puts around a text, as `add_bos_token` and `add_eos_token` say.
fn add_begin_and_end(tokenizer: &mut tokenizers::Tokenizer, keys: &Keys<'_>, tokens: &[&str]) -> Result<()> {
    let wanted = |flag: &str, key: &str| -> Result<Option<(String, u32)>> {
        if !keys.flag(flag) {
            return Ok(None);
        }
        let id = keys.metadata.get(key).and_then(crate::weights::as_u64).and_then(|id| u32::try_from(id).ok());
        let token = id.and_then(|id| tokens.get(id as usize).map(|token| ((*token).to_string(), id)));
        match token {
            Some(token) => Ok(Some(token)),
            None => Err(keys.wrong(key, "names no token of the vocabulary")),
        }
    };
    let begin = wanted("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id")?;
    let end = wanted("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id")?;
    if begin.is_none() && end.is_none() {
        return Ok(());
    }
    // Written by id, as a template's own syntax would trip over tokens with spaces or colons in them.
    let piece = |token: &Option<(String, u32)>| {
        token.as_ref().map(|(token, _)| serde_json::json!({"SpecialToken": {"id": token, "type_id": 0}}))
    };
    let text = |which: &str| serde_json::json!({"Sequence": {"id": which, "type_id": 0}});
    let single: Vec<_> = [piece(&begin), Some(text("A")), piece(&end)].into_iter().flatten().collect();
    let pair: Vec<_> = [piece(&begin), Some(text("A")), Some(text("B")), piece(&end)].into_iter().flatten().collect();
    let mut special = serde_json::Map::new();
    for (token, id) in [&begin, &end].into_iter().flatten() {
        special.insert(token.clone(), serde_json::json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let template = serde_json::json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special
    });
    let processor: tokenizers::PostProcessorWrapper = serde_json::from_value(template).map_err(wrap)?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}
