//! A graph that is recorded again and again is known by its nodes: it gets the plan and the result that its key would give it.
//!
//! A binary of its own, and one test at a time: the cache belongs to the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{Device, Tensor};
use candle_lazy_exec::plan::{cache_stats, clear_cache, set_cache_capacity};
use candle_lazy_exec::{eval_all_with, materialize, EvalOptions, LazyTensor};
use std::sync::{Mutex, MutexGuard, PoisonError};

const CPU: Device = Device::Cpu;

static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    clear_cache();
    alone
}

fn options(validate: bool) -> EvalOptions {
    EvalOptions { validate, ..EvalOptions::default() }
}

fn tensor(dims: &[usize], from: f32) -> Tensor {
    let count = dims.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37 + from).sin()).collect();
    Tensor::from_vec(values, dims, &CPU).unwrap()
}

fn value(y: &LazyTensor, options: &EvalOptions) -> Vec<f32> {
    let (values, _) = eval_all_with(&[y], options).unwrap();
    values[0].flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_third_graph_and_those_after_are_known_at_any_size_and_with_any_scalars() {
    let _alone = alone();
    let cold = EvalOptions { cache: false, ..EvalOptions::default() };
    for validate in [false, true] {
        clear_cache();
        let before = cache_stats();
        for (i, (rows, cols)) in [(4, 6), (3, 7), (50, 40), (5, 9), (11, 300)].into_iter().enumerate() {
            let graph = || {
                let x = LazyTensor::from(tensor(&[rows, cols], 0.0));
                let w = LazyTensor::from(tensor(&[cols, rows], 1.0));
                let y = x.matmul(&w).unwrap().affine(i as f64, 0.5).unwrap().softmax(1).unwrap();
                let z = y.narrow(0, 1, rows - 1).unwrap().reshape(((rows - 1) * rows,)).unwrap();
                (&z * &z).unwrap()
            };
            assert_eq!(value(&graph(), &options(validate)), value(&graph(), &cold), "{i}");
            let now = cache_stats();
            let guarded = (i as u64).saturating_sub(1);
            assert_eq!((now.misses - before.misses, now.guarded - before.guarded), (1, guarded), "{i}");
            assert_eq!(now.hits - before.hits, i as u64);
        }
    }
}

#[test]
fn a_loop_that_writes_its_cache_in_place_is_known_and_equals_eager() {
    let _alone = alone();
    let before = cache_stats();
    let zero = LazyTensor::from(Tensor::zeros((1, 64, 8), candle_core::DType::F32, &CPU).unwrap());
    let mut cache = (&zero + 0.0).unwrap();
    materialize(&[&cache]).unwrap();
    let mut eager: Vec<Tensor> = Vec::new();
    let steps = 40;
    for step in 0..steps {
        let row = tensor(&[1, 1, 8], step as f32);
        eager.push(row.clone());
        let new = LazyTensor::from(&row);
        cache = cache.slice_set_owned(&new, 1, step).unwrap();
        let seen = cache.narrow(1, 0, step + 1).unwrap();
        let scores = new.matmul(&seen.t().unwrap()).unwrap().softmax(2).unwrap();
        let out = scores.matmul(&seen).unwrap();
        materialize(&[&cache, &out]).unwrap();
        let all = Tensor::cat(&eager, 1).unwrap();
        let scores = row.matmul(&all.t().unwrap()).unwrap();
        let want = softmax_of(&scores).matmul(&all).unwrap();
        let (got, want) = (out.eval().unwrap(), want);
        let far = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(far < 1e-5, "step {step}: {far}");
    }
    let now = cache_stats();
    // a length of one is a size of its own
    assert!(now.guarded - before.guarded >= steps as u64 - 4, "{before:?} {now:?}");
    let whole = cache.eval().unwrap().narrow(1, 0, steps).unwrap();
    let want = Tensor::cat(&eager, 1).unwrap();
    assert_eq!(
        whole.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        want.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
}

/// Eager Candle's, over the last dim.
fn softmax_of(x: &Tensor) -> Tensor {
    let e = x.broadcast_sub(&x.max_keepdim(2).unwrap()).unwrap().exp().unwrap();
    e.broadcast_div(&e.sum_keepdim(2).unwrap()).unwrap()
}

#[test]
fn a_graph_that_is_known_writes_over_what_was_given_away_and_nothing_else() {
    let _alone = alone();
    let before = cache_stats();
    let t = tensor(&[300, 10], 0.5);
    for i in 0..8 {
        let x = (&LazyTensor::from(&t) + f64::from(i)).unwrap();
        let want = value(&x, &options(false));
        let x = (&LazyTensor::from(&t) + f64::from(i)).unwrap();
        materialize(&[&x]).unwrap();
        let kept = (i % 2 == 1).then(|| x.clone());
        let y = x.sqr().unwrap().tanh().unwrap().affine(2.0, f64::from(i)).unwrap();
        drop(x);
        let (values, report) = eval_all_with(&[&y], &options(false)).unwrap();
        assert_eq!(report.in_place, usize::from(kept.is_none()), "{i}: {report}");
        let got: Vec<f32> = values[0].flatten_all().unwrap().to_vec1().unwrap();
        let near = |(g, w): (&f32, &f32)| (g - ((w * w).tanh() * 2.0 + i as f32)).abs() < 1e-5;
        assert!(got.iter().zip(&want).all(near), "{i}");
        assert!(kept.is_none_or(|kept| value(&kept, &options(false)) == want), "what somebody holds stays as it was");
    }
    assert!(cache_stats().guarded - before.guarded >= 6);
}

#[test]
fn graphs_that_look_alike_are_told_apart() {
    let _alone = alone();
    let before = cache_stats();
    let x = tensor(&[5], 0.3);
    let graph = |length: usize, other: usize| {
        (0..length)
            .fold(LazyTensor::from(&x), |y, i| if i == other { y.neg().unwrap() } else { y.affine(1.5, 0.25).unwrap() })
    };
    let want = |length: usize, other: usize| {
        let ops = |v: f32| (0..length).fold(v, |v, i| if i == other { -v } else { v * 1.5 + 0.25 });
        x.to_vec1::<f32>().unwrap().into_iter().map(ops).collect::<Vec<_>>()
    };
    let near = |got: Vec<f32>, want: Vec<f32>| got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-5 * w.abs());
    // more than are kept beside one another
    for round in 0..6 {
        for length in 3..20 {
            for other in [0, 1, length - 2] {
                let got = value(&graph(length, other), &options(false));
                assert!(near(got, want(length, other)), "round {round}, {length} ops, number {other} differs");
            }
        }
    }
    let now = cache_stats();
    assert_eq!(now.misses - before.misses, 50, "17 lengths of three graphs, two of them the same");
    assert!(now.guarded > before.guarded);
}

#[test]
fn guards_go_with_their_plans() {
    let _alone = alone();
    set_cache_capacity(2);
    let x = LazyTensor::from(tensor(&[6], 0.0));
    let graphs: [fn(&LazyTensor) -> LazyTensor; 3] = [
        |x| x.exp().unwrap().softmax(0).unwrap(),
        |x| x.neg().unwrap().softmax(0).unwrap(),
        |x| x.sqr().unwrap().softmax(0).unwrap(),
    ];
    for graph in graphs {
        (0..3).for_each(|_| drop(value(&graph(&x), &options(false))));
    }
    let before = cache_stats();
    assert_eq!((before.plans, before.alive), (2, 2), "{before:?}");
    value(&graphs[2](&x), &options(false));
    value(&graphs[1](&x), &options(false));
    let now = cache_stats();
    assert_eq!((now.guarded - before.guarded, now.misses), (2, before.misses));
    value(&graphs[0](&x), &options(false));
    assert_eq!(cache_stats().misses, before.misses + 1, "its guard went with its plan");
    clear_cache();
    assert_eq!(cache_stats().alive, 0);
    value(&graphs[1](&x), &options(false));
    assert_eq!(cache_stats().misses, before.misses + 2);
    set_cache_capacity(1024);
}

#[test]
fn what_fails_in_a_graph_that_is_known_names_its_op_and_line() {
    let _alone = alone();
    let table = LazyTensor::from(tensor(&[4, 3], 0.0));
    let mut lines = Vec::new();
    for id in [0u32, 3, 1, 9, 2] {
        let ids = LazyTensor::new(&[id], &CPU).unwrap();
        // far below the root, where nothing but its one reader holds it
        let row = table.index_select(&ids, 0).unwrap();
        let line = line!() - 1;
        let deep = (0..50).fold(row, |y, _| y.softmax(1).unwrap());
        match eval_all_with(&[&deep], &options(false)) {
            Ok(_) => assert!(id < 4),
            Err(error) => {
                assert_eq!(id, 9);
                let site = error.site().expect("a place").location();
                assert_eq!((site.line(), site.file().ends_with("guards.rs")), (line, true), "{error}");
                assert!(error.to_string().contains("index_select"), "{error}");
                lines.push(line);
            }
        }
    }
    assert_eq!(lines.len(), 1);
    assert!(cache_stats().guarded >= 3);
}

#[test]
fn threads_that_record_on_shared_nodes_get_what_one_thread_gets() {
    let _alone = alone();
    let base = LazyTensor::from(tensor(&[8, 16], 0.0));
    let want = {
        let t = tensor(&[8, 16], 0.0);
        softmax_of(&t.exp().unwrap().unsqueeze(0).unwrap()).sqr().unwrap().flatten_all().unwrap()
    };
    let want: Vec<f32> = want.to_vec1().unwrap();
    for _ in 0..50 {
        // pending, and read by the graphs of all
        let shared = base.exp().unwrap();
        std::thread::scope(|scope| {
            for i in 0..4 {
                let (shared, want) = (&shared, &want);
                scope.spawn(move || {
                    for _ in 0..4 {
                        let y = shared.softmax(1).unwrap().sqr().unwrap();
                        let got = value(&y, &options(i == 0));
                        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-6));
                    }
                });
            }
        });
    }
}

#[test]
fn a_value_that_waits_is_not_taken_for_another_that_is_there() {
    let _alone = alone();
    let (x, y) = (LazyTensor::from(tensor(&[6], 0.0)), LazyTensor::from(tensor(&[6], 1.0)));
    for _ in 0..3 {
        let (a, b) = (x.exp().unwrap(), x.exp().unwrap());
        materialize(&[&a, &b]).unwrap();
        value(&(&a + &b).unwrap(), &options(false));
    }
    for validate in [false, true] {
        let (a, b) = (x.exp().unwrap(), y.exp().unwrap());
        materialize(&[&a]).unwrap();
        let got = value(&(&a + &b).unwrap(), &options(validate));
        let want: Vec<f32> =
            (tensor(&[6], 0.0).exp().unwrap() + tensor(&[6], 1.0).exp().unwrap()).unwrap().to_vec1().unwrap();
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-6), "{got:?}, not {want:?}");
    }
}

#[test]
fn what_somebody_holds_is_not_written_where_one_node_stands_for_two() {
    let _alone = alone();
    let own = |from: f32| {
        let x = (&LazyTensor::from(tensor(&[6], from)) + 1.0).unwrap();
        materialize(&[&x]).unwrap();
        x
    };
    for _ in 0..4 {
        let x = own(0.0);
        let (a, b) = ((&x * 2.0).unwrap(), (&x * 3.0).unwrap());
        drop(x);
        eval_all_with(&[&a, &b], &options(false)).unwrap();
    }
    let y = own(2.0);
    let want: Vec<f32> = (tensor(&[6], 2.0) + 1.0).unwrap().to_vec1().unwrap();
    for i in 0..3 {
        let c = (&y * f64::from(i)).unwrap();
        let (values, report) = eval_all_with(&[&c, &c], &options(false)).unwrap();
        assert_eq!((values.len(), report.in_place), (2, 0));
        let sum = (&(&y * 2.0).unwrap() + &(&y * 2.0).unwrap()).unwrap();
        value(&sum, &options(i == 1));
        assert_eq!(y.eval().unwrap().to_vec1::<f32>().unwrap(), want, "what somebody holds stays as it was");
    }
}
