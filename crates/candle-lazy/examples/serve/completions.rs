//! `/v1/completions` and `/v1/chat/completions`.

use super::app::{compute, now, Admission, App};
use super::embeddings::Input;
use super::failure::{tokens as counted, Failure, Outcome};
use super::fields::{unless, Fields};
use super::messages;
use super::texts::{Event, Events, Texts};
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use candle_lazy::nn::models::StopReason;
use candle_lazy::nn::sampling::{Sampling, SamplingOptions};
use candle_lazy::nn::service::{Finish, GenerationRequest};
use candle_lazy::nn::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{json, Value};
use std::sync::Arc;

/// Texts that one request may ask for.
const TEXTS: usize = 128;
/// Stop strings of a request, as OpenAI has it.
const STOPS: usize = 4;
/// New tokens where a request for a completion names no number, as OpenAI has it.
const MAX_TOKENS: usize = 16;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    Chat,
}

impl Form {
    /// The field that what is continued comes in.
    fn asks(self) -> &'static str {
        match self {
            Self::Text => "prompt",
            Self::Chat => "messages",
        }
    }
}

/// What stands around the choices of an answer.
#[derive(Debug)]
pub(crate) struct Head {
    form: Form,
    id: String,
    created: u64,
    model: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a string or an array of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

/// How an answer is to come.
#[derive(Debug, Clone, Copy)]
struct Streamed {
    include_usage: bool,
}

/// How many tokens a text may get.
#[derive(Debug, Clone, Copy)]
struct Length {
    /// The field that says so; of those that say nothing a text gets what the context has room for, at most.
    said: Option<&'static str>,
    tokens: usize,
}

impl Length {
    fn read(fields: &mut Fields, names: &[&'static str], otherwise: usize) -> Outcome<Self> {
        let mut length = Self { said: None, tokens: otherwise };
        for name in names {
            if let Some(tokens) = fields.count(name, 0, usize::MAX)? {
                length = Self { said: Some(name), tokens };
            }
        }
        Ok(length)
    }

    /// How many a text of `prompt` tokens gets; more than it has room for is refused where it was asked for.
    fn behind(self, prompt: usize, context: usize) -> Outcome<usize> {
        let Self { said, tokens } = self;
        match (said, context.saturating_sub(prompt)) {
            // a prompt that fills the context by itself is refused when it is submitted
            (Some(name), room @ 1..) if tokens > room => {
                let text = counted(prompt);
                let message = format!(
                    "`{name}` is {tokens}, behind a text of {text} there is room for {room}: the context has {context}."
                );
                Err(Failure::too_long(message).of(name))
            }
            (_, room) => Ok(tokens.min(room)),
        }
    }
}

/// A request that was read.
#[derive(Debug)]
struct Asked {
    head: Head,
    requests: Vec<GenerationRequest>,
    /// What stands before the text of each.
    echo: Vec<String>,
    prompt_tokens: usize,
    streamed: Option<Streamed>,
}

/// Answers a request for continuations of texts.
pub(crate) async fn answer_text(
    State(app): State<Arc<App>>,
    Extension(admission): Extension<Admission>,
    body: Result<Bytes, BytesRejection>,
) -> Outcome<Response> {
    let body = body?;
    let asked = compute(body.len(), || read_text(&app, &body))?;
    answer(&app, admission, asked).await
}

/// Answers a request for the next message of a conversation.
pub(crate) async fn answer_chat(
    State(app): State<Arc<App>>,
    Extension(admission): Extension<Admission>,
    body: Result<Bytes, BytesRejection>,
) -> Outcome<Response> {
    let body = body?;
    let asked = compute(body.len(), || read_chat(&app, &body))?;
    answer(&app, admission, asked).await
}

async fn answer(app: &App, admission: Admission, asked: Asked) -> Outcome<Response> {
    let Asked { head, requests, echo, prompt_tokens, streamed } = asked;
    let submitted = Texts::submit(&app.generation, requests, &admission.submit_options());
    let mut texts = submitted.map_err(|failure| failure.of(head.form.asks()))?;
    if let Some(streamed) = streamed {
        let usage = streamed.include_usage.then_some(prompt_tokens);
        return Ok(Events::begin(texts, head, &echo, usage, admission).await?.into_response());
    }
    let mut whole: Vec<(String, Option<Finish>)> = echo.into_iter().map(|echo| (echo, None)).collect();
    while let Some(event) = admission.in_time(texts.next()).await? {
        match event? {
            Event::Text(at, piece) => whole.get_mut(at).map_or((), |(text, _)| text.push_str(&piece)),
            Event::End(at, finish) => whole.get_mut(at).map_or((), |(_, end)| *end = Some(finish)),
        }
    }
    let new_tokens = whole.iter().filter_map(|(_, finish)| finish.as_ref()).map(|finish| finish.new_tokens).sum();
    let choices = whole.iter().enumerate().map(|(index, (text, finish))| head.choice(index, text, finish.as_ref()));
    let choices: Vec<Value> = choices.collect();
    Ok(Json(head.around(false, choices, Some(usage(prompt_tokens, new_tokens)))).into_response())
}

pub(crate) fn usage(prompt_tokens: usize, new_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": prompt_tokens + new_tokens
    })
}

/// Why a text ended, as OpenAI says it.
fn reason(finish: &Finish) -> &'static str {
    match finish.reason {
        StopReason::EndOfText | StopReason::StopString => "stop",
        _ => "length",
    }
}

impl Head {
    fn new(app: &App, form: Form, model: String) -> Self {
        let id = app.id(match form {
            Form::Text => "cmpl",
            Form::Chat => "chatcmpl",
        });
        Self { form, id, created: now(), model }
    }

    /// An answer, or one event of it where it is streamed.
    pub(crate) fn around(&self, streamed: bool, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let object = match (self.form, streamed) {
            (Form::Text, _) => "text_completion",
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
        };
        let Self { id, created, model, .. } = self;
        let mut all = json!({ "id": id, "object": object, "created": created, "model": model, "choices": choices });
        if let (Some(usage), Some(all)) = (usage, all.as_object_mut()) {
            all.insert("usage".to_string(), usage);
        }
        all
    }

    fn choice(&self, index: usize, text: &str, finish: Option<&Finish>) -> Value {
        let reason = finish.map(reason);
        match self.form {
            Form::Text => json!({ "index": index, "text": text, "logprobs": null, "finish_reason": reason }),
            Form::Chat => json!({
                "index": index, "logprobs": null, "finish_reason": reason,
                "message": { "role": "assistant", "content": text, "refusal": null },
            }),
        }
    }

    /// The first event of a text: what stands before it, or whose it is.
    pub(crate) fn opening(&self, index: usize, echo: &str) -> Option<Value> {
        match self.form {
            Form::Text => (!echo.is_empty()).then(|| self.piece(index, echo)),
            Form::Chat => {
                let delta = json!({ "role": "assistant", "content": "" });
                Some(json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null }))
            }
        }
    }

    /// An event with more of a text.
    pub(crate) fn piece(&self, index: usize, text: &str) -> Value {
        match self.form {
            Form::Text => json!({ "index": index, "text": text, "logprobs": null, "finish_reason": null }),
            Form::Chat => {
                json!({ "index": index, "delta": { "content": text }, "logprobs": null, "finish_reason": null })
            }
        }
    }

    /// The last event of a text.
    pub(crate) fn closing(&self, index: usize, finish: &Finish) -> Value {
        let reason = reason(finish);
        match self.form {
            Form::Text => json!({ "index": index, "text": "", "logprobs": null, "finish_reason": reason }),
            Form::Chat => json!({ "index": index, "delta": {}, "logprobs": null, "finish_reason": reason }),
        }
    }
}

fn tokenizer(app: &App) -> Outcome<&Tokenizer> {
    app.generation.tokenizer().map(Arc::as_ref).ok_or_else(|| Failure::internal("the service has no tokenizer"))
}

fn read_text(app: &App, body: &[u8]) -> Outcome<Asked> {
    let mut fields = Fields::parse(body)?;
    let model: String = fields.need("model")?;
    let adapter = app.adapter(&model)?;
    let prompt = fields.need("prompt")?;
    let echoes = fields.flag("echo")?;
    let length = Length::read(&mut fields, &["max_tokens"], MAX_TOKENS)?;
    fields.only(&[("best_of", |value| value.as_u64() == Some(1)), ("suffix", |value| value.as_str() == Some(""))])?;
    // 0 asks for the chosen tokens' own
    fields.only(&[("logprobs", unless::given)])?;
    let common = Common::read(&mut fields)?;
    fields.end()?;
    let tokenizer = tokenizer(app)?;
    let texts: Vec<(Vec<u32>, Option<String>)> = match prompt {
        Input::Ids(ids) => vec![(ids, None)],
        Input::IdsOfTexts(ids) => ids.into_iter().map(|ids| (ids, None)).collect(),
        Input::Text(text) => vec![(prompt_ids(tokenizer, &text)?, Some(text))],
        Input::Texts(texts) => {
            let ids = texts.into_iter().map(|text| Ok((prompt_ids(tokenizer, &text)?, Some(text))));
            ids.collect::<Outcome<_>>()?
        }
    };
    let mut asked = Vec::with_capacity(texts.len());
    for (ids, text) in texts {
        let echo = match (echoes, text) {
            (false, _) => String::new(),
            (true, Some(text)) => text,
            // ids that do not exist are refused when they are submitted
            (true, None) => tokenizer.decode(&ids)?,
        };
        asked.push((ids, echo));
    }
    let stop_ids = app.generation.model().config().eos_token_ids.clone();
    common.asked(app, Head::new(app, Form::Text, model), asked, adapter, length, &stop_ids)
}

fn prompt_ids(tokenizer: &Tokenizer, text: &str) -> Outcome<Vec<u32>> {
    tokenizer.encode_for_model(text).map_err(|error| Failure::from(error).of(Form::Text.asks()))
}

fn read_chat(app: &App, body: &[u8]) -> Outcome<Asked> {
    let mut fields = Fields::parse(body)?;
    let model: String = fields.need("model")?;
    let adapter = app.adapter(&model)?;
    let messages = messages::read(fields.need("messages")?)?;
    // the newer name of the two counts
    let length = Length::read(&mut fields, &["max_tokens", "max_completion_tokens"], usize::MAX)?;
    fields.only(&[
        ("logprobs", unless::false_),
        ("top_logprobs", unless::zero),
        ("tools", unless::empty),
        ("functions", unless::empty),
        ("tool_choice", |value| value == "none" || value == "auto"),
        ("function_call", |value| value == "none" || value == "auto"),
        ("parallel_tool_calls", Value::is_boolean),
        ("response_format", |value| value == &json!({ "type": "text" })),
        ("modalities", |value| value == &json!(["text"])),
        ("reasoning_effort", |value| value == "none"),
        ("audio", unless::given),
        ("prediction", unless::given),
        ("web_search_options", unless::given),
    ])?;
    let common = Common::read(&mut fields)?;
    fields.end()?;
    let tokenizer = tokenizer(app)?;
    let ids = tokenizer.encode_chat(&messages).map_err(|error| Failure::from(error).of(Form::Chat.asks()))?;
    let mut stop_ids = app.generation.model().config().eos_token_ids.clone();
    // an answer ends with its message, whatever a config calls the end of a text
    stop_ids.extend(tokenizer.token_to_id("<|im_end|>"));
    let head = Head::new(app, Form::Chat, model);
    common.asked(app, head, vec![(ids, String::new())], adapter, length, &stop_ids)
}

/// What both ask for.
#[derive(Debug)]
struct Common {
    sampling: Sampling,
    stop: Vec<String>,
    n: usize,
    streamed: Option<Streamed>,
}

impl Common {
    fn read(fields: &mut Fields) -> Outcome<Self> {
        let temperature = fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0);
        let top_p = fields.number("top_p", 0.0, 1.0)?.filter(|p| *p < 1.0);
        // any number repeats a text: a negative one stands for one of its own
        let seed = fields.whole("seed")?.map(i64::cast_unsigned);
        let options = SamplingOptions { temperature, top_p, top_k: None };
        let sampling = Sampling { options, seed, ..Sampling::default() };
        let stop = match fields.take("stop")? {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Several(stop)) => stop,
        };
        if stop.len() > STOPS || stop.iter().any(String::is_empty) {
            let message = format!("`stop` is up to {STOPS} strings, none of them empty.");
            return Err(Failure::field("stop", message));
        }
        let n = fields.count("n", 1, TEXTS)?.unwrap_or(1);
        let stream = fields.flag("stream")?;
        let include_usage = match fields.take("stream_options")? {
            None => false,
            Some(_) if !stream => {
                let message = "`stream_options` goes with `stream`: true only.";
                return Err(Failure::field("stream_options", message));
            }
            Some(options) => {
                let mut options = Fields::within(options, "stream_options")?;
                let include_usage = options.flag("include_usage")?;
                options.only(&[("include_obfuscation", unless::false_)])?;
                options.end()?;
                include_usage
            }
        };
        fields.only(&[
            ("frequency_penalty", unless::zero),
            ("presence_penalty", unless::zero),
            ("logit_bias", unless::empty),
            ("store", unless::false_),
            ("service_tier", |value| value == "auto" || value == "default"),
        ])?;
        fields.ignore(&["user", "metadata", "safety_identifier", "prompt_cache_key"]);
        Ok(Self { sampling, stop, n, streamed: stream.then_some(Streamed { include_usage }) })
    }

    /// The texts that are asked for: `n` of each of `prompts` (ids, and what stands before the answer).
    fn asked(
        self,
        app: &App,
        head: Head,
        prompts: Vec<(Vec<u32>, String)>,
        adapter: Option<String>,
        length: Length,
        stop_ids: &[u32],
    ) -> Outcome<Asked> {
        let count = prompts.len().saturating_mul(self.n);
        if !(1..=TEXTS).contains(&count) {
            let message = format!("The request asks for {count} texts, it must be from 1 to {TEXTS}.");
            return Err(Failure::field(head.form.asks(), message));
        }
        let options = app.generation.options();
        // those that run on an idle server, and those that wait
        let most = options.max_running.saturating_add(options.queue);
        if count > most {
            let message = format!("The request asks for {count} texts, this server takes at most {most} at once.");
            return Err(Failure::field(if self.n > 1 { "n" } else { head.form.asks() }, message));
        }
        let prompt_tokens = prompts.iter().map(|(ids, _)| ids.len()).sum();
        let (mut requests, mut echo) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for (ids, before) in prompts {
            let max_new_tokens = length.behind(ids.len(), options.max_context)?;
            for number in 0..self.n {
                // texts of one prompt are to differ, and to repeat themselves
                let seed = self.sampling.seed.map(|seed| seed.wrapping_add(number as u64));
                let mut request = GenerationRequest::new(ids.clone())
                    .max_new_tokens(max_new_tokens)
                    .sampling(Sampling { seed, ..self.sampling })
                    .stop_ids(stop_ids.to_vec())
                    .stop(self.stop.clone());
                request.adapter.clone_from(&adapter);
                requests.push(request);
                echo.push(before.clone());
            }
        }
        Ok(Asked { head, requests, echo, prompt_tokens, streamed: self.streamed })
    }
}
