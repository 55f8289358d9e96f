//! `/metrics` in Prometheus' text format, and `/health`.

use crate::common::Server;
use crate::load::clients::{idle, sample};
use serde_json::{json, Value};
use std::collections::{BTreeMap, BTreeSet};

/// A line of the text: the metric's name, its labels, and its value.
type Sample = (String, BTreeMap<String, String>, f64);

fn name_at(text: &str, colons: bool) -> usize {
    let first = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    assert!(first, "no name: {text}");
    text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || (colons && c == ':'))).unwrap_or(text.len())
}

/// A sample, read as the format's grammar says.
fn read(line: &str) -> Sample {
    let (name, mut rest) = line.split_at(name_at(line, true));
    let mut labels = BTreeMap::new();
    if let Some(within) = rest.strip_prefix('{') {
        rest = within;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_at(name_at(rest, false));
            let after = after.strip_prefix("=\"").unwrap();
            let (mut value, mut escaped, mut end) = (String::new(), false, None);
            for (at, c) in after.char_indices() {
                match (escaped, c) {
                    (true, 'n') => value.push('\n'),
                    (true, '\\' | '"') => value.push(c),
                    (true, _) => panic!("`\\{c}` in {line}"),
                    (false, '\\') => {}
                    (false, '"') => {
                        end = Some(at);
                        break;
                    }
                    (false, _) => value.push(c),
                }
                escaped = !escaped && c == '\\';
            }
            assert!(labels.insert(label.to_string(), value).is_none(), "twice: {line}");
            rest = &after[end.unwrap() + 1..];
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').unwrap();
    (name.to_string(), labels, value.parse().unwrap())
}

/// The families of a text with their kinds and samples.
fn families(text: &str) -> BTreeMap<String, (String, Vec<Sample>)> {
    let mut families: BTreeMap<String, (String, Vec<Sample>)> = BTreeMap::new();
    let (mut helped, mut current) = (BTreeSet::new(), String::new());
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            assert!(helped.insert(help.split_once(' ').unwrap().0.to_string()), "twice: {line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(helped.contains(name) && ["counter", "gauge", "histogram"].contains(&kind), "{line}");
            current = name.to_string();
            assert!(families.insert(current.clone(), (kind.to_string(), Vec::new())).is_none(), "twice: {line}");
        } else {
            let sample = read(line);
            let (kind, samples) = families.get_mut(&current).unwrap();
            let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.iter().any(|suffix| sample.0 == format!("{current}{suffix}")), "not together: {line}");
            assert!(!samples.iter().any(|other| (&other.0, &other.1) == (&sample.0, &sample.1)), "twice: {line}");
            samples.push(sample);
        }
    }
    families
}

#[tokio::test(flavor = "multi_thread")]
async fn the_numbers_can_be_read_and_add_up() {
    let server = Server::start(&[]).await;
    let text = json!({ "model": "tiny", "prompt": "eat the food", "max_tokens": 5, "temperature": 0 });
    for _ in 0..3 {
        assert_eq!(server.ask("/v1/completions", &text).await.0, 200);
    }
    assert_eq!(server.ask("/v1/completions", &json!({ "model": "tiny", "prompt": [99] })).await.0, 400);
    assert_eq!(server.ask("/v1/completions", &json!({ "model": "nobody \"\\", "prompt": [99] })).await.0, 404);
    assert_eq!(server.ask("/v1/embeddings", &json!({ "model": "vectors", "input": ["a", "the"] })).await.0, 200);
    assert_eq!(server.get("/no/such/\"route").await.0, 404);
    let metrics = idle(&server.url).await.unwrap();
    let families = families(&metrics);
    let value = |name: &str, label: &str| sample(&metrics, &format!("candle_lazy_{name}"), label);
    let of_texts = "service=\"generation\"";
    assert_eq!(value("submitted_total", of_texts), 3.0);
    assert_eq!(value("completed_total", of_texts), 3.0);
    assert_eq!(value("refused_total", of_texts), 1.0);
    assert_eq!((value("prompt_tokens_total", of_texts), value("new_tokens_total", of_texts)), (9.0, 15.0));
    assert_eq!(value("completed_total", "service=\"embedding\""), 1.0);
    assert_eq!(value("http_requests_total", "route=\"/v1/completions\",status=\"200\""), 3.0);
    assert_eq!(value("http_requests_total", "status=\"404\""), 2.0);
    assert_eq!(value("http_requests_total", "route=\"other\""), 1.0);
    assert!(value("plan_cache_hits_total", "") > 0.0 && value("plans", "") > 0.0);
    let mut histograms = 0;
    for (name, (kind, samples)) in &families {
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
        if kind != "histogram" {
            continue;
        }
        for service in ["embedding", "generation"] {
            let of = |suffix: &str| -> Vec<&Sample> {
                let full = format!("{name}{suffix}");
                samples.iter().filter(|sample| sample.0 == full && sample.1["service"] == service).collect()
            };
            let buckets = of("_bucket");
            let Some(last) = buckets.last() else { continue };
            histograms += 1;
            let bounds: Vec<f64> =
                buckets.iter().map(|sample| sample.1["le"].replace('+', "").parse().unwrap()).collect();
            assert!(bounds.is_sorted_by(|a, b| a < b) && bounds.last() == Some(&f64::INFINITY), "{name}: {bounds:?}");
            assert!(buckets.is_sorted_by_key(|sample| sample.2), "{name} is not cumulative");
            assert!(last.2 > 0.0 && last.2 == of("_count")[0].2 && of("_sum")[0].2 >= 0.0, "{name}");
        }
    }
    assert_eq!(histograms, 9);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_how_it_is() {
    let server = Server::start(&[]).await;
    for (path, status) in [("/health", "ready"), ("/health/ready", "ready"), ("/health/live", "live")] {
        let (code, answer) = server.get(path).await;
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!((code, &answer["status"]), (200, &json!(status)));
    }
    // what a load balancer hears while it stops
    server.app.stop();
    assert_eq!(server.get("/health/ready").await.0, 503);
    assert_eq!(server.get("/health/live").await.0, 200);
    let (code, answer) = server.ask("/v1/embeddings", &json!({ "model": "vectors", "input": "a" })).await;
    assert_eq!((code, &answer["error"]["code"]), (503, &json!("shutting_down")));
    server.stop().await;
}
