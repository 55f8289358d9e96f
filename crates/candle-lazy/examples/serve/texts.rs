//! The texts of one request on their way to its caller, whole or as server-sent events.

use super::app::Admission;
use super::completions::{usage, Head};
use super::failure::{Failure, Outcome};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use candle_lazy::nn::service::{Finish, Generating, GenerationRequest, GenerationService, SubmitOptions};
use futures::stream::{unfold, Stream};
use serde_json::Value;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Texts that are computed at once. Dropping them ends them.
#[derive(Debug)]
pub(crate) struct Texts {
    running: Vec<Option<Generating>>,
    /// Who is asked first for news.
    turn: usize,
}

/// What is new of one of the texts, by its number.
#[derive(Debug)]
pub(crate) enum Event {
    Text(usize, String),
    End(usize, Finish),
}

impl Texts {
    /// Submits all of them. Where one is refused, those before it are cancelled, whatever was begun of them.
    pub(crate) fn submit(
        service: &GenerationService,
        requests: Vec<GenerationRequest>,
        how: &SubmitOptions,
    ) -> Outcome<Self> {
        let submitted = requests.into_iter().map(|request| service.try_submit(request, how).map(Some));
        Ok(Self { running: submitted.collect::<Result<_, _>>()?, turn: 0 })
    }

    /// The next event; `None` after the last, which is the error of a text where there is one.
    pub(crate) async fn next(&mut self) -> Option<Outcome<Event>> {
        poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Outcome<Event>>> {
        let count = self.running.len();
        let mut pending = false;
        for at in (self.turn..count).chain(0..self.turn.min(count)) {
            let Some(slot) = self.running.get_mut(at) else { continue };
            let event = match next_of(slot, at, context) {
                Poll::Ready(None) => continue,
                Poll::Ready(Some(event)) => event,
                Poll::Pending => {
                    pending = true;
                    continue;
                }
            };
            self.turn = at + 1;
            if event.is_err() {
                self.running.clear();
            }
            return Poll::Ready(Some(event));
        }
        match pending {
            true => Poll::Pending,
            false => Poll::Ready(None),
        }
    }
}

fn next_of(slot: &mut Option<Generating>, at: usize, context: &mut Context<'_>) -> Poll<Option<Outcome<Event>>> {
    let Some(text) = slot else { return Poll::Ready(None) };
    loop {
        return match Pin::new(&mut *text).poll_next(context) {
            Poll::Pending => Poll::Pending,
            // within a character, or what may become a stop string
            Poll::Ready(Some(Ok(piece))) if piece.text.is_empty() => continue,
            Poll::Ready(Some(Ok(piece))) => Poll::Ready(Some(Ok(Event::Text(at, piece.text)))),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => {
                let finish = text.finish().copied();
                *slot = None;
                let end = finish.map(|finish| Event::End(at, finish));
                Poll::Ready(Some(end.ok_or_else(|| Failure::internal("a text ended without a reason"))))
            }
        };
    }
}

/// An answer as a stream of events. Dropped with its connection, it ends its texts.
#[derive(Debug)]
pub(crate) struct Events {
    texts: Texts,
    head: Head,
    admission: Admission,
    /// Tokens of the prompts, where the numbers are asked for.
    prompt_tokens: Option<usize>,
    new_tokens: usize,
    /// Written already, not sent yet.
    ready: VecDeque<Written>,
    over: bool,
}

#[derive(Debug)]
enum Written {
    Json(Value),
    Done,
}

impl Events {
    /// Waits for the first of them: what goes wrong before that has a status of its own.
    pub(crate) async fn begin(
        mut texts: Texts,
        head: Head,
        echo: &[String],
        prompt_tokens: Option<usize>,
        admission: Admission,
    ) -> Outcome<Self> {
        let first = admission.in_time(texts.next()).await?.transpose()?;
        let (new_tokens, ready, over) = (0, VecDeque::new(), false);
        let mut events = Self { texts, head, admission, prompt_tokens, new_tokens, ready, over };
        for (index, echo) in echo.iter().enumerate() {
            if let Some(opening) = events.head.opening(index, echo) {
                events.write(vec![opening]);
            }
        }
        events.take(first);
        Ok(events)
    }

    fn write(&mut self, choices: Vec<Value>) {
        // with numbers at the end, every event before says that it has none
        let usage = self.prompt_tokens.map(|_| Value::Null);
        self.ready.push_back(Written::Json(self.head.around(true, choices, usage)));
    }

    fn take(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Text(at, text)) => self.write(vec![self.head.piece(at, &text)]),
            Some(Event::End(at, finish)) => {
                self.new_tokens += finish.new_tokens;
                self.write(vec![self.head.closing(at, &finish)]);
            }
            None => {
                if let Some(prompt_tokens) = self.prompt_tokens {
                    let usage = usage(prompt_tokens, self.new_tokens);
                    self.ready.push_back(Written::Json(self.head.around(true, Vec::new(), Some(usage))));
                }
                self.ready.push_back(Written::Done);
                self.over = true;
            }
        }
    }

    async fn next(mut self) -> Option<(Result<sse::Event, Infallible>, Self)> {
        while self.ready.is_empty() {
            if self.over {
                return None;
            }
            match self.admission.in_time(self.texts.next()).await.and_then(Option::transpose) {
                Ok(event) => self.take(event),
                Err(failure) => {
                    // the head has been sent: the error is the last event, and no mark of a good end follows
                    self.ready.push_back(Written::Json(failure.body()));
                    self.over = true;
                }
            }
        }
        let data = match self.ready.pop_front()? {
            Written::Json(value) => value.to_string(),
            Written::Done => "[DONE]".to_string(),
        };
        Some((Ok(sse::Event::default().data(data)), self))
    }

    fn stream(self) -> impl Stream<Item = Result<sse::Event, Infallible>> {
        unfold(self, Self::next)
    }
}

impl IntoResponse for Events {
    fn into_response(self) -> Response {
        Sse::new(self.stream()).keep_alive(KeepAlive::default()).into_response()
    }
}
