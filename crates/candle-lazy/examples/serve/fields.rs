//! The fields of a request, each asked for by name; what nobody asked for is refused by name.

use super::failure::{Failure, Outcome};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::fmt::Arguments;

/// A name, and whether a value of it asks for what is done anyway.
pub(crate) type Only<'a> = (&'a str, fn(&Value) -> bool);

/// The fields that have not been asked for yet.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Those of a body.
    pub(crate) fn parse(body: &[u8]) -> Outcome<Self> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(Failure::invalid("The body is JSON, but no object.")),
            Err(error) => Err(Failure::invalid(format_args!("The body is not JSON: {error}."))),
        }
    }

    /// Those of an object within the body.
    pub(crate) fn within(value: Value, param: &str) -> Outcome<Self> {
        match value {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(Failure::field(param, format_args!("`{param}` must be an object."))),
        }
    }

    /// A field that may be missing; `null` is missing.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Outcome<Option<T>> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(error) => Err(Failure::field(name, format_args!("`{name}` is not what it should be: {error}."))),
            },
        }
    }

    /// A field that must be there.
    pub(crate) fn need<T: DeserializeOwned>(&mut self, name: &str) -> Outcome<T> {
        self.take(name)?.ok_or_else(|| Failure::field(name, format_args!("`{name}` is missing.")))
    }

    /// A number of a field, within bounds.
    pub(crate) fn number(&mut self, name: &str, least: f64, most: f64) -> Outcome<Option<f64>> {
        let within = |value: &Value| value.as_f64().filter(|value| (least..=most).contains(value));
        self.which(name, within, format_args!("a number from {least} to {most}"))
    }

    /// A count of a field, within bounds.
    pub(crate) fn count(&mut self, name: &str, least: usize, most: usize) -> Outcome<Option<usize>> {
        let count = |value: &Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
        let within = |value: &Value| count(value).filter(|count| (least..=most).contains(count));
        self.which(name, within, format_args!("a whole number from {least} to {most}"))
    }

    /// A whole number of a field.
    pub(crate) fn whole(&mut self, name: &str) -> Outcome<Option<i64>> {
        self.which(name, Value::as_i64, format_args!("a whole number from {} to {}", i64::MIN, i64::MAX))
    }

    /// Yes or no; no where it is missing.
    pub(crate) fn flag(&mut self, name: &str) -> Outcome<bool> {
        Ok(self.which(name, Value::as_bool, format_args!("true or false"))?.unwrap_or(false))
    }

    /// What `read` makes of a field, which must be `what`.
    fn which<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&Value) -> Option<T>,
        what: Arguments<'_>,
    ) -> Outcome<Option<T>> {
        let Some(value) = self.take::<Value>(name)? else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| {
            Failure::field(name, format_args!("`{name}` is {}, it must be {what}.", begin(&value.to_string())))
        })
    }

    /// Fields that change nothing about an answer: who asks, and notes.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.0.remove(*name);
        }
    }

    /// Fields that are taken only where they ask for what is done anyway.
    pub(crate) fn only(&mut self, fields: &[Only<'_>]) -> Outcome<()> {
        for (name, does_nothing) in fields {
            match self.0.remove(*name) {
                Some(value) if !value.is_null() && !does_nothing(&value) => {
                    let message = format!("`{name}` is not supported by this server.");
                    return Err(Failure::unsupported(name, message));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Refuses what is left.
    pub(crate) fn end(self) -> Outcome<()> {
        match self.0.into_iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(Failure::unsupported(&name, format_args!("The field `{name}` is not known here."))),
            None => Ok(()),
        }
    }
}

/// The beginning of what may be long.
fn begin(text: &str) -> String {
    const MOST: usize = 40;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_string(),
    }
}

/// Conditions for [`Fields::only`].
pub(crate) mod unless {
    use serde_json::Value;

    /// 0, or what may stand for it.
    pub(crate) fn zero(value: &Value) -> bool {
        value.as_f64() == Some(0.0)
    }

    /// Never.
    pub(crate) fn given(_: &Value) -> bool {
        false
    }

    pub(crate) fn false_(value: &Value) -> bool {
        value == &Value::Bool(false)
    }

    /// Nothing in it.
    pub(crate) fn empty(value: &Value) -> bool {
        value.as_object().is_some_and(serde_json::Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
    }
}
