//! Documents that must keep up with the code: the ops and the invariants.

use super::lexer::{code_only, line_of, matching, words};
use super::tree::{module_path, Tree};
use super::Violation;

const OPS: &str = "docs/ops.md";
const ENUM: &str = "crates/graph/src/op.rs";
/// Where the names of ops stand beside those of the enums.
const TABLE: &str = "crates/graph/src/op/table.rs";

/// What each op's section says, in this order.
const FIELDS: &[&str] = &["Inputs", "Attributes", "Result", "Exactness", "Kernel", "Backward", "Eager twin"];

/// Every variant of the `Op` enum has a section in `docs/ops.md` with every field, every name an op can have stands in
/// it, and no section is about an op that does not exist.
pub(super) fn ops_described(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "ops described";
    let (Some(source), Some(docs)) = (tree.get(ENUM), tree.get(OPS)) else {
        return vec![Violation::new(CHECK, OPS, format_args!("this file or {ENUM} is missing"))];
    };
    let mut found = Vec::new();
    let code = code_only(&source.text);
    let variants = variants(&code, "Op");
    if variants.is_empty() {
        found.push(Violation::new(CHECK, ENUM, "no variant of `enum Op` was recognised"));
    }
    let sections = sections(&docs.text, "## ");
    for variant in &variants {
        let Some((line, _, body)) = sections.iter().find(|(_, title, _)| first_word(title) == variant) else {
            found.push(Violation::new(CHECK, OPS, format_args!("no section `## {variant}`")));
            continue;
        };
        for field in FIELDS {
            if !body.iter().any(|text| text.starts_with(&format!("- {field}:"))) {
                found.push(Violation::new(CHECK, format_args!("{OPS}:{line}"), format_args!("no line `- {field}:`")));
            }
        }
    }
    for (line, title, _) in &sections {
        if !variants.iter().any(|variant| variant == first_word(title)) {
            let message = format!("`## {title}` is about no op");
            found.push(Violation::new(CHECK, format_args!("{OPS}:{line}"), message));
        }
    }
    let table = tree.get(TABLE).map(|table| names(&table.text, &code_only(&table.text)));
    for name in names(&source.text, &code).into_iter().chain(table.into_iter().flatten()) {
        if !docs.text.contains(&format!("`{name}`")) {
            found.push(Violation::new(CHECK, OPS, format_args!("the op `{name}` is not named")));
        }
    }
    found
}

fn first_word(title: &str) -> &str {
    title.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

/// The headings of one level with their lines and bodies.
fn sections<'a>(text: &'a str, mark: &str) -> Vec<(usize, &'a str, Vec<&'a str>)> {
    let mut found: Vec<(usize, &str, Vec<&str>)> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if let Some(title) = line.strip_prefix(mark) {
            found.push((at + 1, title.trim(), Vec::new()));
        } else if let Some((_, _, body)) = found.last_mut() {
            body.push(line);
        }
    }
    found
}

/// The variants of an enum: the names that stand first in each part of its body.
fn variants(code: &str, name: &str) -> Vec<String> {
    let all = words(code);
    let Some(start) =
        all.windows(2).find(|pair| pair[0].text == "enum" && pair[1].text == name).map(|pair| pair[1].end())
    else {
        return Vec::new();
    };
    let Some(open) = code[start..].find('{').map(|at| start + at) else {
        return Vec::new();
    };
    let close = matching(code, open, '{', '}').unwrap_or(code.len());
    let (mut depth, mut fresh, mut found) = (0usize, true, Vec::new());
    for (at, c) in code[open..close].char_indices() {
        match c {
            '{' | '(' | '[' | '<' => depth += 1,
            '}' | ')' | ']' | '>' => depth = depth.saturating_sub(1),
            ',' if depth == 1 => fresh = true,
            c if depth == 1 && fresh && c.is_uppercase() => {
                let rest = &code[open + at..close];
                let len = rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len());
                found.push(rest[..len].to_string());
                fresh = false;
            }
            _ => {}
        }
    }
    found
}

/// The names that ops have in dumps and reports: the literals behind `=>` in the file of the enum.
fn names(text: &str, code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("=> \"") {
        let open = at + "=> \"".len();
        if let Some(len) = code[open..].find('"') {
            found.push(text[open..open + len].to_string());
        }
    }
    found.sort();
    found.dedup();
    found
}

/// The READMEs of the repository and of the umbrella show the same program and the same output. The umbrella's is compiled
/// and run by its tests, so neither can go stale.
pub(super) fn readmes_agree(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "readmes";
    const UMBRELLA: &str = "crates/candle-lazy/README.md";
    let (Some(top), Some(umbrella)) = (tree.get("README.md"), tree.get(UMBRELLA)) else {
        return vec![Violation::new(CHECK, "README.md", format_args!("this file or {UMBRELLA} is missing"))];
    };
    let mut found = Vec::new();
    for language in ["```rust", "```text"] {
        let (a, b) = (block(&top.text, language), block(&umbrella.text, language));
        if a.is_none() || a != b {
            found.push(Violation::new(
                CHECK,
                "README.md",
                format_args!("its {language} block is not that of {UMBRELLA}"),
            ));
        }
    }
    found
}

/// The first block of a language.
fn block<'a>(text: &'a str, language: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("{language}\n"))?;
    Some(rest.split_once("```")?.0)
}

const ARCHITECTURE: &str = "docs/architecture.md";
const MARK: &str = "tested by:";

/// The folder of a package's sources.
fn folder(package: &str) -> Option<String> {
    Some(match package {
        "xtask" => "xtask".to_string(),
        "candle_lazy" => "crates/candle-lazy".to_string(),
        other => format!("crates/{}", other.strip_prefix("candle_lazy_")?),
    })
}

/// Every invariant in `docs/architecture.md` names at least one test, and each named test exists.
///
/// An invariant is a list entry below a heading "Invariants"; it ends in ``tested by: `crate::module::test` ``, more than
/// one separated by commas.
pub(super) fn invariants_tested(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "invariants";
    let Some(file) = tree.get(ARCHITECTURE) else {
        return vec![Violation::new(CHECK, ARCHITECTURE, "this file is missing")];
    };
    let mut found = Vec::new();
    let mut entries: Vec<(usize, String)> = Vec::new();
    let (mut inside, mut open) = (false, false);
    for (at, line) in file.text.lines().enumerate() {
        if line.starts_with('#') {
            inside = line.trim_start_matches('#').trim() == "Invariants";
            open = false;
        } else if inside && line.starts_with("- ") {
            entries.push((at + 1, line.to_string()));
            open = true;
        } else if line.trim().is_empty() {
            open = false;
        } else if let Some((_, text)) = entries.last_mut().filter(|_| inside && open) {
            text.push(' ');
            text.push_str(line.trim());
        }
    }
    if entries.is_empty() {
        found.push(Violation::new(CHECK, ARCHITECTURE, "no invariant was recognised"));
    }
    for (line, text) in entries {
        let place = format!("{ARCHITECTURE}:{line}");
        let Some((_, tests)) = text.split_once(MARK) else {
            found.push(Violation::new(CHECK, place, "an invariant that no test enforces"));
            continue;
        };
        let tests: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        if tests.is_empty() {
            found.push(Violation::new(CHECK, &place, "names no test"));
        }
        for test in tests {
            if !exists(tree, test) {
                found.push(Violation::new(CHECK, &place, format_args!("there is no test `{test}`")));
            }
        }
    }
    found
}

/// Whether a test of this path exists in the sources: crate, modules, function.
fn exists(tree: &Tree, test: &str) -> bool {
    let Some((krate, rest)) = test.split_once("::") else {
        return false;
    };
    let Some(folder) = folder(krate) else {
        return false;
    };
    let (modules, name) = rest.rsplit_once("::").unwrap_or(("", rest));
    tree.rust().any(|(file, rust)| {
        let Some(inside) = file.path.strip_prefix(&folder).and_then(|rest| rest.strip_prefix('/')) else {
            return false;
        };
        if !(inside.starts_with("src/") || inside.starts_with("tests/")) {
            return false;
        }
        let Some(own) = module_path(&file.path) else {
            return false;
        };
        let inner = match modules.strip_prefix(own.as_str()) {
            Some(inner) if own.is_empty() => inner,
            Some("") => "",
            Some(inner) => match inner.strip_prefix("::") {
                Some(inner) => inner,
                None => return false,
            },
            None => return false,
        };
        is_test(&rust.code, inner, name)
    })
}

/// Whether the code has a function of this name with `#[test]` above it, in these inline modules (empty: in none).
fn is_test(code: &str, modules: &str, name: &str) -> bool {
    let words = words(code);
    let mut blocks: Vec<(&str, std::ops::Range<usize>)> = Vec::new();
    for pair in words.windows(2) {
        let body = code[pair[1].end()..].trim_start();
        if pair[0].text == "mod" && body.starts_with('{') {
            let open = code.len() - body.len();
            blocks.push((pair[1].text, open..matching(code, open, '{', '}').unwrap_or(code.len())));
        }
    }
    words.windows(2).any(|pair| {
        if !(pair[0].text == "fn" && pair[1].text == name) {
            return false;
        }
        let around: Vec<&str> =
            blocks.iter().filter(|(_, block)| block.contains(&pair[0].start)).map(|(name, _)| *name).collect();
        if around.join("::") != modules {
            return false;
        }
        let line = line_of(code, pair[0].start);
        let above: Vec<&str> = code.lines().take(line.saturating_sub(1)).collect();
        let same_line = code.lines().nth(line - 1).is_some_and(|text| text.contains("#[test]"));
        same_line
            || above
                .iter()
                .rev()
                .map(|text| text.trim())
                .take_while(|text| text.is_empty() || text.starts_with("#["))
                .any(|text| text.starts_with("#[test]"))
    })
}

#[cfg(test)]
mod tests {
    use super::super::tree::fixture;
    use super::*;

    const SOURCE: &str = "//! D.\nenum UnaryOp { Neg }\nnamed! { UnaryOp { Neg => \"neg\" } }\n\
        pub enum Op<S = usize> {\n    /// Docs, with { brackets.\n    Unary(UnaryOp),\n    Full { shape: Dims<S>, dtype: DType },\n    Matmul,\n}\n\
        fn name() { match self { Self::Full { .. } => \"full\", Self::Matmul => \"matmul\" } }\n";

    fn section(name: &str) -> String {
        let fields: String = FIELDS.iter().map(|field| format!("- {field}: x\n")).collect();
        format!("## {name}\n\n{fields}\n")
    }

    #[test]
    fn variants_and_names_are_read() {
        let code = code_only(SOURCE);
        assert_eq!(variants(&code, "Op"), ["Unary", "Full", "Matmul"]);
        assert_eq!(names(SOURCE, &code), ["full", "matmul", "neg"]);
    }

    #[test]
    fn complete_docs_pass() {
        let docs =
            format!("# Ops\n`neg`\n{}{}{}", section("Unary"), section("Full (`full`)"), section("Matmul (`matmul`)"));
        assert_eq!(ops_described(&fixture(&[(ENUM, SOURCE), (OPS, &docs)])), []);
    }

    #[test]
    fn gaps_in_the_docs_are_found() {
        let cut = section("Full (`full`)").replace("- Backward: x\n", "");
        let docs = format!("# Ops\n{}{cut}{}", section("Unary"), section("Gone"));
        let found = ops_described(&fixture(&[(ENUM, SOURCE), (OPS, &docs)]));
        let text: String = found.iter().map(|v| format!("{v}\n")).collect();
        for part in ["`## Matmul`", "`- Backward:`", "`## Gone`", "`matmul`", "`neg`"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(found.len(), 5, "{text}");
    }

    #[test]
    fn missing_files_are_found() {
        assert_eq!(ops_described(&fixture(&[(ENUM, SOURCE)])).len(), 1);
        assert_eq!(invariants_tested(&fixture(&[])).len(), 1);
    }

    fn with_docs(docs: &str) -> Vec<Violation> {
        invariants_tested(&fixture(&[
            ("crates/graph/src/capture.rs", "#[cfg(test)]\nmod tests;\n"),
            ("crates/graph/src/capture/tests.rs", "#[test]\nfn merged() {}\nfn leaf() {}\n"),
            ("crates/graph/src/error.rs", "mod tests {\n    #[test]\n    fn named() {}\n}\n"),
            ("crates/graph/tests/deep.rs", "proptest! {\n    /// Docs.\n    #[test]\n    fn stays(x in 0..1) {}\n}\n"),
            ("crates/candle-lazy/src/error.rs", "mod tests { #[test] fn chained() {} }\n"),
            (ARCHITECTURE, docs),
        ]))
    }

    #[test]
    fn tests_that_exist_pass() {
        let docs = "# A\n- not an invariant\n## Invariants\n- a\n  (tested by: `candle_lazy_graph::capture::tests::merged`,\n  `candle_lazy_graph::error::tests::named`)\n\
            - b, tested by: `candle_lazy_graph::deep::stays`\n- c, tested by: `candle_lazy::error::tests::chained`\n";
        assert_eq!(with_docs(docs), []);
    }

    #[test]
    fn invariants_without_a_test_are_found() {
        let docs = "## Invariants\n- a\n- b, tested by: nothing\n- c, tested by: `candle_lazy_graph::capture::tests::gone`\n\
            - d, tested by: `candle_lazy_graph::error::named`\n- e, tested by: `candle_lazy_graph::capture::tests::leaf`\n";
        let found = with_docs(docs);
        assert_eq!(found.len(), 5, "{found:?}");
    }

    #[test]
    fn readmes_that_differ_are_found() {
        let readme = "# A\n```rust\nlet x;\n```\n```text\n1\n```\n";
        let of =
            |other: &str| readmes_agree(&fixture(&[("README.md", readme), ("crates/candle-lazy/README.md", other)]));
        assert_eq!(of(readme), []);
        assert_eq!(of(&readme.replace('1', "2")).len(), 1);
        assert_eq!(of("# A\n").len(), 2);
        assert_eq!(readmes_agree(&fixture(&[])).len(), 1);
    }

    #[test]
    fn a_document_without_invariants_is_found() {
        assert_eq!(with_docs("# A\n").len(), 1);
    }
}
