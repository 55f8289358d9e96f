//! Which folder of `exec` may use which: data, compared with the paths in its sources.
//!
//! The folders stand in the order in which data flows through them. What lies below is used from above, never the other
//! way; the one exception is listed by name.

use super::lexer::{line_of, words, Word};
use super::tree::{module_path, Tree};
use super::Violation;

/// What may be used of a folder.
enum What {
    /// Everything that the folder shows.
    All,
    /// These names only.
    Only(&'static [&'static str]),
}

/// The allowed uses: from, to, what.
const ALLOWED: &[(&str, &str, What)] = &[
    // recording ends in an evaluation: the handle calls the run loop through these functions only
    (
        "tensor",
        "run",
        What::Only(&[
            "eval_all",
            "eval_all_with",
            "eval_all_with_report",
            "eval_direct",
            "eval_all_checked",
            "first_nan",
            "first_nonfinite",
            "NonFinite",
            "materialize",
        ]),
    ),
    ("tensor", "report", What::All),
    ("tensor", "buffer", What::All),
    ("tensor", "config", What::All),
    ("lower", "plan", What::All),
    ("lower", "config", What::All),
    ("plan", "config", What::All),
    // whether a leaf may be written in place, and from which size on memory may be refused
    ("plan", "buffer", What::Only(&["BufferValue", "ASK_FROM"])),
    ("run", "lower", What::All),
    ("run", "plan", What::All),
    ("run", "report", What::All),
    ("run", "buffer", What::All),
    ("run", "config", What::All),
    // the functions that evaluate take handles
    ("run", "tensor", What::Only(&["LazyTensor"])),
    // functions of handles
    ("grad", "tensor", What::Only(&["LazyTensor"])),
    ("compile", "tensor", What::Only(&["LazyTensor"])),
    ("compile", "run", What::Only(&["eval_all", "Trace"])),
    ("compile", "config", What::All),
    (
        "batch",
        "run",
        What::Only(&[
            "eval_all",
            "eval_group",
            "eval_now",
            "eval_small",
            "in_group",
            "is_small",
            "message_of",
            "refuse_while_recording",
            "Request",
            "Values",
        ]),
    ),
    ("batch", "tensor", What::Only(&["LazyTensor"])),
    ("batch", "buffer", What::Only(&["keep_freed"])),
    // of its spans, and whether this thread may evaluate
    ("batch", "config", What::Only(&["TARGET", "is_recording"])),
    // a job that was submitted
    ("batch", "future", What::Only(&["task"])),
    ("future", "run", What::Only(&["eval_all", "message_of", "refuse_while_recording"])),
    ("future", "config", What::All),
    ("future", "tensor", What::Only(&["LazyTensor"])),
];

/// Modules that everything may use: errors.
const COMMON: &[&str] = &["error"];

const CHECK: &str = "folders of exec";
const SRC: &str = "crates/exec/src/";

/// Compares the `crate::…` and `super::…` paths in exec's sources with what is allowed. Tests may use everything.
pub(super) fn edges_of_exec(tree: &Tree) -> Vec<Violation> {
    check(tree, ALLOWED)
}

fn check(tree: &Tree, allowed: &[(&str, &str, What)]) -> Vec<Violation> {
    let mut found = Vec::new();
    let modules: Vec<String> = tree.rust().filter_map(|(file, _)| top_module(&file.path)).collect();
    for (file, rust) in tree.rust() {
        let Some(from) = top_module(&file.path).filter(|name| !name.is_empty()) else {
            continue;
        };
        if tree.is_test_file(&file.path) {
            continue;
        }
        let here = module_path(&file.path).unwrap_or_default();
        let depth = here.split("::").count();
        for (start, to, name) in uses(&rust.code, depth) {
            if rust.tests.contains(start) || to == from || COMMON.contains(&to.as_str()) {
                continue;
            }
            let place = format!("{}:{}", file.path, line_of(&file.text, start));
            if !modules.contains(&to) {
                let message = format!("`crate::{to}`: name the folder it comes from, not what lib.rs re-exports");
                found.push(Violation::new(CHECK, place, message));
                continue;
            }
            let rules = || allowed.iter().filter(|(a, b, _)| *a == from && *b == to);
            let fine = rules().any(|(_, _, what)| match what {
                What::All => true,
                What::Only(names) => names.contains(&name.as_str()),
            });
            if !fine {
                let message =
                    format!("{from} may not use crate::{to}{}{name}", if name.is_empty() { "" } else { "::" });
                found.push(Violation::new(CHECK, place, message));
            }
        }
    }
    found
}

/// The top module that a file of exec belongs to; empty for lib.rs.
fn top_module(path: &str) -> Option<String> {
    path.strip_prefix(SRC)?;
    let module = module_path(path)?;
    Some(module.split("::").next().unwrap_or_default().to_string())
}

/// Paths that begin at the crate's root: the offset, the top module, and the next name (empty if there is none).
///
/// `depth` is the number of segments of the module that the code is in; a path of that many `super` begins at the root.
fn uses(code: &str, depth: usize) -> Vec<(usize, String, String)> {
    let words = words(code);
    let joined = |a: &Word<'_>, b: &Word<'_>| code[a.end()..b.start].trim() == "::";
    let mut found = Vec::new();
    let mut at = 0;
    while at < words.len() {
        let begin = at;
        if words[at].text == "super" {
            while at + 1 < words.len() && words[at + 1].text == "super" && joined(&words[at], &words[at + 1]) {
                at += 1;
            }
        }
        let supers = at - begin + 1;
        let root = words[begin].text == "crate" || (words[begin].text == "super" && supers >= depth);
        // a path's first segment only: `$crate` and `pub(crate)` have no `::` behind them
        if root && code[words[at].end()..].trim_start().starts_with("::") {
            let open = words[at].end() + code[words[at].end()..].find("::").unwrap_or(0) + 2;
            for (first, second) in leaves(code, open) {
                found.push((words[begin].start, first, second));
            }
        }
        at += 1;
    }
    found
}

/// The first two names of every path in the use tree (or plain path) that begins at `open`.
fn leaves(code: &str, open: usize) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (first, rest) in branches(code, open) {
        let after = code[rest..].trim_start();
        if after.starts_with("::") {
            let next = rest + (code.len() - rest - after.len()) + 2;
            let seconds = branches(code, next);
            if seconds.is_empty() {
                found.push((first, String::new()));
            } else {
                found.extend(seconds.into_iter().map(|(second, _)| (first.clone(), second)));
            }
        } else {
            found.push((first, String::new()));
        }
    }
    found
}

/// The names that stand at `open`: one, or those of a group in braces; with each the offset behind it.
fn branches(code: &str, open: usize) -> Vec<(String, usize)> {
    let skipped = code.len() - open - code[open..].trim_start().len();
    let begin = open + skipped;
    let name_at = |at: usize| -> Option<(String, usize)> {
        let text = code[at..].trim_start();
        let from = code.len() - text.len();
        let len = text.find(|c: char| c != '_' && !c.is_alphanumeric() && c != '*').unwrap_or(text.len());
        (len > 0).then(|| (text[..len].to_string(), from + len))
    };
    if !code[begin..].starts_with('{') {
        return name_at(begin).into_iter().collect();
    }
    let Some(close) = super::lexer::matching(code, begin, '{', '}') else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let (mut depth, mut fresh) = (0usize, true);
    for (at, c) in code[begin..close].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' if depth == 1 => fresh = true,
            _ => {
                if fresh && depth == 1 && !c.is_whitespace() {
                    found.extend(name_at(begin + at));
                    fresh = false;
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::tree::fixture;
    use super::*;

    fn of(code: &str) -> Vec<(String, String)> {
        uses(code, 2).into_iter().map(|(_, a, b)| (a, b)).collect()
    }

    fn pair(a: &str, b: &str) -> (String, String) {
        (a.to_string(), b.to_string())
    }

    #[test]
    fn paths_are_read_in_every_form() {
        assert_eq!(of("use crate::plan::Plan;"), [pair("plan", "Plan")]);
        assert_eq!(
            of("use crate::{config, run::{self, eval_all}, error::Result};"),
            [pair("config", ""), pair("run", "self"), pair("run", "eval_all"), pair("error", "Result")]
        );
        assert_eq!(of("let x = crate::run::materialize(&[&y])?;"), [pair("run", "materialize")]);
        assert_eq!(of("use super::super::plan::{Slot, Step};"), [pair("plan", "Slot"), pair("plan", "Step")]);
        assert_eq!(of("use super::views::x; pub(crate) fn f() {} $crate! {}"), []);
    }

    #[test]
    fn the_allowed_uses_have_no_cycle_but_the_named_ones() {
        // uses of everything point one way: repeatedly drop the folders that use nothing that is left
        let mut left: Vec<(&str, &str)> =
            ALLOWED.iter().filter(|(_, _, what)| matches!(what, What::All)).map(|(a, b, _)| (*a, *b)).collect();
        loop {
            let before = left.len();
            let users: Vec<&str> = left.iter().map(|(a, _)| *a).collect();
            left.retain(|(_, b)| users.contains(b));
            if left.len() == before {
                break;
            }
        }
        assert_eq!(left, []);
    }

    #[test]
    fn an_upward_use_is_found() {
        let tree = fixture(&[
            ("crates/exec/src/lib.rs", "pub mod plan; pub use plan::Plan;"),
            ("crates/exec/src/plan/mod.rs", "use crate::run::Bound;\nuse crate::error::Error;\n"),
            (
                "crates/exec/src/run/mod.rs",
                "use crate::plan::Plan;\n#[cfg(test)]\nmod tests { use crate::tensor::All; }\n",
            ),
            ("crates/exec/src/tensor/mod.rs", "use crate::run::materialize;\nuse crate::run::State;\n"),
            ("crates/exec/src/lower/mod.rs", "use crate::Plan;\nuse super::tensor::LazyTensor;\n"),
        ]);
        let found = edges_of_exec(&tree);
        let places: Vec<&str> = found.iter().map(|v| v.place.as_str()).collect();
        assert_eq!(
            places,
            [
                "crates/exec/src/lower/mod.rs:1",
                "crates/exec/src/lower/mod.rs:2",
                "crates/exec/src/plan/mod.rs:1",
                "crates/exec/src/tensor/mod.rs:2",
            ]
        );
        assert!(found[0].message.contains("name the folder"), "{found:?}");
    }
}
