//! Text to token ids and back.
//!
//! Two sources: Hugging Face's `tokenizer.json`, and the vocabulary in a GGUF file's metadata. Nothing is ever added to
//! a text unless asked for: [`Tokenizer::encode`] gives the text's own tokens, [`Tokenizer::encode_for_model`] what the
//! model was trained to be given (BERT's `[CLS] … [SEP]`), [`Tokenizer::encode_chat`] a conversation.

mod chat;
mod from_gguf;
mod stream;

pub use chat::{ChatMessage, ChatTemplate};
pub use stream::TextStream;

use crate::error::{Error, Result};
use std::path::Path;
use std::sync::OnceLock;
use tokenizers::{PostProcessor, TruncationDirection};

/// A tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    /// Recognises special tokens that are written in a text.
    parsing: tokenizers::Tokenizer,
    /// The same, but takes their spelling for plain text; made when it is first needed.
    plain: OnceLock<tokenizers::Tokenizer>,
    chat: Option<ChatTemplate>,
    max_tokens: Option<usize>,
}

fn wrap(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer { message: error.to_string() }
}

impl Tokenizer {
    /// From Hugging Face's `tokenizer.json`.
    ///
    /// Padding that the file asks for is dropped (batches are padded where they are made, to their longest text).
    /// Truncation becomes a limit, [`Tokenizer::max_tokens`]: nothing is cut off a text without a word.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a file that is no tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let tokenizer =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| Error::format(path, "tokenizer.json", e))?;
        Ok(Self::from_parts(tokenizer, None))
    }

    /// From a tokenizer of the `tokenizers` crate.
    pub fn from_tokenizers(tokenizer: tokenizers::Tokenizer) -> Self {
        Self::from_parts(tokenizer, None)
    }

    fn from_parts(mut tokenizer: tokenizers::Tokenizer, chat: Option<ChatTemplate>) -> Self {
        let max_tokens = tokenizer.get_truncation().map(|truncation| truncation.max_length);
        // Only a truncation can be refused, none cannot.
        drop(tokenizer.with_truncation(None));
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(false);
        let chat = chat.or_else(|| ChatTemplate::of_vocabulary(|token| tokenizer.token_to_id(token)));
        Self { parsing: tokenizer, plain: OnceLock::new(), chat, max_tokens }
    }

    fn with_special_tokens(&self, parse_special: bool) -> &tokenizers::Tokenizer {
        if parse_special {
            return &self.parsing;
        }
        self.plain.get_or_init(|| {
            let mut plain = self.parsing.clone();
            plain.set_encode_special_tokens(true);
            plain
        })
    }

    /// The ids of `text`, nothing added.
    ///
    /// Where `parse_special`, special tokens written in the text (`<|im_end|>`) are those tokens; else they are their
    /// letters, as text from outside should be taken.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with what the tokenizer said.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        let encoding = self.with_special_tokens(parse_special).encode_fast(text, false).map_err(wrap)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The most tokens that a text may have for the model, those around it included, where the tokenizer's file names a
    /// number (its truncation).
    pub fn max_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    /// The ids of `text` with what the model expects around them, as its post-processor says; special tokens written in
    /// the text are recognised.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] for more than [`Tokenizer::max_tokens`]; [`Error::Tokenizer`] with what the tokenizer said.
    #[track_caller]
    pub fn encode_for_model(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.parsing.encode_fast(text, true).map_err(wrap)?;
        match self.max_tokens {
            Some(most) if encoding.len() > most => Err(Error::prompt_too_long(encoding.len(), most)),
            _ => Ok(encoding.get_ids().to_vec()),
        }
    }

    /// As [`Tokenizer::encode_for_model`], but what exceeds `most` tokens or [`Tokenizer::max_tokens`] is cut off the end of
    /// the text; what stands around it stays.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with what the tokenizer said, or where what stands around a text leaves no room for it.
    pub fn encode_for_model_truncated(&self, text: &str, most: usize) -> Result<Vec<u32>> {
        let most = self.max_tokens.map_or(most, |max| max.min(most));
        let around = self.parsing.get_post_processor().map_or(0, |around| around.added_tokens(false));
        if most <= around {
            return Err(wrap(format_args!("{most} tokens leave no room for a text: {around} stand around it")));
        }
        let mut encoding = self.parsing.encode_fast(text, false).map_err(wrap)?;
        encoding.truncate(most - around, 0, TruncationDirection::Right);
        Ok(self.parsing.post_process(encoding, None, true).map_err(wrap)?.get_ids().to_vec())
    }

    /// The ids of a conversation in the model's template, open for the assistant's answer.
    ///
    /// What the messages say is taken as plain text: a special token spelled in one cannot end it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the model has no template that is known, [`Error::Tokenizer`].
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        let template = self.chat.ok_or_else(|| Error::Unsupported {
            what: "chat template",
            found: "none that is known".to_string(),
            supported: "ChatML",
        })?;
        template.encode(self, messages)
    }

    /// The chat template, where the model has one that is known.
    pub fn chat_template(&self) -> Option<ChatTemplate> {
        self.chat
    }

    /// The text of `ids`, special tokens left out. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with what the tokenizer said.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.parsing.decode(ids, true).map_err(wrap)
    }

    /// A decoder for ids that come one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// The id of a token, by its spelling.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.parsing.token_to_id(token)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.parsing.get_vocab_size(true)
    }
}
