//! Many threads that submit, drop, fail and panic: every value is right, and nothing is alive afterwards.
//!
//! A binary of its own: it counts what lives in the process.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use candle_lazy_exec::buffer::memory_stats;
use candle_lazy_exec::{eval_all_async, materialize, Eval, LazyTensor};
use candle_lazy_graph::live_nodes;
use futures::executor::block_on;
use futures::future::{select_all, try_join_all};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};

const CPU: Device = Device::Cpu;
const SUBMITTERS: u64 = 16;
const ROUNDS: usize = 1500;

/// Panics, without a word on the standard error.
struct Panics;

impl CustomOp1 for Panics {
    fn name(&self) -> &'static str {
        "panics"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        std::panic::resume_unwind(Box::new("out of order"))
    }
}

/// What a program gives.
enum Expected {
    /// All elements are this number, exactly.
    All(f32),
    /// An error that says this.
    Error(&'static str),
}

/// A program on a square of `n`, whose numbers are small and whole, and what it gives.
fn program(kind: u32, n: f32, shared: &LazyTensor) -> (LazyTensor, Expected) {
    let x = LazyTensor::from(Tensor::full(n, (8, 8), &CPU).unwrap());
    let bad = || LazyTensor::new(&[99u32], &CPU).unwrap();
    match kind {
        0 => ((x + 1.0).unwrap(), Expected::All(n + 1.0)),
        // a product of 8 terms, in a chain that is one plan
        1 => (x.matmul(&x).unwrap().affine(2.0, -1.0).unwrap().relu().unwrap(), Expected::All(16.0 * n * n - 1.0)),
        2 => ((&x * shared).unwrap().max_keepdim(0).unwrap(), Expected::All(3.0 * n)),
        // a cache that is given away again and again
        3 => {
            let mut cache = LazyTensor::zeros((1, 4, 8), DType::F32, &CPU).unwrap();
            for at in 0..4 {
                cache = cache.slice_set_owned(&x.narrow(0, 0, 1).unwrap().reshape((1, 1, 8)).unwrap(), 1, at).unwrap();
                if at == 1 {
                    materialize(&[&cache]).unwrap();
                }
            }
            (cache.sum_keepdim(1).unwrap(), Expected::All(4.0 * n))
        }
        4 => {
            let var = Var::from_tensor(&Tensor::full(n, 3, &CPU).unwrap()).unwrap();
            (LazyTensor::from(var.as_tensor()).sqr().unwrap(), Expected::All(n * n))
        }
        5 => (x.index_select(&bad(), 0).unwrap().exp().unwrap(), Expected::Error("index")),
        _ => (x.custom_op1(Panics, (8, 8), DType::F32).unwrap().neg().unwrap(), Expected::Error("out of order")),
    }
}

fn check(got: candle_lazy_exec::Result<Tensor>, expected: &Expected, what: &str) {
    match (got, expected) {
        (Ok(tensor), Expected::All(want)) => {
            let got = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(got.iter().all(|v| v == want), "{what}: {got:?}, not {want}");
        }
        (Err(error), Expected::Error(words)) => {
            let text = error.to_string();
            assert!(text.contains(words) && text.contains(file!()), "{what}: {text}");
        }
        (Ok(_), Expected::Error(words)) => panic!("{what}: a value, not {words}"),
        (Err(error), Expected::All(_)) => panic!("{what}: {error}"),
    }
}

/// One thread's life: it submits one program after the other and treats each in a way of its own.
fn submitter(seed: u64, shared: &LazyTensor) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut left_alone: Vec<(Eval, Expected)> = Vec::new();
    for round in 0..ROUNDS {
        let (kind, way, n) = (rng.random_range(0..7u32), rng.random_range(0..8u32), rng.random_range(1..9u8));
        let what = format!("seed {seed}, round {round}, program {kind}, way {way}");
        let (y, expected) = program(kind, f32::from(n), shared);
        let mut eval = y.eval_async();
        match way {
            0 => check(eval.wait(), &expected, &what),
            1 => check(block_on(eval), &expected, &what),
            2 => drop(eval),
            3 => {
                let _ = pin!(&mut eval).poll(&mut Context::from_waker(Waker::noop()));
            }
            // at once, beside the one in the line
            4 => {
                check(y.eval(), &expected, &what);
                check(eval.wait(), &expected, &what);
            }
            // the first of three that is there; the others are dropped
            5 => {
                let (got, _, _) = block_on(select_all([eval, y.eval_async(), y.eval_async()]));
                check(got, &expected, &what);
            }
            6 => {
                let all = block_on(try_join_all([eval_all_async(&[&y, shared]), eval_all_async(&[shared])]));
                check(all.map(|mut all| all.swap_remove(0).swap_remove(0)), &expected, &what);
            }
            _ => left_alone.push((eval, expected)),
        }
    }
    for (eval, expected) in left_alone {
        check(eval.wait(), &expected, &format!("seed {seed}, in the end"));
    }
}

#[test]
fn nothing_is_alive_after_sixteen_threads_submitted_dropped_failed_and_panicked() {
    let before = (live_nodes(), memory_stats().active);
    {
        // pending, so that all of them compute it and the first one's value stays
        let shared = (LazyTensor::from(Tensor::full(1f32, (8, 8), &CPU).unwrap()) * 3.0).unwrap();
        std::thread::scope(|scope| {
            for seed in 0..SUBMITTERS {
                let shared = &shared;
                scope.spawn(move || submitter(seed, shared));
            }
        });
    }
    // behind all that was submitted
    let last = LazyTensor::new(&[1f32], &CPU).unwrap().exp().unwrap();
    block_on(last.eval_async()).unwrap();
    drop(last);
    assert_eq!((live_nodes(), memory_stats().active), before);
    assert_eq!(before, (0, 0));
}
