//! The checker, checked: what is wrong is caught.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_graph::Op;
use candle_lazy_parity::case::{Case, Domain, InputSpec, Layout};
use candle_lazy_parity::compare::same_bits;
use candle_lazy_parity::modes::{expected_kernels, gradients, judge_gradients, Fold, Mode, Outcome, Subject};
use candle_lazy_parity::value::{bits, ulp};

fn softmax(dtype: DType) -> Subject {
    let x = InputSpec::new(&[3, 17], dtype, Layout::Contiguous, Domain::Any);
    Subject::new(Case::new(Op::Softmax { dim: 1 }, &[], vec![x]), 1).unwrap()
}

fn with_element(t: &Tensor, at: usize, f: impl Fn(f64) -> f64) -> Tensor {
    let mut data = t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    data[at] = f(data[at]);
    Tensor::from_vec(data, t.dims(), &Device::Cpu).unwrap().to_dtype(t.dtype()).unwrap()
}

fn fails(subject: &Subject, got: &Tensor) -> bool {
    matches!(subject.verdict("mutant", got).unwrap().outcome, Outcome::Failed(_))
}

#[test]
fn the_right_result_passes() {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let subject = softmax(dtype);
        let eager = subject.eager.clone().unwrap();
        assert!(!fails(&subject, &eager), "{dtype:?}");
    }
}

#[test]
fn one_tail_element_off_by_a_thousandth_is_caught() {
    for dtype in [DType::F32, DType::F64] {
        let subject = softmax(dtype);
        let eager = subject.eager.clone().unwrap();
        // the largest element of the last row's tail, so that the error is seen at the row's scale
        for at in [16, 33, 50] {
            assert!(fails(&subject, &with_element(&eager, at, |x| x * 1.001 + 1e-4)), "{dtype:?} {at}");
        }
    }
}

#[test]
fn infinities_shapes_and_dtypes_that_are_wrong_are_caught() {
    let subject = softmax(DType::F32);
    let eager = subject.eager.clone().unwrap();
    assert!(fails(&subject, &with_element(&eager, 3, |_| f64::NAN)));
    assert!(fails(&subject, &with_element(&eager, 3, |_| f64::INFINITY)));
    assert!(fails(&subject, &eager.t().unwrap()));
}

#[test]
fn an_exact_op_that_is_off_by_one_bit_is_caught() {
    let x = InputSpec::new(&[4, 5], DType::F32, Layout::Contiguous, Domain::Any);
    let case = Case::new(Op::Contiguous, &[], vec![x]);
    let subject = Subject::new(case, 1).unwrap();
    let eager = subject.eager.clone().unwrap();
    assert!(!fails(&subject, &eager));
    assert!(fails(&subject, &with_element(&eager, 19, |v| f64::from(f32::from_bits((v as f32).to_bits() ^ 1)))));
}

#[test]
fn a_missing_gradient_is_caught() {
    let specs = ["x", "w", "b"].map(|n| {
        let dims: &[usize] = if n == "x" { &[2, 8] } else { &[8] };
        InputSpec::new(dims, DType::F32, Layout::Contiguous, Domain::Any)
    });
    let case = Case::new(Op::LayerNorm { weight: true, bias: true }, &[1e-5], specs.to_vec());
    let subject = Subject::new(case.clone(), 1).unwrap();
    let run = |x: &[Tensor]| candle_lazy_parity::eager::run(&case.op, &case.scalars, x).unwrap();
    let (vars, inputs) = case.tracked_inputs(1).unwrap();
    let right = gradients(&run(&inputs), &vars);
    assert_eq!(judge_gradients(&subject, right, Fold::Candle).unwrap().outcome, Outcome::Passed);
    // the weight cut from the tape: Candle's fused kernels do as much to every input
    let cut = [inputs[0].clone(), inputs[1].detach(), inputs[2].clone()];
    let missing = judge_gradients(&subject, gradients(&run(&cut), &vars), Fold::Candle).unwrap().outcome;
    assert!(matches!(&missing, Outcome::Failed(text) if text.contains("input 1 is missing")), "{missing:?}");
}

#[test]
fn a_gradient_that_lacks_a_term_is_caught() {
    let x = InputSpec::new(&[2, 8], DType::F32, Layout::Contiguous, Domain::Any);
    let case = Case::new(Op::Softmax { dim: 1 }, &[], vec![x]);
    let subject = Subject::new(case.clone(), 1).unwrap();
    let (vars, inputs) = case.tracked_inputs(1).unwrap();
    // the largest element and the sum held constant: right value, wrong gradient
    let e = inputs[0].exp().unwrap();
    let y = e.broadcast_div(&e.sum_keepdim(1).unwrap().detach()).unwrap();
    assert!(!fails(&subject, &y));
    let wrong = judge_gradients(&subject, gradients(&y, &vars), Fold::Candle).unwrap().outcome;
    assert!(matches!(wrong, Outcome::Failed(_)), "{wrong:?}");
}

#[test]
fn an_infinite_gradient_is_right_beyond_the_range_alone() {
    let x = InputSpec::new(&[2], DType::F16, Layout::Contiguous, Domain::Positive);
    let case = Case::new(Op::Affine, &[1e9, 0.0], vec![x]);
    let subject = Subject::new(case.clone(), 1).unwrap();
    let (vars, inputs) = case.tracked_inputs(1).unwrap();
    let y = candle_lazy_parity::eager::run(&case.op, &case.scalars, &inputs).unwrap();
    let right = gradients(&y, &vars).unwrap();
    // Candle's own, once as it is and once with its signs changed
    let judged =
        |g: candle_lazy_parity::modes::Gradients| judge_gradients(&subject, Ok(g), Fold::Exact).unwrap().outcome;
    let sign = |t: &Tensor| t.neg().unwrap();
    assert_eq!(judged(right.clone()), Outcome::Passed);
    assert!(matches!(judged(vec![right[0].as_ref().map(sign)]), Outcome::Failed(_)));
}

#[test]
fn the_leaf_of_a_broadcast_input_gets_the_exact_sum() {
    // 1030 gradients of one number in bf16: a sum in bf16 would stop growing at 256 times each
    let x = InputSpec::new(&[1030, 3], DType::BF16, Layout::Broadcast, Domain::Any);
    let case = Case::new(Op::Affine, &[1.0, 0.0], vec![x]);
    let cell = Subject::new(case, 1).unwrap().check(Mode::Grad).unwrap().unwrap();
    assert!(matches!(cell.outcome, Outcome::Passed), "{:?}", cell.outcome);
}

#[test]
fn bits_tell_zeros_apart_and_nans_not() {
    let t = |v: Vec<f32>| Tensor::new(v, &Device::Cpu).unwrap();
    assert!(same_bits("zeros", &t(vec![0.0]), &t(vec![-0.0])).unwrap().is_err());
    let odd_nan = f32::from_bits(f32::NAN.to_bits() | 7);
    assert!(same_bits("nans", &t(vec![f32::NAN]), &t(vec![odd_nan])).unwrap().is_ok());
    assert_eq!(bits(&t(vec![1.0])).unwrap(), [u64::from(1f32.to_bits())]);
}

#[test]
fn units_in_the_last_place_are_the_formats_own() {
    assert_eq!(ulp(DType::F32, 1.0), f64::from(f32::EPSILON));
    assert_eq!(ulp(DType::F64, 1.5), f64::EPSILON);
    assert_eq!(ulp(DType::F16, 1.0), 1.0 / 1024.0);
    assert_eq!(ulp(DType::BF16, 2.0), 1.0 / 64.0);
    // below the smallest normal number the spacing stays
    assert_eq!(ulp(DType::F16, 0.0), f64::from(half::f16::from_bits(1)));
    assert_eq!(ulp(DType::F32, 1e-44), f64::from(f32::from_bits(1)));
}

#[test]
fn layouts_are_what_they_say() {
    for layout in Layout::ALL {
        let spec = InputSpec::new(&[3, 4], DType::F32, layout, Domain::Any);
        let case = Case::new(Op::Contiguous, &[], vec![spec]);
        let x = &case.inputs(1).unwrap()[0];
        assert_eq!(x.dims(), [3, 4]);
        assert_eq!(x.is_contiguous(), layout == Layout::Contiguous, "{layout:?}");
        let offset = x.layout().start_offset();
        assert_eq!(offset > 0, matches!(layout, Layout::Narrowed | Layout::Stepped), "{layout:?}");
        assert_eq!(x.stride().contains(&0), layout == Layout::Broadcast);
        assert_eq!(x.stride().last() == Some(&2), layout == Layout::Stepped, "{layout:?}");
    }
}

#[test]
fn other_sizes_keep_the_pattern() {
    let spec = |dims: &[usize]| InputSpec::new(dims, DType::F32, Layout::Contiguous, Domain::Any);
    let case = Case::new(Op::Matmul, &[], vec![spec(&[1, 3, 4]), spec(&[4, 5])]);
    let other = case.at_other_sizes().unwrap();
    assert_eq!((&other.inputs[0].dims[..], &other.inputs[1].dims[..]), (&[1, 6, 8][..], &[8, 10][..]));
    let scalar = Case::new(Op::Contiguous, &[], vec![spec(&[1, 1])]);
    assert!(scalar.at_other_sizes().is_none());
}

#[test]
fn tracked_inputs_share_the_numbers_of_plain_ones() {
    let spec = InputSpec::new(&[3, 4], DType::F32, Layout::Transposed, Domain::Any);
    let case = Case::new(Op::Contiguous, &[], vec![spec]);
    let (vars, tracked): (Vec<Option<Var>>, _) = case.tracked_inputs(7).unwrap();
    assert!(vars[0].is_some() && tracked[0].track_op());
    assert!(same_bits("tracked", &tracked[0], &case.inputs(7).unwrap()[0]).unwrap().is_ok());
}

#[test]
fn a_silent_fallback_is_caught_unless_the_table_gives_its_reason() {
    let mut report = candle_lazy_exec::EvalReport::default();
    let case = |dtype| {
        let spec = InputSpec::new(&[3, 4], dtype, Layout::Contiguous, Domain::Any);
        Case::new(Op::Affine, &[2.0, 1.0], vec![spec])
    };
    assert_eq!(expected_kernels(&case(DType::F32), &report), None);
    report.fallbacks.insert("affine", 1);
    assert!(expected_kernels(&case(DType::F32), &report).is_some());
    assert_eq!(expected_kernels(&case(DType::I64), &report), None);
    let mut replayed = candle_lazy_exec::EvalReport::default();
    replayed.replayed.insert("affine", 1);
    assert!(expected_kernels(&case(DType::F32), &replayed).is_some());
}
