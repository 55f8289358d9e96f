//! Conversations as one sequence of tokens.

use super::Tokenizer;
use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What they say.
    pub content: String,
}

impl ChatMessage {
    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_string(), content: content.into() }
    }

    /// The message that says how to answer.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".to_string(), content: content.into() }
    }

    /// An earlier answer.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".to_string(), content: content.into() }
    }
}

/// How a model wants a conversation written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChatTemplate {
    /// `<|im_start|>role\ncontent<|im_end|>\n` per message, then `<|im_start|>assistant\n` (SmolLM2, Qwen2).
    ///
    /// No system message is put in front where the caller gives none.
    ChatMl,
}

const START: &str = "<|im_start|>";
const END: &str = "<|im_end|>";

impl ChatTemplate {
    /// The template whose marks a vocabulary has.
    pub(crate) fn of_vocabulary(id: impl Fn(&str) -> Option<u32>) -> Option<Self> {
        (id(START).is_some() && id(END).is_some()).then_some(Self::ChatMl)
    }

    /// The conversation as text, for eyes; [`Tokenizer::encode_chat`] does not go through it.
    pub fn render(&self, messages: &[ChatMessage]) -> String {
        let mut text = String::new();
        for message in messages {
            for part in [START, &message.role, "\n", &message.content, END, "\n"] {
                text.push_str(part);
            }
        }
        text.push_str(START);
        text.push_str("assistant\n");
        text
    }

    /// The conversation as ids: the marks by id, what stands between them as plain text.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let mark = |token: &str| {
            tokenizer
                .token_to_id(token)
                .ok_or_else(|| Error::Tokenizer { message: format!("the vocabulary has no `{token}`") })
        };
        let (start, end) = (mark(START)?, mark(END)?);
        let mut ids = Vec::new();
        for message in messages {
            ids.push(start);
            ids.extend(tokenizer.encode(&format!("{}\n{}", message.role, message.content), false)?);
            ids.push(end);
            ids.extend(tokenizer.encode("\n", false)?);
        }
        ids.push(start);
        ids.extend(tokenizer.encode("assistant\n", false)?);
        Ok(ids)
    }
}
