//! Module paths: while a module records, its nodes carry its place in the model.
//!
//! A module knows its full path (`model.layers.3.self_attn.q_proj`, the prefix of its `VarBuilder`), the engine wants
//! segments. So each thread remembers how far the path is already open, and a module pushes what is missing. A module
//! used alone pushes its whole path.

use std::cell::RefCell;

thread_local! {
    static OPEN: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Restores the path of the enclosing module, also when the recording ends early with an error.
struct Reopen {
    previous: Option<String>,
}

impl Drop for Reopen {
    fn drop(&mut self) {
        if let Some(previous) = self.previous.take() {
            OPEN.with(|open| *open.borrow_mut() = previous);
        }
    }
}

/// What is to be pushed for a module at `path` when `open` is already open.
fn missing<'a>(open: &str, path: &'a str) -> &'a str {
    match path.strip_prefix(open) {
        Some(rest) if open.is_empty() => rest,
        Some(rest) => match rest.strip_prefix('.') {
            Some(rest) => rest,
            None if rest.is_empty() => "",
            // `model.layers.1` is no parent of `model.layers.12`.
            None => path,
        },
        None => path,
    }
}

/// Opens the module at `path` on this thread until the result is dropped. An empty path opens nothing.
pub(crate) fn enter(path: &str) -> impl Sized {
    let (segment, reopen) = OPEN.with(|open| {
        let mut open = open.borrow_mut();
        let segment = missing(&open, path);
        if segment.is_empty() {
            return (None, Reopen { previous: None });
        }
        let previous = std::mem::replace(&mut *open, path.to_string());
        (Some(segment.to_string()), Reopen { previous: Some(previous) })
    });
    let guard = segment.map(|segment| candle_lazy_exec::module_scope(&segment));
    (guard, reopen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> String {
        OPEN.with(|open| open.borrow().clone())
    }

    #[test]
    fn only_the_missing_part_is_pushed() {
        assert_eq!(missing("", "a.b"), "a.b");
        assert_eq!(missing("a.b", "a.b.c.d"), "c.d");
        assert_eq!(missing("a.b", "a.b"), "");
        assert_eq!(missing("a.b", ""), "");
        assert_eq!(missing("a.l.1", "a.l.12"), "a.l.12");
        assert_eq!(missing("x", "a.b"), "a.b");
    }

    #[test]
    fn scopes_nest_and_close() {
        {
            let _outer = enter("model");
            assert_eq!(open(), "model");
            {
                let _inner = enter("model.norm");
                assert_eq!(open(), "model.norm");
                let _nothing = enter("");
                assert_eq!(open(), "model.norm");
            }
            assert_eq!(open(), "model");
        }
        assert_eq!(open(), "");
    }
}
