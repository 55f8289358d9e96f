//! New tokens as text, and the stop strings in it.

use crate::error::Result;
#[cfg(feature = "tokenizers")]
use crate::tokenizer::{TextStream, Tokenizer};
#[cfg(feature = "tokenizers")]
use std::sync::Arc;

/// What tokens are spelled with, where a service knows that.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    #[cfg(feature = "tokenizers")]
    tokenizer: Option<Arc<Tokenizer>>,
}

impl Vocabulary {
    #[cfg(feature = "tokenizers")]
    pub(super) fn of(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer: Some(tokenizer) }
    }

    /// The letters of one text, which ends before any of these strings.
    pub(super) fn begin(&self, stop: Vec<String>) -> Letters<'_> {
        Letters {
            #[cfg(feature = "tokenizers")]
            stream: self.tokenizer.as_deref().map(Tokenizer::stream),
            #[cfg(not(feature = "tokenizers"))]
            service: std::marker::PhantomData,
            search: StopSearch { stop, held: String::new() },
        }
    }
}

/// The text of one generation as it grows.
#[derive(Debug)]
pub(super) struct Letters<'v> {
    #[cfg(feature = "tokenizers")]
    stream: Option<TextStream<'v>>,
    #[cfg(not(feature = "tokenizers"))]
    service: std::marker::PhantomData<&'v Vocabulary>,
    #[cfg_attr(not(feature = "tokenizers"), allow(dead_code))] // there is no text without
    search: StopSearch,
}

impl Letters<'_> {
    /// What one more token completes, and whether a stop string is complete with it.
    pub(super) fn push(&mut self, token: u32) -> Result<(String, bool)> {
        #[cfg(feature = "tokenizers")]
        if let Some(stream) = &mut self.stream {
            return Ok(self.search.push(&stream.push(token)?));
        }
        #[cfg(not(feature = "tokenizers"))]
        let _ = (token, self.service);
        Ok((String::new(), false))
    }

    /// What is left when no token follows.
    pub(super) fn finish(&mut self) -> Result<String> {
        #[cfg(feature = "tokenizers")]
        if let Some(stream) = &mut self.stream {
            let (mut text, stopped) = self.search.push(&stream.finish()?);
            if !stopped {
                text.push_str(&self.search.held);
            }
            return Ok(text);
        }
        Ok(String::new())
    }
}

/// Looks for strings in a text that comes in pieces, holding back what may become one.
#[derive(Debug)]
struct StopSearch {
    stop: Vec<String>,
    held: String,
}

impl StopSearch {
    /// What can be shown now, and whether a stop string follows it.
    #[cfg_attr(not(feature = "tokenizers"), allow(dead_code))] // there is no text without
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let may_begin = |tail: &str| self.stop.iter().any(|stop| stop.starts_with(tail));
        let hold = self.held.char_indices().map(|(at, _)| at).find(|&at| self.held.get(at..).is_some_and(may_begin));
        let kept = hold.map_or_else(String::new, |at| self.held.split_off(at));
        (std::mem::replace(&mut self.held, kept), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(stop: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut search = StopSearch { stop: stop.iter().map(ToString::to_string).collect(), held: String::new() };
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, stopped) = search.push(piece);
            shown.push(text);
            if stopped {
                return (shown, true);
            }
        }
        (shown, false)
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn text_ends_before_a_stop_string_wherever_it_is_cut() {
        assert_eq!(search(&["END"], &["a", "bEN", "Dc"]), (strings(&["a", "b", ""]), true));
        assert_eq!(search(&["END"], &["aENDb"]), (strings(&["a"]), true));
        assert_eq!(search(&["b", "ab"], &["xab"]), (strings(&["x"]), true));
    }

    #[test]
    fn what_only_began_like_one_is_shown() {
        assert_eq!(search(&["END"], &["EN", "EN", "x"]), (strings(&["", "EN", "ENx"]), false));
        assert_eq!(search(&["日本"], &["a日", "x"]), (strings(&["a", "日x"]), false));
        assert_eq!(search(&[], &["a", "b"]), (strings(&["a", "b"]), false));
    }
}
