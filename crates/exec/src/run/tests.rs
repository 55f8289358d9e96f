//! Tests of running.
use super::*;
use crate::buffer::memory_stats;
use crate::plan::cache_stats;
use candle_core::{DType, Device, Var};

const CPU: Device = Device::Cpu;

fn close(a: &Tensor, b: &Tensor, tol: f64) {
    assert_eq!(a.dims(), b.dims());
    let flat = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for (i, (x, y)) in flat(a).iter().zip(flat(b)).enumerate() {
        assert!((x - y).abs() <= tol * (1.0 + y.abs()) || (x.is_nan() && y.is_nan()), "element {i}: {x} and {y}");
    }
}

fn randn(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &CPU).unwrap()
}

#[test]
fn a_chain_gives_what_candle_gives_and_runs_as_one_row_program() {
    let t = randn(&[4, 7]);
    let x = LazyTensor::from(&t);
    let y = (((x.silu().unwrap() * &x).unwrap() + &x).unwrap() * 2.0).unwrap();
    let y = (y + 1.0).unwrap().tanh().unwrap();
    let (got, report) = y.eval_with_report().unwrap();
    let want = ((((t.silu().unwrap() * &t).unwrap() + &t).unwrap() * 2.0).unwrap() + 1.0).unwrap().tanh().unwrap();
    close(&got, &want, 1e-6);
    assert_eq!(report.kernels.get("row"), Some(&1), "{report}");
    assert_eq!((report.steps, report.fallback_count()), (1, 0), "{report}");
}

#[test]
fn softmax_composed_by_the_user_is_one_row_program() {
    let t = randn(&[3, 5, 9]);
    let x = LazyTensor::from(&t);
    let e = x.broadcast_sub(&x.max_keepdim(1).unwrap()).unwrap().exp().unwrap();
    let y = e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap();
    drop(e);
    let (got, report) = y.eval_with_report().unwrap();
    assert_eq!(report.steps, 1, "{report}");
    let composite = x.softmax(1).unwrap().eval().unwrap();
    assert_eq!(
        got.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        composite.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
    close(
        &got,
        &candle_core::Tensor::clone(&t)
            .exp()
            .unwrap()
            .broadcast_div(&t.exp().unwrap().sum_keepdim(1).unwrap())
            .unwrap(),
        1e-5,
    );
}

#[test]
fn residual_and_norm_are_one_program_with_two_results() {
    let (a, b, w) = (randn(&[2, 6, 32]), randn(&[2, 6, 32]), randn(&[32]));
    let (x, r, weight) = (LazyTensor::from(&a), LazyTensor::from(&b), LazyTensor::from(&w));
    let sum = (&x + &r).unwrap();
    let norm = sum.rms_norm(Some(&weight), 1e-5).unwrap();
    let (got, report) = eval_all_with_report(&[&sum, &norm]).unwrap();
    assert_eq!(report.steps, 1, "{report}");
    close(&got[0], &(&a + &b).unwrap(), 0.0);
    let s = (&a + &b).unwrap();
    let m = ((s.sqr().unwrap().mean_keepdim(2).unwrap() + 1e-5).unwrap()).sqrt().unwrap();
    close(&got[1], &s.broadcast_div(&m).unwrap().broadcast_mul(&w).unwrap(), 1e-5);
}

#[test]
fn views_move_nothing_and_strided_inputs_are_read_in_place() {
    let t = randn(&[4, 6]);
    let x = LazyTensor::from(&t);
    let y = (x.t().unwrap().narrow(0, 1, 3).unwrap() * 3.0).unwrap();
    let (got, report) = y.eval_with_report().unwrap();
    assert_eq!((report.views, report.steps), (2, 1), "{report}");
    close(&got, &(t.t().unwrap().narrow(0, 1, 3).unwrap() * 3.0).unwrap(), 0.0);
    // a reshape of a transposed buffer has to copy
    let z = (&x + 1.0).unwrap().t().unwrap().reshape((3, 8)).unwrap();
    close(&z.eval().unwrap(), &(&t + 1.0).unwrap().t().unwrap().reshape((3, 8)).unwrap(), 0.0);
}

#[test]
fn the_second_evaluation_at_another_size_hits_the_cache_and_equals_a_fresh_plan() {
    let run = |rows: usize, cols: usize, mul: f64, options: &EvalOptions| {
        let data: Vec<f32> = (0..rows * cols).map(|i| (i as f32).sin()).collect();
        let x = LazyTensor::from_vec(data, (rows, cols), &CPU).unwrap();
        let y = ((&x * mul).unwrap().softmax(1).unwrap() + &x).unwrap().sum_keepdim(0).unwrap();
        let (tensors, report) = eval_all_with(&[&y], options).unwrap();
        (tensors[0].to_vec2::<f32>().unwrap(), report)
    };
    let cold = EvalOptions { cache: false, ..EvalOptions::default() };
    run(11, 13, 1.5, &EvalOptions::default());
    let before = cache_stats();
    for (rows, cols) in [(2, 3), (17, 40), (100, 7)] {
        // a graph that is validated is captured whole and asks for its plan with that; else its key alone does
        for validate in [true, false] {
            let options = EvalOptions { validate, ..EvalOptions::default() };
            let (got, report) = run(rows, cols, rows as f64, &options);
            assert!(report.cache_hit, "{rows} x {cols}, validate {validate}");
            assert_eq!(got, run(rows, cols, rows as f64, &cold).0);
        }
    }
    assert!(cache_stats().hits >= before.hits + 6);
    // a dim of one broadcasts: another plan
    assert!(!run(1, 13, 1.5, &EvalOptions::default()).1.cache_hit || before.plans > 1);
}

#[test]
fn the_options_agree_bit_for_bit() {
    let t = randn(&[5, 33]);
    let w = randn(&[33]);
    let build = || {
        let x = LazyTensor::from(&t);
        let h = x.layer_norm(Some(&LazyTensor::from(&w)), None, 1e-5).unwrap();
        let g = (h.gelu().unwrap() * &x).unwrap();
        (g.softmax(1).unwrap() + h.mean_keepdim(1).unwrap().broadcast_as((5, 33)).unwrap()).unwrap()
    };
    let run = |options: EvalOptions| eval_all_with(&[&build()], &options).unwrap().0[0].to_vec2::<f32>().unwrap();
    let all = run(EvalOptions::default());
    assert_eq!(all, run(EvalOptions::no_passes()));
    assert_eq!(all, run(EvalOptions { cache: false, ..EvalOptions::default() }));
    for pass in ["split_bias", "noop_views", "cse", "dce", "fuse"] {
        assert_eq!(all, run(EvalOptions::only_pass(pass)), "{pass}");
    }
    // a norm's parts round more often than the norm: 2 units each, at the row's scale; the terms of the mean nearly cancel, and err
    // by units of their own
    let parts = run(EvalOptions { decompose: true, ..EvalOptions::default() });
    let normed = LazyTensor::from(&t).layer_norm(Some(&LazyTensor::from(&w)), None, 1e-5).unwrap();
    let terms = normed.eval().unwrap().abs().unwrap().mean(1).unwrap().to_vec1::<f32>().unwrap();
    for ((a, b), terms) in all.iter().zip(&parts).zip(terms) {
        let scale = a.iter().fold(terms, |m, x| m.max(x.abs()));
        assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 4.0 * f32::EPSILON * scale), "{a:?} {b:?}");
    }
}

#[test]
fn caches_are_written_in_place_when_given_away() {
    let mut cache = LazyTensor::zeros((1, 2, 16, 4), DType::F32, &CPU).unwrap();
    let mut want = Tensor::zeros((1, 2, 16, 4), DType::F32, &CPU).unwrap();
    for step in 0..16 {
        let k = randn(&[1, 2, 1, 4]);
        want = want.slice_scatter(&k, 2, step).unwrap();
        cache = cache.slice_set_owned(&LazyTensor::from(&k), 2, step).unwrap();
        let view = cache.narrow(2, 0, step + 1).unwrap();
        let sum = view.sum_all().unwrap();
        drop(view);
        let (values, report) = eval_all_with_report(&[&sum]).unwrap();
        assert_eq!((report.in_place, report.copies), (1, 0), "step {step}: {report}");
        let total = want.sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((values[0].to_scalar::<f32>().unwrap() - total).abs() < 1e-4);
    }
    close(&cache.eval().unwrap(), &want, 0.0);
}

#[test]
fn a_cache_that_somebody_holds_is_copied_and_stays_as_it_was() {
    let old = LazyTensor::zeros((4, 3), DType::F32, &CPU).unwrap();
    materialize(&[&old]).unwrap();
    let kept = old.clone();
    let one = LazyTensor::ones((1, 3), DType::F32, &CPU).unwrap();
    let new = old.slice_set_owned(&one, 0, 2).unwrap();
    let report = materialize(&[&new]).unwrap();
    assert_eq!((report.in_place, report.copies), (0, 1), "{report}");
    assert_eq!(kept.sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    assert_eq!(new.sum_all().unwrap().to_scalar::<f32>().unwrap(), 3.0);
}

#[test]
fn slice_assign_writes_a_box() {
    let t = randn(&[4, 5, 6]);
    let src = randn(&[2, 5, 3]);
    let x = LazyTensor::from(&t);
    let y = x.slice_assign(&[1..3, 0..5, 2..5], &LazyTensor::from(&src)).unwrap();
    let want = t.slice_assign(&[1..3, 0..5, 2..5], &src).unwrap();
    close(&y.eval().unwrap(), &want, 0.0);
    assert!(x.slice_assign(std::slice::from_ref(&(0..9)), &LazyTensor::from(&src)).is_err());
}

#[test]
fn gradients_of_tracked_leaves_are_candles() {
    let var = Var::from_tensor(&randn(&[3, 8])).unwrap();
    let w = Var::from_tensor(&randn(&[8])).unwrap();
    let x = LazyTensor::from(var.as_tensor());
    let y = x.rms_norm(Some(&LazyTensor::from(w.as_tensor())), 1e-5).unwrap().softmax(1).unwrap();
    let (loss, report) = y.sqr().unwrap().sum_all().unwrap().eval_with_report().unwrap();
    assert!(
        report.replayed.is_empty() && report.fallback_count() == 0 && report.kernels.contains_key("row"),
        "{report}"
    );
    let grads = loss.backward().unwrap();
    let t = var.as_tensor();
    let m = ((t.sqr().unwrap().mean_keepdim(1).unwrap() + 1e-5).unwrap()).sqrt().unwrap();
    let n = t.broadcast_div(&m).unwrap().broadcast_mul(w.as_tensor()).unwrap();
    let e = n.broadcast_sub(&n.max_keepdim(1).unwrap()).unwrap().exp().unwrap();
    let s = e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap();
    let want = s.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for v in [&var, &w] {
        close(grads.get(v.as_tensor()).unwrap(), want.get(v.as_tensor()).unwrap(), 1e-6);
    }
}

#[test]
fn an_untracked_part_still_uses_kernels_and_detach_cuts() {
    let var = Var::from_tensor(&randn(&[4, 4])).unwrap();
    let frozen = LazyTensor::from(randn(&[4, 4]));
    let h = frozen.gelu().unwrap().softmax(1).unwrap();
    let y = (h.matmul(&LazyTensor::from(var.as_tensor())).unwrap()).sum_all().unwrap();
    let (loss, report) = y.eval_with_report().unwrap();
    assert!(report.kernels.contains_key("row"), "{report}");
    assert!(loss.backward().unwrap().get(var.as_tensor()).is_some());
    let cut = LazyTensor::from(var.as_tensor()).detach().exp().unwrap();
    assert!(!cut.track_op() && !cut.eval().unwrap().track_op());
}

#[test]
fn a_failed_run_names_the_line_and_leaves_everything_pending() {
    let table = LazyTensor::from(randn(&[5, 3]));
    let ids = LazyTensor::new(&[1u32, 7], &CPU).unwrap();
    let line = line!() + 1;
    let rows = table.index_select(&ids, 0).unwrap();
    let y = (&rows + 1.0).unwrap();
    for _ in 0..2 {
        let error = y.eval().unwrap_err().to_string();
        assert!(error.contains("index_select") && error.contains(&format!("tests.rs:{line}:")), "{error}");
        assert!(!y.is_ready() && !rows.is_ready());
    }
}

#[test]
fn a_failed_run_gives_a_cache_back() {
    let mut cache = LazyTensor::zeros((4, 3), DType::F32, &CPU).unwrap();
    materialize(&[&cache]).unwrap();
    cache = cache.slice_set_owned(&LazyTensor::ones((1, 3), DType::F32, &CPU).unwrap(), 0, 1).unwrap();
    let bad = cache.index_select(&LazyTensor::new(&[9u32], &CPU).unwrap(), 0).unwrap();
    assert!(eval_all(&[&bad]).is_err());
    assert!(!cache.is_ready());
    drop(bad);
    assert_eq!(cache.sum_all().unwrap().to_scalar::<f32>().unwrap(), 3.0);
}

#[test]
fn integers_fall_back_to_candle_and_are_counted() {
    let x = LazyTensor::new(&[1u32, 2, 3], &CPU).unwrap();
    let (got, report) = (&x + &x).unwrap().eval_with_report().unwrap();
    assert_eq!(got.to_vec1::<u32>().unwrap(), [2, 4, 6]);
    assert_eq!(report.fallbacks.get("add"), Some(&1), "{report}");
}

#[test]
fn a_root_that_is_a_view_of_the_users_tensor_shares_it() {
    let t = randn(&[4, 5]);
    let y = LazyTensor::from(&t).t().unwrap().eval().unwrap();
    close(&y, &t.t().unwrap(), 0.0);
    // a leaf is read when it is evaluated
    let var = Var::from_tensor(&randn(&[2])).unwrap();
    let sum = LazyTensor::from(var.as_detached_tensor()).sum_all().unwrap();
    var.set(&Tensor::new(&[1f32, 2.], &CPU).unwrap()).unwrap();
    assert_eq!(sum.to_scalar::<f32>().unwrap(), 3.0);
}

#[test]
fn loops_that_never_evaluate_stay_bounded() {
    let loss = LazyTensor::new(&[1f32], &CPU).unwrap();
    let mut acc = LazyTensor::new(&[0f32], &CPU).unwrap();
    let before = crate::config::budget_evaluations();
    for _ in 0..120_000 {
        acc = (&acc + &loss).unwrap();
        assert!(acc.node().pending_estimate().0 <= 50_001);
    }
    assert!(crate::config::budget_evaluations() >= before + 2);
    assert_eq!(acc.to_vec1::<f32>().unwrap(), [120_000.0]);
}

#[test]
fn what_is_dropped_returns_to_the_pool() {
    let x = LazyTensor::from(randn(&[301, 307]));
    let y = (x.exp().unwrap() + 1.0).unwrap();
    materialize(&[&y]).unwrap();
    let active = memory_stats().active;
    assert!(active >= 301 * 307 * 4);
    drop(y);
    // other tests run at the same time, so only this buffer's share can be told
    assert!(memory_stats().cached >= 301 * 307 * 4);
}

#[test]
fn threads_share_graphs_while_a_variable_is_set() {
    let var = Var::from_tensor(&randn(&[64, 64])).unwrap();
    let leaf = LazyTensor::from(var.as_detached_tensor());
    let square = leaf.matmul(&leaf).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let y = ((&square * 2.0).unwrap() + &leaf).unwrap();
                    assert_eq!(y.eval().unwrap().dims(), [64, 64]);
                    let own = leaf.t().unwrap().matmul(&leaf).unwrap();
                    assert_eq!(own.sum_all().unwrap().eval().unwrap().rank(), 0);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..200 {
                var.set(&randn(&[64, 64])).unwrap();
            }
        });
    });
}

#[test]
fn many_threads_write_the_same_cache_step() {
    let mut cache = LazyTensor::zeros((64, 8), DType::F32, &CPU).unwrap();
    for step in 0..20 {
        let row = LazyTensor::full(step as f32, (1, 8), &CPU).unwrap();
        cache = cache.slice_set_owned(&row, 0, step).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| cache.sum_all().unwrap().to_scalar::<f32>().unwrap());
            }
        });
        let want: usize = (0..=step).sum::<usize>() * 8;
        assert_eq!(cache.sum_all().unwrap().to_scalar::<f32>().unwrap(), want as f32);
    }
}

#[test]
fn matmul_linear_lora_and_attention_agree_with_candle() {
    let (x, w, b) = (randn(&[2, 5, 12]), randn(&[7, 12]), randn(&[7]));
    let lazy = LazyTensor::from(&x).linear(&LazyTensor::from(&w), Some(&LazyTensor::from(&b))).unwrap();
    let want = x.broadcast_matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
    close(&lazy.eval().unwrap(), &want, 1e-6);
    let (a, bb) = (randn(&[12, 4]), randn(&[4, 7]));
    let lora = LazyTensor::from(&x).lora_add(&lazy, &LazyTensor::from(&a), &LazyTensor::from(&bb), 0.5).unwrap();
    let delta = x.broadcast_matmul(&a).unwrap().broadcast_matmul(&bb).unwrap();
    close(&lora.eval().unwrap(), &(want + (delta * 0.5).unwrap()).unwrap(), 1e-5);
    let (q, k, v) = (randn(&[2, 6, 5, 8]), randn(&[2, 3, 9, 8]), randn(&[2, 3, 9, 8]));
    let options = crate::AttentionOptions::new(0.35).causal(true);
    let lazy = |o: &EvalOptions| {
        let y = LazyTensor::attention(&(&q).into(), &(&k).into(), &(&v).into(), None, &options).unwrap();
        eval_all_with(&[&y], o).unwrap()
    };
    let (fused, report) = lazy(&EvalOptions::default());
    assert_eq!(report.kernels.get("attention"), Some(&1), "{report}");
    let (replayed, _) = lazy(&EvalOptions { replay: true, ..EvalOptions::default() });
    close(&fused[0], &replayed[0], 1e-5);
}

#[test]
fn long_chains_evaluate_on_a_small_stack() {
    let run = || {
        let mut x = LazyTensor::new(&[1f32], &CPU).unwrap();
        for i in 0..20_000 {
            x = (&x * if i % 2 == 0 { 2.0 } else { 0.5 }).unwrap();
        }
        assert_eq!(x.to_vec1::<f32>().unwrap(), [1.0]);
    };
    std::thread::Builder::new().stack_size(512 * 1024).spawn(run).unwrap().join().unwrap();
}

#[test]
fn broadcast_inputs_that_are_results_fill_every_row() {
    let half = randn(&[1, 17]).to_dtype(DType::F16).unwrap();
    let wide = half.broadcast_as((3, 17)).unwrap();
    let got = LazyTensor::from(&wide).to_dtype(DType::F32).unwrap().eval().unwrap();
    close(&got, &wide.to_dtype(DType::F32).unwrap(), 0.0);
}

#[test]
fn a_biased_linear_without_the_pass_gives_the_same_bits() {
    let (x, w, b) = (randn(&[3, 8]), randn(&[4, 8]), randn(&[4]));
    let run = |x: &Tensor, o: &EvalOptions| {
        let y = LazyTensor::from(x).linear(&(&w).into(), Some(&(&b).into())).unwrap();
        eval_all_with(&[&y], o).unwrap().0[0].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(run(&x, &EvalOptions::default()), run(&x, &EvalOptions::no_passes()));
    let one = x.get(0).unwrap();
    assert_eq!(run(&one, &EvalOptions::default()), run(&one, &EvalOptions::no_passes()));
}

#[test]
fn a_biased_linear_without_features_has_no_elements_with_or_without_the_pass() {
    let zeros = |dims: &[usize]| LazyTensor::from(Tensor::zeros(dims, DType::F32, &CPU).unwrap());
    for dims in [&[0][..], &[3, 0]] {
        let y = || zeros(dims).linear(&zeros(&[0, 0]), Some(&zeros(&[0]))).unwrap();
        assert_eq!(y().eval().unwrap().dims(), dims);
        assert_eq!(eval_all_with(&[&y()], &EvalOptions::no_passes()).unwrap().0[0].dims(), dims);
    }
}

#[test]
fn reductions_over_dims_of_size_one_do_not_meet_row_values() {
    let x = LazyTensor::new(&[0.5f64], &CPU).unwrap();
    let y = x.sum_keepdim(0).unwrap().max_keepdim(0).unwrap().log_softmax(0).unwrap();
    assert_eq!(y.to_vec1::<f64>().unwrap(), [0.0]);
    let z = LazyTensor::from(randn(&[4, 1])).softmax(1).unwrap().sum_keepdim(1).unwrap().softmax(1).unwrap();
    assert_eq!(z.sum_all().unwrap().to_scalar::<f32>().unwrap(), 4.0);
}
