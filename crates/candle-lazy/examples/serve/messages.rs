//! The messages of a conversation.

use super::failure::{Failure, Outcome};
use super::fields::{unless, Fields};
use candle_lazy::nn::tokenizer::ChatMessage;
use serde_json::Value;

/// Reads `messages`.
pub(crate) fn read(messages: Vec<Value>) -> Outcome<Vec<ChatMessage>> {
    if messages.is_empty() {
        return Err(Failure::field("messages", "`messages` is empty."));
    }
    messages.into_iter().enumerate().map(|(index, message)| one(&format!("messages[{index}]"), message)).collect()
}

fn one(param: &str, message: Value) -> Outcome<ChatMessage> {
    let mut fields = Fields::within(message, param)?;
    let role: String = fields.need("role").map_err(|failure| failure.in_field(param))?;
    let role = match role.as_str() {
        "system" | "user" | "assistant" => role,
        // what newer models call it
        "developer" => "system".to_string(),
        _ => {
            let message =
                format!("The role `{role}` is not supported: there are system, developer, user and assistant.");
            return Err(Failure::unsupported(&format!("{param}.role"), message));
        }
    };
    let content = match fields.take("content").map_err(|failure| failure.in_field(param))? {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts.into_iter().map(|part| text_of(param, part)).collect::<Outcome<String>>()?,
        None if role == "assistant" => String::new(),
        _ => {
            let message = format!("`{param}.content` must be a string or an array of parts.");
            return Err(Failure::field(&format!("{param}.content"), message));
        }
    };
    fields
        .only(&[("tool_calls", unless::empty)])
        .and_then(|()| fields.end())
        .map_err(|failure| failure.in_field(param))?;
    Ok(ChatMessage { role, content })
}

fn text_of(param: &str, part: Value) -> Outcome<String> {
    match part.get("text") {
        Some(Value::String(text)) if part.get("type").is_some_and(|kind| kind == "text") => Ok(text.clone()),
        _ => {
            let param = format!("{param}.content");
            let message = format!("A part of `{param}` is no text: this server takes texts only.");
            Err(Failure::unsupported(&param, message))
        }
    }
}
