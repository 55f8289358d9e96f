//! A file of questions and answers as documents.

use candle_lazy::nn::data::Document;
use candle_lazy::nn::tokenizer::{ChatMessage, Tokenizer};
use std::error::Error;
use std::path::Path;

/// The text that comes with the example.
const FACTS: &str = include_str!("facts.txt");

/// A block of a file.
pub(crate) enum Text {
    /// As it is.
    Plain(String),
    /// A question and what is to be answered.
    Answer { question: String, answer: String },
    /// A question that is to be answered as it was before the training.
    Keep(String),
}

/// What a model says to a question.
pub(crate) struct Reply {
    pub(crate) ids: Vec<u32>,
    /// It ended by itself.
    pub(crate) whole: bool,
}

/// Blocks between blank lines: a question (`Q:`) and its answer (`A:`), a question whose answer is to stay (`Keep:`), or a plain text. Lines
/// that begin with `#` are remarks.
pub(crate) fn read(path: Option<&Path>) -> Result<Vec<Text>, Box<dyn Error>> {
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
    for block in blocks {
        let Some((first, rest)) = block.split_first() else {
            continue;
        };
        let (rest, owned) = (rest.join("\n"), |part: &str| part.trim().to_string());
        read.push(match (first.strip_prefix("Q:"), first.strip_prefix("Keep:")) {
            (Some(question), _) => match rest.strip_prefix("A:") {
                Some(answer) => Text::Answer { question: owned(question), answer: owned(answer) },
                None => {
                    let question = question.trim();
                    return Err(format!("{name}: the question `{question}` has no line that begins with `A:`").into());
                }
            },
            (None, Some(question)) if rest.is_empty() => Text::Keep(owned(question)),
            (None, Some(question)) => {
                return Err(format!("{name}: after `Keep: {}` comes `{rest}`", question.trim()).into());
            }
            (None, None) => Text::Plain(block.join("\n")),
        });
    }
    if read.is_empty() {
        return Err(format!("{name}: there is no text in it").into());
    }
    Ok(read)
}

/// What a model is given for a question: the user's message in ChatML, without the system message that the model's own template may put in
/// front, or `Q: …\nA:` where it knows no such messages.
pub(crate) fn prompt(tokenizer: &Tokenizer, question: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    Ok(match tokenizer.chat_template() {
        Some(_) => tokenizer.encode_chat(&[ChatMessage::user(question)])?,
        None => tokenizer.encode(&format!("Q: {question}\nA:"), true)?,
    })
}

/// The documents, each with the token that ends it; of an answer, the question before it is read and not learned. `reply` says what the model
/// answers to a question whose answer is to stay: where that was cut off, no end is learned.
pub(crate) fn documents(
    tokenizer: &Tokenizer,
    texts: &[Text],
    end: Option<u32>,
    reply: impl Fn(&str) -> Result<Reply, Box<dyn Error>>,
) -> Result<Vec<Document>, Box<dyn Error>> {
    let mut documents = Vec::with_capacity(texts.len());
    for text in texts {
        let (mut ids, question) = match text {
            Text::Plain(text) => (tokenizer.encode(text, true)?, 0),
            Text::Answer { question, .. } | Text::Keep(question) => {
                let ids = prompt(tokenizer, question)?;
                let len = ids.len();
                (ids, len)
            }
        };
        let mut whole = true;
        match text {
            Text::Plain(_) => {}
            Text::Answer { answer, .. } => {
                let space = if tokenizer.chat_template().is_some() { "" } else { " " };
                ids.extend(tokenizer.encode(&format!("{space}{answer}"), false)?);
            }
            Text::Keep(question) => {
                let reply = reply(question)?;
                ids.extend(reply.ids);
                whole = reply.whole;
            }
        }
        ids.extend(end.filter(|_| whole));
        documents.push(Document::with_prompt(ids, question)?);
    }
    Ok(documents)
}
