//! Routes, what stands before all of them, and how the server ends.

use super::app::{Admission, App};
use super::failure::{Failure, Outcome};
use super::{completions, embeddings, metrics};
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, MatchedPath, Path, Request, State};
use axum::http::{header, Method, StatusCode, Uri};
use axum::middleware::{from_fn_with_state, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{json, Value};
use std::future::{Future, IntoFuture};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// Everything that the server answers.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/embeddings", post(embeddings::answer))
        .route("/v1/completions", post(completions::answer_text))
        .route("/v1/chat/completions", post(completions::answer_chat))
        .route_layer(from_fn_with_state(Arc::clone(&app), admitted))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/health", get(ready))
        .route("/health/ready", get(ready))
        .route("/health/live", get(live))
        .route("/metrics", get(show_metrics))
        .fallback(|method: Method, uri: Uri| async move { Failure::no_route(method.as_str(), uri.path()) })
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
            Failure::no_method(method.as_str(), uri.path())
        })
        .layer(DefaultBodyLimit::max(app.limits.max_body))
        .layer(from_fn_with_state(Arc::clone(&app), counted))
        .with_state(app)
}

/// Answers until `stop`; then finishes what is being answered, until `enough`, which ends it with errors. Meanwhile who watches is answered,
/// and who asks for more is told that the server stops; with the last answer it takes no more connections.
///
/// # Errors
/// The listener's.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    stop: impl Future<Output = ()> + Send + 'static,
    enough: impl Future<Output = ()>,
) -> std::io::Result<()> {
    /// For the answers to those that are ended: they are written by then, or nobody reads.
    const LAST_WORDS: Duration = Duration::from_secs(2);
    let (told, stopped) = oneshot::channel();
    let stopping = {
        let app = Arc::clone(&app);
        async move {
            stop.await;
            app.stop();
            // nobody listens where the server has ended by itself
            told.send(()).unwrap_or_default();
            app.answered().await;
        }
    };
    let mut server =
        pin!(axum::serve(listener, router(Arc::clone(&app))).with_graceful_shutdown(stopping).into_future());
    let cut = async {
        if stopped.await.is_ok() {
            enough.await;
        } else {
            std::future::pending().await
        }
    };
    let ended = tokio::select! {
        ended = &mut server => Some(ended),
        () = cut => None,
    };
    // a step may run for a while
    let ending = tokio::task::spawn_blocking(move || app.cancel());
    let ended = match ended {
        Some(ended) => ended,
        None => tokio::time::timeout(LAST_WORDS, server).await.unwrap_or(Ok(())),
    };
    ending.await.map_err(std::io::Error::other)?;
    ended
}

/// Counts each answer by its route and status.
async fn counted(State(app): State<Arc<App>>, path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    app.requests.answered(path.as_ref().map_or("other", MatchedPath::as_str), response.status());
    response
}

/// Gives a request a place among those that are answered, and a deadline.
async fn admitted(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let admission = match app.admit() {
        Ok(admission) => admission,
        Err(failure) => return failure.into_response(),
    };
    request.extensions_mut().insert::<Admission>(admission.clone());
    admission.in_time(next.run(request)).await.unwrap_or_else(IntoResponse::into_response)
}

fn described(app: &App, name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": app.created, "owned_by": "candle-lazy" })
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let data: Vec<Value> = app.names().iter().map(|name| described(&app, name)).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Outcome<Json<Value>> {
    let names = app.names();
    match names.contains(&name) {
        true => Ok(Json(described(&app, &name))),
        false => Err(Failure::no_model(&name, &names)),
    }
}

async fn live() -> Json<Value> {
    Json(json!({ "status": "live" }))
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.is_stopping() {
        true => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "stopping" }))).into_response(),
        false => Json(json!({ "status": "ready" })).into_response(),
    }
}

async fn show_metrics(State(app): State<Arc<App>>) -> Response {
    let kind = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([kind], Body::from(metrics::text(&app))).into_response()
}
