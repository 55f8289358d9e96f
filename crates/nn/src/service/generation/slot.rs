//! A text that is being continued.

use super::request::{Finish, Job};
use super::stream::Piece;
use super::text::{Letters, Vocabulary};
use crate::error::{Error, Result};
use crate::lora::LoraSet;
use crate::models::{Cache, StopReason};
use crate::sampling::Chooser;
use candle_lazy_exec::batch::Drawn;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request with a cache.
#[derive(Debug)]
pub(super) struct Slot<'v> {
    drawn: Drawn<Job, Result<Finish>>,
    job: Job,
    /// The prompt and what has been generated.
    history: Vec<u32>,
    pub(super) cache: Cache,
    /// Computed in steps of its own until it has caught up: a step with others failed.
    pub(super) alone: bool,
    /// Numbers the requests in the order in which they began.
    pub(super) arrival: u64,
    chooser: Chooser,
    new_tokens: usize,
    letters: Letters<'v>,
    waited: Duration,
    began: Instant,
}

impl<'v> Slot<'v> {
    pub(super) fn new(
        drawn: Drawn<Job, Result<Finish>>,
        mut job: Job,
        cache: Cache,
        arrival: u64,
        vocabulary: &'v Vocabulary,
    ) -> Self {
        let letters = vocabulary.begin(std::mem::take(&mut job.stop));
        let history = std::mem::take(&mut job.prompt);
        let (chooser, waited) = (job.sampling.chooser(), drawn.waited());
        let (alone, began, new_tokens) = (false, Instant::now(), 0);
        Self { drawn, job, history, cache, alone, arrival, chooser, new_tokens, letters, waited, began }
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.history.len() - self.new_tokens
    }

    pub(super) fn new_tokens(&self) -> usize {
        self.new_tokens
    }

    pub(super) fn capacity(&self) -> usize {
        self.job.capacity
    }

    pub(super) fn adapter(&self) -> Option<&Arc<LoraSet>> {
        self.job.adapter.as_ref()
    }

    /// Positions that are to be computed before a token can be chosen: one while it runs, more of a prompt.
    pub(super) fn behind(&self) -> usize {
        self.history.len().saturating_sub(self.cache.position())
    }

    /// The next `take` of them, the cache that they go to, and whether they are the last.
    pub(super) fn next(&mut self, take: usize) -> (&[u32], &mut Cache, Option<&LoraSet>, bool) {
        let start = self.cache.position();
        let end = start.saturating_add(take).min(self.history.len());
        let ids = self.history.get(start..end).unwrap_or_default();
        (ids, &mut self.cache, self.job.adapter.as_deref(), end == self.history.len())
    }

    /// Why it is to leave before the next step, if it is: nobody waits for it, or it is too late.
    pub(super) fn leaves(&self, now: Instant) -> Option<Leave> {
        if self.drawn.is_cancelled() {
            return Some(Leave::Cancelled);
        }
        self.job.deadline.filter(|deadline| *deadline <= now).map(|_| Leave::TooLate)
    }

    /// Takes the logits after its last position: the next token, and why the text ends with or before it, if it does.
    pub(super) fn take(&mut self, logits: &[f32]) -> Result<Option<StopReason>> {
        let token = self.chooser.choose(logits, &self.history)?;
        let token = token.ok_or(Error::Logits { position: self.cache.position() })?;
        if self.job.stop_ids.contains(&token) {
            return Ok(Some(StopReason::EndOfText));
        }
        self.history.push(token);
        self.new_tokens += 1;
        let (text, stopped) = self.letters.push(token)?;
        self.job.pieces.push(Piece { token: Some(token), text });
        Ok(if stopped { Some(StopReason::StopString) } else { self.full() })
    }

    /// Why no further token fits, if none does.
    pub(super) fn full(&self) -> Option<StopReason> {
        if self.new_tokens >= self.job.max_new_tokens {
            return Some(StopReason::MaxNewTokens);
        }
        (self.history.len() > self.job.most).then_some(StopReason::ContextFull)
    }

    /// From submission to now.
    pub(super) fn age(&self) -> Duration {
        self.waited + self.began.elapsed()
    }

    pub(super) fn ran(&self) -> Duration {
        self.began.elapsed()
    }

    /// Answers the caller; gives the cache for another text.
    pub(super) fn finish(mut self, end: Result<StopReason>) -> Cache {
        let end = end.and_then(|reason| {
            if reason != StopReason::StopString {
                let text = self.letters.finish()?;
                if !text.is_empty() {
                    self.job.pieces.push(Piece { token: None, text });
                }
            }
            let (prompt_tokens, new_tokens) = (self.prompt_tokens(), self.new_tokens);
            Ok(Finish { reason, prompt_tokens, new_tokens, waited: self.waited, ran: self.began.elapsed() })
        });
        self.drawn.finish(Ok(end));
        self.cache
    }
}

/// Why a text leaves early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leave {
    /// Its caller went away.
    Cancelled,
    /// Its deadline passed.
    TooLate,
}
