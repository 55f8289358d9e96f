//! A client library of OpenAI's API gets from the server what the models give.

use crate::common::{Models, Server};
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestMessage, ChatCompletionRequestSystemMessage, ChatCompletionRequestUserMessage,
    ChatCompletionStreamOptions, CompletionFinishReason, CreateChatCompletionRequestArgs, FinishReason, Role,
    StopConfiguration,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use async_openai::types::embeddings::{CreateEmbeddingRequestArgs, EncodingFormat};
use async_openai::Client;
use base64::Engine;
use candle_core::{DType, Device};
use candle_lazy::nn::models::GenerateOptions;
use candle_lazy::nn::sampling::{Sampling, SamplingOptions};
use candle_lazy::nn::tokenizer::ChatMessage;
use candle_lazy::nn::LoraAdapter;
use futures::StreamExt;
use serde_json::{json, Value};

fn client(server: &Server) -> Client<OpenAIConfig> {
    Client::with_config(OpenAIConfig::new().with_api_base(format!("{}/v1", server.url)).with_api_key("none"))
}

/// The ids that a prompt is continued with.
fn continued(models: &Models, adapter: Option<&str>, ids: &[u32], new: usize, sampling: &Sampling) -> Vec<u32> {
    let files = models.open("tiny");
    let mut model = files.causal_lm(DType::F32, &Device::Cpu).unwrap();
    if let Some(name) = adapter {
        LoraAdapter::load(&mut model, models.path(name)).unwrap();
    }
    let eos = files.tokenizer().unwrap().token_to_id("<|im_end|>").unwrap();
    let options = GenerateOptions { max_new_tokens: new, eos_token_ids: vec![eos], ..GenerateOptions::default() };
    // only conversations end there
    let options = if ids.first() == Some(&0) { options } else { GenerateOptions { eos_token_ids: vec![], ..options } };
    model.generate(ids, options).unwrap().sampled(sampling).unwrap().collect::<Result<_, _>>().unwrap()
}

fn encoded(models: &Models, text: &str) -> Vec<u32> {
    models.open("tiny").tokenizer().unwrap().encode(text, true).unwrap()
}

fn decoded(models: &Models, ids: &[u32]) -> String {
    models.open("tiny").tokenizer().unwrap().decode(ids).unwrap()
}

fn greedy(models: &Models, adapter: Option<&str>, text: &str, new: usize) -> String {
    decoded(models, &continued(models, adapter, &encoded(models, text), new, &Sampling::greedy()))
}

#[tokio::test(flavor = "multi_thread")]
async fn models_and_adapters_are_listed() {
    let server = Server::start(&[]).await;
    let client = client(&server);
    let names: Vec<String> = client.models().list().await.unwrap().data.into_iter().map(|model| model.id).collect();
    assert_eq!(names, ["tiny", "loud", "vectors"]);
    assert_eq!(client.models().retrieve("loud").await.unwrap().id, "loud");
    match client.models().retrieve("nobody").await {
        Err(OpenAIError::ApiError(error)) => {
            assert_eq!((error.status_code.as_u16(), error.api_error.code.as_deref()), (404, Some("model_not_found")));
        }
        other => panic!("{other:?}"),
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_are_the_models_bit_for_bit() {
    let server = Server::start(&[]).await;
    let client = client(&server);
    let files = server.models.open("vectors");
    let encoder = files.sentence_encoder(DType::F32, &Device::Cpu).unwrap();
    let tokenizer = files.tokenizer().unwrap();
    let texts = ["eat the food", "sleep", "tree and stone"];
    let ids: Vec<Vec<u32>> = texts.iter().map(|text| tokenizer.encode_for_model(text).unwrap()).collect();
    let want = encoder.embed_batched(&ids, 1).unwrap();
    let tokens: usize = ids.iter().map(Vec::len).sum();

    let request = CreateEmbeddingRequestArgs::default().model("vectors").input(texts).build().unwrap();
    let answer = client.embeddings().create(request).await.unwrap();
    assert_eq!(answer.data.iter().map(|one| one.index).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(answer.data.into_iter().map(|one| one.embedding).collect::<Vec<_>>(), want);
    assert_eq!((answer.usage.prompt_tokens, answer.usage.total_tokens), (tokens as u32, tokens as u32));

    let mut request = CreateEmbeddingRequestArgs::default();
    let request = request.model("vectors").input("sleep").encoding_format(EncodingFormat::Base64).build().unwrap();
    let answer = client.embeddings().create_base64(request).await.unwrap();
    let bytes = base64::engine::general_purpose::STANDARD.decode(&answer.data[0].embedding.0).unwrap();
    let vector: Vec<f32> = bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
    assert_eq!(vector, want[1]);

    for input in [json!(ids[1]), json!([ids[1]]), json!("sleep"), json!(["sleep"])] {
        let body = json!({ "model": "vectors", "input": input, "dimensions": want[1].len(), "user": "somebody" });
        let (status, answer) = server.ask("/v1/embeddings", &body).await;
        assert_eq!(status, 200, "{answer}");
        let vector: Vec<f32> = serde_json::from_value(answer["data"][0]["embedding"].clone()).unwrap();
        assert_eq!((&vector, answer["data"].as_array().unwrap().len()), (&want[1], 1));
        assert_eq!((&answer["object"], &answer["data"][0]["object"]), (&json!("list"), &json!("embedding")));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_are_what_the_model_generates() {
    let server = Server::start(&[]).await;
    let (client, models) = (client(&server), &server.models);
    let mut request = CreateCompletionRequestArgs::default();
    let request = request.model("tiny").prompt("eat the food").max_tokens(12u32).temperature(0.0);
    let answer = client.completions().create(request.build().unwrap()).await.unwrap();
    let want = greedy(models, None, "eat the food", 12);
    let choice = &answer.choices[0];
    assert_eq!((choice.text.as_str(), choice.index), (want.as_str(), 0));
    assert_eq!(choice.finish_reason, Some(CompletionFinishReason::Length));
    let usage = answer.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (3, 12, 15));
    assert_eq!((answer.object.as_str(), answer.model.as_str()), ("text_completion", "tiny"));
    assert!(answer.id.starts_with("cmpl-"));

    // the adapter has words of its own
    let answer = client.completions().create(request.model("loud").build().unwrap()).await.unwrap();
    assert_eq!(answer.choices[0].text, greedy(models, Some("loud"), "eat the food", 12));
    assert_ne!(answer.choices[0].text, want);

    // by ids, with the prompt in front; without a number there are 16 tokens
    let ids = encoded(models, "eat the food");
    let body = json!({ "model": "tiny", "prompt": [ids, [9, 10]], "echo": true, "temperature": 0 });
    let (status, answer) = server.ask("/v1/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let texts: Vec<&str> = answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    let want = ["eat the food", "the a"].map(|text| format!("{text}{}", greedy(models, None, text, 16)));
    assert_eq!(texts, want);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_repeats_each_of_several_texts() {
    let server = Server::start(&[]).await;
    let mut request = CreateCompletionRequestArgs::default();
    request
        .model("tiny")
        .prompt(["sun and moon", "a"])
        .n(2u8)
        .max_tokens(10u32)
        .temperature(1.5)
        .top_p(0.75)
        .seed(11i64);
    let answer = client(&server).completions().create(request.build().unwrap()).await.unwrap();
    let want: Vec<String> = [("sun and moon", 11), ("sun and moon", 12), ("a", 11), ("a", 12)]
        .into_iter()
        .map(|(text, seed)| {
            let options = SamplingOptions { temperature: 1.5, top_p: Some(0.75), top_k: None };
            let sampling = Sampling { options, seed: Some(seed), ..Sampling::default() };
            let models = &server.models;
            decoded(models, &continued(models, None, &encoded(models, text), 10, &sampling))
        })
        .collect();
    assert_eq!(answer.choices.iter().map(|choice| choice.text.clone()).collect::<Vec<_>>(), want);
    assert_eq!(answer.choices.iter().map(|choice| choice.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let usage = answer.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (4, 40));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_over_several_tokens_is_never_shown() {
    let server = Server::start(&[]).await;
    let client = client(&server);
    let whole = greedy(&server.models, None, "who eat", 24);
    let words: Vec<&str> = whole.split(' ').collect();
    // two words that stand together first in the middle of the text
    let stop = (4..20).map(|at| words[at..at + 2].join(" ")).find(|stop| whole.find(stop.as_str()) > Some(8)).unwrap();
    let want = &whole[..whole.find(&stop).unwrap()];
    let mut request = CreateCompletionRequestArgs::default();
    request.model("tiny").prompt("who eat").max_tokens(24u32).temperature(0.0);
    request.stop(StopConfiguration::StringArray(vec!["nothing like it".into(), stop.clone()]));
    let answer = client.completions().create(request.build().unwrap()).await.unwrap();
    assert_eq!(answer.choices[0].text, want);
    assert_eq!(answer.choices[0].finish_reason, Some(CompletionFinishReason::Stop));
    let mut events = client.completions().create_stream(request.stream(true).build().unwrap()).await.unwrap();
    let (mut shown, mut pieces, mut reason) = (String::new(), 0, None);
    while let Some(event) = events.next().await {
        for choice in event.unwrap().choices {
            shown.push_str(&choice.text);
            pieces += usize::from(!choice.text.is_empty());
            reason = choice.finish_reason.or(reason);
        }
        assert!(want.starts_with(&shown), "{shown:?} is no part of {want:?}");
    }
    assert_eq!((shown.as_str(), reason), (want, Some(CompletionFinishReason::Stop)));
    assert!(pieces > 1, "it came as one");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_answered_whole_and_streamed() {
    let server = Server::start(&[]).await;
    let (client, models) = (client(&server), &server.models);
    let told = [ChatMessage::system("the food"), ChatMessage::user("who eat")];
    let ids = models.open("tiny").tokenizer().unwrap().encode_chat(&told).unwrap();
    let new = continued(models, Some("loud"), &ids, 20, &Sampling::greedy());
    let want = decoded(models, &new);
    let messages: Vec<ChatCompletionRequestMessage> = vec![
        ChatCompletionRequestSystemMessage::from("the food").into(),
        ChatCompletionRequestUserMessage::from("who eat").into(),
    ];
    let mut request = CreateChatCompletionRequestArgs::default();
    request.model("loud").messages(messages).max_completion_tokens(20u32).temperature(0.0);
    let answer = client.chat().create(request.build().unwrap()).await.unwrap();
    let ended = if new.len() < 20 { FinishReason::Stop } else { FinishReason::Length };
    let choice = &answer.choices[0];
    assert_eq!((choice.message.content.as_deref(), choice.message.role), (Some(want.as_str()), Role::Assistant));
    assert_eq!(choice.finish_reason, Some(ended));
    let usage = answer.usage.unwrap();
    assert_eq!((usage.prompt_tokens as usize, usage.completion_tokens as usize), (ids.len(), new.len()));

    let options = ChatCompletionStreamOptions { include_usage: Some(true), include_obfuscation: Some(false) };
    let request = request.stream(true).stream_options(options).n(2u8).build().unwrap();
    let mut events = client.chat().create_stream(request).await.unwrap();
    let (mut texts, mut roles, mut reasons, mut numbers) = ([String::new(), String::new()], 0, 0, None);
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        assert!(numbers.is_none(), "something follows the numbers");
        numbers = event.usage;
        assert_eq!(event.choices.is_empty(), numbers.is_some());
        for choice in event.choices {
            roles += usize::from(choice.delta.role == Some(Role::Assistant));
            texts[choice.index as usize].push_str(choice.delta.content.as_deref().unwrap_or_default());
            reasons += usize::from(choice.finish_reason == Some(ended));
        }
    }
    assert_eq!((&texts[0], &texts[1], roles, reasons), (&want, &want, 2, 2));
    let usage = numbers.unwrap();
    assert_eq!((usage.prompt_tokens as usize, usage.completion_tokens as usize), (ids.len(), 2 * new.len()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_on_the_wire_is_data_lines_and_done() {
    let server = Server::start(&[]).await;
    let parts = json!([{ "type": "text", "text": "who " }, { "type": "text", "text": "eat" }]);
    let messages = json!([{ "role": "developer", "content": "the food" }, { "role": "user", "content": parts }]);
    // what asks for nothing unusual is taken
    let body = json!({
        "model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, "stream": true, "n": 1, "stop": null,
        "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": false, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "response_format": { "type": "text" }, "user": "somebody", "metadata": { "a": "b" }, "store": false, "unheard_of": null,
    });
    let answer = server.post("/v1/chat/completions", &body).send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let text = answer.text().await.unwrap();
    let events: Vec<&str> = text.strip_suffix("\n\n").unwrap().split("\n\n").collect();
    assert_eq!(events.last(), Some(&"data: [DONE]"));
    let values: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect();
    let delta = &values[0]["choices"][0]["delta"];
    assert_eq!(*delta, json!({ "role": "assistant", "content": "" }));
    for value in &values {
        assert_eq!((&value["object"], &value["id"]), (&json!("chat.completion.chunk"), &values[0]["id"]));
        assert!(value.get("usage").is_none(), "nobody asked for numbers: {value}");
    }
    let last = &values[values.len() - 1]["choices"][0];
    assert_eq!(*last, json!({ "index": 0, "delta": {}, "logprobs": null, "finish_reason": "length" }));
    server.stop().await;
}
