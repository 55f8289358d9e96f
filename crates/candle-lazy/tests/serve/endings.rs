//! How requests end: callers that go away, a full queue, a deadline, and the end of the server.

use crate::common::{read, until, Server, LONG};
use crate::load::clients::idle;
use candle_lazy::nn::service::{GenerationRequest, SubmitOptions};
use serde_json::{json, Value};

const PATH: &str = "/v1/completions";

/// A text that takes longer than any test.
fn endless(streamed: bool) -> Value {
    json!({ "model": "tiny", "prompt": "eat", "max_tokens": LONG - 8, "stream": streamed })
}

/// A server whose texts may be that long.
async fn patient(more: &[&str]) -> Server {
    let context = LONG.to_string();
    Server::start(&[&["--max-context", &context], more].concat()).await
}

fn code(answer: &Value) -> &str {
    answer["error"]["code"].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_is_not_computed_any_more_and_others_are() {
    let server = patient(&["--max-batch", "1"]).await;
    let stats = || server.app.generation.stats();
    // one whose answer is to be whole, and one that waits for its stream
    let runs = tokio::spawn(server.post(PATH, &endless(false)).send());
    until(|| stats().running == 1).await;
    let waits = tokio::spawn(server.post(PATH, &endless(true)).send());
    until(|| stats().queued == 1).await;
    waits.abort();
    until(|| stats().queued == 0).await;
    assert_eq!((stats().running, stats().cancelled, server.app.in_flight()), (1, 1, 1));
    runs.abort();
    idle(&server.url).await.unwrap();
    assert_eq!((stats().cancelled, stats().completed, stats().failed), (2, 0, 0));
    server.serves().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_a_stream_ends_its_text() {
    let server = patient(&[]).await;
    let mut answer = server.post(PATH, &endless(true)).send().await.unwrap();
    assert!(answer.chunk().await.unwrap().unwrap().starts_with(b"data: "));
    drop(answer);
    idle(&server.url).await.unwrap();
    let stats = server.app.generation.stats();
    assert_eq!((stats.cancelled, stats.completed, stats.failed), (1, 0, 0));
    server.serves().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_and_a_deadline_ends_who_waits() {
    let server = patient(&["--max-batch", "1", "--queue", "1", "--timeout", "5"]).await;
    // without a deadline of its own
    let endless = GenerationRequest::new(vec![3]).max_new_tokens(LONG);
    let runs = server.app.generation.submit(endless, &SubmitOptions::default()).unwrap();
    until(|| server.app.generation.stats().running == 1).await;
    let body = json!({ "model": "tiny", "prompt": "eat", "max_tokens": 2 });
    let waits = tokio::spawn(read(server.post(PATH, &body)));
    until(|| server.app.generation.stats().queued == 1).await;
    let answer = server.post(PATH, &body).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    let answer: Value = answer.json().await.unwrap();
    assert_eq!((code(&answer), &answer["error"]["type"]), ("rate_limit_exceeded", &json!("rate_limit_error")));
    // embeddings have a queue of their own
    assert_eq!(server.ask("/v1/embeddings", &json!({ "model": "vectors", "input": "eat" })).await.0, 200);
    let (status, answer) = waits.await.unwrap();
    assert_eq!((status, code(&answer)), (504, "deadline_exceeded"), "{answer}");
    assert_eq!(server.app.generation.stats().running, 1);
    // several texts of one request are all or none
    let (status, answer) = server.ask(PATH, &json!({ "model": "tiny", "prompt": "eat", "n": 2 })).await;
    assert_eq!(status, 429, "{answer}");
    until(|| server.app.generation.stats().queued == 0).await;
    drop(runs);
    idle(&server.url).await.unwrap();
    // it may be a moment before the place of the one that ended is free
    let mut status = 429;
    for _ in 0..100 {
        status = server.ask(PATH, &json!({ "model": "tiny", "prompt": "eat", "n": 2 })).await.0;
        if status != 429 {
            break;
        }
    }
    assert_eq!(status, 200);
    // to try again would not help those that are too many for an idle server
    let (status, answer) = server.ask(PATH, &json!({ "model": "tiny", "prompt": "eat", "n": 3 })).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("n")), "{answer}");
    let (status, answer) = server.ask(PATH, &json!({ "model": "tiny", "prompt": ["eat", "eat", "eat"] })).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("prompt")), "{answer}");
    idle(&server.url).await.unwrap();
    server.serves().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_in_the_past_is_an_error() {
    let server = Server::start(&["--timeout", "0"]).await;
    for (path, body) in [
        (PATH, json!({ "model": "tiny", "prompt": "eat" })),
        (PATH, json!({ "model": "tiny", "prompt": "eat", "stream": true })),
        ("/v1/embeddings", json!({ "model": "vectors", "input": "eat" })),
    ] {
        let (status, answer) = server.ask(path, &body).await;
        assert_eq!((status, code(&answer)), (504, "deadline_exceeded"), "{answer}");
    }
    assert_eq!(server.get("/health").await.0, 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_within_a_stream_is_its_last_event() {
    let server = patient(&["--timeout", "4"]).await;
    let answer = server.post(PATH, &endless(true)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let text = answer.text().await.unwrap();
    let last = text.strip_suffix("\n\n").unwrap().rsplit("\n\n").next().unwrap();
    let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(code(&error), "deadline_exceeded", "{error}");
    assert!(text.matches("\n\n").count() > 1, "nothing came before: {text}");
    idle(&server.url).await.unwrap();
    server.serves().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_limit_at_once_are_refused() {
    let server = patient(&["--max-concurrency", "1"]).await;
    // a stream holds its place until its end
    let first = server.post(PATH, &endless(true)).send().await.unwrap();
    let (status, answer) = server.ask("/v1/embeddings", &json!({ "model": "vectors", "input": "eat" })).await;
    assert_eq!((status, code(&answer)), (429, "rate_limit_exceeded"), "{answer}");
    // whoever watches is let in
    for path in ["/health", "/metrics", "/v1/models"] {
        assert_eq!(server.get(path).await.0, 200);
    }
    drop(first);
    idle(&server.url).await.unwrap();
    server.serves().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_finishes_what_runs_and_takes_no_more() {
    const NEW: usize = 2000;
    let mut server = patient(&["--max-batch", "1"]).await;
    let text = |streamed: bool| json!({ "model": "tiny", "prompt": "eat", "max_tokens": NEW, "stream": streamed });
    let mut streamed = server.post(PATH, &text(true)).send().await.unwrap();
    let mut events = streamed.chunk().await.unwrap().unwrap().to_vec();
    // and one that waits
    let whole = tokio::spawn(read(server.post(PATH, &text(false))));
    until(|| server.app.generation.stats().queued == 1).await;
    server.interrupt();
    until(|| server.app.is_stopping()).await;
    // who watches is answered meanwhile, on new connections too; who asks for more is told
    for (path, status) in [("/health/ready", 503), ("/health", 503), ("/health/live", 200), ("/metrics", 200)] {
        assert_eq!(reqwest::get(format!("{}{path}", server.url)).await.unwrap().status(), status, "{path}");
    }
    let (status, answer) = server.ask(PATH, &text(false)).await;
    assert_eq!((status, code(&answer)), (503, "shutting_down"), "{answer}");
    let metrics = reqwest::get(format!("{}/metrics", server.url)).await.unwrap().text().await.unwrap();
    let stats = server.app.generation.stats();
    assert_eq!((stats.running, stats.queued), (1, 1), "the first one runs still");
    assert!(metrics.lines().any(|line| line == "candle_lazy_http_requests_in_flight 2"), "{metrics}");
    while let Some(more) = streamed.chunk().await.unwrap() {
        events.extend(more);
    }
    assert!(events.ends_with(b"data: [DONE]\n\n"));
    let (status, answer) = whole.await.unwrap();
    assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &json!(NEW)), "{answer}");
    let (app, url) = (server.app.clone(), format!("{}/health", server.url));
    server.stop().await;
    assert!(reqwest::get(&url).await.is_err(), "nobody listens any more");
    let stats = app.generation.stats();
    assert_eq!((stats.running, stats.queued, stats.completed, stats.failed, stats.cancelled), (0, 0, 2, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_takes_too_long_ends_what_runs_with_errors() {
    let mut server = patient(&["--max-batch", "1"]).await;
    let streamed = server.post(PATH, &endless(true)).send().await.unwrap();
    let whole = tokio::spawn(read(server.post(PATH, &endless(false))));
    until(|| server.app.generation.stats().queued == 1).await;
    server.interrupt();
    until(|| server.app.is_stopping()).await;
    drop(server.enough.take());
    let (status, answer) = whole.await.unwrap();
    assert_eq!((status, code(&answer)), (503, "shutting_down"), "{answer}");
    let text = streamed.text().await.unwrap();
    let last = text.trim_end().rsplit("data: ").next().unwrap();
    assert_eq!(code(&serde_json::from_str(last).unwrap()), "shutting_down", "{last}");
    server.stop().await;
}
