//! Generation as an asynchronous stream.

use super::generator::Run;
use super::StreamToken;
use crate::error::{Error, Result};
use futures_core::Stream;
use std::pin::Pin;
use std::task::{Context, Poll};

/// What the stream does next.
enum State<'a> {
    /// The generation could not begin.
    Failed(Error),
    /// A token.
    Running(Run<'a>),
    /// Nothing any more.
    Ended,
}

/// The tokens of a run.
pub(super) struct TokenStream<'a> {
    state: State<'a>,
    /// Whether a token was given since other tasks had their turn.
    busy: bool,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(run: Result<Run<'a>>) -> Self {
        let state = match run {
            Ok(run) => State::Running(run),
            Err(error) => State::Failed(error),
        };
        Self { state, busy: false }
    }
}

impl Stream for TokenStream<'_> {
    type Item = Result<StreamToken>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.busy) {
            // a step computes without waiting for anything: without a pause no other task of this thread would run before the end
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Failed(error) => Poll::Ready(Some(Err(error))),
            State::Ended => Poll::Ready(None),
            State::Running(mut run) => match run.advance_described() {
                Ok(Some(token)) => {
                    self.state = State::Running(run);
                    self.busy = true;
                    Poll::Ready(Some(Ok(token)))
                }
                Ok(None) => Poll::Ready(None),
                Err(error) => Poll::Ready(Some(Err(error))),
            },
        }
    }
}
