//! The change that ports a source: its `use` lines, and a check that nothing else changed.

/// A line that differs between an original and its port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its number in the original; for an added line, of the line that it stands before.
    pub line: usize,
    /// The original line; absent for an added one.
    pub before: Option<String>,
    /// The ported line.
    pub after: String,
}

/// Why a text is not a port of another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A line that is no `use` line differs, or is gone.
    #[error("line {line} differs and is no `use` line: {before:?} became {after:?}")]
    NotAUseLine {
        /// Its number in the original.
        line: usize,
        /// The original line.
        before: String,
        /// What stands there.
        after: String,
    },
    /// More lines were added than the one that is allowed.
    #[error("{0} lines were added; one is allowed")]
    Added(usize),
}

/// Candle's crates under the names that sources use, and where their lazy twins are.
const CRATES: &[(&str, &str)] = &[("candle", "candle"), ("candle_core", "candle"), ("candle_nn", "candle_nn")];

/// The source with its `use` lines changed: Candle's crates are taken from `candle_lazy`. Where a path in the code begins
/// with one of them, one line brings that name in.
#[must_use]
pub fn port(source: &str) -> String {
    let lines: Vec<&str> = source.split_inclusive('\n').collect();
    let in_code = |name: &str| lines.iter().any(|line| !is_use(line) && has_path(line, name));
    let names: Vec<String> = CRATES
        .iter()
        .filter(|(name, _)| in_code(name))
        .map(|(name, twin)| if name == twin { (*name).to_string() } else { format!("{twin} as {name}") })
        .collect();
    let added = match names.as_slice() {
        [] => None,
        [one] => Some(format!("use candle_lazy::{one};\n")),
        several => Some(format!("use candle_lazy::{{{}}};\n", several.join(", "))),
    };
    let mut at = lines.iter().position(|line| line.starts_with("use ")).unwrap_or(0);
    // what belongs to the first line stays with it
    while at > 0 && (lines[at - 1].starts_with("#[") || lines[at - 1].starts_with("///")) {
        at -= 1;
    }
    let mut ported = String::with_capacity(source.len() + 100);
    for (index, line) in lines.iter().enumerate() {
        if index == at {
            ported.extend(added.as_deref());
        }
        ported.push_str(&ported_line(line));
    }
    ported
}

/// A `use` line with Candle's crate replaced; any other line as it is.
fn ported_line(line: &str) -> String {
    let Some(path) = use_path(line) else {
        return line.to_string();
    };
    let begin = line.len() - path.len();
    for (name, twin) in CRATES {
        if let Some(rest) = path.strip_prefix(name).filter(|rest| rest.starts_with("::")) {
            return format!("{}candle_lazy::{twin}{rest}", &line[..begin]);
        }
    }
    line.to_string()
}

/// What stands behind `use ` and before it only a visibility.
fn use_path(line: &str) -> Option<&str> {
    let text = line.trim_start();
    let text = match text.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => rest.split_once(')')?.1.trim_start(),
        Some(rest) => rest.trim_start(),
        None => text,
    };
    text.strip_prefix("use ").map(str::trim_start)
}

fn is_use(line: &str) -> bool {
    use_path(line).is_some()
}

/// Whether a path that begins with `name` stands in the line.
fn has_path(line: &str, name: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let inside = before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
        !inside && code[at + name.len()..].starts_with("::")
    })
}

/// Whether the line after `line` is what became of `before`, so that `line` itself was added: it is the same, or it ends as
/// `before` does and `line` does not.
fn stands_for(next: Option<&str>, line: &str, before: &str) -> bool {
    let items = before.split_once("::").map_or(before, |(_, items)| items);
    next.is_some_and(|next| {
        next == before || (is_use(before) && is_use(next) && next.ends_with(items) && !line.ends_with(items))
    })
}

/// The lines that differ, if only `use` lines do and at most one was added.
///
/// This looks at the two texts alone: it does not know how the second was made.
///
/// # Errors
/// Naming the first line that differs otherwise.
pub fn changes(original: &str, ported: &str) -> Result<Vec<Change>, Error> {
    let old: Vec<&str> = original.lines().collect();
    let new: Vec<&str> = ported.lines().collect();
    let mut found = Vec::new();
    let (mut at, mut added) = (0, 0);
    for (index, line) in new.iter().enumerate() {
        let before = old.get(at).copied();
        if before == Some(*line) {
            at += 1;
            continue;
        }
        let inserted =
            is_use(line) && before.is_some_and(|before| stands_for(new.get(index + 1).copied(), line, before));
        match before {
            _ if inserted => {
                added += 1;
                found.push(Change { line: at + 1, before: None, after: (*line).to_string() });
            }
            Some(before) if is_use(before) && is_use(line) => {
                at += 1;
                found.push(Change { line: at, before: Some(before.to_string()), after: (*line).to_string() });
            }
            _ => {
                let before = before.unwrap_or_default().to_string();
                return Err(Error::NotAUseLine { line: at + 1, before, after: (*line).to_string() });
            }
        }
    }
    if let Some(before) = old.get(at) {
        return Err(Error::NotAUseLine { line: at + 1, before: (*before).to_string(), after: String::new() });
    }
    if added > 1 {
        return Err(Error::Added(added));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "//! A model.\n\n#[rustfmt::skip]\nuse super::shared::Layer;\nuse candle::{Result, Tensor};\n\
        pub(crate) use candle_nn::ops;\nuse std::fmt;\n\n/// candle::Tensor in words\nfn f(x: &Tensor) -> candle::Result<Tensor> \
        {\n    use candle_core::D;\n    candle_nn::ops::silu(x) // candle_core::x\n}\nstruct S { candle: u8 }\n";

    #[test]
    fn use_lines_change_and_nothing_else() {
        let want = SOURCE
            .replace("#[rustfmt::skip]", "use candle_lazy::{candle, candle_nn};\n#[rustfmt::skip]")
            .replace("use candle::{", "use candle_lazy::candle::{")
            .replace("use candle_nn::ops", "use candle_lazy::candle_nn::ops")
            .replace("use candle_core::D", "use candle_lazy::candle::D");
        let ported = port(SOURCE);
        assert_eq!(ported, want);
        let changes = changes(SOURCE, &ported).unwrap();
        let lines: Vec<(usize, bool)> = changes.iter().map(|c| (c.line, c.before.is_none())).collect();
        assert_eq!(lines, [(3, true), (5, false), (6, false), (11, false)]);
    }

    #[test]
    fn a_source_without_paths_in_its_code_gets_no_line() {
        let source = "use candle_core::{Result, Tensor};\nfn f(x: &Tensor) -> Result<Tensor> { x.exp() }\n";
        assert_eq!(port(source), source.replace("candle_core", "candle_lazy::candle"));
        let source = "fn f() -> candle_core::Result<()> { candle_core::bail!(\"x\") }\n";
        assert_eq!(port(source), format!("use candle_lazy::candle as candle_core;\n{source}"));
        let source = "use candle::Tensor;\n\nfn f() -> candle::Result<()> { todo() }\n";
        let changes = changes(source, &port(source)).unwrap();
        let befores: Vec<Option<&str>> = changes.iter().map(|change| change.before.as_deref()).collect();
        assert_eq!(befores, [None, Some("use candle::Tensor;")]);
        assert_eq!(port("fn f() {}\n"), "fn f() {}\n");
        assert_eq!(
            port("use my_candle::x;\nuse candle_nn_extra::y;\n"),
            "use my_candle::x;\nuse candle_nn_extra::y;\n"
        );
    }

    #[test]
    fn any_other_change_is_found() {
        let ported = port(SOURCE);
        for (from, to, line) in
            [("silu", "gelu", 12), ("struct S { candle: u8 }\n", "", 14), ("u8 }\n", "u8 }\nmore\n", 15)]
        {
            match changes(SOURCE, &ported.replace(from, to)) {
                Err(Error::NotAUseLine { line: found, .. }) => assert_eq!(found, line, "{from}"),
                other => panic!("{from}: {other:?}"),
            }
        }
        let twice = ported.replace("use std::fmt;", "use std::io;\nuse std::fmt;");
        assert_eq!(changes(SOURCE, &twice), Err(Error::Added(2)));
        assert_eq!(changes(SOURCE, SOURCE), Ok(Vec::new()));
    }
}
