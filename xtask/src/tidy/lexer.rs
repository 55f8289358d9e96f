//! Just enough of Rust's lexical grammar to look at code without its comments and literals.
//!
//! A full parser would be a heavy dependency for questions as small as "is there an `unwrap` outside of tests".

/// The text with every comment and every literal's content replaced by spaces: same length, same lines, quotes kept.
pub(super) fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = if rest.starts_with(b"//") {
            at + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            at + block_comment(rest)
        } else if let Some((open, len)) = string(rest, at.checked_sub(1).map(|before| bytes[before])) {
            blank(&mut out[at + open..at + len.saturating_sub(1)]);
            at += len;
            continue;
        } else if let Some(len) = char_literal(rest) {
            blank(&mut out[at + 1..at + len - 1]);
            at += len;
            continue;
        } else {
            at += 1;
            continue;
        };
        blank(&mut out[at..end]);
        at = end;
    }
    // Only whole literals and comments were blanked, byte by byte, so what is left is the same UTF-8 or spaces.
    String::from_utf8_lossy(&out).into_owned()
}

fn blank(bytes: &mut [u8]) {
    for byte in bytes {
        if *byte != b'\n' {
            *byte = b' ';
        }
    }
}

/// The length of a block comment; they nest.
fn block_comment(bytes: &[u8]) -> usize {
    let (mut at, mut depth) = (0, 0usize);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// The offset of the content and the whole length of a string literal that begins here: plain, byte, C or raw.
fn string(bytes: &[u8], before: Option<u8>) -> Option<(usize, usize)> {
    let in_word = before.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    let mut at = 0;
    if !in_word {
        while at < 2 && matches!(bytes.get(at), Some(b'b' | b'c' | b'r')) {
            at += 1;
        }
    }
    let raw = at > 0 && bytes[at - 1] == b'r';
    let mut hashes = 0;
    while raw && bytes.get(at + hashes) == Some(&b'#') {
        hashes += 1;
    }
    let open = at + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let mut at = open + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if !raw => at += 2,
            b'"' => {
                let closing = &bytes[at + 1..];
                if closing.len() >= hashes && closing[..hashes].iter().all(|&b| b == b'#') {
                    return Some((open + 1, at + 1 + hashes));
                }
                at += 1;
            }
            _ => at += 1,
        }
    }
    Some((open + 1, bytes.len()))
}

/// The length of a character literal that begins here; a lifetime is none.
fn char_literal(bytes: &[u8]) -> Option<usize> {
    if bytes.first() != Some(&b'\'') {
        return None;
    }
    if bytes.get(1) == Some(&b'\\') {
        let close = bytes.get(3..)?.iter().take(12).position(|&b| b == b'\'')?;
        return Some(close + 4);
    }
    let text = std::str::from_utf8(bytes.get(1..bytes.len().min(6))?);
    let first = match text {
        Ok(text) => text.chars().next(),
        // the window cut a later character in two; what is before the cut is whole
        Err(e) => std::str::from_utf8(&bytes[1..1 + e.valid_up_to()]).ok().and_then(|t| t.chars().next()),
    }?;
    let close = 1 + first.len_utf8();
    (bytes.get(close) == Some(&b'\'')).then_some(close + 1)
}

/// A word of code with its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Word<'a> {
    pub(super) text: &'a str,
    pub(super) start: usize,
}

impl Word<'_> {
    /// The offset behind the word.
    pub(super) fn end(&self) -> usize {
        self.start + self.text.len()
    }
}

/// The identifiers and keywords of code without comments and literals.
pub(super) fn words(code: &str) -> Vec<Word<'_>> {
    let mut found = Vec::new();
    let mut start = None;
    for (at, c) in code.char_indices().chain(std::iter::once((code.len(), ' '))) {
        let part = c == '_' || c.is_alphanumeric();
        match (start, part) {
            (None, true) => start = Some(at),
            (Some(from), false) => {
                found.push(Word { text: &code[from..at], start: from });
                start = None;
            }
            _ => {}
        }
    }
    found
}

/// The line of an offset, counted from 1.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count()
}

/// The attributes of the code: where each begins, where it ends, and its text without spaces.
fn attributes(code: &str) -> Vec<(usize, usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices('#') {
        let rest = &code[at + 1..];
        let skip = rest.len() - rest.trim_start_matches(['!', ' ']).len();
        if !rest[skip..].starts_with('[') {
            continue;
        }
        let open = at + 1 + skip;
        if let Some(close) = matching(code, open, '[', ']') {
            found.push((at, close, code[open..close].split_whitespace().collect()));
        }
    }
    found
}

/// The offset behind the bracket that closes the one at `open`.
pub(super) fn matching(code: &str, open: usize, left: char, right: char) -> Option<usize> {
    let mut depth = 0usize;
    for (at, c) in code[open..].char_indices() {
        if c == left {
            depth += 1;
        } else if c == right {
            depth = depth.checked_sub(1)?;
            if depth == 0 {
                return Some(open + at + c.len_utf8());
            }
        }
    }
    None
}

/// Parts of a file that exist in tests only.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct TestParts {
    /// Ranges of offsets.
    pub(super) inside: Vec<std::ops::Range<usize>>,
    /// Modules declared here for tests only, whose text is another file.
    pub(super) modules: Vec<String>,
}

impl TestParts {
    pub(super) fn contains(&self, offset: usize) -> bool {
        self.inside.iter().any(|range| range.contains(&offset))
    }
}

/// Items behind `#[cfg(test)]`, `#[cfg(all(test, …))]` or `#[test]`.
pub(super) fn test_parts(code: &str) -> TestParts {
    let mut parts = TestParts::default();
    let attributes = attributes(code);
    for (start, end, text) in &attributes {
        if !(text.starts_with("[cfg(test)") || text.starts_with("[cfg(all(test,") || text == "[test]") {
            continue;
        }
        let mut item = *end;
        while let Some((_, next, _)) =
            attributes.iter().find(|(at, _, _)| *at >= item && code[item..*at].trim().is_empty())
        {
            item = *next;
        }
        let Some(stop) = code[item..].find(['{', ';']) else {
            continue;
        };
        let stop = item + stop;
        if code[stop..].starts_with('{') {
            let close = matching(code, stop, '{', '}').unwrap_or(code.len());
            parts.inside.push(*start..close);
        } else {
            parts.inside.push(*start..stop + 1);
            if let Some(name) = code[item..stop].trim().rsplit(' ').next() {
                if code[item..stop].split_whitespace().any(|word| word == "mod") {
                    parts.modules.push(name.to_string());
                }
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        let text =
            "let a = \"unwrap()\"; // panic!\n/* a /* b */ unsafe */ let c = 'x'; let d: &'static str = r#\"todo!\"#;";
        let code = code_only(text);
        assert_eq!(code.len(), text.len());
        assert_eq!(code.lines().count(), 2);
        for gone in ["unwrap", "panic", "unsafe", "todo", "'x'"] {
            assert!(!code.contains(gone), "{code}");
        }
        for kept in ["let a", "let c", "&'static str", "let d"] {
            assert!(code.contains(kept), "{code}");
        }
    }

    #[test]
    fn escapes_do_not_end_a_literal() {
        let code = code_only(r#"f("a\"b", '\'', b"c\\", '\u{41}', 'é'); unwrap"#);
        assert!(code.ends_with("; unwrap"), "{code}");
        assert!(!code.contains('b') || !code.contains("41"), "{code}");
    }

    #[test]
    fn words_have_places() {
        let found = words("fn a_b(x1)");
        let texts: Vec<&str> = found.iter().map(|w| w.text).collect();
        assert_eq!(texts, ["fn", "a_b", "x1"]);
        assert_eq!(found[1].start, 3);
        assert_eq!(found[1].end(), 6);
    }

    #[test]
    fn test_items_are_found() {
        let code = "fn a() {}\n#[cfg(test)]\n#[allow(x)]\nmod tests { fn b() { {} } }\nfn c() {}\n#[test]\nfn d() {}\n#[cfg(test)]\nmod far;\n";
        let parts = test_parts(code);
        let inside = |what: &str| parts.contains(code.find(what).unwrap());
        assert!(!inside("fn a") && inside("fn b") && !inside("fn c") && inside("fn d"));
        assert_eq!(parts.modules, ["far"]);
    }

    #[test]
    fn code_for_tests_and_a_feature_is_not_test_code() {
        let code = "#[cfg(any(test, feature = \"testing\"))]\nfn a() {}\n";
        assert_eq!(test_parts(code), TestParts::default());
    }

    #[test]
    fn lines_count_from_one() {
        assert_eq!(line_of("a\nb\nc", 0), 1);
        assert_eq!(line_of("a\nb\nc", 4), 3);
    }
}
