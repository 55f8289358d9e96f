//! Bad input: an error of OpenAI's form that says what is wrong, and the next request is served.

use crate::common::{Server, CONTEXT};
use serde_json::{json, Value};

/// `base` with other fields.
fn with(base: &Value, fields: Value) -> Value {
    let mut all = base.clone();
    for (name, value) in fields.as_object().unwrap() {
        all[name] = value.clone();
    }
    all
}

#[track_caller]
fn check(what: &str, (status, answer): (u16, Value), want: (u16, Option<&str>, Option<&str>), says: &str) {
    let error = &answer["error"];
    let found = (status, error["param"].as_str(), error["code"].as_str());
    assert_eq!(found, want, "{what}: {answer}");
    assert!(error["message"].as_str().is_some_and(|message| message.contains(says)), "{what}: {answer}");
    assert_eq!(error["type"], "invalid_request_error", "{what}: {answer}");
    // nothing of this program's inside
    assert!(!answer.to_string().contains(".rs:"), "{what}: {answer}");
}

const UNSUPPORTED: Option<&str> = Some("unsupported_parameter");

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_cannot_be_is_refused_by_name() {
    let server = Server::start(&[]).await;
    let base = json!({ "model": "tiny", "prompt": "eat", "max_tokens": 2 });
    let long = vec!["eat"; CONTEXT].join(" ");
    for (fields, param, code, says) in [
        (json!({ "model": "vectors" }), Some("model"), None, "/v1/embeddings"),
        (json!({ "model": null }), Some("model"), None, "`model` is missing"),
        (json!({ "model": 3 }), Some("model"), None, "string"),
        (json!({ "prompt": null }), Some("prompt"), None, "`prompt` is missing"),
        (json!({ "prompt": { "a": 1 } }), Some("prompt"), None, "an array of token ids"),
        (json!({ "prompt": [] }), Some("prompt"), None, "0 texts"),
        (json!({ "prompt": "" }), Some("prompt"), None, "empty"),
        (json!({ "prompt": [[3], []] }), Some("prompt"), None, "empty"),
        (json!({ "prompt": [3, 24] }), Some("prompt"), None, "24 is outside of the vocabulary of 24"),
        (json!({ "prompt": [-1] }), Some("prompt"), None, "an array of token ids"),
        (
            json!({ "prompt": long }),
            Some("prompt"),
            Some("context_length_exceeded"),
            "has 192 tokens, which leaves no room for another: the context has 192",
        ),
        (json!({ "max_tokens": -1 }), Some("max_tokens"), None, "is -1, it must be a whole number from 0 to"),
        (json!({ "max_tokens": "a".repeat(1000) }), Some("max_tokens"), None, "aaaa…, it must be a whole number"),
        (json!({ "max_tokens": "many" }), Some("max_tokens"), None, "is \"many\", it must be a whole number"),
        (json!({ "max_tokens": CONTEXT }), Some("max_tokens"), Some("context_length_exceeded"), "room for 191: the"),
        (json!({ "temperature": 2.5 }), Some("temperature"), None, "from 0 to 2"),
        (json!({ "temperature": "hot" }), Some("temperature"), None, "hot"),
        (json!({ "top_p": -0.1 }), Some("top_p"), None, "from 0 to 1"),
        (json!({ "n": 0 }), Some("n"), None, "from 1 to 128"),
        (json!({ "n": 100, "prompt": ["eat", "food"] }), Some("prompt"), None, "200 texts"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), Some("stop"), None, "up to 4"),
        (json!({ "stop": [""] }), Some("stop"), None, "empty"),
        (json!({ "stop": 3 }), Some("stop"), None, "array of strings"),
        (json!({ "stream_options": { "include_usage": true } }), Some("stream_options"), None, "stream"),
        (json!({ "stream": true, "stream_options": { "what": 1 } }), Some("what"), UNSUPPORTED, "what"),
        (json!({ "stream": true, "stream_options": 1 }), Some("stream_options"), None, "object"),
        (json!({ "stream": true, "prompt": [99] }), Some("prompt"), None, "vocabulary"),
        (json!({ "logprobs": 0 }), Some("logprobs"), UNSUPPORTED, "not supported"),
        (json!({ "best_of": 2 }), Some("best_of"), UNSUPPORTED, "not supported"),
        (json!({ "suffix": "x" }), Some("suffix"), UNSUPPORTED, "not supported"),
        (json!({ "logit_bias": { "3": 1 } }), Some("logit_bias"), UNSUPPORTED, "not supported"),
        (json!({ "presence_penalty": 0.5 }), Some("presence_penalty"), UNSUPPORTED, "not supported"),
        (json!({ "seed": 1.5 }), Some("seed"), None, "is 1.5, it must be a whole number"),
        (json!({ "stream": "yes" }), Some("stream"), None, "is \"yes\", it must be true or false"),
        (json!({ "colour": "red" }), Some("colour"), UNSUPPORTED, "not known"),
    ] {
        let body = with(&base, fields);
        check(&body.to_string(), server.ask("/v1/completions", &body).await, (400, param, code), says);
    }
    // without a number a text ends with the context: all but one token of it are the prompt's
    let almost = vec!["eat"; CONTEXT - 1].join(" ");
    let (status, answer) = server.ask("/v1/completions", &json!({ "model": "tiny", "prompt": almost })).await;
    assert_eq!((status, answer["usage"]["total_tokens"].as_u64()), (200, Some(CONTEXT as u64)), "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
    let body = with(&base, json!({ "model": "nobody" }));
    let answer = server.ask("/v1/completions", &body).await;
    check("no such adapter", answer, (404, Some("model"), Some("model_not_found")), "tiny, loud, vectors");
    server.serves().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_that_cannot_be_is_refused_by_name() {
    let server = Server::start(&[]).await;
    let base = json!({ "model": "loud", "messages": [{ "role": "user", "content": "eat" }], "max_tokens": 2 });
    let message = |message: Value| json!({ "messages": [message] });
    let picture = json!([{ "type": "image_url", "image_url": { "url": "x" } }]);
    for (fields, param, code, says) in [
        (json!({ "messages": null }), Some("messages"), None, "missing"),
        (json!({ "messages": [] }), Some("messages"), None, "empty"),
        (json!({ "messages": ["eat"] }), Some("messages[0]"), None, "object"),
        (message(json!({ "content": "eat" })), Some("messages[0].role"), None, "missing"),
        (message(json!({ "role": "tool", "content": "eat" })), Some("messages[0].role"), UNSUPPORTED, "tool"),
        (message(json!({ "role": "user" })), Some("messages[0].content"), None, "string"),
        (
            message(json!({ "role": "user", "content": picture })),
            Some("messages[0].content"),
            UNSUPPORTED,
            "texts only",
        ),
        (
            message(json!({ "role": "user", "content": "eat", "name": "a" })),
            Some("messages[0].name"),
            UNSUPPORTED,
            "name",
        ),
        (json!({ "tools": [{ "type": "function" }] }), Some("tools"), UNSUPPORTED, "not supported"),
        (json!({ "logprobs": true }), Some("logprobs"), UNSUPPORTED, "not supported"),
        (
            json!({ "response_format": { "type": "json_object" } }),
            Some("response_format"),
            UNSUPPORTED,
            "not supported",
        ),
        (json!({ "prompt": "eat" }), Some("prompt"), UNSUPPORTED, "not known"),
    ] {
        let body = with(&base, fields);
        check(&body.to_string(), server.ask("/v1/chat/completions", &body).await, (400, param, code), says);
    }
    server.serves().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedding_that_cannot_be_is_refused_by_name() {
    let server = Server::start(&[]).await;
    let base = json!({ "model": "vectors", "input": "eat" });
    for (fields, param, code, says) in [
        (json!({ "model": "loud" }), Some("model"), None, "no embeddings"),
        (json!({ "input": null }), Some("input"), None, "missing"),
        (json!({ "input": ["eat", ""] }), Some("input"), None, "Text 1 of `input` is empty"),
        (json!({ "input": [] }), Some("input"), None, "0 texts"),
        (json!({ "input": [[]] }), Some("input"), None, "empty"),
        (json!({ "input": [99] }), Some("input"), None, "vocabulary"),
        (json!({ "input": vec!["eat"; 17].join(" ") }), Some("input"), Some("context_length_exceeded"), "17 tokens"),
        (json!({ "input": vec!["a"; 2049] }), Some("input"), None, "from 1 to 2048"),
        (json!({ "dimensions": 3 }), Some("dimensions"), UNSUPPORTED, "16 numbers"),
        (json!({ "encoding_format": "hex" }), Some("encoding_format"), None, "hex"),
        (json!({ "prompt": "eat" }), Some("prompt"), UNSUPPORTED, "not known"),
    ] {
        let body = with(&base, fields);
        check(&body.to_string(), server.ask("/v1/embeddings", &body).await, (400, param, code), says);
    }
    let answer = server.ask("/v1/embeddings", &base).await;
    assert_eq!(answer.0, 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_is_refused() {
    let server = Server::start(&["--max-body", "5000"]).await;
    let send = async |method: &str, path: &str, body: &str| {
        let method = method.parse().unwrap();
        let request = reqwest::Client::new().request(method, format!("{}{path}", server.url)).body(body.to_string());
        crate::common::read(request).await
    };
    for path in ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"] {
        check("no JSON", send("POST", path, "eat the food").await, (400, None, None), "not JSON");
        check("half of it", send("POST", path, "{\"model\": \"tiny\"").await, (400, None, None), "not JSON");
        check("nothing", send("POST", path, "").await, (400, None, None), "not JSON");
        check("an array", send("POST", path, "[1]").await, (400, None, None), "no object");
        let deep = format!("{}{}", "[".repeat(2000), "]".repeat(2000));
        check("too deep", send("POST", path, &deep).await, (400, None, None), "not JSON");
        let large = (413, None, Some("request_too_large"));
        check("too large", send("POST", path, &" ".repeat(5001)).await, large, "--max-body");
        check("GET", send("GET", path, "").await, (405, None, Some("method_not_allowed")), "GET");
    }
    check("no route", send("POST", "/v1/images", "{}").await, (404, None, Some("unknown_url")), "/v1/images");
    server.serves().await;
    server.stop().await;
}

#[test]
fn arguments_that_mean_nothing_are_refused_before_anything_is_loaded() {
    use clap::Parser;
    let parse = |words: &[&str]| {
        let words = ["serve", "--model", "no/such/model"].iter().chain(words);
        crate::server::Arguments::try_parse_from(words).map_err(|error| error.to_string())
    };
    for word in ["--adapter=name", "--adapter==dir", "--timeout=-1", "--grace=NaN", "--listen=here"] {
        let error = parse(&[word]).unwrap_err();
        assert!(error.contains(word.split('=').next().unwrap()), "{error}");
    }
    let models = crate::common::Models::write();
    let loud = format!("loud={}", models.path("loud").display());
    let load = |words: &[&str]| crate::server::load(&parse(words).unwrap()).unwrap_err().to_string();
    assert!(load(&["--adapter", &loud, "--adapter", &loud]).contains("two adapters are named loud"));
    assert!(load(&["--adapter", "x=no/such/adapter"]).contains("no/such/adapter"));
    let error = crate::server::load(&models.arguments(&["--adapter", &loud.replace("loud=", "tiny=")])).unwrap_err();
    assert!(error.to_string().contains("are named tiny"), "{error}");
    let error = crate::server::load(&models.arguments(&["--max-concurrency", "0"])).unwrap_err();
    assert!(error.to_string().contains("above 0"), "{error}");
}
