//! What a caller asks for, and what comes out.

use super::stream::Pieces;
use crate::lora::LoraSet;
use crate::models::StopReason;
use crate::sampling::Sampling;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A text to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationRequest {
    /// Its ids.
    pub prompt: Vec<u32>,
    /// Number of new tokens at most.
    pub max_new_tokens: usize,
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Tokens that end the text; they are not part of the result.
    pub stop_ids: Vec<u32>,
    /// Strings that end the text; they and what follows are not part of it. They need a service with a tokenizer.
    pub stop: Vec<String>,
    /// The name of the adapter that the text is continued with.
    pub adapter: Option<String>,
}

impl GenerationRequest {
    /// Up to 128 new tokens, the likeliest each time, which nothing but the length ends, without an adapter.
    #[must_use]
    pub fn new(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            max_new_tokens: 128,
            sampling: Sampling::greedy(),
            stop_ids: Vec::new(),
            stop: Vec::new(),
            adapter: None,
        }
    }

    /// With another number of new tokens.
    #[must_use]
    pub fn max_new_tokens(self, max_new_tokens: usize) -> Self {
        Self { max_new_tokens, ..self }
    }

    /// With tokens chosen so.
    #[must_use]
    pub fn sampling(self, sampling: Sampling) -> Self {
        Self { sampling, ..self }
    }

    /// Ended by these tokens.
    #[must_use]
    pub fn stop_ids(self, stop_ids: Vec<u32>) -> Self {
        Self { stop_ids, ..self }
    }

    /// Ended by these strings.
    #[must_use]
    pub fn stop(self, stop: Vec<String>) -> Self {
        Self { stop, ..self }
    }

    /// With the adapter of this name.
    #[must_use]
    pub fn adapter(self, name: impl Into<String>) -> Self {
        Self { adapter: Some(name.into()), ..self }
    }
}

/// How a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finish {
    /// Why.
    pub reason: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// New tokens.
    pub new_tokens: usize,
    /// From the submission to the first step.
    pub waited: Duration,
    /// From the first step to the end.
    pub ran: Duration,
}

/// A whole generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Their text; empty where the service has no tokenizer.
    pub text: String,
    /// How it ended.
    pub finish: Finish,
}

/// A request that was checked.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) prompt: Vec<u32>,
    /// Positions that the text may have.
    pub(super) most: usize,
    pub(super) max_new_tokens: usize,
    pub(super) sampling: Sampling,
    pub(super) stop_ids: Vec<u32>,
    pub(super) stop: Vec<String>,
    pub(super) adapter: Option<Arc<LoraSet>>,
    /// Positions of its cache.
    pub(super) capacity: usize,
    pub(super) deadline: Option<Instant>,
    pub(super) pieces: Arc<Pieces>,
}
