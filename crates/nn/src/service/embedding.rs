//! Texts to vectors, for many callers at once.
//!
//! The service's thread draws the requests that wait, puts their texts in order of length, and computes texts of one length together:
//! nothing is padded, so nothing is computed twice over and no mask comes near a text's numbers. A request is answered as soon as its last
//! text is.

use super::stats::{Counters, End, ServiceStats};
use super::{contained, Worker, TARGET};
use crate::error::{Error, Result};
use crate::models::SentenceEncoder;
#[cfg(feature = "tokenizers")]
use crate::tokenizer::Tokenizer;
use candle_core::DType;
use candle_lazy_exec::batch::{Drawn, Inbox, MaxWait, Shutdown, SubmitOptions, Ticket, Window};
use parking_lot::Mutex;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use std::time::Instant;
use tracing::debug_span;

const NAME: &str = "embedding service";

/// How an [`EmbeddingService`] batches.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingOptions {
    /// How many requests are taken together at most, and how long the first one waits for company.
    pub window: Window,
    /// Requests that may wait, beside those that an idle service begins with at once.
    pub queue: usize,
    /// Tokens of one evaluation at most: bounds its memory. One text is computed whole, whatever its length.
    pub batch_tokens: usize,
    /// Whether a text that is too long is cut, as [`Tokenizer::encode_for_model_truncated`](crate::tokenizer::Tokenizer) does, rather than
    /// refused.
    pub truncate: bool,
}

impl Default for EmbeddingOptions {
    /// 64 requests, an adaptive window, a queue of 1,024, 4,096 tokens per evaluation, and long texts are refused.
    fn default() -> Self {
        let window = Window { max_batch: 64, max_wait: MaxWait::Adaptive };
        Self { window, queue: 1024, batch_tokens: 4096, truncate: false }
    }
}

/// The ids of a request's texts.
type Texts = Vec<Vec<u32>>;
/// A vector for each.
type Vectors = Result<Vec<Vec<f32>>>;

/// A sentence encoder for many callers.
///
/// Dropping it refuses what waits and joins its thread; [`EmbeddingService::shutdown`] can serve it first.
#[derive(Debug)]
pub struct EmbeddingService {
    inbox: Inbox<Texts, Vectors>,
    counters: Arc<Counters>,
    encoder: SentenceEncoder,
    #[cfg(feature = "tokenizers")]
    tokenizer: Option<Arc<Tokenizer>>,
    #[cfg(feature = "tokenizers")]
    options: EmbeddingOptions,
    worker: Mutex<Worker>,
}

impl EmbeddingService {
    /// Starts the service's thread.
    ///
    /// # Errors
    /// [`Error::Service`] where an option is 0, [`Error::Io`] where the system gives no thread.
    pub fn new(encoder: SentenceEncoder, options: EmbeddingOptions) -> Result<Self> {
        for (name, value) in [
            ("window.max_batch", options.window.max_batch),
            ("queue", options.queue),
            ("batch_tokens", options.batch_tokens),
        ] {
            if value == 0 {
                return Err(Error::service(NAME, format_args!("{name} is 0")));
            }
        }
        let inbox = Inbox::new(options.queue);
        inbox.set_free_slots(options.window.max_batch);
        let counters = Arc::new(Counters::default());
        let work = Work { inbox: inbox.clone(), counters: Arc::clone(&counters), encoder: encoder.clone(), options };
        let worker = Mutex::new(Worker::start("candle-lazy-embedding", move || work.run())?);
        Ok(Self {
            inbox,
            counters,
            encoder,
            #[cfg(feature = "tokenizers")]
            tokenizer: None,
            #[cfg(feature = "tokenizers")]
            options,
            worker,
        })
    }

    /// The same with a tokenizer, for [`EmbeddingService::tokenize`].
    #[cfg(feature = "tokenizers")]
    #[must_use]
    pub fn with_tokenizer(mut self, tokenizer: Arc<Tokenizer>) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// The encoder.
    #[must_use]
    pub fn encoder(&self) -> &SentenceEncoder {
        &self.encoder
    }

    /// The ids of texts as the encoder wants them; on the caller's thread.
    ///
    /// # Errors
    /// [`Error::Service`] without a tokenizer, [`Error::PromptTooLong`] for a text that is too long where the options do not let it be
    /// cut, [`Error::Tokenizer`].
    #[cfg(feature = "tokenizers")]
    #[track_caller]
    pub fn tokenize<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Error::service(NAME, "it has no tokenizer: give ids, or make it with one"));
        };
        let most = self.encoder.model().max_tokens();
        let mut ids = Vec::with_capacity(texts.len());
        for text in texts {
            ids.push(match self.options.truncate {
                true => tokenizer.encode_for_model_truncated(text.as_ref(), most)?,
                false => tokenizer.encode_for_model(text.as_ref())?,
            });
        }
        Ok(ids)
    }

    /// Submits the ids of one or several texts. Blocks while the queue is full.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] where there is no text or one has no token, [`Error::TokenOutOfRange`], [`Error::PromptTooLong`];
    /// [`Error::Exec`] where the service is shut down or the deadline passes before there is room.
    #[track_caller]
    pub fn submit(&self, texts: Vec<Vec<u32>>, how: &SubmitOptions) -> Result<Embeddings> {
        self.accepted(self.checked(texts).and_then(|texts| Ok(self.inbox.submit(texts, how)?)))
    }

    /// As [`EmbeddingService::submit`], but a full queue is an error at once.
    ///
    /// # Errors
    /// As [`EmbeddingService::submit`], and [`Error::Exec`] where the queue is full.
    #[track_caller]
    pub fn try_submit(&self, texts: Vec<Vec<u32>>, how: &SubmitOptions) -> Result<Embeddings> {
        self.accepted(self.checked(texts).and_then(|texts| Ok(self.inbox.try_submit(texts, how)?)))
    }

    /// As [`EmbeddingService::submit`], but a full queue is waited for without blocking the thread.
    ///
    /// # Errors
    /// As [`EmbeddingService::submit`].
    pub async fn submit_async(&self, texts: Vec<Vec<u32>>, how: &SubmitOptions) -> Result<Embeddings> {
        let ticket = match self.checked(texts) {
            Ok(texts) => self.inbox.submit_async(texts, how).await.map_err(Error::from),
            Err(error) => Err(error),
        };
        self.accepted(ticket)
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ServiceStats {
        self.counters.snapshot(&self.inbox.stats())
    }

    /// Takes no more requests; serves those that wait or refuses them, as asked, and returns when its thread has ended.
    pub fn shutdown(&self, how: Shutdown) {
        self.inbox.close(how);
        self.worker.lock().join();
    }

    #[track_caller]
    fn checked(&self, texts: Texts) -> Result<Texts> {
        let (vocab, most) = (self.encoder.model().vocab_size(), self.encoder.model().max_tokens());
        if texts.is_empty() {
            return Err(Error::empty_prompt());
        }
        for text in &texts {
            if text.is_empty() {
                return Err(Error::empty_prompt());
            }
            if let Some(&id) = text.iter().find(|&&id| id as usize >= vocab) {
                return Err(Error::token_out_of_range(id, vocab));
            }
            if text.len() > most {
                return Err(Error::prompt_too_long(text.len(), most));
            }
        }
        Ok(texts)
    }

    fn accepted(&self, ticket: Result<Ticket<Texts, Vectors>>) -> Result<Embeddings> {
        self.counters.submitted(&ticket);
        ticket.map(Embeddings)
    }
}

impl Drop for EmbeddingService {
    fn drop(&mut self) {
        self.shutdown(Shutdown::Cancel);
    }
}

/// The vectors to come: a future for any runtime, or [`Embeddings::wait`]. Dropping it cancels the request.
#[must_use = "dropped, the request is cancelled"]
#[derive(Debug)]
pub struct Embeddings(Ticket<Texts, Vectors>);

impl Embeddings {
    /// One vector per text, in the order of the texts. Blocks.
    ///
    /// # Errors
    /// What went wrong with this request: [`Error::NonFinite`] for a vector with a NaN or an infinity in it, [`Error::Service`] for a
    /// panic, [`Error::Exec`] for what the engine refuses, a deadline that passed, or a service that was shut down.
    pub fn wait(self) -> Result<Vec<Vec<f32>>> {
        self.0.wait()?
    }
}

impl Future for Embeddings {
    type Output = Result<Vec<Vec<f32>>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let vectors = ready!(Pin::new(&mut self.get_mut().0).poll(context))?;
        Poll::Ready(vectors)
    }
}

/// The thread's.
struct Work {
    inbox: Inbox<Texts, Vectors>,
    counters: Arc<Counters>,
    encoder: SentenceEncoder,
    options: EmbeddingOptions,
}

/// A request that is being computed.
struct Request {
    drawn: Drawn<Texts, Vectors>,
    vectors: Vec<Vec<f32>>,
    left: usize,
    began: Instant,
}

/// A text of a request.
struct Text {
    request: usize,
    place: usize,
    ids: Vec<u32>,
}

impl Work {
    fn run(self) {
        while let Some(drawn) = self.inbox.draw(&self.options.window) {
            self.inbox.set_free_slots(0);
            let (count, began) = (drawn.len(), Instant::now());
            let (mut requests, mut texts) = self.begin(drawn);
            texts.sort_by_key(|text| text.ids.len());
            let mut rest = texts.as_slice();
            while let Some(first) = rest.first() {
                let len = first.ids.len();
                let same = rest.iter().take_while(|text| text.ids.len() == len).count();
                let (batch, after) = rest.split_at(same.min((self.options.batch_tokens / len.max(1)).max(1)));
                self.compute(batch, &mut requests);
                rest = after;
            }
            self.inbox.ran(count, began.elapsed());
            self.inbox.set_free_slots(self.options.window.max_batch);
        }
    }

    fn begin(&self, drawn: Vec<Drawn<Texts, Vectors>>) -> (Vec<Option<Request>>, Vec<Text>) {
        let (mut requests, mut texts) = (Vec::with_capacity(drawn.len()), Vec::new());
        for mut drawn in drawn {
            let Some(job) = drawn.take_job() else { continue };
            self.counters.began(drawn.waited());
            let (request, left) = (requests.len(), job.len());
            texts.extend(job.into_iter().enumerate().map(|(place, ids)| Text { request, place, ids }));
            requests.push(Some(Request { drawn, vectors: vec![Vec::new(); left], left, began: Instant::now() }));
        }
        (requests, texts)
    }

    /// Texts of one length, and the answers to the requests that are complete with them.
    fn compute(&self, batch: &[Text], requests: &mut [Option<Request>]) {
        let began = Instant::now();
        self.leave(batch, requests);
        let alive: Vec<&Text> =
            batch.iter().filter(|text| requests.get(text.request).is_some_and(Option::is_some)).collect();
        if alive.is_empty() {
            return;
        }
        let ids: Vec<&[u32]> = alive.iter().map(|text| text.ids.as_slice()).collect();
        let rows: Vec<Result<Vec<f32>>> = match self.embed(&ids) {
            Ok(rows) => rows.into_iter().map(Ok).collect(),
            // whose fault it is shows when each is computed alone
            Err(_) if alive.len() > 1 => {
                let alone = |text: &&Text| {
                    let rows = self.embed(&[text.ids.as_slice()])?;
                    rows.into_iter().next().ok_or_else(|| Error::service(NAME, "a text without a vector"))
                };
                alive.iter().map(alone).collect()
            }
            Err(error) => vec![Err(error)],
        };
        // before anybody is told: who looks then finds it so
        let tokens = alive.iter().map(|text| text.ids.len()).sum();
        self.counters.step(alive.len(), tokens, 0, began.elapsed());
        for (text, row) in alive.iter().zip(rows) {
            self.answer(text, row.and_then(|row| self.judged(text, row)), requests);
        }
    }

    fn embed(&self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let (texts, waiting) = (ids.len(), self.inbox.len());
        let _span = debug_span!(target: TARGET, "embedding batch", texts, waiting).entered();
        contained(NAME, || {
            let embedded = self.encoder.embed(ids)?;
            let embedded = if embedded.dtype() == DType::F32 { embedded } else { embedded.to_dtype(DType::F32)? };
            Ok(embedded.to_vec2::<f32>()?)
        })
    }

    /// The vector, or why it is none.
    fn judged(&self, text: &Text, row: Vec<f32>) -> Result<Vec<f32>> {
        if row.iter().all(|value| value.is_finite()) {
            return Ok(row);
        }
        let first = contained(NAME, || Ok(self.encoder.embed(&[text.ids.as_slice()])?.first_nonfinite()?))?;
        Err(Error::NonFinite { text: text.place, first: first.map(Box::new) })
    }

    /// Drops requests whose callers went away.
    fn leave(&self, batch: &[Text], requests: &mut [Option<Request>]) {
        for text in batch {
            let Some(slot) = requests.get_mut(text.request) else { continue };
            if let Some(request) = slot.take_if(|request| request.drawn.is_cancelled()) {
                self.counters.ended(End::Unwanted, request.began.elapsed());
            }
        }
    }

    fn answer(&self, text: &Text, row: Result<Vec<f32>>, requests: &mut [Option<Request>]) {
        let Some(slot) = requests.get_mut(text.request) else { return };
        let Some(request) = slot else { return };
        let result = match row {
            Ok(row) => {
                if let Some(place) = request.vectors.get_mut(text.place) {
                    *place = row;
                }
                request.left = request.left.saturating_sub(1);
                if request.left > 0 {
                    return;
                }
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Some(request) = slot.take() {
            let how = if result.is_ok() { End::Completed } else { End::Failed };
            self.counters.ended(how, request.began.elapsed());
            request.drawn.finish(Ok(result.map(|()| request.vectors)));
        }
    }
}
