//! Every op has cases, in every dtype that it accepts.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::DType;
use candle_lazy_parity::case::{Case, Domain, InputSpec};
use candle_lazy_parity::cases::{cases, Extent, FLOATS, INTEGERS};
use candle_lazy_parity::modes::Mode;
use candle_lazy_parity::verify::{run, Options};
use std::collections::{BTreeMap, BTreeSet};

/// The names of ops in `docs/ops.md`, which `tidy` compares with the enum: that in a section's heading, else those in
/// quotes in the section's first paragraph.
fn names_in_docs() -> BTreeSet<String> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/ops.md");
    let text = std::fs::read_to_string(path).unwrap();
    let quoted = |text: &str| -> Vec<String> { text.split('`').skip(1).step_by(2).map(str::to_string).collect() };
    let mut names = BTreeSet::new();
    for section in text.split("\n## ").skip(1) {
        let (heading, rest) = section.split_once('\n').unwrap();
        let own = quoted(heading);
        let first = rest.trim_start().split("\n\n").next().unwrap();
        // a suffix is no name
        let named = if own.is_empty() { quoted(first) } else { own };
        names.extend(named.into_iter().filter(|name| !name.starts_with('_')));
    }
    names
}

#[test]
fn every_op_of_the_docs_has_cases() {
    let covered: BTreeSet<&str> = cases(Extent::Quick).iter().map(|c| c.op.name()).collect();
    let names = names_in_docs();
    // the sections are read as they are meant to be
    assert!(names.contains("softmax") && names.contains("gelu_erf") && names.contains("le"), "{names:?}");
    for name in &names {
        assert!(covered.contains(name.as_str()), "{name} has no case in parity/src/cases");
    }
}

/// The case with its first input's dtype, and what goes with it, replaced.
fn in_dtype(case: &Case, dtype: DType) -> Case {
    let from = case.inputs.first().map(|i| i.dtype);
    let swap = |i: &InputSpec| InputSpec { dtype: if Some(i.dtype) == from { dtype } else { i.dtype }, ..i.clone() };
    Case { inputs: case.inputs.iter().map(swap).collect(), ..case.clone() }
}

#[test]
fn every_op_has_cases_in_every_dtype_that_it_accepts() {
    let table = cases(Extent::Quick);
    let mut first: BTreeMap<String, &Case> = BTreeMap::new();
    let mut have: BTreeSet<(String, &str)> = BTreeSet::new();
    // an op's kind: its text without sizes, so that `eq` and `eq_scalar` are two
    let kind = |case: &Case| format!("{:?}", std::mem::discriminant(&case.op)) + case.op.name();
    for case in table.iter().filter(|c| !c.inputs.is_empty()) {
        first.entry(kind(case)).or_insert(case);
        have.insert((kind(case), case.inputs[0].dtype.as_str()));
    }
    for (kind, case) in &first {
        for dtype in FLOATS.into_iter().chain(INTEGERS) {
            let accepted = in_dtype(case, dtype).infer().is_ok();
            // a cast to its own dtype is nothing
            let nothing = case.op.name() == "to_dtype";
            if accepted && !nothing {
                assert!(
                    have.contains(&(kind.clone(), dtype.as_str())),
                    "{} takes {} and has no case in it",
                    case.op,
                    dtype.as_str()
                );
            }
        }
    }
    assert!(first.len() > 40, "{}", first.len());
}

#[test]
fn special_and_zero_sized_inputs_rank_zero_and_every_layout_are_among_the_cases() {
    let table = cases(Extent::Quick);
    let any = |what: fn(&InputSpec) -> bool| table.iter().flat_map(|c| &c.inputs).filter(|i| what(i)).count();
    assert!(any(|i| i.dims.is_empty()) > 100);
    assert!(any(|i| i.dims.contains(&0)) > 100);
    assert!(any(|i| i.domain == Domain::Special) > 100);
    for layout in candle_lazy_parity::case::Layout::ALL {
        assert!(table.iter().flat_map(|c| &c.inputs).any(|i| i.layout == layout), "{layout:?}");
    }
}

#[test]
fn every_mode_has_cells() {
    for mode in Mode::all() {
        let op = match mode {
            Mode::Ops | Mode::OpsTracked | Mode::Decomposed | Mode::Recorded | Mode::NnModule => "rms_norm",
            Mode::Compat => "v1",
            _ => "affine",
        };
        let op = if mode == Mode::RoundsOnce { "powf" } else { op };
        let mut options = Options::new(Extent::Smoke);
        (options.op, options.mode) = (Some(op.into()), Some(mode.name()));
        let summary = run(&options).unwrap();
        assert!(summary.cases() > 0, "{}", mode.name());
        assert_eq!(summary.failed(), 0, "{}", summary.text(5));
    }
}
