//! What the source files must and must not hold.

use super::lexer::{line_of, words};
use super::tree::{File, Tree};
use super::Violation;

fn place(file: &File, offset: usize) -> String {
    format!("{}:{}", file.path, line_of(&file.text, offset))
}

/// Every Rust file begins with module docs; a crate's may be its README.
pub(super) fn module_docs(tree: &Tree) -> Vec<Violation> {
    const BEGINNINGS: &[&str] = &["//! ", "#![doc = include_str!("];
    tree.rust()
        .filter(|(file, _)| !BEGINNINGS.iter().any(|beginning| file.text.starts_with(beginning)))
        .map(|(file, _)| Violation::new("module docs", &file.path, "does not begin with module docs"))
        .collect()
}

/// The graph is the same in every build: no feature decides anything in it.
pub(super) fn no_features_in_graph(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "features in graph";
    let mut found = Vec::new();
    for (file, rust) in tree.rust().filter(|(file, _)| file.path.starts_with("crates/graph/")) {
        let words = words(&rust.code);
        for (at, word) in words.iter().enumerate() {
            let conditional =
                at.checked_sub(1).is_some() && words[..at].iter().rev().take(4).any(|w| w.text.starts_with("cfg"));
            if word.text == "feature" && conditional {
                found.push(Violation::new(CHECK, place(file, word.start), "a cargo feature decides something here"));
            }
        }
    }
    if let Some(manifest) = tree.get("crates/graph/Cargo.toml") {
        if manifest.text.lines().any(|line| line.trim() == "[features]") {
            found.push(Violation::new(CHECK, &manifest.path, "the graph has no features"));
        }
    }
    found
}

/// The most lines a file may have.
const MAX_LINES: usize = 600;

/// Files that may be longer, each with the reason.
const LONGER: &[(&str, &str)] = &[];

/// No file grows past what can be read in one go.
pub(super) fn file_length(tree: &Tree) -> Vec<Violation> {
    check_length(tree, LONGER)
}

fn check_length(tree: &Tree, longer: &[(&str, &str)]) -> Vec<Violation> {
    const CHECK: &str = "file length";
    let mut found = Vec::new();
    for (file, _) in tree.rust() {
        let lines = file.text.lines().count();
        if lines > MAX_LINES && !longer.iter().any(|(path, _)| *path == file.path) {
            let message = format!("{lines} lines; {MAX_LINES} are allowed without an entry and its reason");
            found.push(Violation::new(CHECK, &file.path, message));
        }
    }
    for (path, reason) in longer {
        let long = tree.get(path).is_some_and(|file| file.text.lines().count() > MAX_LINES);
        if !long || reason.is_empty() {
            found.push(Violation::new(CHECK, path, "has an entry that it does not need, or one without a reason"));
        }
    }
    found
}

/// A test that does not run is no test: no attribute says `ignore`, nor does the fence of a doc test.
pub(super) fn no_ignored_tests(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "ignored tests";
    let mut found = Vec::new();
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    for (file, rust) in tree.rust() {
        for (at, word) in rust.code.match_indices("ignore") {
            let (before, after) = (&rust.code[..at], &rust.code[at + word.len()..]);
            let whole = !before.ends_with(in_word) && !after.starts_with(in_word);
            if whole && before.rfind("#[").is_some_and(|open| !before[open..].contains(']')) {
                found.push(Violation::new(CHECK, place(file, at), "an ignored test"));
            }
        }
        for (number, line) in file.text.lines().enumerate() {
            let line = line.trim_start();
            let doc = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")).map(str::trim_start);
            let fence = doc.and_then(|doc| doc.strip_prefix("```"));
            if fence.is_some_and(|words| words.split(|c| !in_word(c)).any(|word| word == "ignore")) {
                let place = format!("{}:{}", file.path, number + 1);
                found.push(Violation::new(CHECK, place, "a doc test that is ignored"));
            }
        }
    }
    found
}

/// Words that name nothing; what a thing does is its name.
const EMPTY_WORDS: &[&str] = &["manager", "handler", "processor", "helper", "smart"];

/// Names of files, types, functions, modules and constants say what they are.
pub(super) fn names(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "names";
    const DEFINING: &[&str] =
        &["fn", "struct", "enum", "trait", "type", "mod", "const", "static", "union", "macro_rules"];
    let mut found = Vec::new();
    for file in &tree.files {
        let ours = file.path.starts_with("crates/") || file.path.starts_with("xtask/") || file.path.starts_with("ci/");
        if let Some(word) = file.path.split('/').find_map(empty_word).filter(|_| ours) {
            found.push(Violation::new(CHECK, &file.path, format_args!("`{word}` in the name of a file")));
        }
    }
    for (file, rust) in tree.rust() {
        let words = words(&rust.code);
        for pair in words.windows(2) {
            if let [keyword, name] = pair {
                let between = rust.code[keyword.end()..name.start].trim();
                let defined = DEFINING.contains(&keyword.text) && (between.is_empty() || between == "!");
                if let Some(word) = empty_word(name.text).filter(|_| defined) {
                    let message = format!("`{word}` in the name `{}`", name.text);
                    found.push(Violation::new(CHECK, place(file, name.start), message));
                }
            }
        }
    }
    found
}

/// The first empty word in a name, in snake case or camel case.
fn empty_word(name: &str) -> Option<&'static str> {
    let mut spaced = String::new();
    for c in name.chars() {
        if c.is_uppercase() || !c.is_alphanumeric() {
            spaced.push(' ');
        }
        spaced.extend(c.to_lowercase());
    }
    let parts: Vec<&str> = spaced.split(|c: char| !c.is_alphanumeric()).collect();
    EMPTY_WORDS
        .iter()
        .copied()
        .find(|word| parts.iter().any(|part| part == word || part.strip_suffix('s') == Some(word)))
}

/// Library code never panics on purpose: no user input may end the process.
pub(super) fn no_panics(tree: &Tree) -> Vec<Violation> {
    const METHODS: &[&str] = &["unwrap", "expect", "unwrap_err", "expect_err", "unwrap_unchecked"];
    const MACROS: &[&str] = &["panic", "unreachable", "todo", "unimplemented"];
    let mut found = Vec::new();
    for (file, rust) in tree.rust() {
        if !(file.path.starts_with("crates/") && file.path.contains("/src/")) || tree.is_test_file(&file.path) {
            continue;
        }
        for word in words(&rust.code) {
            let before = rust.code[..word.start].trim_end().chars().next_back();
            let after = rust.code[word.end()..].chars().next();
            let method = METHODS.contains(&word.text) && before == Some('.') && after == Some('(');
            let macro_call = MACROS.contains(&word.text) && after == Some('!');
            if (method || macro_call) && !rust.tests.contains(word.start) {
                let message = format!("`{}` outside of tests", word.text);
                found.push(Violation::new("panics", place(file, word.start), message));
            }
        }
    }
    found
}

/// Where `unsafe` may stand.
const UNSAFE_PLACES: &[&str] = &["crates/ops/", "crates/exec/src/buffer", "crates/parity/src/alloc"];

/// `unsafe` stands in kernels, in the buffer module and in the measuring allocator, each time with its reason.
pub(super) fn unsafe_places(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "unsafe";
    let mut found = Vec::new();
    for (file, rust) in tree.rust() {
        for word in words(&rust.code).iter().filter(|word| word.text == "unsafe") {
            if !UNSAFE_PLACES.iter().any(|allowed| file.path.starts_with(allowed)) {
                found.push(Violation::new(CHECK, place(file, word.start), "`unsafe` outside of kernels and buffers"));
                continue;
            }
            // a function that is unsafe to call states its conditions in its docs; `unsafe fn` types and trait items too
            let is_fn = rust.code[word.end()..].trim_start().split([' ', '(']).take(3).any(|next| next == "fn");
            let line = line_of(&file.text, word.start);
            let above: Vec<&str> = file.text.lines().take(line).collect();
            let wanted = |text: &str| text.contains("SAFETY:") || (is_fn && text.contains("# Safety"));
            let reason = above.iter().rev().take(14).any(|text| wanted(text));
            if !reason {
                found.push(Violation::new(CHECK, place(file, word.start), "no `// SAFETY:` comment near"));
            }
        }
    }
    found
}

/// Nothing of one machine gets into the repository: no absolute paths of a checkout, no package index of one's own.
pub(super) fn no_local_paths(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "local paths";
    // put together here, so that this file does not hold what it looks for
    let paths = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/tm", "p/"), concat!("/ho", "me/")];
    let settings = [
        concat!("[sou", "rce."),
        concat!("replace-", "with"),
        concat!("index-", "url"),
        concat!("trusted-", "host"),
        concat!("[regis", "tries"),
    ];
    let mut found = Vec::new();
    for file in &tree.files {
        for (at, line) in file.text.lines().enumerate() {
            let here = || format!("{}:{}", file.path, at + 1);
            for path in paths {
                let own = line.match_indices(path).any(|(at, _)| {
                    !line[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || "._-/}~$:".contains(c))
                });
                if own {
                    found.push(Violation::new(CHECK, here(), format_args!("a path of one machine, {path}…")));
                }
            }
            for setting in settings {
                if line.contains(setting) {
                    found.push(Violation::new(
                        CHECK,
                        here(),
                        format_args!("a package index of one machine, {setting}…"),
                    ));
                }
            }
            let lock = file.path.ends_with("Cargo.lock") && line.starts_with("source = ");
            if lock && line != "source = \"registry+https://github.com/rust-lang/crates.io-index\"" {
                found.push(Violation::new(CHECK, here(), "a crate from elsewhere than the public index"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::tree::fixture;
    use super::*;

    #[test]
    fn missing_module_docs_are_found() {
        let tree = fixture(&[
            ("crates/a/src/lib.rs", "#![doc = include_str!(\"../README.md\")]\n"),
            ("crates/a/src/a.rs", "//! Docs.\n"),
            ("crates/a/src/b.rs", "use x;\n//! Late.\n"),
        ]);
        assert_eq!(module_docs(&tree).len(), 1);
        assert_eq!(module_docs(&tree)[0].place, "crates/a/src/b.rs");
    }

    #[test]
    fn features_in_graph_are_found() {
        let gated =
            "//! D.\n#[cfg(feature = \"cuda\")]\nfn a() {}\nfn b() -> bool { cfg!(all(unix, feature = \"x\")) }\n";
        let free = "//! D.\n// #[cfg(feature = \"x\")]\n#[cfg(test)]\nmod tests { fn feature() {} }\n";
        let tree = fixture(&[
            ("crates/graph/src/a.rs", gated),
            ("crates/graph/src/b.rs", free),
            ("crates/exec/src/a.rs", gated),
            ("crates/graph/Cargo.toml", "[features]\nx = []\n"),
        ]);
        let places: Vec<String> = no_features_in_graph(&tree).into_iter().map(|v| v.place).collect();
        assert_eq!(places, ["crates/graph/src/a.rs:2", "crates/graph/src/a.rs:4", "crates/graph/Cargo.toml"]);
    }

    #[test]
    fn long_files_are_found_unless_listed() {
        let long = "//! D.\n".repeat(MAX_LINES + 1);
        let tree = fixture(&[("crates/a/src/long.rs", &long), ("crates/a/src/short.rs", "//! D.\n")]);
        assert_eq!(check_length(&tree, &[]).len(), 1);
        assert_eq!(check_length(&tree, &[("crates/a/src/long.rs", "a table")]), []);
        assert_eq!(check_length(&tree, &[("crates/a/src/long.rs", "")]).len(), 1, "an entry without a reason");
        assert_eq!(check_length(&tree, &[("crates/a/src/long.rs", "x"), ("crates/a/src/short.rs", "x")]).len(), 1);
    }

    #[test]
    fn ignored_tests_are_found() {
        let tree = fixture(&[
            ("crates/a/src/a.rs", "#[test]\n#[ignore]\nfn a() {}\n"),
            ("crates/a/src/b.rs", "#[test]\n#[ignore = \"slow\"]\nfn a() {}\n"),
            ("crates/a/src/c.rs", "// #[ignore]\n#[test]\nfn ignore() { let s = [ignored]; }\n"),
            ("crates/a/src/d.rs", "#[cfg_attr(all(), ignore)]\n#[test]\nfn a() {}\n"),
            (
                "crates/a/src/e.rs",
                "/// A.\n/// ```rust,ignore\n/// a();\n/// ```\n/// ```text\n/// ignore\n/// ```\nfn a() {}\n",
            ),
        ]);
        assert_eq!(no_ignored_tests(&tree).len(), 4);
    }

    #[test]
    fn empty_words_in_names_are_found() {
        let tree = fixture(&[
            ("crates/a/src/helpers.rs", "//! D.\n"),
            (
                "crates/a/src/a.rs",
                "struct BufferManager;\nfn plan_handler() {}\nfn chandler(processor: u8) { x.smart(); }\n",
            ),
            ("crates/a/src/b.rs", "// struct Helper\nlet s = \"fn helper\";\nmacro_rules! smart_add { () => {} }\n"),
        ]);
        let found = names(&tree);
        let places: Vec<&str> = found.iter().map(|v| v.place.as_str()).collect();
        assert_eq!(
            places,
            ["crates/a/src/helpers.rs", "crates/a/src/a.rs:1", "crates/a/src/a.rs:2", "crates/a/src/b.rs:3"]
        );
    }

    #[test]
    fn panics_in_library_code_are_found() {
        let tree = fixture(&[
            (
                "crates/a/src/a.rs",
                "fn a() { x\n  .unwrap(); y.expect(\"z\"); unreachable!(); x.unwrap_or(1); expect(1); }\n",
            ),
            (
                "crates/a/src/b.rs",
                "#[cfg(test)]\nmod tests { fn a() { x.unwrap(); panic!() } }\n/// x.unwrap()\nfn d() {}\n",
            ),
            ("crates/a/tests/c.rs", "fn a() { x.unwrap(); }\n"),
            ("xtask/src/a.rs", "fn a() { x.unwrap(); }\n"),
        ]);
        let places: Vec<String> = no_panics(&tree).into_iter().map(|v| v.place).collect();
        assert_eq!(places, ["crates/a/src/a.rs:2", "crates/a/src/a.rs:2", "crates/a/src/a.rs:2"]);
    }

    #[test]
    fn unsafe_without_reason_or_elsewhere_is_found() {
        let reasoned = "fn a() {\n    // SAFETY: the length was checked.\n    unsafe { b() }\n}\n";
        let tree = fixture(&[
            ("crates/ops/src/a.rs", reasoned),
            ("crates/ops/src/b.rs", "fn a() { unsafe { b() } }\n"),
            ("crates/ops/src/c.rs", "/// Reads.\n///\n/// # Safety\n/// The pointer is valid.\npub unsafe fn c() {}\n"),
            ("crates/nn/src/a.rs", reasoned),
            ("crates/exec/src/buffer/raw.rs", reasoned),
            ("crates/exec/src/run/mod.rs", "#![forbid(unsafe_code)]\n// unsafe\n"),
        ]);
        let places: Vec<String> = unsafe_places(&tree).into_iter().map(|v| v.place).collect();
        assert_eq!(places, ["crates/nn/src/a.rs:3", "crates/ops/src/b.rs:1"]);
    }

    #[test]
    fn local_paths_and_indexes_are_found() {
        let path = format!("see {}main/x\nsee https://example.org{}x\n", concat!("/wo", "rk/"), concat!("/wo", "rk/"));
        let index = format!("{}crates-io]\n", concat!("[sou", "rce."));
        let lock = "source = \"registry+https://github.com/rust-lang/crates.io-index\"\nsource = \"registry+https://elsewhere.example/index\"\n";
        let tree = fixture(&[("README.md", &path), (".cargo/config.toml", &index), ("Cargo.lock", lock)]);
        let places: Vec<String> = no_local_paths(&tree).into_iter().map(|v| v.place).collect();
        assert_eq!(places, [".cargo/config.toml:1", "Cargo.lock:2", "README.md:1"]);
    }
}
