//! The files that the checks look at.

use super::lexer::{code_only, test_parts, TestParts};
use super::Error;
use std::collections::BTreeSet;
use std::path::Path;

/// A file of the repository.
#[derive(Debug)]
pub(super) struct File {
    /// The path below the root, with `/`.
    pub(super) path: String,
    /// The content.
    pub(super) text: String,
    /// For Rust files: the content without comments and literals, and the parts that only tests see.
    pub(super) rust: Option<Rust>,
}

/// What is known about a Rust file.
#[derive(Debug)]
pub(super) struct Rust {
    pub(super) code: String,
    pub(super) tests: TestParts,
}

/// All text files below a root.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) files: Vec<File>,
    test_files: BTreeSet<String>,
}

/// Folders that are made, not written.
const SKIPPED: &[&str] = &["target", ".git", "models"];

impl Tree {
    /// Reads every text file below `root`, except in folders that are made and not written.
    pub(super) fn read(root: &Path) -> Result<Self, Error> {
        let mut files = Vec::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))?;
            for entry in entries {
                let path = entry.map_err(|e| Error::io(&folder, e))?.path();
                let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                // `shared` is no part of the repository: a session's own notes, where it exists.
                if SKIPPED.contains(&name.as_str()) || name.ends_with(".swp") {
                    continue;
                }
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
                // a binary file has nothing that these checks could read
                if let Ok(text) = String::from_utf8(bytes) {
                    let relative = path.strip_prefix(root).unwrap_or(&path);
                    let parts: Vec<String> =
                        relative.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
                    files.push((parts.join("/"), text));
                }
            }
        }
        Ok(Self::new(files))
    }

    /// A tree of the given paths and contents.
    pub(super) fn new(mut files: Vec<(String, String)>) -> Self {
        files.sort();
        let files: Vec<File> = files
            .into_iter()
            .map(|(path, text)| {
                let rust = path.ends_with(".rs").then(|| {
                    let code = code_only(&text);
                    let tests = test_parts(&code);
                    Rust { code, tests }
                });
                File { path, text, rust }
            })
            .collect();
        let mut test_files = BTreeSet::new();
        for file in &files {
            let Some(rust) = &file.rust else { continue };
            for module in &rust.tests.modules {
                let folder = module_folder(&file.path);
                test_files.insert(format!("{folder}/{module}.rs"));
                test_files.insert(format!("{folder}/{module}/mod.rs"));
            }
        }
        Self { files, test_files }
    }

    /// The Rust files.
    pub(super) fn rust(&self) -> impl Iterator<Item = (&File, &Rust)> {
        self.files.iter().filter_map(|file| file.rust.as_ref().map(|rust| (file, rust)))
    }

    /// The file at a path.
    pub(super) fn get(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Whether a whole file exists for tests, benches or examples only.
    pub(super) fn is_test_file(&self, path: &str) -> bool {
        let for_tests = ["/tests/", "/benches/", "/examples/"].iter().any(|part| path.contains(part));
        // what a test module declares lies below that module's folder
        let below = self.test_files.iter().any(|file| {
            file.strip_suffix(".rs")
                .is_some_and(|stem| path.starts_with(&format!("{}/", stem.trim_end_matches("/mod"))))
        });
        for_tests || below || self.test_files.contains(path)
    }
}

/// The folder in which the modules that a file declares lie.
fn module_folder(path: &str) -> String {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    match name {
        "lib.rs" | "main.rs" | "mod.rs" => folder.to_string(),
        other => format!("{folder}/{}", other.trim_end_matches(".rs")),
    }
}

/// The module path of a source file inside its crate: `crates/a/src/b/c.rs` is `b::c`, `crates/a/tests/d.rs` is `d`.
pub(super) fn module_path(path: &str) -> Option<String> {
    let inside = path.split_once("/src/").or_else(|| path.split_once("/tests/"))?.1;
    let stem = inside.strip_suffix(".rs")?;
    let stem = match stem {
        "lib" | "main" | "mod" => "",
        other => other.strip_suffix("/mod").unwrap_or(other),
    };
    Some(stem.replace('/', "::"))
}

/// A tree for a test.
#[cfg(test)]
pub(super) fn fixture(files: &[(&str, &str)]) -> Tree {
    Tree::new(files.iter().map(|(path, text)| ((*path).to_string(), (*text).to_string())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_for_tests_are_whole_test_files() {
        let tree = fixture(&[
            ("crates/a/src/lib.rs", "mod b;\n"),
            ("crates/a/src/b.rs", "#[cfg(test)]\nmod tests;\n"),
            ("crates/a/src/b/tests.rs", "mod deep;"),
            ("crates/a/src/b/tests/deep.rs", ""),
            ("crates/a/src/tests.rs", ""),
        ]);
        assert!(tree.is_test_file("crates/a/src/b/tests.rs"));
        assert!(tree.is_test_file("crates/a/src/b/tests/deep.rs"));
        assert!(tree.is_test_file("crates/a/tests/x.rs"));
        assert!(!tree.is_test_file("crates/a/src/b.rs"));
        assert!(!tree.is_test_file("crates/a/src/tests.rs"), "declared by nobody");
    }

    #[test]
    fn module_paths() {
        assert_eq!(module_path("crates/a/src/lib.rs").as_deref(), Some(""));
        assert_eq!(module_path("crates/a/src/b/mod.rs").as_deref(), Some("b"));
        assert_eq!(module_path("crates/a/src/b/c.rs").as_deref(), Some("b::c"));
        assert_eq!(module_path("crates/a/tests/d.rs").as_deref(), Some("d"));
        assert_eq!(module_path("README.md"), None);
    }
}
