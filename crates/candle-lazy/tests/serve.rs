//! The example `serve` on made-up models, in this process: clients of OpenAI's API, rude clients, the end of the server, and the example
//! `load`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

#[allow(dead_code)]
#[path = "../examples/load/main.rs"]
mod load;
#[allow(dead_code)]
#[path = "../examples/serve/main.rs"]
mod server;

mod made_up;

#[path = "serve/common.rs"]
mod common;
#[path = "serve/endings.rs"]
mod endings;
#[path = "serve/metrics.rs"]
mod metrics;
#[path = "serve/openai.rs"]
mod openai;
#[path = "serve/refusals.rs"]
mod refusals;

use common::Server;

#[tokio::test(flavor = "multi_thread")]
async fn each_of_many_clients_gets_what_it_gets_alone() {
    let server = Server::start(&["--max-batch", "4"]).await;
    let words =
        ["eat", "the food and", "sleep", "who eat the food", "tree water stone", "sun", "a a a a a a a", "moon"];
    let load = load::clients::Load {
        url: server.url.clone(),
        models: vec!["tiny".into(), "loud".into()],
        embedding_model: "vectors".into(),
        texts: words.iter().map(ToString::to_string).collect(),
        clients: 8,
        requests: 12,
        max_tokens: 24,
        seed: 3,
    };
    let report = load.run().await.unwrap();
    // the mix has all kinds of them
    assert_eq!(report.times.len(), 7, "{report}");
    assert!(report.left > 0 && report.refused > 0 && report.new_tokens > 0, "{report}");
    let answers: usize = report.times.iter().filter(|(what, _)| !what.contains("first")).map(|(_, t)| t.len()).sum();
    assert_eq!(answers + report.left + report.refused, 8 * 12);
    let (texts, vectors) = (server.app.generation.stats(), server.app.embedding.stats());
    assert_eq!((texts.queued, texts.running, vectors.queued, vectors.running), (0, 0, 0, 0));
    assert_eq!((texts.failed, vectors.failed), (0, 0));
    assert!(texts.batch.mean() > 1.0, "nothing was computed together: {:?}", texts.batch);
    server.stop().await;
}
