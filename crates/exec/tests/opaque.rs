//! What the graph passes through unread, and numbers with a key: custom ops, quantised weights, random numbers, masks.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used, clippy::panic)]

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Module, Shape, Tensor, Var};
use candle_lazy_exec::{eval_all_with_report, grad, EvalOptions, LazyTensor, RandomKey};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

const CPU: Device = Device::Cpu;

/// x·factor, counting how often it ran.
struct Scaled {
    factor: f32,
    runs: Arc<AtomicUsize>,
}

impl CustomOp1 for Scaled {
    fn name(&self) -> &'static str {
        "scaled"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let data = storage.as_slice::<f32>()?;
        let (a, b) = layout.contiguous_offsets().ok_or_else(|| candle_core::Error::Msg("strided".into()))?;
        let data = data[a..b].iter().map(|x| x * self.factor).collect();
        Ok((CpuStorage::F32(data), layout.shape().clone()))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some((grad * f64::from(self.factor))?))
    }
}

struct Panics;

impl CustomOp2 for Panics {
    fn name(&self) -> &'static str {
        "panics"
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        panic!("out of luck")
    }
}

fn scaled(factor: f32, runs: &Arc<AtomicUsize>) -> Arc<Box<dyn CustomOp1 + Send + Sync>> {
    Arc::new(Box::new(Scaled { factor, runs: runs.clone() }))
}

/// `Scaled` refuses what is not contiguous; no plan may hand it that.
#[test]
fn a_custom_op_gets_contiguous_inputs_whatever_views_were_recorded() {
    let runs = Arc::new(AtomicUsize::new(0));
    let var = Var::from_tensor(&x()).unwrap();
    for leaf in [x(), var.as_tensor().clone()] {
        let lazy = LazyTensor::from(&leaf);
        let views = [
            (lazy.t().unwrap(), leaf.t().unwrap()),
            (lazy.broadcast_as((2, 2, 3)).unwrap(), leaf.broadcast_as((2, 2, 3)).unwrap()),
            (lazy.narrow(1, 1, 2).unwrap(), leaf.narrow(1, 1, 2).unwrap()),
            (lazy.contiguous().unwrap().t().unwrap(), leaf.t().unwrap()),
        ];
        for (view, eager) in views {
            for options in [EvalOptions::default(), EvalOptions::no_passes(), EvalOptions::only_pass("noop_views")] {
                let y = view.custom_op1_arc(&scaled(2.0, &runs), view.shape(), DType::F32).unwrap();
                let got = candle_lazy_exec::eval_all_with(&[&y], &options).unwrap().0.remove(0);
                let want = (&eager * 2.0).unwrap();
                assert_eq!(got.dims(), want.dims());
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(flat(&got), flat(&want));
            }
            view.custom_op1_arc(&scaled(2.0, &runs), view.shape(), DType::F32).unwrap().eval_checked().unwrap();
        }
    }
}

fn x() -> Tensor {
    Tensor::from_vec((0..6).map(|i| i as f32 - 2.5).collect::<Vec<_>>(), (2, 3), &CPU).unwrap()
}

#[test]
fn a_custom_op_runs_once_per_object_and_a_plan_serves_every_object() {
    let runs = Arc::new(AtomicUsize::new(0));
    let (twice, thrice) = (scaled(2.0, &runs), scaled(3.0, &runs));
    // nothing but the sum is held, so that both programs have one output
    let program = |a: &Arc<_>, b: &Arc<_>, c: &Arc<_>| {
        let y = (LazyTensor::from(x()) + 1.0).unwrap();
        let part = |op| y.custom_op1_arc(op, (2, 3), DType::F32).unwrap();
        ((part(a) + part(b)).unwrap() + part(c)).unwrap()
    };
    let (values, report) = eval_all_with_report(&[&program(&twice, &twice, &thrice)]).unwrap();
    let want = ((x() + 1.0).unwrap() * 7.0).unwrap();
    assert_eq!(values[0].to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap());
    assert_eq!((runs.load(Ordering::Relaxed), report.kernels["custom"]), (2, 2));
    assert!(report.fallbacks.is_empty(), "{:?}", report.fallbacks);
    // other objects of the same name: the same plan
    let (values, report) = eval_all_with_report(&[&program(&thrice, &thrice, &twice)]).unwrap();
    assert!(report.cache_hit);
    let want = ((x() + 1.0).unwrap() * 8.0).unwrap();
    assert_eq!(values[0].to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap());
}

#[test]
fn a_custom_op_keeps_its_backward() {
    let var = Var::from_tensor(&x()).unwrap();
    let leaf = LazyTensor::from(var.as_tensor().clone());
    let op = Scaled { factor: 5.0, runs: Arc::default() };
    let y = leaf.sqr().unwrap().custom_op1(op, (2, 3), DType::F32).unwrap().eval().unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    let want = (x() * 10.0).unwrap();
    assert_eq!(grads.get(&var).unwrap().to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap());
}

#[test]
fn a_second_derivative_of_a_custom_op_is_refused_when_it_is_recorded() {
    let x = LazyTensor::from(x()).variable().unwrap();
    let line = line!() + 2;
    let op = Scaled { factor: 5.0, runs: Arc::default() };
    let y = x.custom_op1(op, (2, 3), DType::F32).unwrap().sqr().unwrap().sum_all().unwrap();
    let first = grad(&y, &[&x]).unwrap().remove(0);
    assert_eq!(first.to_vec2::<f32>().unwrap().len(), 2);
    let text = grad(&first.sum_all().unwrap(), &[&x]).unwrap_err().to_string();
    for part in ["scaled", "backward of a custom op", "unsupported", &format!("opaque.rs:{line}")] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_result_other_than_stated_and_a_panic_are_errors_that_name_the_line() {
    let leaf = LazyTensor::from(x());
    let op = || Scaled { factor: 1.0, runs: Arc::default() };
    let line = line!() + 1;
    let wrong = leaf.custom_op1(op(), (3, 2), DType::F32).unwrap();
    let text = wrong.eval().unwrap_err().to_string() + &source_text(&wrong.eval().unwrap_err());
    for part in ["scaled", "[2, 3]", "[3, 2]", &format!("opaque.rs:{line}")] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let line = line!() + 1;
    let panics = leaf.custom_op2(&leaf, Panics, (2, 3), DType::F32).unwrap();
    let text = panics.eval().unwrap_err().to_string();
    for part in ["panics", "out of luck", &format!("opaque.rs:{line}")] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // nothing is lost: the leaf still computes
    assert!(!panics.is_ready());
    assert_eq!((&leaf * 1.0).unwrap().to_vec2::<f32>().unwrap(), x().to_vec2::<f32>().unwrap());
}

fn source_text(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(String::new, |e| format!(" {e}{}", source_text(e)))
}

#[test]
fn quantised_products_are_candles_and_keep_the_gradient_of_the_input() {
    let w = Tensor::randn(0f32, 1.0, (8, 64), &CPU).unwrap();
    let weight = Arc::new(QTensor::quantize(&w, GgmlDType::Q8_0).unwrap());
    let theirs = QMatMul::from_arc(weight.clone()).unwrap();
    for dims in [vec![64], vec![3, 64], vec![2, 5, 64], vec![0, 64]] {
        let x = Tensor::randn(0f32, 1.0, dims.clone(), &CPU).unwrap();
        let y = LazyTensor::from(&x).qmatmul(&weight).unwrap();
        let (got, report) = y.eval_with_report().unwrap();
        assert_eq!(report.fallbacks["qmatmul"], 1);
        if dims.len() > 1 && dims[0] > 0 {
            let want = theirs.forward(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(got.flatten_all().unwrap().to_vec1::<f32>().unwrap(), want);
        }
        let half = LazyTensor::from(x.to_dtype(DType::BF16).unwrap()).qmatmul(&weight).unwrap().eval().unwrap();
        assert_eq!((half.dtype(), half.dims()), (DType::BF16, got.dims()));
    }
    let var = Var::from_tensor(&Tensor::randn(0f32, 1.0, (3, 64), &CPU).unwrap()).unwrap();
    let y = LazyTensor::from(var.as_tensor().clone()).qmatmul(&weight).unwrap().eval().unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    let want = weight.dequantize(&CPU).unwrap().sum(0).unwrap().to_vec1::<f32>().unwrap();
    let got = grads.get(&var).unwrap().get(0).unwrap().to_vec1::<f32>().unwrap();
    for (g, w) in got.iter().zip(&want) {
        assert!((g - w).abs() <= 1e-5 * (1.0 + w.abs()), "{g} {w}");
    }
    let error = LazyTensor::from(&x()).qmatmul(&weight).unwrap_err().to_string();
    assert!(error.contains("qmatmul") && error.contains("[2, 3]") && error.contains("opaque.rs"), "{error}");
    // Candle's kernel of this kind takes pairs of blocks and panics else
    for (width, taken) in [(32, false), (64, true)] {
        let w = Tensor::randn(0f32, 1.0, (2, width), &CPU).unwrap();
        let weight = Arc::new(QTensor::quantize(&w, GgmlDType::Q5_1).unwrap());
        let y = LazyTensor::from(&w).qmatmul(&weight);
        assert_eq!(y.is_ok(), taken);
        match y {
            Ok(y) => assert_eq!(y.eval().unwrap().dims(), [2, 2]),
            Err(error) => assert!(error.to_string().contains("Q5_1 [2, 32]"), "{error}"),
        }
    }
}

#[test]
fn keys_give_equal_numbers_whatever_is_computed_with_them() {
    let key = RandomKey::new(7);
    let draw = |key| LazyTensor::rand(key, 0.0, 1.0, (3, 5), DType::F32, &CPU).unwrap();
    let (a, b, c) = (draw(key), draw(key), draw(key.fold_in(1)));
    let (values, _) = eval_all_with_report(&[&a, &b, &c]).unwrap();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(flat(&values[0]), flat(&values[1]));
    assert_ne!(flat(&values[0]), flat(&values[2]));
    // fused into something else, without passes, and under another key with the same plan
    let fused = (draw(key).exp().unwrap().log().unwrap() - draw(key)).unwrap();
    assert!(flat(&fused.eval().unwrap()).iter().all(|d| d.abs() < 1e-6));
    let options = EvalOptions::no_passes();
    let plain = candle_lazy_exec::eval_all_with(&[&draw(key)], &options).unwrap().0;
    assert_eq!(flat(&plain[0]), flat(&values[0]));
    draw(key).eval().unwrap();
    let (_, report) = draw(key.fold_in(9)).eval_with_report().unwrap();
    assert!(report.cache_hit);
    let keys = key.split(100);
    assert!((0..100).all(|i| (0..i).all(|j| keys[i] != keys[j])));
}

#[test]
fn dropout_zeroes_that_share_and_scales_the_rest() {
    let ones = LazyTensor::ones((100, 100), DType::F32, &CPU).unwrap();
    let y = ones.dropout(0.25, RandomKey::new(3)).unwrap().eval().unwrap();
    let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let zeros = y.iter().filter(|v| **v == 0.0).count();
    // six standard deviations of a binomial count of 10,000 at 0.25
    assert!((zeros as f64 - 2500.0).abs() < 6.0 * (10_000.0f64 * 0.25 * 0.75).sqrt(), "{zeros}");
    assert!(y.iter().all(|v| *v == 0.0 || (v - 4.0 / 3.0).abs() < 1e-6));
    let error = ones.dropout(1.0, RandomKey::new(3)).unwrap_err().to_string();
    assert!(error.contains("dropout") && error.contains("opaque.rs"), "{error}");
}

#[test]
fn masks_one_hot_padding_and_repetition_are_candles() {
    let same = |ours: LazyTensor, theirs: Tensor| {
        let (ours, theirs) = (ours.eval().unwrap(), theirs);
        assert_eq!((ours.dims(), ours.dtype()), (theirs.dims(), theirs.dtype()));
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(flat(&ours), flat(&theirs));
    };
    for n in [0, 1, 5] {
        for dtype in [DType::F32, DType::U8, DType::BF16, DType::I64] {
            same(LazyTensor::tril2(n, dtype, &CPU).unwrap(), Tensor::tril2(n, dtype, &CPU).unwrap());
            same(LazyTensor::triu2(n, dtype, &CPU).unwrap(), Tensor::triu2(n, dtype, &CPU).unwrap());
            same(LazyTensor::eye(n, dtype, &CPU).unwrap(), Tensor::eye(n, dtype, &CPU).unwrap());
        }
    }
    let ids = Tensor::new(&[[0i64, 2], [1, -1]], &CPU).unwrap();
    // 1 where the id is the place, nothing for -1
    let hot = [[[1f32, 0., 0., 0.], [0., 0., 1., 0.]], [[0., 1., 0., 0.], [0., 0., 0., 0.]]];
    let hot = Tensor::new(&hot, &CPU).unwrap();
    same(LazyTensor::from(&ids).one_hot(4, 1.0, 0.0, DType::F32).unwrap(), hot);
    let (lazy, eager) = (LazyTensor::from(x()), x());
    for (left, right) in [(0, 0), (2, 0), (0, 1), (1, 3)] {
        for dim in [0, 1] {
            same(lazy.pad_with_zeros(dim, left, right).unwrap(), eager.pad_with_zeros(dim, left, right).unwrap());
            same(lazy.pad_with_same(dim, left, right).unwrap(), eager.pad_with_same(dim, left, right).unwrap());
        }
    }
    for repeats in [vec![1, 2], vec![3, 1], vec![2, 1, 3], vec![0, 2]] {
        same(lazy.repeat(repeats.clone()).unwrap(), eager.repeat(repeats).unwrap());
    }
    let parts = lazy.split(&[1, 2], 1).unwrap();
    same(parts[1].clone(), eager.narrow(1, 1, 2).unwrap());
    same(lazy.maximum(0.5).unwrap(), eager.maximum(0.5).unwrap());
    same(lazy.minimum(0.5).unwrap(), eager.minimum(0.5).unwrap());
    same(lazy.max_all().unwrap(), eager.max_all().unwrap());
    same(LazyTensor::from(&ids).maximum(1).unwrap(), ids.maximum(1i64).unwrap());
}

#[test]
fn what_is_composed_names_the_callers_line_too() {
    let lazy = LazyTensor::from(x());
    let nine = LazyTensor::from(Tensor::zeros(vec![1; 9], DType::F32, &CPU).unwrap());
    let line = line!() + 1;
    let errors = [
        lazy.repeat(vec![usize::MAX, 2]).err(),
        lazy.repeat(vec![usize::MAX / 4, 2, 3]).err(),
        lazy.pad_with_same(0, usize::MAX / 2, 0).err(),
        lazy.pad_with_zeros(1, 0, usize::MAX / 2).err(),
        nine.pad_with_same(0, 1, 1).err(),
        LazyTensor::from(Tensor::new(&[1u32], &CPU).unwrap()).one_hot(3, 1.0, 0.0, DType::I16).err(),
        LazyTensor::from(Tensor::new(&[1u32, 2], &CPU).unwrap()).cumsum(0).err(),
    ];
    for (i, error) in (1..).zip(errors) {
        let error = error.unwrap();
        let site = error.site().unwrap();
        assert!(site.location().file().ends_with("opaque.rs"), "{error}");
        assert_eq!(site.location().line(), line + i, "{error}");
    }
}
