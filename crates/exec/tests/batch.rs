//! The batching executor: a request's bits are those that it gets alone, and nobody pays for a neighbour.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use candle_lazy_exec::batch::{BatchExecutor, BatchOptions, MaxWait, Shutdown, SubmitOptions, Window};
use candle_lazy_exec::{Error, LazyTensor, QueueError, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

fn numbers(dims: &[usize], seed: usize) -> Tensor {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1000.0 - 1.0).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn lazy(dims: &[usize], seed: usize) -> LazyTensor {
    LazyTensor::from(numbers(dims, seed))
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// An executor that draws so many requests as one batch.
fn batches_of(n: usize) -> BatchExecutor {
    let window = Window { max_batch: n, max_wait: MaxWait::Fixed(Duration::from_secs(30)) };
    BatchExecutor::with_options(&BatchOptions { capacity: 4096, window }).unwrap()
}

/// Weights that requests share.
struct Weights {
    up: LazyTensor,
    down: LazyTensor,
    bias: LazyTensor,
    norm: LazyTensor,
    a: LazyTensor,
    b: LazyTensor,
}

impl Weights {
    fn new() -> Self {
        Self {
            up: lazy(&[96, 48], 1),
            down: lazy(&[48, 96], 2),
            bias: lazy(&[48], 3),
            norm: lazy(&[48], 4),
            a: lazy(&[48, 4], 5),
            b: lazy(&[4, 48], 6),
        }
    }

    /// A block with products, norms, an epilogue with a residual of its own rows, and a LoRA onto them.
    fn block(&self, x: &LazyTensor) -> Result<LazyTensor> {
        let hidden = x.rms_norm(Some(&self.norm), 1e-5)?.linear(&self.up, None)?.silu()?;
        let y = (hidden.linear(&self.down, Some(&self.bias))? + x)?;
        y.add(&y.lora(&self.a, &self.b, 0.5)?)
    }
}

#[test]
fn a_request_has_the_bits_that_it_gets_alone() {
    let weights = Weights::new();
    let other = Weights { up: lazy(&[96, 48], 11), ..Weights::new() };
    // rows of one, of several dims, a vector, and more rows than are gathered
    let shapes: [&[usize]; 6] = [&[1, 48], &[3, 48], &[2, 5, 48], &[1, 1, 48], &[70, 48], &[1, 48]];
    for n in [2, 3, 17, 40] {
        let executor = batches_of(n);
        let inputs: Vec<Tensor> = (0..n).map(|i| numbers(shapes[i % shapes.len()], 100 + i)).collect();
        let weights_of = |i: usize| if i % 5 == 4 { &other } else { &weights };
        let graph = |i: usize| weights_of(i).block(&LazyTensor::from(inputs[i].clone())).unwrap();
        let alone: Vec<Vec<u32>> = (0..n).map(|i| bits(&graph(i).eval().unwrap())).collect();
        let graphs: Vec<LazyTensor> = (0..n).map(graph).collect();
        let asked: Vec<_> = graphs.iter().rev().map(|x| executor.submit(x).unwrap()).collect();
        for (i, one) in asked.into_iter().rev().enumerate() {
            let value = one.wait().unwrap();
            assert_eq!(value.dims(), inputs[i].dims());
            assert!(bits(&value) == alone[i], "request {i} of {n}");
            assert_eq!(value.id(), graphs[i].eval().unwrap().id(), "the value stays in the recorded tensor");
        }
        executor.shutdown(Shutdown::Drain);
        let stats = executor.stats();
        assert_eq!(stats.batch_sizes.count(), 1, "it was one batch");
        assert_eq!(stats.merged_products > 0, n > 6, "{n} requests, of several plans: {}", stats.merged_products);
    }
}

#[test]
fn transposed_and_strided_rows_are_gathered_as_they_read() {
    let w = lazy(&[20, 12], 1);
    let base = numbers(&[12, 9], 2);
    let wide = numbers(&[9, 24], 3);
    let inputs = || {
        let turned = LazyTensor::from(base.t().unwrap());
        let cut = LazyTensor::from(wide.narrow(1, 5, 12).unwrap());
        let plain = lazy(&[9, 12], 4);
        [turned, cut, plain]
    };
    let graph = |x: &LazyTensor| (x.linear(&w, None).unwrap().exp().unwrap() * 0.5).unwrap();
    let alone: Vec<_> = inputs().iter().map(|x| bits(&graph(x).eval().unwrap())).collect();
    let executor = batches_of(3);
    let asked: Vec<_> = inputs().iter().map(|x| executor.submit(&graph(x)).unwrap()).collect();
    for (one, alone) in asked.into_iter().zip(alone) {
        assert!(bits(&one.wait().unwrap()) == alone);
    }
}

/// Notes that it ran, and fails or panics where it reads what it must not.
struct Picky(Arc<AtomicUsize>);

impl CustomOp1 for Picky {
    fn name(&self) -> &'static str {
        "picky"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let CpuStorage::F32(data) = storage else { candle_core::bail!("f32 only") };
        match data[layout.start_offset()] {
            -1.0 => candle_core::bail!("not this one"),
            -2.0 => panic!("never this one"),
            _ => Ok((CpuStorage::F32(data.clone()), layout.shape().clone())),
        }
    }
}

#[test]
fn a_bad_request_fails_alone_and_names_its_line() {
    let ran = Arc::new(AtomicUsize::new(0));
    let w = lazy(&[2, 2], 1);
    let picky: Arc<Box<dyn CustomOp1 + Send + Sync>> = Arc::new(Box::new(Picky(ran.clone())));
    let graph = |first: f32| {
        let x = LazyTensor::new(&[[first, 1.0]], &Device::Cpu).unwrap().linear(&w, None).unwrap();
        let x = x.exp().unwrap().narrow(0, 0, 1).unwrap();
        // what it reads must be the number itself
        let own = LazyTensor::new(&[first, 1.0], &Device::Cpu).unwrap();
        let own = own.custom_op1_arc(&picky, 2, DType::F32).unwrap();
        x.broadcast_add(&own).unwrap()
    };
    let executor = batches_of(5);
    let firsts = [1.0, -1.0, 2.0, -2.0, 3.0];
    let graphs: Vec<LazyTensor> = firsts.iter().map(|&first| graph(first)).collect();
    let asked: Vec<_> = graphs.iter().map(|x| executor.submit(x).unwrap()).collect();
    for (first, one) in firsts.into_iter().zip(asked) {
        let result = one.wait();
        match first {
            -1.0 => {
                let error = result.unwrap_err();
                assert!(error.site().is_some() && error.to_string().contains("not this one"), "{error}");
            }
            -2.0 => {
                let error = result.unwrap_err();
                assert!(
                    matches!(error, Error::Panic { .. }) && error.to_string().contains("never this one"),
                    "{error}"
                );
            }
            _ => assert_eq!(bits(&result.unwrap()), bits(&graph(first).eval().unwrap())),
        }
    }
    let stats = executor.stats();
    assert_eq!((stats.completed, stats.failed, stats.queued), (3, 2, 0));
}

#[test]
fn requests_that_share_what_is_pending_compute_it_once() {
    let ran = Arc::new(AtomicUsize::new(0));
    let trunk = lazy(&[4, 48], 1).custom_op1(Picky(ran.clone()), (4, 48), DType::F32).unwrap();
    let w = lazy(&[8, 48], 2);
    let heads: Vec<LazyTensor> = (0..6).map(|i| (trunk.linear(&w, None).unwrap() + f64::from(i)).unwrap()).collect();
    let executor = batches_of(7);
    let mut asked: Vec<_> = heads.iter().map(|x| executor.submit(x).unwrap()).collect();
    // and one that is asked for twice
    asked.push(executor.submit(&heads[0]).unwrap());
    let values: Vec<Tensor> = asked.into_iter().map(|one| one.wait().unwrap()).collect();
    assert_eq!(ran.load(Ordering::Relaxed), 1);
    assert_eq!(values[6].id(), values[0].id());
    let w = numbers(&[8, 48], 2);
    let expected = candle_lazy_ops::linear(&numbers(&[4, 48], 1), &w, None).unwrap();
    for (i, value) in values[..6].iter().enumerate() {
        assert_eq!(bits(value), bits(&(&expected + i as f64).unwrap()));
    }
}

#[test]
fn caches_are_written_in_place_by_requests_of_one_batch() {
    let executor = batches_of(4);
    let mut caches: Vec<LazyTensor> =
        (0..4).map(|_| LazyTensor::zeros((3, 8), DType::F32, &Device::Cpu).unwrap()).collect();
    for step in 0..3 {
        let row = |i: usize| lazy(&[1, 8], 10 * step + i);
        caches =
            caches.iter().enumerate().map(|(i, c)| c.slice_assign(&[step..step + 1, 0..8], &row(i)).unwrap()).collect();
        let asked: Vec<_> = caches.iter().map(|c| executor.submit(&c.sum(1).unwrap()).unwrap()).collect();
        for one in asked {
            one.wait().unwrap();
        }
    }
    for (i, cache) in caches.iter().enumerate() {
        let expected =
            Tensor::cat(&[numbers(&[1, 8], i), numbers(&[1, 8], 10 + i), numbers(&[1, 8], 20 + i)], 0).unwrap();
        assert_eq!(bits(&cache.eval().unwrap()), bits(&expected));
    }
}

#[test]
fn several_roots_tracked_leaves_and_other_dtypes_are_what_eval_all_gives() {
    let var = Var::from_tensor(&numbers(&[5, 7], 1)).unwrap();
    let executor = batches_of(4);
    let x = LazyTensor::from(var.as_tensor().clone());
    let tracked = x.sqr().unwrap().sum_all().unwrap();
    let half = lazy(&[3, 7], 2).to_dtype(DType::BF16).unwrap();
    let half = half.matmul(&half.t().unwrap()).unwrap();
    let ints = LazyTensor::arange(0i64, 9, &Device::Cpu).unwrap();
    let several = [ints.mul(&ints).unwrap(), lazy(&[9], 3).exp().unwrap(), ints.clone()];
    let refs: Vec<&LazyTensor> = several.iter().collect();
    let plain = SubmitOptions::default();
    let (a, b) = (executor.submit(&tracked).unwrap(), executor.submit(&half).unwrap());
    let c = executor.submit_all(&refs, &plain).unwrap();
    let d = executor.submit_all(&[], &plain).unwrap();
    let loss = a.wait().unwrap();
    let gradient = loss.backward().unwrap().remove(&var).unwrap();
    assert_eq!(bits(&gradient), bits(&(var.as_tensor() * 2.0).unwrap()));
    assert_eq!(b.wait().unwrap().dims(), [3, 3]);
    let values = c.wait().unwrap();
    assert_eq!(values[0].to_vec1::<i64>().unwrap(), [0, 1, 4, 9, 16, 25, 36, 49, 64]);
    assert_eq!(values[2].to_vec1::<i64>().unwrap(), (0..9).collect::<Vec<i64>>());
    assert!(d.wait().unwrap().is_empty());
}

#[test]
fn what_is_dropped_never_runs_and_what_is_late_is_told() {
    let ran = Arc::new(AtomicUsize::new(0));
    let counted = || lazy(&[4], 1).custom_op1(Picky(ran.clone()), 4, DType::F32).unwrap();
    let executor = batches_of(3);
    drop(executor.submit(&counted()).unwrap());
    let soon = SubmitOptions { deadline: Some(Instant::now() + Duration::from_millis(20)), ..SubmitOptions::default() };
    // the window would stay open for longer, but not for one that has a deadline
    let one = executor.submit_all(&[&counted()], &soon).unwrap();
    assert!(matches!(one.wait(), Ok(_) | Err(Error::Queue(QueueError::Deadline))));
    let past = SubmitOptions { deadline: Some(Instant::now()), ..SubmitOptions::default() };
    let refused = executor.submit_all(&[&counted()], &past).unwrap_err();
    assert!(matches!(refused, Error::Queue(QueueError::Deadline)));
    assert!(ran.load(Ordering::Relaxed) <= 1);
    assert_eq!(executor.stats().cancelled, 1);
}

#[test]
fn a_shutdown_drains_or_cancels_as_asked() {
    for how in [Shutdown::Drain, Shutdown::Cancel] {
        let executor = batches_of(100);
        let asked: Vec<_> = (0..5).map(|i| executor.submit(&lazy(&[4], i).exp().unwrap()).unwrap()).collect();
        executor.clone().shutdown(how);
        for (i, one) in asked.into_iter().enumerate() {
            match (how, one.wait()) {
                (Shutdown::Drain, Ok(value)) => {
                    assert_eq!(bits(&value), bits(&lazy(&[4], i).exp().unwrap().eval().unwrap()));
                }
                (Shutdown::Cancel, Err(Error::Queue(QueueError::Closed))) => {}
                (_, other) => panic!("{how:?}: {other:?}"),
            }
        }
        let after = executor.submit(&lazy(&[4], 1).exp().unwrap()).unwrap_err();
        assert!(matches!(after, Error::Queue(QueueError::Closed)));
    }
    // the last handle drops: what waits is served
    let executor = batches_of(100);
    let one = executor.submit(&lazy(&[4], 1).exp().unwrap()).unwrap();
    drop(executor);
    one.wait().unwrap();
}

/// Asks the executor that runs it for another value, and waits.
struct Asks(Mutex<Option<BatchExecutor>>);

impl CustomOp1 for Asks {
    fn name(&self) -> &'static str {
        "asks"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let executor = self.0.lock().unwrap().take();
        let inner = lazy(&[3], 5).exp()?;
        let value = match executor {
            Some(executor) => executor.submit(&inner)?.wait()?,
            None => inner.eval()?,
        };
        Ok((CpuStorage::F32(value.to_vec1()?), layout.shape().clone()))
    }
}

#[test]
fn an_op_may_wait_for_the_executor_that_runs_it() {
    let executor = batches_of(2);
    let graph =
        |executor: Option<BatchExecutor>| lazy(&[3], 1).custom_op1(Asks(Mutex::new(executor)), 3, DType::F32).unwrap();
    let alone = bits(&graph(None).eval().unwrap());
    let asked: Vec<_> = (0..2).map(|_| executor.submit(&graph(Some(executor.clone()))).unwrap()).collect();
    for one in asked {
        assert_eq!(bits(&one.wait().unwrap()), alone);
    }
}

#[test]
fn any_runtime_polls_it_and_many_threads_ask_at_once() {
    let weights = Arc::new(Weights::new());
    let executor = BatchExecutor::with_options(&BatchOptions { capacity: 7, ..BatchOptions::default() }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let graph = |i: usize| {
        let x = lazy(&[1 + i % 3, 48], i);
        match i % 3 {
            0 => weights.block(&x).unwrap(),
            1 => x.softmax(1).unwrap(),
            _ => x.rms_norm(Some(&weights.norm), 1e-6).unwrap().sqr().unwrap(),
        }
    };
    let alone: Vec<_> = (0..60).map(|i| bits(&graph(i).eval().unwrap())).collect();
    runtime.block_on(async {
        let tasks: Vec<_> = (0..60)
            .map(|i| {
                let (executor, x) = (executor.clone(), graph(i));
                tokio::spawn(async move {
                    let how = SubmitOptions { lane: i as u64 % 4, ..SubmitOptions::default() };
                    executor.submit_async(&[&x], &how).await?.await
                })
            })
            .collect();
        for (task, alone) in tasks.into_iter().zip(&alone) {
            assert!(bits(&task.await.unwrap().unwrap()[0]) == *alone);
        }
    });
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for t in 0..8 {
            let (executor, alone, graph, barrier) = (&executor, &alone, &graph, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for i in (0..60).map(|i| (i * 7 + t * 11) % 60) {
                    assert!(bits(&executor.submit(&graph(i)).unwrap().wait().unwrap()) == alone[i]);
                }
            });
        }
    });
    assert_eq!(executor.stats().completed, 60 + 8 * 60);
}
