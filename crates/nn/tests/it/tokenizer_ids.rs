//! The ids that llama.cpp and Hugging Face's tokenizer give for SmolLM2, without its file: the part of its vocabulary that
//! these texts need, at the published ids, in a vocabulary of the published size.
//!
//! What a space put in front of a text would need is in the part too, so that it would show. That digits stand alone shows
//! in the tests of `tokenizer`, where other splittings have merges for them.

use crate::common::TestResult;
use candle_core::quantized::gguf_file::Value;
use candle_lazy_nn::tokenizer::{ChatMessage, Tokenizer};
use std::collections::BTreeMap;
use std::path::Path;

const VOCABULARY: usize = 49152;

const MARKS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

#[rustfmt::skip]
const TOKENS: [(usize, &str); 101] = [
    (30, "."), (33, "1"), (35, "3"), (36, "4"), (37, "5"), (40, "8"), (41, "9"), (43, ";"), (45, "="), (47, "?"),
    (50, "B"), (54, "F"), (68, "T"), (71, "W"), (81, "a"), (83, "c"), (85, "e"), (86, "f"), (88, "h"), (89, "i"),
    (92, "l"), (94, "n"), (95, "o"), (96, "p"), (98, "r"), (99, "s"), (100, "t"), (101, "u"), (102, "v"), (104, "x"),
    (115, "¥"), (122, "¬"), (124, "¯"), (142, "Ã"), (177, "æ"), (197, "ĉ"), (198, "Ċ"), (216, "Ġ"), (241, "Ĺ"),
    (246, "ľ"), (252, "Ġt"), (254, "in"), (255, "he"), (257, "re"), (259, "er"), (260, "Ġthe"), (261, "at"),
    (263, "Ġo"), (265, "Ġc"), (269, "it"), (270, "or"), (271, "is"), (272, "al"), (276, "an"), (281, "Ġin"),
    (282, "Ġof"), (292, "as"), (304, "Ġn"), (307, "ve"), (312, "ĠT"), (314, "Ġis"), (315, "ur"), (319, "ce"),
    (326, "Ġu"), (363, "ist"), (376, "us"), (378, "ĠThe"), (389, "ĠB"), (403, "ant"), (408, "ĠW"), (426, "ĠF"),
    (446, "Ġ="), (468, "Ġus"), (504, "The"), (512, "ap"), (520, "ass"), (524, "ance"), (667, "urn"), (962, "hat"),
    (1201, "ital"), (1395, "orn"), (1408, "Ġcap"), (1780, "What"), (1792, "Ġx"), (1812, "ĠWhat"), (2133, "ĠFr"),
    (2914, "Ġuser"), (3274, "ret"), (3575, "Ġcapital"), (4093, "user"), (4649, "ĠFrance"), (5406, "return"),
    (9531, "istant"), (14483, "æľ"), (15486, "Ġna"), (17097, "Ġæ"), (19080, "ĠBorn"), (25212, "Born"), (25972, "Ã¯"),
    (40993, "æľ¬"), (46494, "Ã¯ve"),
];

/// In the order of the published ones.
#[rustfmt::skip]
const MERGES: [&str; 61] = [
    "Ġ t", "i n", "h e", "r e", "e r", "Ġt he", "a t", "Ġ o", "Ġ c", "i t", "o r", "i s", "a l", "a n", "Ġ in",
    "Ġo f", "a s", "Ġ n", "v e", "Ġ T", "Ġ is", "u r", "c e", "Ġ u", "is t", "u s", "ĠT he", "Ġ B", "an t", "Ġ W",
    "Ġ F", "Ġ =", "Ġu s", "T he", "a p", "as s", "an ce", "ur n", "h at", "it al", "or n", "Ġc ap", "W hat", "Ġ x",
    "ĠW hat", "ĠF r", "Ġus er", "re t", "Ġcap ital", "us er", "ĠFr ance", "ret urn", "ist ant", "æ ľ", "Ġn a", "Ġ æ",
    "ĠB orn", "B orn", "Ã ¯", "æľ ¬", "Ã¯ ve",
];

/// Texts and the ids on which both agree.
const REFERENCE: [(&str, &[u32]); 4] = [
    ("The capital of France is", &[504, 3575, 282, 4649, 314]),
    ("Born in 1984.", &[25212, 281, 216, 33, 41, 40, 36, 30]),
    (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        &[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
    ),
    (
        "x  = 3.14159;\n\treturn naïve 日本",
        &[104, 216, 446, 216, 35, 30, 33, 36, 33, 37, 41, 43, 198, 197, 5406, 15486, 46494, 17097, 241, 115, 40993],
    ),
];

fn tokenizer() -> candle_lazy_nn::Result<Tokenizer> {
    let mut tokens: Vec<String> = (0..VOCABULARY).map(|id| format!("<unused {id}>")).collect();
    for (id, token) in TOKENS.into_iter().chain(MARKS.into_iter().enumerate()) {
        tokens[id] = token.to_string();
    }
    let types = (0..VOCABULARY).map(|id| Value::I32(if id < MARKS.len() { 3 } else { 1 })).collect();
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let metadata = BTreeMap::from([
        ("tokenizer.ggml.model".to_string(), Value::String("gpt2".to_string())),
        ("tokenizer.ggml.pre".to_string(), Value::String("smollm".to_string())),
        ("tokenizer.ggml.tokens".to_string(), strings(tokens)),
        ("tokenizer.ggml.merges".to_string(), strings(MERGES.map(str::to_string).to_vec())),
        ("tokenizer.ggml.token_type".to_string(), Value::Array(types)),
        ("tokenizer.ggml.bos_token_id".to_string(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".to_string(), Value::U32(2)),
    ]);
    Tokenizer::from_gguf_metadata(Path::new("smollm2.gguf"), &metadata)
}

#[test]
fn smollm2_gives_the_reference_ids() -> TestResult {
    let tokenizer = tokenizer()?;
    for (text, ids) in REFERENCE {
        assert_eq!(tokenizer.encode(text, true)?, ids, "{text:?}");
        assert_eq!(tokenizer.encode_for_model(text)?, ids, "nothing stands around a text: {text:?}");
    }
    let chat = tokenizer.encode_chat(&[ChatMessage::user("What is the capital of France?")])?;
    assert_eq!(chat, REFERENCE[2].1);
    Ok(())
}

#[test]
fn the_reference_ids_come_back_as_text() -> TestResult {
    let tokenizer = tokenizer()?;
    for (text, ids) in REFERENCE {
        let shown = MARKS.iter().fold(text.to_string(), |text, mark| text.replace(mark, ""));
        assert_eq!(tokenizer.decode(ids)?, shown);
    }
    Ok(())
}

#[test]
fn a_space_in_front_gives_other_ids() -> TestResult {
    let tokenizer = tokenizer()?;
    assert_eq!(tokenizer.encode(" The capital of France is", true)?, [378, 3575, 282, 4649, 314]);
    assert_eq!(tokenizer.encode(" Born", true)?, [19080]);
    Ok(())
}
