//! What goes wrong, as OpenAI's API says it: a status, and `{"error": {"message", "type", "param", "code"}}`.

use axum::extract::rejection::BytesRejection;
use axum::http::{header, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::Json;
use candle_lazy::exec::error::QueueError;
use candle_lazy::{exec, nn};
use serde_json::{json, Value};
use std::fmt::Display;

/// An error for the caller.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
}

pub(crate) type Outcome<T> = Result<T, Failure>;

impl Failure {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Display) -> Self {
        Self { status, kind, code, param: None, message: message.to_string() }
    }

    /// The request means nothing.
    pub(crate) fn invalid(message: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// A field of the request means nothing.
    pub(crate) fn field(param: &str, message: impl Display) -> Self {
        Self { param: Some(param.to_string()), ..Self::invalid(message) }
    }

    /// A field asks for what this server does not do.
    pub(crate) fn unsupported(param: &str, message: impl Display) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// More tokens than there is room for.
    pub(crate) fn too_long(message: impl Display) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid(message) }
    }

    pub(crate) fn no_model(name: &str, known: &[String]) -> Self {
        let message = format!("The model `{name}` does not exist (there are {}).", known.join(", "));
        let status = StatusCode::NOT_FOUND;
        Self {
            param: Some("model".into()),
            ..Self::new(status, "invalid_request_error", Some("model_not_found"), message)
        }
    }

    pub(crate) fn no_route(method: &str, path: &str) -> Self {
        let message = format!("There is no {method} {path}.");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    pub(crate) fn no_method(method: &str, path: &str) -> Self {
        let message = format!("{path} takes no {method}.");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// As many requests as may are there already.
    pub(crate) fn busy(message: impl Display) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"), message)
    }

    pub(crate) fn stopping() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            Some("shutting_down"),
            "The server is shutting down.",
        )
    }

    pub(crate) fn late() -> Self {
        let message = "The request took longer than the server's --timeout allows.";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", Some("deadline_exceeded"), message)
    }

    pub(crate) fn internal(message: impl Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// With the field that it is about.
    pub(crate) fn of(self, param: &str) -> Self {
        let about = self.status == StatusCode::BAD_REQUEST && self.param.is_none();
        Self { param: if about { Some(param.to_string()) } else { self.param }, ..self }
    }

    /// Of a field within this one.
    pub(crate) fn in_field(self, outer: &str) -> Self {
        Self { param: self.param.map(|inner| format!("{outer}.{inner}")), ..self }
    }

    /// `{"error": …}`, the body of an answer or the last event of a stream.
    pub(crate) fn body(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            // seconds; clients of OpenAI's read it before they try again
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<nn::Error> for Failure {
    fn from(error: nn::Error) -> Self {
        // the messages of the first ones name a line of this program, which is nothing to a caller
        match error {
            nn::Error::EmptyPrompt { .. } => Self::invalid("The text is empty: it has no token."),
            nn::Error::PromptTooLong { len, context, .. } => {
                let room =
                    if len > context { "more than there is room for" } else { "which leaves no room for another" };
                Self::too_long(format_args!("The text has {}, {room}: the context has {context}.", tokens(len)))
            }
            nn::Error::TokenOutOfRange { id, vocab, .. } => {
                Self::invalid(format_args!("Token id {id} is outside of the vocabulary of {vocab}."))
            }
            nn::Error::UnknownAdapter { name, known } => Self::no_model(&name, &[known]),
            nn::Error::Sampling { message } => Self::invalid(message),
            error @ (nn::Error::Unsupported { .. } | nn::Error::Tokenizer { .. }) => Self::invalid(error),
            nn::Error::Deadline { .. } => Self::late(),
            nn::Error::Exec(error) => match *error {
                exec::Error::Queue(QueueError::Full { capacity }) => {
                    Self::busy(format_args!("The queue is full: {capacity} may wait, and as many do. Try again later."))
                }
                exec::Error::Queue(QueueError::Deadline) => Self::late(),
                exec::Error::Queue(QueueError::Closed) => Self::stopping(),
                error => Self::internal(error),
            },
            error => Self::internal(error),
        }
    }
}

/// So many, in words.
pub(crate) fn tokens(count: usize) -> String {
    format!("{count} token{}", if count == 1 { "" } else { "s" })
}

impl From<BytesRejection> for Failure {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                Some("request_too_large"),
                "The body is larger than the server's --max-body allows.",
            ),
            _ => Self::invalid(format_args!("The body could not be read: {rejection}")),
        }
    }
}
