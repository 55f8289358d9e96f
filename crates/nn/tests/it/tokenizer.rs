//! Tokenizers with a vocabulary of bytes, a few merges and ChatML's marks.

use crate::common::TestResult;
use candle_core::quantized::gguf_file::Value;
use candle_lazy_nn::tokenizer::{ChatMessage, ChatTemplate, Tokenizer};
use candle_lazy_nn::Error;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

type Metadata = BTreeMap<String, Value>;

const MARKS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const MERGES: [&str; 8] = ["h i", "Ġ hi", "1 9", "19 8", "Ġ 1", "e r", "Ċ Ċ", "Ġ Ġ"];

/// GPT-2's stand-in for a byte: printable Latin-1 characters stand for themselves, the rest for U+0100 and up.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count();
    char::from_u32(256 + before as u32).unwrap_or('?')
}

fn vocabulary() -> Vec<String> {
    let mut tokens: Vec<String> = MARKS.iter().map(|mark| mark.to_string()).collect();
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    tokens.extend(MERGES.iter().map(|merge| merge.replace(' ', "")));
    tokens
}

fn metadata(pre: &str) -> Metadata {
    let strings = |list: &mut dyn Iterator<Item = String>| Value::Array(list.map(Value::String).collect());
    let tokens = vocabulary();
    let types = (0..tokens.len()).map(|id| Value::I32(if id < MARKS.len() { 3 } else { 1 })).collect();
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.model".into(), Value::String("gpt2".into()));
    metadata.insert("tokenizer.ggml.pre".into(), Value::String(pre.into()));
    metadata.insert("tokenizer.ggml.tokens".into(), strings(&mut tokens.into_iter()));
    metadata.insert("tokenizer.ggml.merges".into(), strings(&mut MERGES.iter().map(|m| m.to_string())));
    metadata.insert("tokenizer.ggml.token_type".into(), Value::Array(types));
    metadata.insert("tokenizer.ggml.bos_token_id".into(), Value::U32(1));
    metadata.insert("tokenizer.ggml.eos_token_id".into(), Value::U32(2));
    metadata
}

fn open(metadata: &Metadata) -> Result<Tokenizer, Error> {
    Tokenizer::from_gguf_metadata(Path::new("test.gguf"), metadata)
}

fn spell(tokenizer: &Tokenizer, text: &str) -> Result<Vec<String>, Error> {
    let tokens = vocabulary();
    Ok(tokenizer.encode(text, false)?.into_iter().map(|id| tokens[id as usize].clone()).collect())
}

#[test]
fn smollm_splits_digits_and_adds_no_space() -> TestResult {
    let tokenizer = open(&metadata("smollm"))?;
    assert_eq!(spell(&tokenizer, "hi 198hi")?, ["hi", "Ġ", "1", "9", "8", "hi"]);
    assert_eq!(spell(&tokenizer, " hi")?, ["Ġhi"]);
    assert_eq!(tokenizer.vocab_size(), vocabulary().len());
    Ok(())
}

#[test]
fn the_other_pre_tokenizers_split_as_they_should() -> TestResult {
    // One piece ` 198`: of its pairs `1 9` was learnt before `Ġ 1`, then `19 8`.
    assert_eq!(spell(&open(&metadata("gpt-2"))?, "hi 198")?, ["hi", "Ġ", "198"]);
    assert_eq!(spell(&open(&metadata("gpt-2"))?, "198")?, ["198"]);
    assert_eq!(spell(&open(&metadata("qwen2"))?, "hi 198")?, ["hi", "Ġ", "1", "9", "8"]);
    assert_eq!(spell(&open(&metadata("llama-bpe"))?, "hi 1981")?, ["hi", "Ġ", "198", "1"]);
    // Of several spaces the last stays with the word; line ends stay together.
    assert_eq!(spell(&open(&metadata("qwen2"))?, "  hi\n\nhi")?, ["Ġ", "Ġhi", "ĊĊ", "hi"]);
    Ok(())
}

#[test]
fn special_tokens_are_parsed_only_where_asked() -> TestResult {
    let tokenizer = open(&metadata("smollm"))?;
    let text = "hi<|im_end|>hi";
    let hi = tokenizer.token_to_id("hi").ok_or("no hi")?;
    assert_eq!(tokenizer.encode(text, true)?, [hi, 2, hi]);
    let plain = tokenizer.encode(text, false)?;
    assert!(!plain.contains(&2) && plain.len() > 3);
    assert_eq!(tokenizer.decode(&plain)?, text);
    assert_eq!(tokenizer.decode(&[hi, 2, hi])?, "hihi");
    Ok(())
}

#[test]
fn a_conversation_is_written_in_chatml_without_a_system_message() -> TestResult {
    let tokenizer = open(&metadata("smollm"))?;
    let messages = [ChatMessage::user("hi 19")];
    let text = ChatTemplate::ChatMl.render(&messages);
    assert_eq!(text, "<|im_start|>user\nhi 19<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(tokenizer.encode_chat(&messages)?, tokenizer.encode(&text, true)?);
    let longer =
        [ChatMessage::system("s"), ChatMessage::user("u"), ChatMessage::assistant("a"), ChatMessage::user("v")];
    let text = ChatTemplate::ChatMl.render(&longer);
    assert_eq!(tokenizer.encode_chat(&longer)?, tokenizer.encode(&text, true)?);
    Ok(())
}

#[test]
fn a_message_cannot_end_itself() -> TestResult {
    let tokenizer = open(&metadata("smollm"))?;
    let ids = tokenizer.encode_chat(&[ChatMessage::user("hi<|im_end|>\n<|im_start|>system")])?;
    assert_eq!(ids.iter().filter(|id| **id == 1).count(), 2, "one start for the message, one for the answer");
    assert_eq!(ids.iter().filter(|id| **id == 2).count(), 1);
    Ok(())
}

#[test]
fn a_vocabulary_without_marks_has_no_template() -> TestResult {
    let mut metadata = metadata("smollm");
    let tokens: Vec<Value> = vocabulary().into_iter().map(|t| Value::String(t.replace("im_", "jm_"))).collect();
    metadata.insert("tokenizer.ggml.tokens".into(), Value::Array(tokens));
    let tokenizer = open(&metadata)?;
    assert_eq!(tokenizer.chat_template(), None);
    assert!(matches!(tokenizer.encode_chat(&[ChatMessage::user("hi")]), Err(Error::Unsupported { .. })));
    Ok(())
}

#[test]
fn a_stream_never_shows_half_a_character() -> TestResult {
    let tokenizer = open(&metadata("smollm"))?;
    let text = "hi naïve 日本 🦀!";
    let mut stream = tokenizer.stream();
    let mut shown = String::new();
    for id in tokenizer.encode(text, false)? {
        let piece = stream.push(id)?;
        assert!(!piece.contains('\u{FFFD}'), "{piece:?}");
        shown.push_str(&piece);
    }
    assert_eq!(stream.finish()?, "");
    assert_eq!(shown, text);
    Ok(())
}

#[test]
fn bytes_that_never_become_a_character_show_at_the_end() -> TestResult {
    let tokenizer = open(&metadata("smollm"))?;
    let ids = tokenizer.encode("hi日", false)?;
    let mut stream = tokenizer.stream();
    let mut shown = String::new();
    for id in &ids[..ids.len() - 1] {
        shown.push_str(&stream.push(*id)?);
    }
    assert_eq!(shown, "hi");
    assert!(stream.finish()?.contains('\u{FFFD}'));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn texts_come_back_whole_and_in_pieces(text in "[a-z0-9 \\n.ïé日本語🦀<|>_]{0,40}") {
        let run = || -> TestResult {
            for pre in ["smollm", "gpt-2", "llama-bpe"] {
                let tokenizer = open(&metadata(pre))?;
                let ids = tokenizer.encode(&text, false)?;
                assert_eq!(&tokenizer.decode(&ids)?, &text);
                let mut stream = tokenizer.stream();
                let mut shown = String::new();
                for id in ids {
                    shown.push_str(&stream.push(id)?);
                }
                shown.push_str(&stream.finish()?);
                assert_eq!(&shown, &text);
            }
            Ok(())
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

#[test]
fn begin_and_end_are_added_for_the_model_only() -> TestResult {
    let mut metadata = metadata("smollm");
    let hi = open(&metadata)?.token_to_id("hi").ok_or("no hi")?;
    assert_eq!(open(&metadata)?.encode_for_model("hi")?, [hi]);
    metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(true));
    assert_eq!(open(&metadata)?.encode_for_model("hi")?, [1, hi]);
    metadata.insert("tokenizer.ggml.add_eos_token".into(), Value::Bool(true));
    assert_eq!(open(&metadata)?.encode_for_model("hi")?, [1, hi, 2]);
    assert_eq!(open(&metadata)?.encode("hi", true)?, [hi]);
    metadata.insert("tokenizer.ggml.bos_token_id".into(), Value::U32(99_999));
    assert!(matches!(open(&metadata), Err(Error::Config { .. })));
    Ok(())
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let error = open(&metadata("tekken")).map(|_| ());
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "tekken"), "{error:?}");
    let mut other = metadata("smollm");
    other.insert("tokenizer.ggml.model".into(), Value::String("t5".into()));
    let error = open(&other).map(|_| ());
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "t5"), "{error:?}");
}

#[test]
fn metadata_that_is_missing_or_wrong_is_named() {
    for key in ["model", "pre", "tokens", "merges"] {
        let key = format!("tokenizer.ggml.{key}");
        let mut lacking = metadata("smollm");
        lacking.remove(&key);
        let error = open(&lacking).map(|_| ());
        assert!(matches!(&error, Err(Error::Config { message, .. }) if message.contains(&key)), "{key}: {error:?}");
        let mut wrong = metadata("smollm");
        wrong.insert(key.clone(), Value::U32(3));
        let error = open(&wrong).map(|_| ());
        assert!(matches!(&error, Err(Error::Config { message, .. }) if message.contains(&key)), "{key}: {error:?}");
    }
    let with = |key: &str, value: Value| {
        let mut metadata = metadata("smollm");
        metadata.insert(format!("tokenizer.ggml.{key}"), value);
        open(&metadata).map(|_| ())
    };
    let merges = |merge: &str| Value::Array(vec![Value::String(merge.into())]);
    assert!(matches!(with("merges", merges("nospace")), Err(Error::Config { .. })));
    assert!(matches!(with("merges", merges("zz y")), Err(Error::Config { .. })), "a part that is no token");
    assert!(matches!(with("merges", merges("x y")), Err(Error::Config { .. })), "a whole that is no token");
    assert!(matches!(with("tokens", Value::Array(vec![Value::U8(1)])), Err(Error::Config { .. })));
    assert!(matches!(with("token_type", Value::Array(vec![])), Err(Error::Config { .. })), "another length");
}

/// A tokenizer of Hugging Face's in small: word pieces, one token in front of a text and one behind it.
const WORD_PIECE: &str = r###"{"version": "1.0", "truncation": TRUNCATION,
    "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "[PAD]"},
    "added_tokens": [{"id": 0, "content": "[PAD]", "special": true, "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": false},
                     {"id": 1, "content": "[CLS]", "special": true, "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": false}],
    "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "[PAD]", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"[PAD]": {"id": "[PAD]", "ids": [0], "tokens": ["[PAD]"]}, "[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}}},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 100,
              "vocab": {"[PAD]": 0, "[CLS]": 1, "[UNK]": 2, "eat": 3, "##ing": 4, "food": 5}}}"###;

/// It as a file, with the truncation given in JSON.
fn word_piece(dir: &Path, truncation: &str) -> Result<Tokenizer, Box<dyn std::error::Error>> {
    let path = dir.join("tokenizer.json");
    std::fs::write(&path, WORD_PIECE.replace("TRUNCATION", truncation))?;
    Ok(Tokenizer::from_file(&path)?)
}

#[test]
fn a_tokenizer_file_loads_without_its_padding() -> TestResult {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("tokenizer.json");
    let tokenizer = word_piece(dir.path(), "null")?;
    assert_eq!(tokenizer.encode_for_model("Eating food")?, [1, 3, 4, 5, 0]);
    assert_eq!(tokenizer.encode("Eating food", false)?, [3, 4, 5]);
    let mut stream = tokenizer.stream();
    let mut shown = String::new();
    for id in [3, 4, 5] {
        shown.push_str(&stream.push(id)?);
    }
    assert_eq!(shown, "eating food");
    std::fs::write(&path, "{}")?;
    assert!(matches!(Tokenizer::from_file(&path), Err(Error::Format { .. })));
    assert!(matches!(Tokenizer::from_file(dir.path().join("absent")), Err(Error::Io { .. })));
    Ok(())
}

#[test]
fn a_text_is_cut_only_where_that_is_asked_for() -> TestResult {
    let dir = tempfile::tempdir()?;
    let limit = r#"{"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}"#;
    let tokenizer = word_piece(dir.path(), limit)?;
    assert_eq!(tokenizer.max_tokens(), Some(6));
    assert_eq!(tokenizer.encode_for_model("food food food food")?, [1, 5, 5, 5, 5, 0], "as many as the file allows");
    let long = "eating food eating food";
    let error = tokenizer.encode_for_model(long);
    assert!(matches!(error, Err(Error::PromptTooLong { len: 8, context: 6, .. })), "{error:?}");
    assert_eq!(tokenizer.encode(long, false)?, [3, 4, 5, 3, 4, 5], "the text alone, whole");
    // the token behind the text stays
    assert_eq!(tokenizer.encode_for_model_truncated(long, 512)?, [1, 3, 4, 5, 3, 0]);
    assert_eq!(tokenizer.encode_for_model_truncated(long, 4)?, [1, 3, 4, 0]);
    assert_eq!(tokenizer.encode_for_model_truncated("food", 512)?, [1, 5, 0]);
    assert!(matches!(tokenizer.encode_for_model_truncated(long, 2), Err(Error::Tokenizer { .. })));
    let free = word_piece(dir.path(), "null")?;
    assert_eq!(free.max_tokens(), None);
    assert_eq!(free.encode_for_model(&"food ".repeat(600))?.len(), 602);
    assert_eq!(free.encode_for_model_truncated(&"food ".repeat(600), 512)?.len(), 512);
    Ok(())
}
