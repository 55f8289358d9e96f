//! Decoding ids as they come, without ever showing half a character.

use super::Tokenizer;
use crate::error::Result;

/// A window over the last ids: long enough that decoders which look at their neighbours (WordPiece, byte level) give the
/// text they would give for all ids at once, short enough that a step costs the same at any length.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Ids of the window: those whose text was given last, then those whose text was not given yet.
    ids: Vec<u32>,
    /// How many of them have been given.
    given: usize,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), given: 0 }
    }

    /// The text that one more id completes; empty while the bytes so far end within a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.take(false)
    }

    /// What is left at the end: bytes that never became a character show as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> Result<String> {
        let before = match self.ids.get(..self.given) {
            Some([]) | None => String::new(),
            Some(given) => self.tokenizer.decode(given)?,
        };
        let now = self.tokenizer.decode(&self.ids)?;
        if now.ends_with(char::REPLACEMENT_CHARACTER) && !all {
            return Ok(String::new());
        }
        let fresh = now.get(before.len()..).unwrap_or_default().to_string();
        if fresh.is_empty() {
            return Ok(fresh);
        }
        // What was fresh is the neighbour of what comes next; what was given before it is no longer needed.
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(fresh)
    }
}
