//! Against a server of the test's own, which speaks as much HTTP as the hub's client asks for.

use super::{ApiBuilder, Cache, HubModel};
use crate::hub::{NoProgress, Progress};
use crate::{Error, WeightFiles};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

const REPO: &str = "owner/tiny";

/// A hub with one repository.
struct Server {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(files: &[(&str, &str)]) -> std::io::Result<Self> {
        let files: BTreeMap<String, String> =
            files.iter().map(|(name, content)| (name.to_string(), content.to_string())).collect();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                drop(answer(stream, &files, &log));
            }
        });
        Ok(Self { endpoint, asked })
    }

    fn requests(&self) -> usize {
        self.asked.lock().map_or(0, |asked| asked.len())
    }
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, String>, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut path, mut range) = (String::new(), None);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some(rest) = line.strip_prefix("GET ") {
            path = rest.split(' ').next().unwrap_or_default().to_string();
        }
        if let Some(bytes) = line.to_lowercase().strip_prefix("range: bytes=") {
            range = Some(bytes.trim().to_string());
        }
    }
    if let Ok(mut log) = log.lock() {
        log.push(path.clone());
    }
    let listing = format!("/api/models/{REPO}/revision/main");
    let found = path.strip_prefix(&format!("/{REPO}/resolve/main/")).and_then(|name| files.get(name));
    let (status, headers, body) = if path == listing {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        ("200 OK", String::new(), serde_json::json!({ "sha": "c0ffee", "siblings": siblings }).to_string())
    } else if let Some(content) = found {
        let (from, to) = range.as_deref().and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
        let from = from.parse().unwrap_or(0).min(content.len());
        let to = to.parse().map_or(content.len(), |to: usize| (to + 1).min(content.len()));
        let headers = format!(
            "etag: \"{}\"\r\nx-repo-commit: c0ffee\r\ncontent-range: bytes {from}-{}/{}\r\n",
            path.replace('/', "-"),
            to.saturating_sub(1),
            content.len()
        );
        ("206 Partial Content", headers, content[from..to.max(from)].to_string())
    } else {
        ("404 Not Found", String::new(), String::new())
    };
    write!(stream, "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

fn fetch(
    model: &HubModel,
    server: &Server,
    dir: &std::path::Path,
    progress: &dyn Progress,
) -> crate::Result<crate::ModelDir> {
    let cache = Cache::new(dir.to_path_buf());
    let builder = ApiBuilder::from_cache(cache.clone()).with_endpoint(server.endpoint.clone()).with_progress(false);
    model.fetch_with(builder, &cache, progress)
}

#[derive(Default)]
struct Record(RefCell<Vec<String>>);

impl Progress for Record {
    fn start(&self, what: &str, total: Option<u64>) {
        self.0.borrow_mut().push(format!("{what} {total:?}"));
    }
}

#[test]
fn a_model_is_fetched_once() -> TestResult {
    let files = [
        ("config.json", "{}"),
        ("tokenizer.json", "[]"),
        ("1_Pooling/config.json", "{ }"),
        ("model.safetensors", "weights"),
        ("README.md", "no"),
    ];
    let server = Server::start(&files)?;
    let dir = tempfile::tempdir()?;
    let model = HubModel::new(REPO).with_file("1_Pooling/config.json");
    let told = Record::default();
    let first = fetch(&model, &server, dir.path(), &told)?;
    assert_eq!(told.0.borrow().len(), 4, "{:?}", told.0);
    assert_eq!(told.0.borrow().last().map(String::as_str), Some("fetching model.safetensors Some(7)"));
    for (name, content) in &files[..4] {
        assert_eq!(std::fs::read_to_string(first.file(name)?)?, *content, "{name}");
    }
    assert!(first.file("README.md").is_err(), "nobody asked for it");
    let asked = server.requests();
    let second = fetch(&model, &server, dir.path(), &NoProgress)?;
    assert_eq!((second.path(), server.requests()), (first.path(), asked), "the second run asks nobody");
    Ok(())
}

#[test]
fn the_shards_of_an_index_are_fetched() -> TestResult {
    let index =
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let server = Server::start(&[
        ("config.json", "{}"),
        ("tokenizer.json", "[]"),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", "1"),
        ("model-2.safetensors", "2"),
    ])?;
    let dir = tempfile::tempdir()?;
    let model = fetch(&HubModel::new(REPO), &server, dir.path(), &NoProgress)?;
    let WeightFiles::Safetensors(shards) = model.weights() else {
        return Err("safetensors were expected".into());
    };
    assert_eq!(shards.len(), 2);
    Ok(())
}

#[test]
fn what_a_repository_lacks_is_named() -> TestResult {
    let server = Server::start(&[("config.json", "{}"), ("tokenizer.json", "[]")])?;
    let dir = tempfile::tempdir()?;
    let error = |model: &HubModel| fetch(model, &server, dir.path(), &NoProgress).map(|_| ()).unwrap_err();
    let text = error(&HubModel::new(REPO)).to_string();
    assert_eq!(text, "model `owner/tiny` of the hub, file `model.safetensors`: the repository has no such file");
    assert!(error(&HubModel::new(REPO).with_file("x.json")).to_string().contains("`x.json`"));
    let absent = error(&HubModel::new("owner/other"));
    assert!(matches!(&absent, Error::HubDownload { file: None, .. }) && absent.to_string().contains("404"), "{absent}");
    let absent = error(&HubModel::new(REPO).with_revision("v2")).to_string();
    assert!(absent.contains("404"), "{absent}");
    Ok(())
}

#[test]
fn a_hub_that_does_not_answer_is_an_error() -> TestResult {
    let closed = TcpListener::bind("127.0.0.1:0")?;
    let server = Server { endpoint: format!("http://{}", closed.local_addr()?), asked: Arc::default() };
    drop(closed);
    let dir = tempfile::tempdir()?;
    let error = fetch(&HubModel::new(REPO), &server, dir.path(), &NoProgress).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("model `owner/tiny` of the hub: "), "{error}");
    Ok(())
}
