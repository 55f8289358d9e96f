//! Which crate may depend on which: data, compared with what cargo says.
//!
//! A new edge is a change to this file, to be looked at as one. Edges point down only; `ops` and `graph` never see each
//! other, because `exec` is the one place where a recorded op meets a kernel.

use super::Violation;
use serde_json::Value;

/// What one crate of the workspace may depend on.
struct Allowed {
    package: &'static str,
    /// Crates of this workspace.
    own: &'static [&'static str],
    /// Crates of the Candle family.
    candle: &'static [&'static str],
    /// Further crates of either kind that tests and examples may use.
    dev: &'static [&'static str],
}

const ALLOWED: &[Allowed] = &[
    Allowed { package: "candle-lazy-ops", own: &[], candle: &["candle-core", "candle-nn"], dev: &[] },
    Allowed { package: "candle-lazy-graph", own: &[], candle: &["candle-core"], dev: &[] },
    Allowed {
        package: "candle-lazy-exec",
        own: &["candle-lazy-graph", "candle-lazy-ops"],
        candle: &["candle-core"],
        dev: &["candle-nn"],
    },
    Allowed {
        package: "candle-lazy-nn",
        own: &["candle-lazy-exec", "candle-lazy-graph", "candle-lazy-ops"],
        candle: &["candle-core", "candle-nn"],
        dev: &["candle-transformers"],
    },
    Allowed {
        package: "candle-lazy-compat",
        own: &["candle-lazy-ops", "candle-lazy-graph", "candle-lazy-exec", "candle-lazy-nn"],
        candle: &["candle-core", "candle-nn"],
        dev: &["candle-transformers"],
    },
    Allowed {
        package: "candle-lazy",
        own: &["candle-lazy-ops", "candle-lazy-graph", "candle-lazy-exec", "candle-lazy-nn", "candle-lazy-compat"],
        candle: &["candle-core"],
        dev: &["candle-nn"],
    },
    Allowed {
        package: "candle-lazy-parity",
        own: &[
            "candle-lazy-ops",
            "candle-lazy-graph",
            "candle-lazy-exec",
            "candle-lazy-nn",
            "candle-lazy-compat",
            "candle-lazy",
        ],
        candle: &["candle-core", "candle-nn", "candle-transformers"],
        dev: &[],
    },
    Allowed {
        package: "xtask",
        own: &["candle-lazy-parity", "candle-lazy"],
        candle: &["candle-core", "candle-nn"],
        // the migration guide's blocks are tests of xtask
        dev: &["candle-lazy-compat"],
    },
];

const CHECK: &str = "crate edges";

/// Compares the dependencies in cargo's description of the workspace with what is allowed.
pub(super) fn crate_edges(metadata: &Value) -> Vec<Violation> {
    let mut found = Vec::new();
    let empty = Vec::new();
    let packages = metadata.get("packages").and_then(Value::as_array).unwrap_or(&empty);
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let names: Vec<String> = packages.iter().map(|package| text(package, "name")).collect();
    if names.is_empty() {
        found.push(Violation::new(CHECK, "cargo metadata", "names no package"));
    }
    for allowed in ALLOWED {
        if !names.iter().any(|name| name == allowed.package) {
            found.push(Violation::new(CHECK, allowed.package, "is in the list of edges, but not in the workspace"));
        }
    }
    for (package, name) in packages.iter().zip(&names) {
        let Some(allowed) = ALLOWED.iter().find(|allowed| allowed.package == name) else {
            found.push(Violation::new(CHECK, name, "is in the workspace, but not in the list of edges"));
            continue;
        };
        for dependency in package.get("dependencies").and_then(Value::as_array).unwrap_or(&empty) {
            let (to, kind) = (text(dependency, "name"), text(dependency, "kind"));
            let list = if names.contains(&to) {
                allowed.own
            } else if to.starts_with("candle-") {
                allowed.candle
            } else {
                continue;
            };
            let dev = kind == "dev" && allowed.dev.contains(&to.as_str());
            if !list.contains(&to.as_str()) && !dev {
                let kind = if kind.is_empty() { "a dependency" } else { kind.as_str() };
                found.push(Violation::new(CHECK, name, format_args!("may not depend on {to} ({kind})")));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn workspace(change: impl Fn(&str) -> Vec<Value>) -> Value {
        let packages: Vec<Value> = ALLOWED
            .iter()
            .map(|allowed| json!({"name": allowed.package, "dependencies": change(allowed.package)}))
            .collect();
        json!({ "packages": packages })
    }

    #[test]
    fn the_allowed_edges_have_no_cycle() {
        // in the order of the list, every crate depends on earlier ones only
        for (at, allowed) in ALLOWED.iter().enumerate() {
            for own in allowed.own {
                assert!(ALLOWED[..at].iter().any(|a| a.package == *own), "{} -> {own}", allowed.package);
            }
        }
    }

    #[test]
    fn allowed_edges_pass() {
        let metadata = workspace(|name| match name {
            "candle-lazy-exec" => vec![json!({"name": "candle-lazy-graph", "kind": null}), json!({"name": "half"})],
            "candle-lazy-nn" => vec![json!({"name": "candle-transformers", "kind": "dev"})],
            _ => Vec::new(),
        });
        assert_eq!(crate_edges(&metadata), []);
    }

    #[test]
    fn a_new_edge_is_found() {
        let metadata = workspace(|name| match name {
            "candle-lazy-graph" => vec![json!({"name": "candle-lazy-ops", "kind": null})],
            "candle-lazy-nn" => vec![json!({"name": "candle-transformers", "kind": null})],
            _ => Vec::new(),
        });
        let found = crate_edges(&metadata);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].message.contains("candle-lazy-ops"));
        assert!(found[1].message.contains("candle-transformers"));
    }

    #[test]
    fn a_crate_without_an_entry_and_an_entry_without_a_crate_are_found() {
        let found = crate_edges(&json!({"packages": [{"name": "new", "dependencies": []}]}));
        assert!(found.iter().any(|v| v.place == "new"));
        assert_eq!(found.len(), ALLOWED.len() + 1);
    }
}
