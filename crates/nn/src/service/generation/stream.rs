//! Tokens on their way from the service's thread to a caller.

use super::request::{Completion, Finish, Job};
use super::NAME;
use crate::error::{Error, Result};
use candle_lazy_exec::batch::Ticket;
use futures_core::Stream;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::{poll_fn, Future};
use std::pin::{pin, Pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

/// What a step adds to a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The token; `None` in a last piece that has text alone.
    pub token: Option<u32>,
    /// The text that is complete with it: nothing while the bytes so far end within a character, or may be the beginning of a stop string.
    pub text: String,
}

/// A queue of one sender and one receiver.
#[derive(Debug, Default)]
pub(super) struct Pieces(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<Piece>,
    waker: Option<Waker>,
}

impl Pieces {
    pub(super) fn push(&self, piece: Piece) {
        let waker = {
            let mut state = self.0.lock();
            state.pieces.push_back(piece);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll(&self, context: &Context<'_>) -> Poll<Piece> {
        let mut state = self.0.lock();
        if let Some(piece) = state.pieces.pop_front() {
            return Poll::Ready(piece);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

/// A generation that was submitted: a stream of its pieces for any runtime ([`Stream`], or [`Generating::next_piece`]), an iterator that
/// blocks ([`Generating::wait_pieces`]), or the whole of it ([`Generating::wait`], [`Generating::complete`]).
///
/// The pieces end with the generation, or with its error. Dropping it cancels the generation: it leaves before the next step.
#[must_use = "dropped, the generation is cancelled"]
#[derive(Debug)]
pub struct Generating {
    ticket: Option<Ticket<Job, Result<Finish>>>,
    pieces: Arc<Pieces>,
    finish: Option<Finish>,
    error: Option<Error>,
}

impl Generating {
    pub(super) fn new(ticket: Ticket<Job, Result<Finish>>, pieces: Arc<Pieces>) -> Self {
        Self { ticket: Some(ticket), pieces, finish: None, error: None }
    }

    /// How it ended; `None` before that is known, and where it ended with an error.
    #[must_use]
    pub fn finish(&self) -> Option<&Finish> {
        self.finish.as_ref()
    }

    /// The next piece; `None` after the last.
    ///
    /// # Errors
    /// What ended the generation early, once: [`Error::Logits`] and [`Error::Sampling`] where no token can be chosen,
    /// [`Error::Service`] for a panic, [`Error::Exec`] for what the engine refuses, a deadline that passed, or a service that was shut
    /// down.
    pub async fn next_piece(&mut self) -> Option<Result<Piece>> {
        poll_fn(|context| self.poll_piece(context)).await
    }

    /// All of it.
    ///
    /// # Errors
    /// As [`Generating::next_piece`].
    pub async fn complete(mut self) -> Result<Completion> {
        let (mut tokens, mut text) = (Vec::new(), String::new());
        while let Some(piece) = self.next_piece().await {
            let piece = piece?;
            tokens.extend(piece.token);
            text.push_str(&piece.text);
        }
        match self.finish {
            Some(finish) => Ok(Completion { tokens, text, finish }),
            None => Err(Error::service(NAME, "the generation had ended before")),
        }
    }

    /// All of it. Blocks.
    ///
    /// # Errors
    /// As [`Generating::next_piece`].
    pub fn wait(self) -> Result<Completion> {
        block_on(self.complete())
    }

    /// The pieces from here on; each is waited for on this thread.
    ///
    /// # Errors
    /// The items': as [`Generating::next_piece`].
    pub fn wait_pieces(&mut self) -> impl Iterator<Item = Result<Piece>> + '_ {
        std::iter::from_fn(|| block_on(poll_fn(|context| self.poll_piece(context))))
    }

    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Piece>>> {
        // asked before the pieces are: what is there at the end was there when it came
        if let Some(ticket) = &mut self.ticket {
            if let Poll::Ready(end) = Pin::new(ticket).poll(context) {
                self.ticket = None;
                match end.map_err(Error::from).flatten() {
                    Ok(finish) => self.finish = Some(finish),
                    Err(error) => self.error = Some(error),
                }
            }
        }
        match self.pieces.poll(context) {
            Poll::Ready(piece) => Poll::Ready(Some(Ok(piece))),
            Poll::Pending if self.ticket.is_none() => Poll::Ready(self.error.take().map(Err)),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Stream for Generating {
    type Item = Result<Piece>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_piece(context)
    }
}

/// Wakes a thread that sleeps.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The result of a future, polled on this thread, which sleeps in between.
fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}
