//! Tests of checked mode, of the search for non-finite numbers, and of errors inside fused steps, with steps broken on purpose.
use super::hooks::{with_fault, Fault};
use super::*;
use candle_core::{DType, Device};
use candle_lazy_graph::module_scope;

const CPU: Device = Device::Cpu;

fn randn(dims: &[usize]) -> LazyTensor {
    LazyTensor::from(Tensor::randn(0f32, 1.0, dims, &CPU).unwrap())
}

fn here(line: u32) -> String {
    format!("checked_tests.rs:{line}:")
}

/// Two layers of everything, with the line of the second product.
fn network() -> (LazyTensor, u32) {
    let _scope = module_scope("model.layers.3");
    let x = randn(&[3, 8]);
    let h = x.matmul(&randn(&[8, 8])).unwrap().add(&randn(&[3, 8])).unwrap().gelu().unwrap();
    let h = h.rms_norm(Some(&randn(&[8])), 1e-5).unwrap().softmax(1).unwrap();
    let (y, line) = (h.linear(&randn(&[6, 8]), None).unwrap(), line!());
    (y.exp().unwrap().layer_norm(None, None, 1e-5).unwrap().sum_keepdim(1).unwrap(), line)
}

#[test]
fn what_is_right_passes_and_is_what_eval_gives() {
    for _ in 0..20 {
        let (y, _) = network();
        let checked = y.eval_checked().unwrap();
        assert!(y.is_ready());
        assert_eq!(checked.id(), y.eval().unwrap().id());
    }
    let q = |s: usize| randn(&[1, 2, s, 8]);
    for round in 0..100 {
        // masked scores are −∞: they say nothing about the others' roundings
        let options = crate::tensor::AttentionOptions::new(0.35 * f64::from(1 + round % 4)).causal(round % 2 == 0);
        LazyTensor::attention(&q(5), &q(9), &q(9), None, &options).unwrap().eval_checked().unwrap();
    }
    for dtype in [DType::F64, DType::F16, DType::BF16] {
        let x = randn(&[4, 33]).to_dtype(dtype).unwrap();
        let y = (x.silu().unwrap().softmax(1).unwrap() + x.tanh().unwrap()).unwrap();
        y.sum_keepdim(1).unwrap().eval_checked().unwrap();
    }
    let ids = LazyTensor::new(&[2u32, 0, 3], &CPU).unwrap();
    let picked = randn(&[4, 6]).embedding(&ids).unwrap().t().unwrap().narrow(0, 1, 3).unwrap();
    picked.affine(-1.0, 0.5).unwrap().max_keepdim(1).unwrap().eval_checked().unwrap();
}

#[test]
fn the_first_wrong_node_is_named_and_nothing_becomes_ready() {
    let (y, line) = network();
    let error = with_fault("linear", Fault::Scale(1.001), || y.eval_checked()).unwrap_err();
    let Error::Differs(found) = &error else {
        panic!("{error}");
    };
    assert_eq!((found.op.as_str(), found.dims.as_slice()), ("linear", &[3, 6][..]));
    assert_eq!((found.dtype, found.index.as_slice()), (DType::F32, &[2, 5][..]));
    assert!((found.planned / found.eager - 1.001).abs() < 1e-4, "{error}");
    let text = error.to_string();
    for part in [here(line).as_str(), "model.layers.3", "f32 [3, 8], f32 [6, 8]", "linear"] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    assert_eq!(error.site().map(|s| s.location().line()), Some(line));
    assert!(!y.is_ready());
    y.eval_checked().unwrap();
}

#[test]
fn an_exact_node_may_not_differ_in_one_bit() {
    let x = LazyTensor::new(&[[1f32, 2.], [3., 4.]], &CPU).unwrap();
    let line = line!() + 1;
    let sum = x.add(&x).unwrap();
    let y = sum.tanh().unwrap();
    let broken = || y.eval_checked();
    // one unit in the last place of 8
    let error = with_fault("add", Fault::Scale(1.0 + f32::EPSILON), broken).unwrap_err().to_string();
    for part in ["add", "[1, 1]", &here(line), "every bit"] {
        assert!(error.contains(part), "{error} lacks {part}");
    }
}

#[test]
fn the_first_of_several_wrong_nodes_is_the_one_recorded_first() {
    let x = randn(&[4, 4]);
    let line = line!() + 1;
    let first = x.softmax(1).unwrap();
    let second = first.matmul(&x).unwrap().softmax(1).unwrap();
    let error = with_fault("softmax", Fault::Scale(1.01), || second.eval_checked()).unwrap_err();
    assert_eq!(error.site().map(|s| s.location().line()), Some(line), "{error}");
}

#[test]
fn a_panic_inside_a_fused_step_names_every_member() {
    let x = randn(&[2, 5]);
    let line = line!() + 1;
    let a = x.exp().unwrap();
    let b = a.tanh().unwrap();
    let y = (b * 2.0).unwrap();
    drop(a);
    for _ in 0..2 {
        let error = with_fault("tanh", Fault::Panic, || y.eval()).unwrap_err();
        assert!(matches!(error, Error::Panic { .. }), "{error}");
        let text = error.to_string();
        let members = [
            format!("exp at {}", site_of(line)),
            format!("tanh at {}", site_of(line + 1)),
            format!("affine at {}", site_of(line + 2)),
        ];
        for part in members.iter().map(String::as_str).chain(["a fault in tanh", "f32 [2, 5]"]) {
            assert!(text.contains(part), "{text} lacks {part}");
        }
        assert!(!y.is_ready(), "everything stays pending");
    }
    assert_eq!(y.eval().unwrap().dims(), [2, 5]);
}

fn site_of(line: u32) -> String {
    format!("crates/exec/src/run/{}", here(line))
}

#[test]
fn a_composite_that_runs_in_parts_is_named_itself() {
    let table = randn(&[5, 3]);
    let ids = LazyTensor::new(&[1u32, 7], &CPU).unwrap();
    let line = line!() + 1;
    let rows = table.embedding(&ids).unwrap();
    let options = EvalOptions { decompose: true, ..EvalOptions::default() };
    let text = eval_all_with(&[&rows], &options).unwrap_err().to_string();
    for part in ["embedding(f32 [5, 3], u32 [2])", &here(line)] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
}

#[test]
fn the_first_number_that_is_none_is_found_with_its_line() {
    let _scope = module_scope("model.norm");
    let x = LazyTensor::new(&[[1f32, 0.], [4., 2.]], &CPU).unwrap();
    let line = line!() + 1;
    let log = x.log().unwrap();
    let y = (&log * 0.0).unwrap().sum_all().unwrap();
    let found = y.first_nonfinite().unwrap().unwrap();
    assert_eq!((found.op.as_deref(), found.index.as_slice()), (Some("log"), &[0, 1][..]));
    assert_eq!((found.value, found.count), (f64::NEG_INFINITY, 1));
    assert_eq!((found.site.location().line(), found.site.module()), (line, Some("model.norm")));
    let text = found.to_string();
    for part in ["log of (f32 [2, 2])", "[0, 1] is -inf", &here(line), "model.norm"] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    assert!(!y.is_ready() && !log.is_ready(), "looking changes nothing");
    assert!(randn(&[3]).tanh().unwrap().first_nonfinite().unwrap().is_none());
    // an infinity that is meant stands before the NaN that is not
    let mask = LazyTensor::causal_mask(3, 3, None, DType::F32, &Device::Cpu).unwrap();
    let (line, broken) = (line!(), mask.sub(&mask).unwrap());
    let y = broken.exp().unwrap();
    assert!(y.first_nonfinite().unwrap().unwrap().op.unwrap().starts_with("causal_mask"));
    let found = y.first_nan().unwrap().unwrap();
    assert!(found.op.as_deref() == Some("sub") && found.value.is_nan(), "{found}");
    assert_eq!((found.site.location().line(), found.count), (line, 3), "{found}");
    assert!(mask.exp().unwrap().first_nan().unwrap().is_none());
}

#[test]
fn a_leaf_that_holds_the_number_already_is_named_as_a_leaf() {
    let line = line!() + 1;
    let x = LazyTensor::new(&[1f64, f64::NAN], &CPU).unwrap();
    let ids = LazyTensor::new(&[0u32, 1], &CPU).unwrap();
    let y = x.index_select(&ids, 0).unwrap().exp().unwrap();
    let found = y.first_nonfinite().unwrap().unwrap();
    assert_eq!((found.op.clone(), found.index.as_slice()), (None, &[1][..]));
    assert!(found.value.is_nan() && found.to_string().contains(&here(line)), "{found}");
    // a value that was computed before is a leaf too, with the line that recorded it
    let line = line!() + 1;
    let log = LazyTensor::new(&[-1f32], &CPU).unwrap().log().unwrap();
    materialize(&[&log]).unwrap();
    let found = (&log + 1.0).unwrap().first_nonfinite().unwrap().unwrap();
    assert!(found.op.is_none() && found.site.location().line() == line, "{found}");
}
