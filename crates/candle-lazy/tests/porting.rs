//! The module of docs/porting.md, before and after: both are compiled, compared, and are what the page shows.

use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;

// public there, as a module of a crate would be
#[allow(unreachable_pub)]
#[path = "porting/after.rs"]
mod after;
#[allow(unreachable_pub)]
#[path = "porting/before.rs"]
mod before;

const BEFORE: &str = include_str!("porting/before.rs");
const AFTER: &str = include_str!("porting/after.rs");

fn tensor(dims: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::randn(0f32, 1., dims, &Device::Cpu)
}

#[test]
fn both_give_the_same() {
    use candle_core::Module as _;
    use candle_lazy::candle::Module as _;
    let weights: HashMap<String, Tensor> =
        [("norm.weight", vec![6]), ("gate.weight", vec![10, 6]), ("up.weight", vec![10, 6]), ("up.bias", vec![10])]
            .into_iter()
            .map(|(name, dims)| (name.to_string(), tensor(&dims).unwrap()))
            .collect();
    let eager = candle_nn::VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let before = before::Gate::new(6, 10, eager.clone()).unwrap();
    let after = after::Gate::new(6, 10, eager.into()).unwrap();
    let xs = tensor(&[2, 3, 6]).unwrap();
    let want = before.forward(&xs).unwrap().to_vec2::<f32>().unwrap();
    let (got, report) = after.forward(&xs.into()).unwrap().eval_with_report().unwrap();
    assert_eq!(report.fallback_count(), 0, "{report}");
    for (got, want) in got.to_vec2::<f32>().unwrap().iter().flatten().zip(want.iter().flatten()) {
        assert!((got - want).abs() <= 1e-6, "{got} instead of {want}");
    }
}

#[test]
fn an_error_names_the_line_of_the_ported_model() {
    use candle_lazy::candle::Module as _;
    let vb = candle_lazy::candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    let gate = after::Gate::new(6, 10, vb).unwrap();
    let error = gate.forward(&tensor(&[2, 3, 5]).unwrap().into()).unwrap_err();
    let line = 1 + AFTER.lines().position(|line| line.contains("xs.apply(&self.norm)")).unwrap();
    let site = error.site().unwrap().location();
    assert!(site.file().ends_with("porting/after.rs"), "{error}");
    assert_eq!(site.line() as usize, line, "{error}");
    assert!(candle_lazy::Error::from(error).is_shape());
}

/// The code without the docs and the use lines that begin it.
fn body(code: &str) -> &str {
    &code[code.find("/// A gated").unwrap_or(0)..]
}

#[test]
fn only_use_lines_differ_and_the_page_shows_them() {
    assert_eq!(body(BEFORE), body(AFTER));
    // the page is not in a published package
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/porting.md");
    let Ok(page) = std::fs::read_to_string(page) else { return };
    let block = |name: &str| {
        let begin = format!("```rust,{name}\n");
        let text = &page[page.find(&begin).unwrap() + begin.len()..];
        text[..text.find("```").unwrap()].to_string()
    };
    let uses =
        |code: &str| code.lines().filter(|line| line.starts_with("use ")).map(str::to_string).collect::<Vec<_>>();
    assert_eq!(body(&block("before")), body(BEFORE));
    assert_eq!(uses(&block("before")), uses(BEFORE));
    assert_eq!(uses(&block("after")), uses(AFTER));
}
