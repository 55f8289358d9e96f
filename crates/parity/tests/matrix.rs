//! A small part of the matrix: `cargo xtask verify` runs the rest.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_lazy_parity::cases::{cases, Extent};
use candle_lazy_parity::verify::{run, Options};

fn passes(op: &str, mode: Option<&str>) {
    let mut options = Options::new(Extent::Smoke);
    options.op = Some(op.to_string());
    options.mode = mode.map(str::to_string);
    let summary = run(&options).unwrap();
    assert!(summary.cases() > 0);
    assert_eq!(summary.failed(), 0, "{}", summary.text(20));
}

macro_rules! ops {
    ($($name:ident: $($op:literal),+;)*) => {
        $(
            #[test]
            fn $name() {
                for op in [$($op),+] {
                    passes(op, None);
                }
            }
        )*
        const COVERED: &[&str] = &[$($($op),+),*];
    };
}

ops! {
    unary_that_are_exact: "neg", "abs", "sqr", "sqrt", "relu", "floor", "ceil", "round", "sign", "recip", "rsqrt";
    unary_that_round: "exp", "log", "sin", "cos", "tanh", "erf", "gelu", "gelu_erf", "silu", "sigmoid", "powf", "affine";
    binary: "add", "sub", "mul", "div", "maximum", "minimum", "pow", "elu", "clamp";
    comparisons_and_choices: "eq", "ne", "lt", "le", "gt", "ge", "where_cond";
    casts: "to_dtype";
    sources: "full", "causal_mask", "arange", "rand", "randn";
    reductions: "sum", "mean", "max", "min", "var", "log_sum_exp", "argmax", "argmin";
    views: "reshape", "permute", "narrow", "broadcast_as", "contiguous", "detach", "stride", "to_device", "barrier", "checkpoint";
    movement: "cat", "index_select", "slice_assign", "embedding";
    placed: "gather", "scatter", "scatter_add", "index_add";
    groups_and_losses: "group_norm", "cross_entropy";
    products: "matmul", "linear", "lora", "lora_segments";
    rows: "softmax", "log_softmax", "rms_norm", "layer_norm", "glu";
    opaque: "custom_op1", "custom_op2", "custom_op3", "qmatmul";
    rope: "rope";
    attention: "attention", "attention_backward";
    blocks: "block", "method";
    calls_of_metal_candle: "v1";
    random_graphs: "random";
}

#[test]
fn every_op_of_the_table_is_covered_here() {
    for case in cases(Extent::Full) {
        assert!(COVERED.contains(&case.op.name()), "{}", case.op.name());
    }
}

#[test]
fn every_op_of_the_enum_is_in_the_table() {
    // one name per variant, and per function where the variant has one
    let table: std::collections::BTreeSet<&str> = cases(Extent::Smoke).iter().map(|c| c.op.name()).collect();
    for name in COVERED.iter().filter(|name| !["random", "block", "method", "v1"].contains(name)) {
        assert!(table.contains(name), "{name}");
    }
}

#[test]
fn filters_that_name_nothing_are_errors() {
    let mut options = Options::new(Extent::Smoke);
    options.op = Some("softmin".into());
    assert!(run(&options).is_err());
    options.op = None;
    options.mode = Some("sideways".into());
    assert!(run(&options).is_err());
    // names that exist, and no cell has together
    options.op = Some("add".into());
    options.mode = Some("decomposed".into());
    assert!(run(&options).unwrap_err().to_string().contains("no cell has op add and mode decomposed"));
}
