//! `/v1/embeddings`.

use super::app::{compute, Admission, App};
use super::failure::{Failure, Outcome};
use super::fields::Fields;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::engine::general_purpose::STANDARD;
use base64::Engine;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::sync::Arc;

/// Texts of a request at most, as OpenAI has it.
const TEXTS: usize = 2048;

/// The four forms of `input` and `prompt`.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string, an array of strings, an array of token ids, or an array of such arrays")]
pub(crate) enum Input {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdsOfTexts(Vec<Vec<u32>>),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Float,
    Base64,
}

/// Answers a request.
pub(crate) async fn answer(
    State(app): State<Arc<App>>,
    Extension(admission): Extension<Admission>,
    body: Result<Bytes, BytesRejection>,
) -> Outcome<Response> {
    let body = body?;
    let (texts, format) = compute(body.len(), || read(&app, &body))?;
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let submitted = app.embedding.try_submit(texts, &admission.submit_options());
    let vectors = submitted.map_err(|error| Failure::from(error).of("input"))?;
    let vectors = admission.in_time(vectors).await??;
    let bytes = vectors.iter().map(Vec::len).sum::<usize>() * size_of::<f32>();
    compute(bytes, || {
        let data = vectors.into_iter().enumerate().map(|(index, vector)| Written::new(index, vector, format)).collect();
        let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
        let model = app.embedding_model.as_str();
        Ok(Json(Answer { object: "list", data, model, usage }).into_response())
    })
}

fn read(app: &App, body: &[u8]) -> Outcome<(Vec<Vec<u32>>, Format)> {
    let mut fields = Fields::parse(body)?;
    app.embeds(&fields.need::<String>("model")?)?;
    let input = fields.need("input")?;
    let format = fields.take("encoding_format")?.unwrap_or(Format::Float);
    let width = app.embedding.encoder().model().hidden_size();
    if let Some(dimensions) = fields.count("dimensions", 1, usize::MAX)?.filter(|dimensions| *dimensions != width) {
        let message = format!("`dimensions` is {dimensions}, the model's vectors have {width} numbers.");
        return Err(Failure::unsupported("dimensions", message));
    }
    fields.ignore(&["user"]);
    fields.end()?;
    let texts = match input {
        Input::Ids(ids) => vec![ids],
        Input::IdsOfTexts(ids) => ids,
        Input::Text(text) => tokenized(app, &[text])?,
        Input::Texts(texts) => tokenized(app, &texts)?,
    };
    if texts.is_empty() || texts.len() > TEXTS {
        let message = format!("`input` has {} texts, it must have from 1 to {TEXTS}.", texts.len());
        return Err(Failure::field("input", message));
    }
    Ok((texts, format))
}

fn tokenized(app: &App, texts: &[String]) -> Outcome<Vec<Vec<u32>>> {
    if let Some(index) = texts.iter().position(String::is_empty) {
        return Err(Failure::field("input", format_args!("Text {index} of `input` is empty.")));
    }
    app.embedding.tokenize(texts).map_err(|error| Failure::from(error).of("input"))
}

/// Written without a detour over [`Value`], which would make f64 of the numbers.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Written>,
    model: &'a str,
    usage: Value,
}

#[derive(Debug, Serialize)]
struct Written {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

impl Written {
    fn new(index: usize, vector: Vec<f32>, format: Format) -> Self {
        let embedding = match format {
            Format::Float => Vector::Float(vector),
            Format::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                Vector::Base64(STANDARD.encode(bytes))
            }
        };
        Self { object: "embedding", index, embedding }
    }
}
