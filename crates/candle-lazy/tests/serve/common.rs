//! Made-up models on the disk, a server on them, and requests by hand.

use crate::made_up::{self, numbers, Sizes};
use crate::server::app::App;
use crate::server::{http, load, Arguments};
use candle_core::{DType, Device, Tensor};
use candle_lazy::nn::{LoraAdapter, LoraConfig, ModelDir};
use clap::Parser;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const HIDDEN: usize = 16;
/// Tokens of a text, unless a test says otherwise.
pub(crate) const CONTEXT: usize = 192;
/// What the model has: more than a test has patience for.
pub(crate) const LONG: usize = 1 << 16;
const WORDS: [&str; 24] = [
    "<|im_start|>",
    "<|im_end|>",
    "?",
    "eat",
    "food",
    "sleep",
    "user",
    "assistant",
    "system",
    "the",
    "a",
    "and",
    "who",
    "tree",
    "water",
    "stone",
    "sun",
    "moon",
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
];

const SIZES: Sizes = Sizes { words: WORDS.len(), hidden: HIDDEN, inner: 32 };

/// A model whose tokens are words.
fn write_model(dir: &Path, config: &Value, shapes: &[(&str, Vec<usize>)]) {
    std::fs::create_dir_all(dir).unwrap();
    let vocabulary: serde_json::Map<_, _> = (0..).zip(WORDS).map(|(id, word)| (word.to_string(), id.into())).collect();
    let special = |id: usize| {
        json!({"id": id, "content": WORDS[id], "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [special(0), special(1)], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": vocabulary},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let weights: HashMap<String, Tensor> = shapes
        .iter()
        .enumerate()
        .map(|(seed, (name, shape))| ((*name).to_string(), numbers(shape, seed).unwrap()))
        .collect();
    candle_core::safetensors::save(&weights, dir.join("model.safetensors")).unwrap();
}

fn write_decoder(dir: &Path) {
    let config = json!({
        "model_type": "llama", "vocab_size": WORDS.len(), "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": LONG, "tie_word_embeddings": false,
    });
    write_model(dir, &config, &made_up::decoder(&SIZES, true));
}

fn write_encoder(dir: &Path) {
    let config = json!({
        "vocab_size": WORDS.len(), "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 16,
    });
    write_model(dir, &config, &made_up::encoder(&SIZES, 16));
}

/// An adapter in PEFT's format that changes much.
fn write_adapter(dir: &Path, model: &Path) {
    let mut model = ModelDir::open(model).unwrap().causal_lm(DType::F32, &Device::Cpu).unwrap();
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig { alpha: 200., ..LoraConfig::default() }, 1).unwrap();
    for (seed, param) in adapter.params().matching("*.lora_B.weight").unwrap().into_iter().enumerate() {
        param.set(numbers(param.shape().dims(), seed + 20).unwrap()).unwrap();
    }
    adapter.save(dir, None).unwrap();
}

/// The models `tiny` (with the adapter `loud`) and `vectors`.
pub(crate) struct Models(TempDir);

impl Models {
    pub(crate) fn write() -> Self {
        let models = Self(tempfile::tempdir().unwrap());
        write_decoder(&models.path("tiny"));
        write_encoder(&models.path("vectors"));
        write_adapter(&models.path("loud"), &models.path("tiny"));
        models
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn open(&self, name: &str) -> ModelDir {
        ModelDir::open(self.path(name)).unwrap()
    }

    /// What the program is started with.
    pub(crate) fn arguments(&self, more: &[&str]) -> Arguments {
        let path = |name: &str| self.path(name).display().to_string();
        let mut words =
            vec!["serve".to_string(), "--model".into(), path("tiny"), "--embedding-model".into(), path("vectors")];
        words.extend(["--adapter".to_string(), format!("loud={}", path("loud"))]);
        if !more.contains(&"--max-context") {
            words.extend(["--max-context".to_string(), CONTEXT.to_string()]);
        }
        words.extend(more.iter().map(ToString::to_string));
        Arguments::try_parse_from(words).unwrap()
    }
}

/// A server at a port of its own.
pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) app: Arc<App>,
    pub(crate) models: Models,
    stop: Option<oneshot::Sender<()>>,
    /// Ends the time that answers get to be finished.
    pub(crate) enough: Option<oneshot::Sender<()>>,
    pub(crate) ended: JoinHandle<std::io::Result<()>>,
}

impl Server {
    pub(crate) async fn start(more: &[&str]) -> Self {
        let models = Models::write();
        let app = Arc::new(load(&models.arguments(more)).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let ((stop, stopped), (enough, cut)) = (oneshot::channel(), oneshot::channel());
        let ended =
            tokio::spawn(http::serve(listener, Arc::clone(&app), async { stopped.await.unwrap_or_default() }, async {
                cut.await.unwrap_or_default()
            }));
        Self { url, app, models, stop: Some(stop), enough: Some(enough), ended }
    }

    /// Tells it to stop, as Ctrl-C does.
    pub(crate) fn interrupt(&mut self) {
        drop(self.stop.take());
    }

    /// Stops it and waits for its end.
    pub(crate) async fn stop(mut self) {
        self.interrupt();
        tokio::time::timeout(Duration::from_secs(60), &mut self.ended)
            .await
            .expect("it does not end")
            .unwrap()
            .unwrap();
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        reqwest::Client::new().post(format!("{}{path}", self.url)).json(body)
    }

    /// The status and the body of an answer.
    pub(crate) async fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        read(self.post(path, body)).await
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let answer = reqwest::get(format!("{}{path}", self.url)).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// The server still answers, and the answer is right.
    pub(crate) async fn serves(&self) {
        let body = json!({ "model": "tiny", "prompt": "eat the food", "max_tokens": 3, "temperature": 0 });
        let (status, answer) = self.ask("/v1/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["usage"]["completion_tokens"], 3, "{answer}");
    }
}

pub(crate) async fn read(request: reqwest::RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

/// Waits until `done`.
pub(crate) async fn until(done: impl Fn() -> bool) {
    let begin = std::time::Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "it never came");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
