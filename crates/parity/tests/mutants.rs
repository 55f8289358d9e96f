//! The checker, checked by faults in the code: a handful of each kind here, all of them in `cargo xtask verify --mutants`.
//!
//! A binary of its own: a fault is active in the whole process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_lazy_parity::mutants::{mutants, run};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[test]
fn a_fault_of_each_kind_is_caught() {
    for name in [
        "row.Exp.tail",
        "row.Sum.last",
        "row.sum.f16",
        "row.buffer_freed_early",
        "matmul.last_term",
        "attention.causal",
        "bind.broadcast_stride",
        "slots.freed_early",
        "cache.stale_sizes",
        "pass.cse.scalars",
        "grad.softmax.sum",
        "grad.norm.no_weight",
        "vjp.softmax.sum",
        "vjp.matmul.transpose",
        "vjp.add.broadcast",
        "decompose.layer_norm.centre",
        "choose.falls_back",
    ] {
        let verdicts = run(Some(name), None, 1, |_| {}).unwrap();
        assert_eq!(verdicts.len(), 1, "{name}");
        assert!(verdicts[0].caught.is_some(), "{}", verdicts[0].line());
    }
}

#[test]
fn mutants_have_names_of_their_own_and_there_are_enough() {
    let all = mutants();
    let names: BTreeSet<&str> = all.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names.len(), all.len());
    assert!(all.len() >= 100, "{}", all.len());
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The names of the hooks in the sources of a crate: what stands in quotes behind `active(` or `one_if(`.
fn hooks(krate: &str) -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(krate).join("src"), &mut files);
    let mut found = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(file).unwrap();
        for call in ["active(\"", "one_if(\"", "(\"pass.", "(\"vjp."] {
            for (at, _) in text.match_indices(call) {
                let from = at + call.find('"').unwrap() + 1;
                found.insert(text[from..].split('"').next().unwrap().to_string());
            }
        }
    }
    found
}

#[test]
fn every_hook_has_a_mutant_and_every_mutant_a_hook() {
    let hooks: BTreeSet<String> = hooks("ops").union(&hooks("exec")).cloned().collect();
    let all = mutants();
    let names: BTreeSet<&str> = all.iter().map(|m| m.name.as_str()).collect();
    for hook in &hooks {
        assert!(names.contains(hook.as_str()), "the fault {hook} has no mutant");
    }
    // the names of these are made from the tables of ops
    let made = |name: &str| {
        name.starts_with("decompose.")
            || name.ends_with(".tail")
            || name.ends_with(".last")
            || name.starts_with("row.round.")
    };
    for name in names.into_iter().filter(|name| !made(name)) {
        assert!(hooks.contains(name), "the mutant {name} has no fault in the code");
    }
}
