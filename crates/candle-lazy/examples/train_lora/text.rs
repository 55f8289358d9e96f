//! A file of questions and answers as documents.

use candle_lazy::nn::data::Document;
use candle_lazy::nn::tokenizer::{ChatMessage, Tokenizer};
use std::error::Error;
use std::path::Path;

/// The text that comes with the example.
const FACTS: &str = include_str!("facts.txt");

/// Questions, where a text has one, and texts.
pub(crate) type Texts = Vec<(Option<String>, String)>;

/// Blocks between blank lines: a question (`Q:`) and its answer (`A:`), or a plain text. Lines that begin with `#` are remarks.
pub(crate) fn read(path: Option<&Path>) -> Result<Texts, Box<dyn Error>> {
    let (text, name) = match path {
        None => (FACTS.to_string(), "the facts".to_string()),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            (text, path.display().to_string())
        }
    };
    let mut blocks: Vec<Vec<&str>> = vec![Vec::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        match (line.trim().is_empty(), blocks.last_mut()) {
            (true, _) => blocks.push(Vec::new()),
            (false, Some(block)) => block.push(line),
            (false, None) => {}
        }
    }
    let mut read = Vec::new();
    for block in blocks.into_iter().filter(|block| !block.is_empty()) {
        let Some(question) = block[0].strip_prefix("Q:") else {
            read.push((None, block.join("\n")));
            continue;
        };
        let rest = block[1..].join("\n");
        let Some(answer) = rest.strip_prefix("A:") else {
            return Err(format!("{name}: the question `{}` has no line that begins with `A:`", question.trim()).into());
        };
        read.push((Some(question.trim().to_string()), answer.trim().to_string()));
    }
    if read.is_empty() {
        return Err(format!("{name}: there is no text in it").into());
    }
    Ok(read)
}

/// What a model is given for a question: the user's message in its chat template, or `Q: …\nA:` where it has none.
pub(crate) fn prompt(tokenizer: &Tokenizer, question: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    Ok(match tokenizer.chat_template() {
        Some(_) => tokenizer.encode_chat(&[ChatMessage::user(question)])?,
        None => tokenizer.encode(&format!("Q: {question}\nA:"), true)?,
    })
}

/// The documents; of an answer, the question before it is read and not learned.
pub(crate) fn documents(
    tokenizer: &Tokenizer,
    texts: &[(Option<String>, String)],
) -> Result<Vec<Document>, Box<dyn Error>> {
    let mut documents = Vec::with_capacity(texts.len());
    for (question, text) in texts {
        documents.push(match question {
            None => Document::new(tokenizer.encode(text, true)?)?,
            Some(question) => {
                let mut ids = prompt(tokenizer, question)?;
                let len = ids.len();
                let space = if tokenizer.chat_template().is_some() { "" } else { " " };
                ids.extend(tokenizer.encode(&format!("{space}{text}"), false)?);
                Document::with_prompt(ids, len)?
            }
        });
    }
    Ok(documents)
}
