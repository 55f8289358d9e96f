//! The recorded cross entropy against its formula in f64.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::{text, Rng};
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_exec::config::EvalOptions;
use candle_lazy_exec::grad;
use candle_lazy_exec::run::peak_bytes;
use candle_lazy_nn::loss::{cross_entropy, linear_cross_entropy, token_cross_entropy, TokenLoss, TokenLossOptions};
use candle_lazy_nn::{LazyTensor, Module};

const CLASSES: usize = 11;
const TARGETS: [i64; 6] = [3, -100, 0, 10, -100, 7];

fn logits() -> Tensor {
    Rng::new(1).tensor(&[2, 3, CLASSES], 4.).unwrap()
}

fn targets(values: &[i64]) -> LazyTensor {
    LazyTensor::from_slice(values, (2, 3), &Device::Cpu).unwrap()
}

fn scalar(value: &LazyTensor) -> f64 {
    value.eval().unwrap().to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

/// −Σ q·log p of one row in f64, q = 1 − ε on the target plus ε/classes everywhere.
fn by_hand(row: &[f64], target: i64, smoothing: f64) -> f64 {
    let max = row.iter().copied().fold(f64::MIN, f64::max);
    let log = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    let share =
        |class: usize| f64::from(u8::from(class as i64 == target)) * (1. - smoothing) + smoothing / row.len() as f64;
    row.iter().enumerate().map(|(class, x)| -share(class) * (x - log)).sum()
}

fn rows(logits: &Tensor) -> Vec<Vec<f64>> {
    logits.to_dtype(DType::F64).unwrap().reshape(((), CLASSES)).unwrap().to_vec2().unwrap()
}

fn loss(logits: &LazyTensor, smoothing: f64) -> TokenLoss {
    let options = TokenLossOptions { label_smoothing: smoothing, ..TokenLossOptions::default() };
    token_cross_entropy(logits, &targets(&TARGETS), None, &options).unwrap()
}

#[test]
fn it_is_the_mean_over_what_is_kept() {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-13), (DType::F16, 1e-6), (DType::BF16, 1e-6)] {
        let logits = logits().to_dtype(dtype).unwrap();
        for smoothing in [0., 0.1] {
            let loss = loss(&logits.clone().into(), smoothing);
            let kept = rows(&logits).into_iter().zip(TARGETS).filter(|(_, target)| *target != -100);
            let want: f64 = kept.map(|(row, target)| by_hand(&row, target, smoothing)).sum();
            assert_eq!((loss.weight, loss.sum.rank()), (4., 0));
            assert_eq!(loss.sum.dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
            for (got, want) in [(scalar(&loss.sum), want), (scalar(&loss.mean().unwrap()), want / 4.)] {
                assert!((got - want).abs() <= tolerance * want, "{dtype:?} {smoothing}: {got} {want}");
            }
        }
    }
}

#[test]
fn it_agrees_with_the_one_on_plain_tensors() {
    let plain = logits().reshape(((), CLASSES)).unwrap();
    let ids = [3u32, 10, 0, 10, 10, 7];
    let want = cross_entropy(&plain, &Tensor::new(&ids, &Device::Cpu).unwrap(), Some(10)).unwrap();
    let ids = LazyTensor::from_slice(&ids.map(i64::from), 6, &Device::Cpu).unwrap();
    let options = TokenLossOptions { ignore_index: 10, ..TokenLossOptions::default() };
    let got = token_cross_entropy(&plain.into(), &ids, None, &options).unwrap();
    let (got, want) = (scalar(&got.mean().unwrap()), f64::from(want.to_scalar::<f32>().unwrap()));
    assert!((got - want).abs() < 1e-6 * want, "{got} {want}");
}

#[test]
fn weights_weigh_positions() {
    let logits = logits();
    let weights = [2f32, 5., 0., 0.5, 1., 1.];
    let lazy = LazyTensor::from_slice(&weights, (2, 3), &Device::Cpu).unwrap();
    let options = TokenLossOptions::default();
    let loss = token_cross_entropy(&logits.clone().into(), &targets(&TARGETS), Some(&lazy), &options).unwrap();
    let all = rows(&logits).into_iter().zip(TARGETS).zip(weights).filter(|((_, target), _)| *target != -100);
    let want: f64 = all.map(|((row, target), weight)| f64::from(weight) * by_hand(&row, target, 0.)).sum();
    assert_eq!(loss.weight, 3.5);
    assert!((scalar(&loss.sum) - want).abs() < 1e-6 * want);
}

#[test]
fn its_gradient_is_softmax_minus_target() {
    for smoothing in [0., 0.1] {
        let var = Var::from_tensor(&logits()).unwrap();
        let loss = loss(&var.as_tensor().into(), smoothing).mean().unwrap();
        let grads = loss.backward().unwrap();
        let got = rows(grads.get(&var).unwrap());
        for ((got, row), target) in got.iter().zip(rows(&logits())).zip(TARGETS) {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            for (class, (got, x)) in got.iter().zip(&row).enumerate() {
                let on = f64::from(u8::from(class as i64 == target));
                let share = on * (1. - smoothing) + smoothing / CLASSES as f64;
                let want = if target == -100 { 0. } else { (x.exp() / sum - share) / 4. };
                assert!((got - want).abs() < 1e-7, "{got} {want}");
            }
        }
    }
}

#[test]
fn logits_are_read_in_one_program_and_other_targets_make_no_plan() {
    let logits: LazyTensor = logits().into();
    for smoothing in [0., 0.1] {
        let options = TokenLossOptions { label_smoothing: smoothing, ..TokenLossOptions::default() };
        let mut reports = Vec::new();
        for ids in [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, -100, 6]] {
            let loss = token_cross_entropy(&logits, &targets(&ids), None, &options).unwrap().mean().unwrap();
            reports.push(loss.eval_with_report().unwrap().1);
        }
        assert!(reports[1].cache_hit, "{}", reports[1]);
        // what reads the logits, the sum of its results, the mean; beside them what the classes are compared with,
        // and the casts to f64, in which rows are added up, and back
        let kernels = &reports[1].kernels;
        assert_eq!((kernels.get("row"), reports[1].kernel_count()), (Some(&3), 7), "{}", reports[1]);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let logits: LazyTensor = logits().into();
    let options = TokenLossOptions::default();
    let new = |targets: &LazyTensor| text(token_cross_entropy(&logits, targets, None, &options));
    let with = |values: [i64; 6]| new(&targets(&values));
    assert!(with([11, 0, 0, 0, 0, 0]).contains("target 11 at position 0 is not one of 11 classes"));
    assert!(with([0, -1, 0, 0, 0, 0]).contains("target -1 at position 1 is not one of 11 classes"));
    assert!(with([-100; 6]).contains("none of 6 positions counts: all are ignored or weigh nothing"));
    let flat = targets(&[0; 6]).flatten_all().unwrap();
    assert!(new(&flat).contains("found logits [2, 3, 11] and targets [6]"));
    assert!(new(&targets(&[0; 6]).to_dtype(DType::U32).unwrap()).contains("targets must be I64, found U32"));
    let ids = targets(&[0; 6]);
    let integers = logits.to_dtype(DType::U32).unwrap();
    assert!(text(token_cross_entropy(&integers, &ids, None, &options)).contains("logits must be a float tensor"));
    let weights = |values: [f32; 6]| {
        let weights = LazyTensor::from_slice(&values, (2, 3), &Device::Cpu).unwrap();
        text(token_cross_entropy(&logits, &ids, Some(&weights), &options))
    };
    assert!(weights([1., -1., 1., 1., 1., 1.]).contains("the weight -1 at position 1 is negative or no number"));
    assert!(weights([0.; 6]).contains("none of 6 positions counts"));
    let five = LazyTensor::from_slice(&[1f32; 5], 5, &Device::Cpu).unwrap();
    assert!(
        text(token_cross_entropy(&logits, &ids, Some(&five), &options)).contains("weights [5] of F32 for 6 targets")
    );
    for smoothing in [-0.1, 1., f64::NAN] {
        let options = TokenLossOptions { label_smoothing: smoothing, ..options };
        assert!(text(token_cross_entropy(&logits, &ids, None, &options)).contains("a label smoothing of"));
    }
}

/// Hidden rows, a head's weight, and targets of which some are left out.
struct Head {
    hidden: LazyTensor,
    weight: LazyTensor,
    targets: Vec<i64>,
    weights: Vec<f32>,
}

impl Head {
    fn new(rows: usize, width: usize, classes: usize, left_out: impl Fn(usize) -> bool) -> Self {
        let mut rng = Rng::new(5);
        let hidden = rng.tensor(&[1, rows, width], 2.).unwrap();
        let weight = rng.tensor(&[classes, width], 2.).unwrap();
        let target = |row: usize| if left_out(row) { -100 } else { (row * 7919 % classes) as i64 };
        Self {
            hidden: LazyTensor::from(hidden).variable().unwrap(),
            weight: LazyTensor::from(weight).variable().unwrap(),
            targets: (0..rows).map(target).collect(),
            weights: (0..rows).map(|row| 0.5 + (row % 3) as f32).collect(),
        }
    }

    fn classes(&self) -> usize {
        self.weight.dims()[0]
    }

    fn data(&self) -> (LazyTensor, LazyTensor) {
        let rows = self.targets.len();
        let targets = LazyTensor::from_slice(&self.targets, (1, rows), &Device::Cpu).unwrap();
        (targets, LazyTensor::from_slice(&self.weights, (1, rows), &Device::Cpu).unwrap())
    }

    fn loss(&self, smoothing: f64) -> TokenLoss {
        let options = TokenLossOptions { label_smoothing: smoothing, ..TokenLossOptions::default() };
        let (targets, weights) = self.data();
        linear_cross_entropy(&self.hidden, self, self.classes(), &targets, Some(&weights), &options).unwrap()
    }

    /// Of all logits at once.
    fn whole(&self, smoothing: f64) -> TokenLoss {
        let options = TokenLossOptions { label_smoothing: smoothing, ..TokenLossOptions::default() };
        let (targets, weights) = self.data();
        let rows = self.hidden.flatten_to(1).unwrap();
        let logits = self.forward(&rows).unwrap().unsqueeze(0).unwrap();
        token_cross_entropy(&logits, &targets, Some(&weights), &options).unwrap()
    }
}

impl Module for Head {
    fn forward(&self, rows: &LazyTensor) -> candle_lazy_nn::Result<LazyTensor> {
        Ok(rows.matmul(&self.weight.t()?)?)
    }
}

fn norm_of(x: &Tensor) -> f64 {
    x.to_dtype(DType::F64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

#[test]
fn in_pieces_it_has_the_value_and_the_gradients_of_the_whole() {
    // one piece with all rows, one without those that are left out, two pieces of 64 rows at most
    for (rows, classes, kept, smoothing) in [(7, 13, 7, 0.), (7, 13, 7, 0.1), (40, 13, 30, 0.1), (80, 1 << 17, 70, 0.)]
    {
        let head = Head::new(rows, 4, classes, |row| row * 3 % rows >= kept);
        let (loss, whole) = (head.loss(smoothing), head.whole(smoothing));
        assert_eq!(loss.weight, whole.weight);
        let (got, want) = (scalar(&loss.sum), scalar(&whole.sum));
        assert!((got - want).abs() < 1e-6 * want, "{rows} {classes} {smoothing}: {got} {want}");
        let wrt = [&head.hidden, &head.weight];
        let gradients = |loss: &TokenLoss| grad(&loss.mean().unwrap(), &wrt).unwrap();
        for (got, want) in gradients(&loss).iter().zip(&gradients(&whole)) {
            let (got, want) = (got.eval().unwrap(), want.eval().unwrap());
            let apart = norm_of(&(&got - &want).unwrap());
            assert!(apart < 2e-6 * norm_of(&want), "{rows} {classes} {smoothing}: {apart} {}", norm_of(&want));
        }
    }
}

#[test]
fn no_more_than_a_piece_of_logits_is_planned() {
    let (rows, classes) = (512, 1 << 16);
    let peak = |loss: &dyn Fn(&Head) -> TokenLoss| {
        let head = Head::new(rows, 80, classes, |_| false);
        let loss = loss(&head).mean().unwrap();
        let gradient = grad(&loss, &[&head.hidden]).unwrap().remove(0);
        peak_bytes(&[&loss, &gradient], &EvalOptions::default()).unwrap()
    };
    let (pieces, whole) = (peak(&|head| head.loss(0.)), peak(&|head| head.whole(0.)));
    let logits = (rows * classes * 4) as u64;
    // a piece is of 128 rows, a quarter of them; what products take for themselves is the same
    assert!(whole >= logits && pieces <= whole - logits / 4 * 3, "{pieces} of {whole}");
}

#[test]
fn batches_that_keep_other_numbers_of_positions_share_a_plan() {
    let mut hits = Vec::new();
    for kept in [17, 30, 32, 33] {
        let head = Head::new(80, 4, 13, |row| row >= kept);
        hits.push(head.loss(0.).mean().unwrap().eval_with_report().unwrap().1.cache_hit);
    }
    assert_eq!(hits[1..], [true; 3]);
}

#[test]
fn a_head_that_does_not_fit_is_refused() {
    let head = Head::new(6, 4, 11, |_| false);
    let (targets, weights) = head.data();
    let options = TokenLossOptions::default();
    let with = |classes: usize, hidden: &LazyTensor| {
        text(linear_cross_entropy(hidden, &head, classes, &targets, Some(&weights), &options))
    };
    assert!(with(12, &head.hidden).contains("the head made [6, 11] of F32 for 6 rows of 12 classes"));
    assert!(with(11, &head.hidden.flatten_to(1).unwrap())
        .contains("expected hidden (…, width) and targets (…), none empty, found hidden [6, 4] and targets [1, 6]"));
    assert!(with(2, &head.hidden).contains("is not one of 2 classes"));
}
