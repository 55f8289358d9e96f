//! The clients: OpenAI's own protocol through a client library of it, and rude ones by hand.

use super::report::Report;
use async_openai::config::OpenAIConfig;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessage, ChatCompletionStreamOptions, CreateChatCompletionRequest,
    CreateChatCompletionRequestArgs,
};
use async_openai::types::completions::{CreateCompletionRequest, CreateCompletionRequestArgs};
use async_openai::types::embeddings::CreateEmbeddingRequestArgs;
use async_openai::Client;
use futures::StreamExt;
use serde_json::{json, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) type Failed = Box<dyn Error + Send + Sync>;

/// Who asks for what.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    /// `http://host:port`.
    pub(crate) url: String,
    /// The model and its adapters.
    pub(crate) models: Vec<String>,
    pub(crate) embedding_model: String,
    pub(crate) texts: Vec<String>,
    pub(crate) clients: usize,
    /// Of each client.
    pub(crate) requests: usize,
    pub(crate) max_tokens: u32,
    pub(crate) seed: u64,
}

/// What is asked for; streamed or not, the answer is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Vectors,
    Text,
    Chat,
}

/// One that is answered: of a model and a text, by their numbers.
type Question = (What, usize, usize);

#[derive(Debug, Clone, Copy)]
enum Act {
    Ask(Question, bool),
    /// Goes away: after the first piece of a stream, or before any answer.
    Leave(usize, bool),
    /// Asks for nonsense.
    Blunder(usize),
}

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Vectors(Vec<Vec<f32>>),
    /// A text, why it ended, and its numbers of tokens.
    Text(String, String, [u32; 2]),
}

/// SplitMix64 (Steele et al. 2014): an act's number gives what it is.
fn mixed(number: u64) -> u64 {
    let z = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The models of a server: those that make texts, and the one that makes vectors, which it names last.
pub(crate) async fn models(url: &str) -> Result<(Vec<String>, String), Failed> {
    let listed = client(url).models().list().await?;
    let mut names: Vec<String> = listed.data.into_iter().map(|model| model.id).collect();
    let embedding = names.pop().ok_or("the server has no models")?;
    Ok((names, embedding))
}

fn client(url: &str) -> Client<OpenAIConfig> {
    Client::with_config(OpenAIConfig::new().with_api_base(format!("{url}/v1")).with_api_key("none"))
}

/// The sum of a metric's samples whose labels hold `label`.
pub(crate) fn sample(metrics: &str, name: &str, label: &str) -> f64 {
    let lines = metrics.lines().filter_map(|line| line.rsplit_once(' '));
    let those = lines.filter(|(key, _)| key.split('{').next() == Some(name) && key.contains(label));
    those.filter_map(|(_, value)| value.parse::<f64>().ok()).sum()
}

/// Waits until a server answers nobody, and gives its metrics.
pub(crate) async fn idle(url: &str) -> Result<String, Failed> {
    let begin = Instant::now();
    loop {
        let metrics = reqwest::get(format!("{url}/metrics")).await?.text().await?;
        let names = ["candle_lazy_queued", "candle_lazy_running", "candle_lazy_http_requests_in_flight"];
        let left: f64 = names.iter().map(|name| sample(&metrics, name, "")).sum();
        if left == 0.0 {
            return Ok(metrics);
        }
        if begin.elapsed() > Duration::from_secs(60) {
            return Err(format!("{left} requests are left on the server").into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Load {
    /// Asks each question alone, then all clients at once.
    ///
    /// # Errors
    /// The first answer that is not the one that its question got alone, and what goes wrong otherwise.
    pub(crate) async fn run(self) -> Result<Report, Failed> {
        let acts: Vec<Vec<Act>> = (0..self.clients as u64)
            .map(|of| (0..self.requests as u64).map(|number| self.act(of * self.requests as u64 + number)).collect())
            .collect();
        let asked: BTreeSet<Question> = acts
            .iter()
            .flatten()
            .filter_map(|act| match act {
                Act::Ask(question, _) => Some(*question),
                _ => None,
            })
            .collect();
        let (load, mut alone) = (Arc::new(self), BTreeMap::new());
        let one = client(&load.url);
        for question in asked {
            alone.insert(question, load.ask(&one, question).await?);
        }
        let (alone, began) = (Arc::new(alone), Instant::now());
        let mut clients = tokio::task::JoinSet::new();
        for acts in acts {
            let (load, alone) = (Arc::clone(&load), Arc::clone(&alone));
            clients.spawn(async move { load.client(acts, &alone).await });
        }
        let mut report = Report { clients: load.clients, ..Report::default() };
        while let Some(of_one) = clients.join_next().await {
            report.add(of_one??);
        }
        report.took = began.elapsed();
        idle(&load.url).await?;
        Ok(report)
    }

    fn act(&self, number: u64) -> Act {
        let bits = mixed(self.seed.wrapping_mul(1 << 32).wrapping_add(number));
        let (model, text) = ((bits >> 8) as usize % self.models.len(), (bits >> 24) as usize % self.texts.len());
        match bits % 12 {
            0..=2 => Act::Ask((What::Vectors, 0, text), false),
            3 | 4 => Act::Ask((What::Text, model, text), false),
            5 | 6 => Act::Ask((What::Text, model, text), true),
            7 => Act::Ask((What::Chat, model, text), false),
            8 | 9 => Act::Ask((What::Chat, model, text), true),
            10 => Act::Leave(text, model.is_multiple_of(2)),
            _ => Act::Blunder(text),
        }
    }

    async fn client(&self, acts: Vec<Act>, alone: &BTreeMap<Question, Answer>) -> Result<Report, Failed> {
        let (client, mut report) = (client(&self.url), Report::default());
        for act in acts {
            let began = Instant::now();
            let (what, question, answer) = match act {
                Act::Leave(text, streamed) => {
                    self.leave(text, streamed).await?;
                    report.left += 1;
                    continue;
                }
                Act::Blunder(which) => {
                    self.blunder(which).await?;
                    report.refused += 1;
                    continue;
                }
                Act::Ask(question, true) => {
                    let (answer, first) = self.listen(&client, question, began).await?;
                    let what = if question.0 == What::Text { "completions, first" } else { "chats, first" };
                    report.times.entry(what).or_default().push(first);
                    let what = if question.0 == What::Text { "completions, streamed" } else { "chats, streamed" };
                    (what, question, answer)
                }
                Act::Ask(question, false) => {
                    let what = match question.0 {
                        What::Vectors => "embeddings",
                        What::Text => "completions",
                        What::Chat => "chats",
                    };
                    (what, question, self.ask(&client, question).await?)
                }
            };
            report.times.entry(what).or_default().push(began.elapsed());
            if alone.get(&question) != Some(&answer) {
                let want = alone.get(&question);
                return Err(format!("{what} {question:?}: {answer:?} beside others, {want:?} alone").into());
            }
            if let Answer::Text(_, _, [_, new]) = answer {
                report.new_tokens += u64::from(new);
            }
        }
        Ok(report)
    }

    fn model(&self, at: usize) -> &str {
        self.models.get(at).map_or("", String::as_str)
    }

    fn text(&self, at: usize) -> &str {
        self.texts.get(at % self.texts.len()).map_or("", String::as_str)
    }

    fn text_request(&self, model: usize, text: usize, streamed: bool) -> Result<CreateCompletionRequest, Failed> {
        let mut request = CreateCompletionRequestArgs::default();
        request.model(self.model(model)).prompt(self.text(text)).max_tokens(self.max_tokens);
        // greedily for some texts, by a seed for the others
        match text % 2 {
            0 => request.temperature(0.0),
            _ => request.temperature(0.9).top_p(0.95).seed(7i64),
        };
        if streamed {
            request.stream(true).stream_options(with_usage());
        }
        Ok(request.build()?)
    }

    fn chat_request(&self, model: usize, text: usize, streamed: bool) -> Result<CreateChatCompletionRequest, Failed> {
        let mut request = CreateChatCompletionRequestArgs::default();
        let message = ChatCompletionRequestUserMessage::from(self.text(text));
        request.model(self.model(model)).messages(vec![message.into()]).max_completion_tokens(self.max_tokens);
        request.temperature(0.0);
        if streamed {
            request.stream(true).stream_options(with_usage());
        }
        Ok(request.build()?)
    }

    async fn ask(&self, client: &Client<OpenAIConfig>, (what, model, text): Question) -> Result<Answer, Failed> {
        match what {
            What::Vectors => {
                let input = vec![self.text(text).to_string(), self.text(text + 1).to_string()];
                let request =
                    CreateEmbeddingRequestArgs::default().model(&self.embedding_model).input(input).build()?;
                let answer = client.embeddings().create(request).await?;
                Ok(Answer::Vectors(answer.data.into_iter().map(|one| one.embedding).collect()))
            }
            What::Text => {
                let answer = client.completions().create(self.text_request(model, text, false)?).await?;
                let usage = answer.usage.ok_or("no usage")?;
                let choice = answer.choices.into_iter().next().ok_or("no choice")?;
                let reason = format!("{:?}", choice.finish_reason.ok_or("no reason")?);
                Ok(Answer::Text(choice.text, reason, [usage.prompt_tokens, usage.completion_tokens]))
            }
            What::Chat => {
                let answer = client.chat().create(self.chat_request(model, text, false)?).await?;
                let usage = answer.usage.ok_or("no usage")?;
                let choice = answer.choices.into_iter().next().ok_or("no choice")?;
                let reason = format!("{:?}", choice.finish_reason.ok_or("no reason")?);
                let text = choice.message.content.ok_or("no content")?;
                Ok(Answer::Text(text, reason, [usage.prompt_tokens, usage.completion_tokens]))
            }
        }
    }

    /// As [`Load::ask`], streamed; and the time of the first event.
    async fn listen(
        &self,
        client: &Client<OpenAIConfig>,
        (what, model, text): Question,
        began: Instant,
    ) -> Result<(Answer, Duration), Failed> {
        let (mut whole, mut reason, mut usage, mut first) = (String::new(), None, None, None);
        if what == What::Text {
            let mut events = client.completions().create_stream(self.text_request(model, text, true)?).await?;
            while let Some(event) = events.next().await {
                let event = event?;
                first.get_or_insert_with(|| began.elapsed());
                usage = event.usage.or(usage);
                for choice in event.choices {
                    whole.push_str(&choice.text);
                    reason = choice.finish_reason.map(|reason| format!("{reason:?}")).or(reason);
                }
            }
        } else {
            let mut events = client.chat().create_stream(self.chat_request(model, text, true)?).await?;
            while let Some(event) = events.next().await {
                let event = event?;
                first.get_or_insert_with(|| began.elapsed());
                usage = event.usage.or(usage);
                for choice in event.choices {
                    whole.push_str(choice.delta.content.as_deref().unwrap_or_default());
                    reason = choice.finish_reason.map(|reason| format!("{reason:?}")).or(reason);
                }
            }
        }
        let usage = usage.ok_or("a stream without usage")?;
        let tokens = [usage.prompt_tokens, usage.completion_tokens];
        let reason = reason.ok_or("a stream without a reason")?;
        Ok((Answer::Text(whole, reason, tokens), first.ok_or("a stream without events")?))
    }

    async fn leave(&self, text: usize, streamed: bool) -> Result<(), Failed> {
        // a chat that names no length may go on to the end of the context
        let messages = json!([{ "role": "user", "content": self.text(text) }]);
        let body = json!({ "model": self.model(0), "messages": messages, "stream": streamed });
        let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", self.url)).json(&body);
        if streamed {
            let mut answer = request.send().await?.error_for_status()?;
            answer.chunk().await?.ok_or("a stream without events")?;
        } else {
            // whether it is answered by then is all the same
            drop(tokio::time::timeout(Duration::from_millis(20), request.send()).await);
        }
        Ok(())
    }

    async fn blunder(&self, which: usize) -> Result<(), Failed> {
        let good = json!({ "model": self.model(0), "prompt": self.text(which) });
        let with = |name: &str, value: Value| {
            let mut body = good.clone();
            body[name] = value;
            body.to_string()
        };
        let (body, status) = match which % 6 {
            0 => ("{\"model\":".to_string(), 400),
            1 => (with("model", "nobody".into()), 404),
            2 => (with("prompt", format!("{} ", self.text(which)).repeat(3000).into()), 400),
            3 => (with("logprobs", 5.into()), 400),
            4 => (with("max_tokens", 100_000_000.into()), 400),
            _ => (with("prompt", json!([u32::MAX])), 400),
        };
        let answer = reqwest::Client::new().post(format!("{}/v1/completions", self.url)).body(body).send().await?;
        let found = answer.status().as_u16();
        let error: Value = answer.json().await?;
        match found == status && error["error"]["message"].is_string() {
            true => Ok(()),
            false => Err(format!("nonsense {which} is answered by {found} {error}").into()),
        }
    }
}

fn with_usage() -> ChatCompletionStreamOptions {
    ChatCompletionStreamOptions { include_usage: Some(true), include_obfuscation: None }
}
