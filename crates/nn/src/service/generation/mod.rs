//! Continuing texts, for many callers at once (continuous batching, Yu et al. 2022, "Orca").
//!
//! The service's thread computes one step after the other. A step has a row for each running text's last token and, for texts that have
//! just come, a piece of their prompts; so texts join and leave between steps, and a long prompt does not stop the others. All rows go
//! through each linear map together; attention is each text's own ([`PackedDecoder`](crate::models::PackedDecoder)).

mod request;
mod schedule;
mod slot;
mod stream;
mod text;
mod work;

pub use request::{Completion, Finish, GenerationRequest};
pub use stream::{Generating, Piece};

use super::stats::{Counters, ServiceStats};
use super::Worker;
use crate::error::{Error, Result};
use crate::lora::{LoraAdapter, LoraSet};
use crate::models::{CausalLm, PackedDecoder};
#[cfg(feature = "tokenizers")]
use crate::tokenizer::Tokenizer;
use candle_lazy_exec::batch::{Inbox, Shutdown, SubmitOptions, Ticket};
use parking_lot::Mutex;
use request::Job;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

const NAME: &str = "generation service";

/// Positions of the smallest cache: requests that need no more share buffers of one size.
const SMALLEST_CACHE: usize = 256;

/// How a [`GenerationService`] batches, and what it may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerationOptions {
    /// Texts that are continued at once.
    pub max_running: usize,
    /// Requests that may wait, beside those that begin with the next step.
    pub queue: usize,
    /// Positions of a text at most, prompt included; no more than the model's context.
    pub max_context: usize,
    /// Positions that all caches together have at most, kept ones included: bounds the memory of keys and values, which is 2 · layers ·
    /// kv heads · head dim elements per position. A request waits until there is room.
    pub cache_positions: usize,
    /// Tokens of prompts that a step computes beside the running texts: more make prompts quicker and the others slower.
    pub prefill_tokens: usize,
}

impl Default for GenerationOptions {
    /// 8 texts at once, a queue of 256, texts of up to 2,048 positions, 16,384 positions in all, 64 tokens of prompts per step.
    fn default() -> Self {
        Self { max_running: 8, queue: 256, max_context: 2048, cache_positions: 16_384, prefill_tokens: 64 }
    }
}

/// What the service's thread shares with its handles.
#[derive(Debug, Default)]
struct Shared {
    counters: Counters,
    /// Running texts are to end.
    cancel: AtomicBool,
}

type Tickets = Inbox<Job, Result<Finish>>;

/// A decoder for many callers.
///
/// Dropping it ends what waits and runs, and joins its thread; [`GenerationService::shutdown`] can serve it first.
#[derive(Debug)]
pub struct GenerationService {
    inbox: Tickets,
    shared: Arc<Shared>,
    model: CausalLm,
    options: GenerationOptions,
    adapters: Mutex<BTreeMap<String, Arc<LoraSet>>>,
    #[cfg(feature = "tokenizers")]
    tokenizer: Option<Arc<Tokenizer>>,
    worker: Mutex<Worker>,
}

impl GenerationService {
    /// Starts the service's thread. Its texts are ids; [`GenerationService::with_tokenizer`] gives them letters.
    ///
    /// # Errors
    /// [`Error::Service`] where an option is 0 or the model carries an adapter (requests name theirs), [`Error::Io`] where the system
    /// gives no thread.
    pub fn new(model: CausalLm, options: GenerationOptions) -> Result<Self> {
        Self::start(model, options, text::Vocabulary::default())
    }

    /// The same with a tokenizer: pieces have text, requests may have stop strings.
    ///
    /// # Errors
    /// As [`GenerationService::new`].
    #[cfg(feature = "tokenizers")]
    pub fn with_tokenizer(model: CausalLm, tokenizer: Arc<Tokenizer>, options: GenerationOptions) -> Result<Self> {
        let mut service = Self::start(model, options, text::Vocabulary::of(Arc::clone(&tokenizer)))?;
        service.tokenizer = Some(tokenizer);
        Ok(service)
    }

    fn start(model: CausalLm, options: GenerationOptions, vocabulary: text::Vocabulary) -> Result<Self> {
        let context = model.config().max_position_embeddings;
        let options = GenerationOptions { max_context: options.max_context.min(context), ..options };
        for (name, value) in [
            ("max_running", options.max_running),
            ("queue", options.queue),
            ("max_context", options.max_context),
            ("cache_positions", options.cache_positions),
            ("prefill_tokens", options.prefill_tokens),
        ] {
            if value == 0 {
                return Err(Error::service(NAME, format_args!("{name} is 0")));
            }
        }
        if !LoraSet::of(&model)?.is_empty() {
            return Err(Error::service(
                NAME,
                "the model carries an adapter: clear it, and add it to the service by name",
            ));
        }
        let inbox = Inbox::new(options.queue);
        inbox.set_free_slots(options.max_running);
        let shared = Arc::new(Shared::default());
        let decoder = PackedDecoder::new(model.clone());
        let (queue, of_thread) = (inbox.clone(), Arc::clone(&shared));
        let worker = Worker::start("candle-lazy-generation", move || {
            work::Work::new(decoder, options, queue, of_thread, &vocabulary).run();
        })?;
        Ok(Self {
            inbox,
            shared,
            model,
            options,
            adapters: Mutex::default(),
            #[cfg(feature = "tokenizers")]
            tokenizer: None,
            worker: Mutex::new(worker),
        })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// What it was made with; `max_context` is no more than the model's.
    #[must_use]
    pub fn options(&self) -> &GenerationOptions {
        &self.options
    }

    /// The tokenizer, where there is one.
    #[cfg(feature = "tokenizers")]
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// Makes an adapter known by a name, with its factors as they are now; one of the same name is replaced for later requests.
    ///
    /// # Errors
    /// As [`LoraAdapter::put_on`]: where the adapter is one of another model.
    #[track_caller]
    pub fn add_adapter(&self, name: impl Into<String>, adapter: &LoraAdapter) -> Result<()> {
        let mut model = self.model.clone();
        adapter.put_on(&mut model)?;
        self.add_adapter_set(name, LoraSet::of(&model)?);
        Ok(())
    }

    /// As [`GenerationService::add_adapter`], from the factors that a model carries ([`LoraSet::of`]).
    pub fn add_adapter_set(&self, name: impl Into<String>, set: LoraSet) {
        self.adapters.lock().insert(name.into(), Arc::new(set));
    }

    /// Forgets an adapter, and says whether there was one. Requests that were accepted keep it until they end.
    pub fn remove_adapter(&self, name: &str) -> bool {
        self.adapters.lock().remove(name).is_some()
    }

    /// The names of the adapters.
    #[must_use]
    pub fn adapters(&self) -> Vec<String> {
        self.adapters.lock().keys().cloned().collect()
    }

    /// Submits a text to continue. Blocks while the queue is full.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::PromptTooLong`] where the prompt fills the context, [`Error::TokenOutOfRange`],
    /// [`Error::UnknownAdapter`], [`Error::Sampling`], [`Error::Service`] for stop strings without a tokenizer or a text that never fits
    /// the memory; [`Error::Exec`] where the service is shut down or the deadline passes before there is room.
    #[track_caller]
    pub fn submit(&self, request: GenerationRequest, how: &SubmitOptions) -> Result<Generating> {
        let (job, pieces) = self.job(request, how)?;
        self.accepted(self.inbox.submit(job, how).map_err(Error::from), pieces)
    }

    /// As [`GenerationService::submit`], but a full queue is an error at once.
    ///
    /// # Errors
    /// As [`GenerationService::submit`], and [`Error::Exec`] where the queue is full.
    #[track_caller]
    pub fn try_submit(&self, request: GenerationRequest, how: &SubmitOptions) -> Result<Generating> {
        let (job, pieces) = self.job(request, how)?;
        self.accepted(self.inbox.try_submit(job, how).map_err(Error::from), pieces)
    }

    /// As [`GenerationService::submit`], but a full queue is waited for without blocking the thread.
    ///
    /// # Errors
    /// As [`GenerationService::submit`].
    pub async fn submit_async(&self, request: GenerationRequest, how: &SubmitOptions) -> Result<Generating> {
        let (job, pieces) = self.job(request, how)?;
        self.accepted(self.inbox.submit_async(job, how).await.map_err(Error::from), pieces)
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ServiceStats {
        self.shared.counters.snapshot(&self.inbox.stats())
    }

    /// Takes no more requests; serves those that wait and run or ends them, as asked, and returns when its thread has ended.
    pub fn shutdown(&self, how: Shutdown) {
        if how == Shutdown::Cancel {
            self.shared.cancel.store(true, Ordering::Release);
        }
        self.inbox.close(how);
        self.worker.lock().join();
    }

    #[track_caller]
    fn job(&self, request: GenerationRequest, how: &SubmitOptions) -> Result<(Job, Arc<stream::Pieces>)> {
        let job = self.checked(request, how);
        if job.is_err() {
            self.shared.counters.submitted(&job);
        }
        let job = job?;
        let pieces = Arc::clone(&job.pieces);
        Ok((job, pieces))
    }

    fn accepted(&self, ticket: Result<Ticket<Job, Result<Finish>>>, pieces: Arc<stream::Pieces>) -> Result<Generating> {
        self.shared.counters.submitted(&ticket);
        Ok(Generating::new(ticket?, pieces))
    }

    #[track_caller]
    fn checked(&self, request: GenerationRequest, how: &SubmitOptions) -> Result<Job> {
        let GenerationRequest { prompt, max_new_tokens, sampling, stop_ids, stop, adapter } = request;
        let (vocab, context) = (self.model.config().vocab_size, self.options.max_context);
        crate::models::generate::check_prompt(&prompt, vocab)?;
        if prompt.len() >= context {
            return Err(Error::prompt_too_long(prompt.len(), context));
        }
        sampling.validate()?;
        #[cfg(feature = "tokenizers")]
        let letters = self.tokenizer.is_some();
        #[cfg(not(feature = "tokenizers"))]
        let letters = false;
        if !letters && !stop.is_empty() {
            return Err(Error::service(NAME, "it has no tokenizer to look for stop strings with: give stop ids"));
        }
        if stop.iter().any(String::is_empty) {
            return Err(Error::service(NAME, "a stop string is empty: every text has it"));
        }
        let adapter = match adapter {
            None => None,
            Some(name) => {
                let adapters = self.adapters.lock();
                match adapters.get(&name) {
                    Some(set) => Some(Arc::clone(set)),
                    None => {
                        let known = match adapters.keys().map(String::as_str).collect::<Vec<_>>() {
                            names if names.is_empty() => "none".to_string(),
                            names => names.join(", "),
                        };
                        return Err(Error::UnknownAdapter { name, known });
                    }
                }
            }
        };
        let most = prompt.len().saturating_add(max_new_tokens).min(context);
        let capacity = most.checked_next_power_of_two().unwrap_or(most).max(SMALLEST_CACHE).min(context);
        if capacity > self.options.cache_positions {
            let room = self.options.cache_positions;
            return Err(Error::service(
                NAME,
                format_args!("the text needs a cache of {capacity} positions, all caches have {room}"),
            ));
        }
        Ok(Job {
            prompt,
            most,
            max_new_tokens,
            sampling,
            stop_ids,
            stop,
            adapter,
            capacity,
            deadline: how.deadline,
            pieces: Arc::default(),
        })
    }
}

impl Drop for GenerationService {
    fn drop(&mut self) {
        self.shutdown(Shutdown::Cancel);
    }
}

#[cfg(test)]
mod tests;
