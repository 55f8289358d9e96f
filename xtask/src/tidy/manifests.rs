//! What the manifests say: lints and versions come from the workspace, and the umbrella stays light.

use super::tree::Tree;
use super::Violation;
use std::collections::{BTreeMap, BTreeSet};

/// The manifests of the workspace's members. The standalone programs are workspaces of their own and show what a
/// user's manifest looks like.
fn members(tree: &Tree) -> impl Iterator<Item = (&str, &str)> {
    tree.files
        .iter()
        .filter(|file| file.path == "xtask/Cargo.toml" || is_crate_manifest(&file.path))
        .map(|file| (file.path.as_str(), file.text.as_str()))
}

fn is_crate_manifest(path: &str) -> bool {
    path.strip_prefix("crates/")
        .and_then(|rest| rest.strip_suffix("/Cargo.toml"))
        .is_some_and(|name| !name.contains('/'))
}

/// The tables of a manifest with their lines, comments and empty lines left out.
fn tables(text: &str) -> Vec<(String, Vec<(usize, &str)>)> {
    let mut tables: Vec<(String, Vec<(usize, &str)>)> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            tables.push((name.trim_matches(['[', ']']).to_string(), Vec::new()));
        } else if let Some((_, lines)) = tables.last_mut() {
            lines.push((at + 1, line));
        }
    }
    tables
}

/// Every member inherits the workspace's lints.
pub(super) fn lints_inherited(tree: &Tree) -> Vec<Violation> {
    let inherits = |text: &str| {
        tables(text).iter().any(|(name, lines)| {
            name == "lints" && lines.iter().any(|(_, line)| line.replace(' ', "") == "workspace=true")
        })
    };
    members(tree)
        .filter(|(_, text)| !inherits(text))
        .map(|(path, _)| Violation::new("lints", path, "does not inherit the workspace's lints"))
        .collect()
}

/// No member states a version: each stands once, in the workspace's manifest.
pub(super) fn versions_in_the_workspace(tree: &Tree) -> Vec<Violation> {
    const CHECK: &str = "versions";
    let mut found = Vec::new();
    for (path, text) in members(tree) {
        for (name, lines) in tables(text) {
            let list = ["dependencies", "dev-dependencies", "build-dependencies"];
            if list.iter().any(|kind| name == *kind || name.ends_with(&format!(".{kind}"))) {
                for (line, entry) in lines {
                    let entry = entry.replace(' ', "");
                    if !(entry.contains(".workspace=true") || entry.contains("workspace=true")) {
                        let message = "a dependency that is not the workspace's";
                        found.push(Violation::new(CHECK, format_args!("{path}:{line}"), message));
                    }
                }
            } else if list.iter().any(|kind| name.contains(&format!("{kind}."))) {
                if !lines.iter().any(|(_, line)| line.replace(' ', "") == "workspace=true") {
                    found.push(Violation::new(CHECK, path, format_args!("[{name}] is not the workspace's")));
                }
            } else if name == "package" {
                for (line, entry) in lines {
                    if entry.replace(' ', "").starts_with("version=") {
                        let message = "the package's version is not the workspace's";
                        found.push(Violation::new(CHECK, format_args!("{path}:{line}"), message));
                    }
                }
            }
        }
    }
    found
}

/// How many crates the umbrella may add to what candle-nn brings.
const MAX_ADDED: usize = 15;

/// The arguments that make cargo print what [`weight`] reads.
pub(super) const TREE_ARGS: &[&str] =
    &["tree", "--package", "candle-lazy", "--edges", "normal", "--prefix", "depth", "--format", " {p}"];

/// Counts the crates that the umbrella with its default features needs and candle-nn does not, in cargo's dependency
/// tree with the depth in front of each line.
pub(super) fn weight(output: &str) -> Vec<Violation> {
    const CHECK: &str = "weight";
    let mut needs: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut path: Vec<&str> = Vec::new();
    for line in output.lines() {
        let Some((depth, package)) = line.split_once(' ') else {
            continue;
        };
        let Ok(depth) = depth.parse::<usize>() else {
            continue;
        };
        let mut parts = package.split_whitespace();
        let (Some(_), Some(_)) = (parts.next(), parts.next()) else {
            continue;
        };
        // the name and the version; behind them stand folders and marks
        let end = package.find(" (").unwrap_or(package.len());
        let package = package[..end].trim();
        path.truncate(depth);
        if let Some(parent) = path.last() {
            needs.entry(parent).or_default().insert(package);
        }
        needs.entry(package).or_default();
        path.push(package);
    }
    let base: Vec<&str> = needs.keys().copied().filter(|name| name.starts_with("candle-nn ")).collect();
    if base.is_empty() {
        return vec![Violation::new(CHECK, "candle-lazy", "candle-nn is not in the umbrella's tree")];
    }
    let mut below: BTreeSet<&str> = BTreeSet::new();
    let mut open = base;
    while let Some(package) = open.pop() {
        if below.insert(package) {
            open.extend(needs.get(package).into_iter().flatten());
        }
    }
    let added: Vec<&str> = needs.keys().copied().filter(|package| !below.contains(package)).collect();
    if added.len() > MAX_ADDED {
        let message =
            format!("adds {} crates to candle-nn's tree, {MAX_ADDED} are allowed: {}", added.len(), added.join(", "));
        return vec![Violation::new(CHECK, "candle-lazy", message)];
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::super::tree::fixture;
    use super::*;

    #[test]
    fn lints_that_are_not_inherited_are_found() {
        let tree = fixture(&[
            ("crates/a/Cargo.toml", "[package]\nname = \"a\"\n[lints]\nworkspace = true\n"),
            ("crates/b/Cargo.toml", "[package]\nname = \"b\"\n# [lints]\n# workspace = true\n"),
            ("ci/standalone/x/Cargo.toml", "[package]\n"),
        ]);
        let found = lints_inherited(&tree);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].place, "crates/b/Cargo.toml");
    }

    #[test]
    fn versions_outside_of_the_workspace_are_found() {
        let tree = fixture(&[(
            "crates/a/Cargo.toml",
            "[package]\nversion = \"1\"\n[dependencies]\nhalf.workspace = true\nlibm = \"0.2\"\nzip = { workspace = true, optional = true }\n\
             [dev-dependencies.rand]\nversion = \"1\"\n[target.'cfg(unix)'.dependencies]\nlibc = { version = \"1\" }\n",
        )]);
        let places: Vec<String> = versions_in_the_workspace(&tree).into_iter().map(|v| v.place).collect();
        assert_eq!(
            places,
            ["crates/a/Cargo.toml:2", "crates/a/Cargo.toml:5", "crates/a/Cargo.toml", "crates/a/Cargo.toml:10"]
        );
    }

    #[test]
    fn what_is_added_is_counted() {
        let mut tree = String::from(
            "0 candle-lazy v0.1.0 (/x)\n1 candle-nn v0.11.1\n2 shared v1.0.0\n3 deep v1.0.0\n1 shared v1.0.0 (*)\n",
        );
        for n in 0..MAX_ADDED - 1 {
            tree.push_str(&format!("1 extra{n} v1.0.0\n"));
        }
        assert_eq!(weight(&tree), [], "the umbrella itself and 14 more");
        tree.push_str("1 one-more v1.0.0 (proc-macro)\n");
        let found = weight(&tree);
        assert_eq!(found.len(), 1);
        assert!(found[0].message.contains("adds 16 crates") && found[0].message.contains("one-more"), "{found:?}");
        assert!(!found[0].message.contains("deep"));
    }

    #[test]
    fn a_tree_that_cannot_be_read_is_found() {
        assert_eq!(weight("nothing here\n").len(), 1);
    }
}
