//! The thread that computes.

use super::request::{Finish, Job};
use super::schedule::shares;
use super::slot::{Leave, Slot};
use super::text::Vocabulary;
use super::{GenerationOptions, Shared, Tickets, NAME};
use crate::error::{Error, Result};
use crate::models::{Cache, PackedDecoder, Segment, StopReason};
use crate::service::stats::End;
use crate::service::{contained, TARGET};
use candle_core::{DType, Storage, Tensor};
use candle_lazy_exec::batch::{Drawn, MaxWait, Window};
use candle_lazy_exec::error::QueueError;
use candle_lazy_exec::LazyTensor;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::debug_span;

type Request = Drawn<Job, Result<Finish>>;

pub(super) struct Work<'v> {
    decoder: PackedDecoder,
    options: GenerationOptions,
    inbox: Tickets,
    shared: Arc<Shared>,
    vocabulary: &'v Vocabulary,
    slots: Vec<Slot<'v>>,
    /// Requests that were drawn and for whose caches there is no room yet, in the order in which they were.
    waiting: VecDeque<(Request, Job)>,
    /// Caches that no text uses.
    kept: Vec<Cache>,
    arrivals: u64,
    turns: usize,
}

impl<'v> Work<'v> {
    pub(super) fn new(
        decoder: PackedDecoder,
        options: GenerationOptions,
        inbox: Tickets,
        shared: Arc<Shared>,
        vocabulary: &'v Vocabulary,
    ) -> Self {
        let (slots, waiting, kept) = (Vec::new(), VecDeque::new(), Vec::new());
        Self { decoder, options, inbox, shared, vocabulary, slots, waiting, kept, arrivals: 0, turns: 0 }
    }

    pub(super) fn run(mut self) {
        while self.admit() {
            self.leave();
            self.step();
        }
    }

    /// Takes requests from the queue as far as there is room; sleeps while there is nothing to do. False at the end.
    fn admit(&mut self) -> bool {
        let room = self.options.max_running.saturating_sub(self.slots.len() + self.waiting.len());
        self.inbox.set_free_slots(room);
        let drawn = if self.slots.is_empty() && self.waiting.is_empty() {
            // whoever comes next joins at the next step: nobody has to wait for company
            let window = Window { max_batch: room, max_wait: MaxWait::Fixed(Duration::ZERO) };
            match self.inbox.draw(&window) {
                Some(drawn) => drawn,
                None => return false,
            }
        } else if room > 0 {
            self.inbox.try_draw(room)
        } else {
            Vec::new()
        };
        for mut request in drawn {
            if let Some(job) = request.take_job() {
                self.waiting.push_back((request, job));
            }
        }
        self.late();
        while let Some((request, job)) = self.waiting.pop_front() {
            match self.cache(job.capacity) {
                Ok(Some(cache)) => {
                    self.shared.counters.began(request.waited());
                    self.arrivals += 1;
                    self.slots.push(Slot::new(request, job, cache, self.arrivals, self.vocabulary));
                }
                Ok(None) => {
                    self.waiting.push_front((request, job));
                    break;
                }
                Err(error) => {
                    self.shared.counters.began(request.waited());
                    self.shared.counters.ended(End::Failed, Duration::ZERO);
                    request.finish(Ok(Err(error)));
                }
            }
        }
        self.shared.counters.held(self.waiting.len());
        true
    }

    /// Ends requests that wait for a cache and that nobody waits for any more, or that are too late.
    fn late(&mut self) {
        let now = Instant::now();
        let late = |job: &Job| job.deadline.is_some_and(|deadline| deadline <= now);
        let leaves = |(request, job): &(Request, Job)| request.is_cancelled() || late(job);
        if !self.waiting.iter().any(leaves) {
            return;
        }
        let (gone, stay) = self.waiting.drain(..).partition::<VecDeque<_>, _>(leaves);
        self.waiting = stay;
        // before anybody is told: who looks then finds it so
        self.shared.counters.held(self.waiting.len());
        for (request, _) in gone {
            // where nobody waits, nobody is told
            request.finish(Err(candle_lazy_exec::Error::Queue(QueueError::Deadline)));
        }
    }

    /// A cache of so many positions, if there is room for one beside those in use.
    fn cache(&mut self, capacity: usize) -> Result<Option<Cache>> {
        if let Some(at) = self.kept.iter().position(|cache| cache.capacity() == capacity) {
            return Ok(Some(self.kept.swap_remove(at)));
        }
        let used: usize = self.slots.iter().map(Slot::capacity).sum();
        let room = self.options.cache_positions.saturating_sub(used);
        if capacity > room {
            return Ok(None);
        }
        let mut kept: usize = self.kept.iter().map(Cache::capacity).sum();
        while kept + capacity > room {
            let Some(cache) = self.kept.pop() else { break };
            kept -= cache.capacity();
        }
        let decoder = &self.decoder;
        contained(NAME, || decoder.model().new_cache(capacity)).map(Some)
    }

    /// Ends texts that nobody waits for, that are too late, that have no room for a token, and all of them where the service is cancelled.
    fn leave(&mut self) {
        let cancelled = self.shared.cancel.load(Ordering::Acquire);
        let now = Instant::now();
        for at in (0..self.slots.len()).rev() {
            let Some(slot) = self.slots.get(at) else { continue };
            if cancelled {
                self.end(at, Err(closed()), End::ShutDown);
                continue;
            }
            match slot.leaves(now) {
                Some(Leave::Cancelled) => self.end(at, Err(Error::service(NAME, "nobody waits")), End::Unwanted),
                Some(Leave::TooLate) => {
                    let error = Error::Deadline { service: NAME, tokens: slot.new_tokens() };
                    self.end(at, Err(error), End::Failed);
                }
                None => {
                    if let Some(reason) = slot.full() {
                        self.end(at, Ok(reason), End::Completed);
                    }
                }
            }
        }
        if cancelled {
            for (request, _) in self.waiting.drain(..) {
                self.shared.counters.began(request.waited());
                self.shared.counters.ended(End::ShutDown, Duration::ZERO);
                request.finish(Ok(Err(closed())));
            }
            self.shared.counters.held(0);
        }
    }

    fn end(&mut self, at: usize, end: Result<StopReason>, how: End) {
        if at >= self.slots.len() {
            return;
        }
        let slot = self.slots.swap_remove(at);
        self.shared.counters.ended(how, slot.ran());
        let failed = end.is_err();
        let mut cache = slot.finish(end);
        // after a failure its buffers may never have been computed
        if !failed {
            cache.reset();
            self.kept.push(cache);
        }
    }

    /// One step of all texts that compute together, or of one that has to be alone.
    fn step(&mut self) {
        let began = Instant::now();
        // The same texts in the same order make the same plan: by adapter, since neighbours share its products, then by size.
        self.slots.sort_by_key(|slot| {
            (slot.adapter().map(|set| Arc::as_ptr(set) as usize), slot.capacity(), slot.cache.position(), slot.arrival)
        });
        let alone = self.slots.iter().filter(|slot| slot.alone).map(|slot| slot.arrival).min();
        let turn = alone.filter(|_| self.alone_has_its_turn());
        let joins = |slot: &Slot<'_>| match turn {
            Some(arrival) => slot.arrival == arrival,
            None => !slot.alone,
        };
        let behind: Vec<usize> = self.slots.iter().map(|slot| if joins(slot) { slot.behind() } else { 0 }).collect();
        let shares = shares(&behind, self.options.prefill_tokens);
        if shares.iter().all(|share| *share == 0) {
            return;
        }
        let (texts, tokens) = (shares.iter().filter(|share| **share > 0).count(), shares.iter().sum::<usize>());
        let waiting = self.inbox.len() + self.waiting.len();
        let span = debug_span!(target: TARGET, "generation step", texts, tokens, waiting).entered();
        let computed = {
            let (decoder, slots) = (&mut self.decoder, &mut self.slots);
            contained(NAME, || compute(decoder, slots, &shares))
        };
        drop(span);
        match computed {
            Ok(computed) => self.answer(&shares, computed, began),
            Err(error) => self.failed(&shares, error),
        }
    }

    /// Texts that are alone and the others take turns.
    fn alone_has_its_turn(&mut self) -> bool {
        self.turns = self.turns.wrapping_add(1);
        self.turns.is_multiple_of(2) || self.slots.iter().all(|slot| slot.alone)
    }

    /// Hands the logits to their texts.
    fn answer(&mut self, shares: &[usize], computed: Computed, began: Instant) {
        let Computed { logits, rows } = computed;
        let (mut ends, mut tokens_in, mut tokens_out) = (Vec::new(), 0, 0);
        let slots = &mut self.slots;
        let counters = &self.shared.counters;
        let read = with_rows(logits.as_ref(), rows.len(), |logits| {
            for (&at, logits) in rows.iter().zip(logits) {
                let Some(slot) = slots.get_mut(at) else { continue };
                slot.alone = false;
                let before = slot.new_tokens();
                let end = contained(NAME, || slot.take(logits));
                if before == 0 {
                    tokens_in += slot.prompt_tokens();
                    counters.first_token(slot.age());
                }
                tokens_out += slot.new_tokens() - before;
                match end {
                    Ok(None) => {}
                    Ok(Some(reason)) => ends.push((at, Ok(reason))),
                    Err(error) => ends.push((at, Err(error))),
                }
            }
        });
        let requests = shares.iter().filter(|share| **share > 0).count();
        counters.step(requests, tokens_in, tokens_out, began.elapsed());
        if let Err(error) = read {
            return self.failed(shares, error);
        }
        ends.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        for (at, end) in ends {
            let how = if end.is_ok() { End::Completed } else { End::Failed };
            self.end(at, end, how);
        }
    }

    /// A step failed: with one text it was that text's, with several each of them computes its text again, in steps of its own, until it
    /// has caught up. What is computed twice has the same bits.
    fn failed(&mut self, shares: &[usize], error: Error) {
        let those: Vec<usize> = shares.iter().enumerate().filter(|(_, share)| **share > 0).map(|(at, _)| at).collect();
        if let [at] = those.as_slice() {
            return self.end(*at, Err(error), End::Failed);
        }
        for at in those.into_iter().rev() {
            let Some(slot) = self.slots.get_mut(at) else { continue };
            // the old one may wait for a value that is never computed
            match self.decoder.model().new_cache(slot.capacity()) {
                Ok(cache) => (slot.cache, slot.alone) = (cache, true),
                Err(error) => self.end(at, Err(error), End::Failed),
            }
        }
    }
}

/// What a step gave.
struct Computed {
    /// (texts, vocab), f32.
    logits: Option<Tensor>,
    /// The slots of its rows.
    rows: Vec<usize>,
}

fn closed() -> Error {
    candle_lazy_exec::Error::Queue(QueueError::Closed).into()
}

/// Computes each slot's share of a step.
fn compute(decoder: &mut PackedDecoder, slots: &mut [Slot<'_>], shares: &[usize]) -> Result<Computed> {
    let (mut segments, mut rows) = (Vec::new(), Vec::new());
    for (at, (slot, &share)) in slots.iter_mut().zip(shares).enumerate() {
        if share > 0 {
            let (ids, cache, adapter, logits) = slot.next(share);
            segments.push(Segment { ids, cache, adapter, logits });
            if logits {
                rows.push(at);
            }
        }
    }
    let logits = match decoder.forward(&mut segments)? {
        Some(logits) if logits.dtype() != DType::F32 => Some(logits.to_dtype(DType::F32)?),
        logits => logits,
    };
    let mut roots: Vec<&LazyTensor> = segments.iter().flat_map(|segment| segment.cache.handles()).collect();
    roots.extend(&logits);
    candle_lazy_exec::materialize(&roots)?;
    let logits = match logits {
        Some(logits) => Some(logits.eval()?),
        None => None,
    };
    Ok(Computed { logits, rows })
}

/// Calls `read` with the rows of a matrix, which is not copied where it lies in the memory of the process.
fn with_rows<R>(
    matrix: Option<&Tensor>,
    rows: usize,
    read: impl FnOnce(std::slice::ChunksExact<'_, f32>) -> R,
) -> Result<R> {
    let Some(matrix) = matrix else { return Ok(read([].chunks_exact(1))) };
    let width = (matrix.elem_count() / rows.max(1)).max(1);
    let (storage, layout) = matrix.storage_and_layout();
    let borrowed = match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => storage.as_slice::<f32>()?.get(start..end),
        _ => None,
    };
    match borrowed {
        Some(values) => Ok(read(values.chunks_exact(width))),
        None => {
            drop(storage);
            Ok(read(matrix.flatten_all()?.to_vec1::<f32>()?.chunks_exact(width)))
        }
    }
}
