//! Patterns of names, and names in messages.

use crate::error::{Error, Result};
use regex::Regex;

/// A pattern of whole names.
#[derive(Debug, Clone)]
pub(crate) struct Glob(Regex);

impl Glob {
    #[track_caller]
    pub(crate) fn new(pattern: &str) -> Result<Self> {
        // what `escape` gives for the two signs
        let inner = regex::escape(pattern).replace(r"\*", ".*").replace(r"\?", ".");
        match Regex::new(&format!("^(?s:{inner})$")) {
            Ok(regex) => Ok(Self(regex)),
            Err(error) => Err(Error::params(format_args!("the pattern `{pattern}`: {error}"))),
        }
    }

    pub(crate) fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

/// How many names a message lists.
const NAMED: usize = 4;

/// The first names of a list, quoted, and how many more there are.
pub(crate) fn quoted<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    let mut names = names.into_iter();
    let first: Vec<String> = names.by_ref().take(NAMED).map(|name| format!("`{}`", name.as_ref())).collect();
    match (first.is_empty(), names.count()) {
        (true, _) => "no names".to_string(),
        (false, 0) => first.join(", "),
        (false, more) => format!("{} and {more} more", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that fails says so

    use super::*;

    #[test]
    fn a_star_is_any_characters_a_question_mark_is_one() {
        let matches = |pattern: &str, name: &str| Glob::new(pattern).unwrap().matches(name);
        assert!(matches("model.layers.*.q_proj.lora_A", "model.layers.11.self_attn.q_proj.lora_A"));
        assert!(matches("*", "a.b"));
        assert!(matches("layers.?.w", "layers.3.w"));
        assert!(!matches("layers.?.w", "layers.13.w"));
        // the whole name, and dots and brackets for themselves
        assert!(!matches("q_proj", "x.q_proj"));
        assert!(!matches("a.b", "axb"));
        assert!(matches("a[0]", "a[0]"));
        assert!(!matches("", "a"));
    }

    #[test]
    fn messages_name_a_few() {
        assert_eq!(quoted(["a"]), "`a`");
        assert_eq!(quoted(["a", "b", "c", "d", "e", "f"]), "`a`, `b`, `c`, `d` and 2 more");
        assert_eq!(quoted(Vec::<String>::new()), "no names");
    }
}
