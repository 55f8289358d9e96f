//! What must hold whatever a program does with handles, leaves, threads and failures.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_exec::{eval_all, materialize, LazyTensor};

const CPU: Device = Device::Cpu;

fn randn(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, dims, &CPU).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn eight_threads_share_graphs_while_a_variable_is_set() {
    let var = Var::from_tensor(&Tensor::ones((24, 24), DType::F32, &CPU).unwrap()).unwrap();
    let leaf = LazyTensor::from(var.as_detached_tensor());
    let shared = leaf.matmul(&leaf).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|worker| {
                let (leaf, shared) = (leaf.clone(), shared.clone());
                scope.spawn(move || {
                    for round in 0..60 {
                        let own = (leaf.t().unwrap().matmul(&leaf).unwrap() + &leaf).unwrap();
                        let both = (&own + &shared).unwrap();
                        match (worker + round) % 4 {
                            // built and dropped
                            0 => drop(both),
                            1 => assert_eq!(both.sum_all().unwrap().eval().unwrap().rank(), 0),
                            2 => {
                                materialize(&[&own]).unwrap();
                                assert!(own.is_ready());
                            }
                            _ => {
                                let bad = both.index_select(&LazyTensor::new(&[99u32], &CPU).unwrap(), 0).unwrap();
                                assert!(bad.eval().is_err());
                                assert_eq!(eval_all(&[&own, &both]).unwrap().len(), 2);
                            }
                        }
                    }
                })
            })
            .collect();
        let setter = scope.spawn(|| {
            let mut sets = 0u32;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                var.set(&Tensor::full((sets % 5) as f32, (24, 24), &CPU).unwrap()).unwrap();
                sets += 1;
            }
            sets
        });
        for worker in workers {
            worker.join().unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(setter.join().unwrap() > 0);
    });
    // a plan of matmuls alone reads its leaf in one step each: the shared product is one of the sets' products
    let product = flat(&shared.eval().unwrap());
    assert!(product.iter().all(|x| (0..5).any(|v| *x == (v * v * 24) as f32)), "{:?}", &product[..4]);
}

#[test]
fn a_leaf_is_read_when_its_plan_runs_and_a_result_stays() {
    let var = Var::from_tensor(&Tensor::new(&[1f32, 2.], &CPU).unwrap()).unwrap();
    let sum = (LazyTensor::from(var.as_detached_tensor()) * 10.0).unwrap();
    var.set(&Tensor::new(&[3f32, 4.], &CPU).unwrap()).unwrap();
    assert_eq!(sum.to_vec1::<f32>().unwrap(), [30.0, 40.0], "set between recording and evaluation is seen");
    var.set(&Tensor::new(&[5f32, 6.], &CPU).unwrap()).unwrap();
    assert_eq!(sum.to_vec1::<f32>().unwrap(), [30.0, 40.0], "a value that was computed does not change");
    // a tensor written through Candle is seen too, and a plan from the cache keeps no value
    let buffer = Tensor::zeros((2, 2), DType::F32, &CPU).unwrap();
    let twice = |t: &Tensor| (LazyTensor::from(t) * 2.0).unwrap();
    let before = twice(&buffer);
    buffer.slice_set(&Tensor::ones((1, 2), DType::F32, &CPU).unwrap(), 0, 1).unwrap();
    assert_eq!(flat(&before.eval().unwrap()), [0., 0., 2., 2.]);
    buffer.slice_set(&Tensor::ones((1, 2), DType::F32, &CPU).unwrap(), 0, 0).unwrap();
    assert_eq!(flat(&twice(&buffer).eval().unwrap()), [2., 2., 2., 2.]);
}

#[test]
fn a_failure_leaves_every_node_pending_and_a_retry_works() {
    let table = LazyTensor::from(randn(&[4, 3]));
    let ids = Var::from_tensor(&Tensor::new(&[0u32, 9], &CPU).unwrap()).unwrap();
    let h = table.exp().unwrap();
    let rows = h.index_select(&LazyTensor::from(ids.as_detached_tensor()), 0).unwrap();
    let y = rows.softmax(1).unwrap();
    let unrelated = (&h + 1.0).unwrap();
    for _ in 0..3 {
        assert!(eval_all(&[&unrelated, &y]).is_err());
        assert!([&h, &rows, &y, &unrelated].iter().all(|t| !t.is_ready()));
    }
    ids.set(&Tensor::new(&[0u32, 3], &CPU).unwrap()).unwrap();
    let values = eval_all(&[&unrelated, &y]).unwrap();
    assert!([&h, &rows, &y, &unrelated].iter().all(|t| t.is_ready()));
    assert_eq!((values[0].dims(), values[1].dims()), (&[4, 3][..], &[2, 3][..]));
}

#[test]
fn what_the_user_holds_is_never_overwritten() {
    let x = LazyTensor::from(randn(&[32, 16]));
    let mut held: Vec<(Tensor, Vec<f32>)> = Vec::new();
    let mut cache = LazyTensor::zeros((32, 16), DType::F32, &CPU).unwrap();
    for step in 0..24 {
        let y = (x.tanh().unwrap() * f64::from(step)).unwrap();
        let view = y.t().unwrap().narrow(0, 1, 4).unwrap();
        cache = cache.slice_set_owned(&y.narrow(0, 0, 1).unwrap(), 0, step as usize).unwrap();
        // a tensor of the user's, a view, and the cache itself, which the next step gives away
        let values = if step % 2 == 0 { eval_all(&[&y, &view, &cache]) } else { eval_all(&[&y, &view]) };
        for tensor in values.unwrap() {
            let copy = flat(&tensor);
            held.push((tensor, copy));
        }
        for (tensor, copy) in &held {
            assert_eq!(&flat(tensor), copy, "step {step}");
        }
    }
    assert_eq!(held.len(), 12 * 3 + 12 * 2);
}

#[test]
fn empty_views_behind_the_end_of_their_storage_are_read_and_computed() {
    let empty = Tensor::zeros((0, 4), DType::F32, &CPU).unwrap().narrow(1, 3, 1).unwrap();
    let x = LazyTensor::from(&empty);
    assert_eq!(x.to_vec2::<f32>().unwrap(), Vec::<Vec<f32>>::new());
    assert_eq!(x.t().unwrap().to_vec2::<f32>().unwrap(), vec![Vec::<f32>::new()]);
    assert_eq!(x.flatten_all().unwrap().to_vec1::<f32>().unwrap(), Vec::<f32>::new());
    assert_eq!(x.unsqueeze(0).unwrap().to_vec3::<f32>().unwrap(), vec![Vec::<Vec<f32>>::new()]);
    let ints = LazyTensor::from(Tensor::zeros((0, 4), DType::U32, &CPU).unwrap().narrow(1, 3, 1).unwrap());
    assert_eq!((&ints + &ints).unwrap().eval().unwrap().dims(), [0, 1]);
    assert_eq!(x.exp().unwrap().sum_keepdim(0).unwrap().eval_checked().unwrap().dims(), [1, 1]);
    assert!(x.first_nonfinite().unwrap().is_none());
}
