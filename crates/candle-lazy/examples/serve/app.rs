//! What all requests share: the two services, the names of their models, the limits, and what is counted.

use super::failure::{Failure, Outcome};
use super::metrics::Requests;
use candle_lazy::nn::service::{EmbeddingService, GenerationService, Shutdown, SubmitOptions};
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{watch, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// What a request may cost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes of a body.
    pub(crate) max_body: usize,
    /// Requests that are being answered, streams included.
    pub(crate) max_concurrency: usize,
    /// From a request's head to the end of its answer.
    pub(crate) timeout: Duration,
}

impl Limits {
    /// How many places there are.
    ///
    /// # Errors
    /// Where they let nothing in, or cannot be counted.
    pub(crate) fn check(&self) -> Result<u32, String> {
        if self.max_concurrency == 0 || self.max_body == 0 {
            return Err("the limits of a body and of concurrency must be above 0".to_string());
        }
        let places = u32::try_from(self.max_concurrency).ok().filter(|&all| all as usize <= Semaphore::MAX_PERMITS);
        places.ok_or_else(|| "the limit of concurrency is above what can be counted".to_string())
    }
}

/// The server's state.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) generation: GenerationService,
    pub(crate) embedding: EmbeddingService,
    /// The name of the generation service's model; its adapters have names of their own.
    pub(crate) model: String,
    pub(crate) embedding_model: String,
    pub(crate) limits: Limits,
    pub(crate) requests: Requests,
    /// When it began, in seconds since 1970.
    pub(crate) created: u64,
    places: Arc<Semaphore>,
    all_places: u32,
    in_flight: Arc<AtomicUsize>,
    stopping: watch::Sender<bool>,
    numbers: AtomicU64,
}

/// A request that was let in: holds its place until its answer is whole, and says by when that has to be.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    pub(crate) deadline: Instant,
    _place: Arc<Place>,
}

/// Among the requests that are being answered.
#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    in_flight: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    /// For the services' queues.
    pub(crate) fn submit_options(&self) -> SubmitOptions {
        SubmitOptions { deadline: Some(self.deadline.into_std()), ..SubmitOptions::default() }
    }

    /// What a future gives, or that the deadline came first.
    pub(crate) async fn in_time<T>(&self, future: impl Future<Output = T>) -> Outcome<T> {
        tokio::time::timeout_at(self.deadline, future).await.map_err(|_| Failure::late())
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl App {
    /// # Errors
    /// Where two models or adapters have one name, or the limits let nothing in.
    pub(crate) fn new(
        generation: GenerationService,
        embedding: EmbeddingService,
        model: String,
        embedding_model: String,
        limits: Limits,
    ) -> Result<Self, String> {
        let adapters = generation.adapters();
        let twice = adapters.iter().find(|name| **name == model || **name == embedding_model);
        if let Some(name) = twice.or((model == embedding_model).then_some(&model)) {
            return Err(format!("two of the models and adapters are named {name}"));
        }
        let all_places = limits.check()?;
        Ok(Self {
            generation,
            embedding,
            model,
            embedding_model,
            limits,
            requests: Requests::default(),
            created: now(),
            places: Arc::new(Semaphore::new(limits.max_concurrency)),
            all_places,
            in_flight: Arc::default(),
            stopping: watch::Sender::new(false),
            numbers: AtomicU64::new(1),
        })
    }

    /// Lets a request in.
    pub(crate) fn admit(&self) -> Outcome<Admission> {
        if self.is_stopping() {
            return Err(Failure::stopping());
        }
        let permit = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            if self.is_stopping() {
                return Failure::stopping();
            }
            let most = self.limits.max_concurrency;
            Failure::busy(format_args!("{most} requests are being answered, which is the most. Try again later."))
        })?;
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let place = Place { _permit: permit, in_flight: Arc::clone(&self.in_flight) };
        Ok(Admission { deadline: Instant::now() + self.limits.timeout, _place: Arc::new(place) })
    }

    /// Requests that are being answered.
    pub(crate) fn in_flight(&self) -> usize {
        // not by the places that are free: who waits for the last answer holds those
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The adapter that a request for a text names as its model: none for the model itself.
    pub(crate) fn adapter(&self, name: &str) -> Outcome<Option<String>> {
        let adapters = self.generation.adapters();
        if name == self.model {
            Ok(None)
        } else if adapters.iter().any(|adapter| adapter == name) {
            Ok(Some(name.to_string()))
        } else if name == self.embedding_model {
            let message = format!("`{name}` makes embeddings, no texts: it is used with /v1/embeddings.");
            Err(Failure::field("model", message))
        } else {
            Err(Failure::no_model(name, &self.names()))
        }
        .map_err(|failure| failure.of("model"))
    }

    /// Checks the model of a request for embeddings.
    pub(crate) fn embeds(&self, name: &str) -> Outcome<()> {
        if name == self.embedding_model {
            return Ok(());
        }
        match self.adapter(name) {
            Ok(_) => Err(Failure::field("model", format_args!("`{name}` makes texts, no embeddings."))),
            Err(failure) => Err(failure),
        }
    }

    /// The names of models and adapters.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = vec![self.model.clone()];
        names.extend(self.generation.adapters());
        names.push(self.embedding_model.clone());
        names
    }

    /// An id for an answer, unlike those of other answers and of earlier runs of the program.
    pub(crate) fn id(&self, prefix: &str) -> String {
        format!("{prefix}-{:x}{:06x}", self.created, self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Lets no more requests in.
    pub(crate) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Waits until no request is being answered; none is let in then.
    pub(crate) async fn answered(&self) {
        // nobody closes it
        drop(self.places.acquire_many(self.all_places).await);
    }

    /// Ends what runs and waits, with an error to each caller. Blocks for at most a step.
    pub(crate) fn cancel(&self) {
        self.generation.shutdown(Shutdown::Cancel);
        self.embedding.shutdown(Shutdown::Cancel);
    }
}

/// Work of the processor's, which must not keep a thread of the runtime from others where there is much of it.
pub(crate) fn compute<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    const LITTLE: usize = 16 * 1024;
    if bytes > LITTLE {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}
