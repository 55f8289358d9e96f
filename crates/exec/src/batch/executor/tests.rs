//! Who serves which request, and what becomes of those that are cancelled.

use super::super::MaxWait;
use super::*;
use crate::config::EvalOptions;
use crate::error::QueueError;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::time::Duration;

/// Says that it runs, and goes on when it is told to.
struct Slow {
    runs: Sender<()>,
    end: Mutex<Receiver<()>>,
}

impl CustomOp1 for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.runs.send(()).map_err(candle_core::Error::wrap)?;
        self.end.lock().recv().map_err(candle_core::Error::wrap)?;
        Ok((storage.clone(), layout.shape().clone()))
    }
}

/// Keeps the executor's thread busy with a copy of `x` until it is told to go on.
fn busy(executor: &BatchExecutor, x: &LazyTensor) -> (Submission, Sender<()>) {
    let ((runs, started), (go, end)) = (channel(), channel());
    let slow = x.custom_op1(Slow { runs, end: Mutex::new(end) }, x.dims(), candle_core::DType::F32).unwrap();
    let slow = executor.submit(&slow).unwrap();
    started.recv().unwrap();
    (slow, go)
}

/// Requests take a microsecond, whatever this machine says.
fn as_if_small(executor: &BatchExecutor) {
    (0..64).for_each(|_| executor.0.line.ran(1, Duration::from_micros(1)));
}

#[test]
fn small_requests_are_served_by_who_asks_while_the_executor_is_busy() {
    let executor = BatchExecutor::new().unwrap();
    let x = LazyTensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap();
    let (slow, go) = busy(&executor, &x);
    // the executor's thread does nothing else until it is told; what waits for room is never answered at once
    let first = executor.try_submit(&x.affine(2.0, -1.0).unwrap()).unwrap();
    let ones: Vec<_> = (0..3 * TURN + 5).map(|i| x.affine(i as f64, 1.0).unwrap()).collect();
    let asked: Vec<_> = ones
        .iter()
        .map(|one| {
            as_if_small(&executor);
            executor.submit(one).unwrap()
        })
        .collect();
    assert!(executor.0.line.len() < TURN, "who asks served what had come together");
    assert_eq!(first.wait().unwrap().to_vec1::<f32>().unwrap(), [1., 3., 5.]);
    assert!(executor.stats().batch_sizes.counts[5] > 0, "sixteen were served together");
    for (i, one) in asked.into_iter().enumerate() {
        as_if_small(&executor);
        assert_eq!(one.wait().unwrap().to_vec1::<f32>().unwrap(), [1, 2, 3].map(|x| (x * i + 1) as f32));
    }
    // one that is not small is not taken, and nor is what is behind it
    let large = x.softmax(0).and_then(|y| y.sum_keepdim(0)).unwrap();
    let (large, one) = (executor.submit(&large).unwrap(), executor.submit(&ones[0]).unwrap());
    as_if_small(&executor);
    assert!(!serve_small(&executor.0.line, &Window::default()));
    assert_eq!(executor.stats().queued, 2);
    go.send(()).unwrap();
    assert_eq!(slow.wait().unwrap().to_vec1::<f32>().unwrap(), [1., 2., 3.]);
    assert_eq!((large.wait().unwrap().dims(), one.wait().unwrap().dims()), (&[1][..], &[3][..]));
}

#[test]
fn what_is_small_is_answered_while_it_is_submitted_where_nobody_waits() {
    let executor = BatchExecutor::new().unwrap();
    let x = LazyTensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap();
    let (slow, go) = busy(&executor, &x);
    // the executor's thread is busy: nobody else could have answered
    as_if_small(&executor);
    let twice = x.affine(2.0, 0.0).unwrap();
    for i in 1..=2 {
        let one = executor.submit(&twice).unwrap();
        assert!(matches!(one.0 .0, Asked::Answered(Some(Ok(_)))));
        let mut one = Box::pin(one);
        let mut context = Context::from_waker(std::task::Waker::noop());
        let Poll::Ready(value) = one.as_mut().poll(&mut context) else { panic!("not ready") };
        assert_eq!(value.unwrap().to_vec1::<f32>().unwrap(), [2., 4., 6.]);
        assert!(matches!(one.as_mut().poll(&mut context), Poll::Ready(Err(_))), "it gives its answer once");
        let stats = executor.stats();
        assert_eq!((stats.at_once, stats.completed, stats.submitted), (i, i, 1 + i));
    }
    let later = |one: &Submission| matches!(one.0 .0, Asked::InLine(..));
    let exp = x.exp().unwrap();
    let how = SubmitOptions { deadline: Some(Instant::now() + Duration::from_secs(60)), ..Default::default() };
    let all = executor.submit_all(&[&exp, &twice], &SubmitOptions::default()).unwrap();
    assert!(matches!(all.0, Asked::InLine(..)), "several are one request");
    let due = executor.submit_all(&[&exp], &how).unwrap();
    assert!(matches!(due.0, Asked::InLine(..)), "it has a deadline");
    assert!(later(&executor.submit(&exp).unwrap()), "others wait");
    drop((all, due));
    executor.0.line.close(Shutdown::Cancel);
    let refused = executor.submit(&exp).err();
    assert!(matches!(refused, Some(Error::Queue(QueueError::Closed))), "{refused:?}");
    go.send(()).unwrap();
    assert_eq!(slow.wait().unwrap().to_vec1::<f32>().unwrap(), [1., 2., 3.]);
    assert_eq!(executor.stats().at_once, 2);
}

#[test]
fn what_is_not_small_or_not_known_to_be_is_not_answered_at_once() {
    let executor = BatchExecutor::new().unwrap();
    let x = LazyTensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap();
    let one = executor.submit(&x.exp().unwrap()).unwrap();
    assert!(matches!(one.0 .0, Asked::InLine(..)), "nothing is known yet");
    one.wait().unwrap();
    let large = LazyTensor::from(Tensor::ones((64, 4096), candle_core::DType::F32, &Device::Cpu).unwrap());
    let wide = LazyTensor::from(Tensor::ones((4096, 64), candle_core::DType::F32, &Device::Cpu).unwrap());
    let var = candle_core::Var::new(&[1f32, 2.], &Device::Cpu).unwrap();
    let tracked = LazyTensor::from(var.as_tensor().clone());
    let of = [
        large.exp().unwrap(),
        x.softmax(0).unwrap().exp().unwrap(),
        LazyTensor::from(Tensor::ones((1, 64), candle_core::DType::F32, &Device::Cpu).unwrap())
            .lora(&large, &wide, 1.0)
            .unwrap(),
        tracked.affine(2.0, 0.0).unwrap(),
    ];
    for (i, one) in of.iter().enumerate() {
        as_if_small(&executor);
        let value = executor.submit(one).unwrap();
        assert!(matches!(value.0 .0, Asked::InLine(..)), "{i}");
        assert_eq!(value.wait().unwrap().dims(), one.dims());
    }
    assert_eq!(executor.stats().at_once, 0);
    let fixed = BatchOptions {
        window: Window { max_wait: MaxWait::Fixed(Duration::ZERO), ..Window::default() },
        ..BatchOptions::default()
    };
    let fixed = BatchExecutor::with_options(&fixed).unwrap();
    (0..64).for_each(|_| fixed.0.line.ran(1, Duration::from_micros(1)));
    let one = fixed.submit(&x.neg().unwrap()).unwrap();
    assert!(matches!(one.0 .0, Asked::InLine(..)), "a window that is set is kept");
    one.wait().unwrap();
}

#[test]
fn nobody_is_served_by_a_function_that_is_being_recorded() {
    let executor = BatchExecutor::new().unwrap();
    let x = LazyTensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap();
    as_if_small(&executor);
    let other = executor.try_submit(&x.affine(3.0, 0.0).unwrap()).unwrap();
    let mine = executor.try_submit(&x.affine(2.0, 0.0).unwrap()).unwrap();
    let mine = Mutex::new(Some(mine));
    let twice = crate::compile(|inputs: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
        as_if_small(&executor);
        if let Some(mine) = mine.lock().take() {
            assert!(!serve_small(&executor.0.line, &Window::default()));
            assert_eq!(mine.wait()?.to_vec1::<f32>()?, [2., 4., 6.]);
        }
        Ok(vec![inputs[0].affine(2.0, 0.0)?])
    });
    let values = twice.call(&[&x]).unwrap();
    assert_eq!(values[0].eval().unwrap().to_vec1::<f32>().unwrap(), [2., 4., 6.]);
    assert_eq!(other.wait().unwrap().to_vec1::<f32>().unwrap(), [3., 6., 9.]);
}

#[test]
fn what_takes_long_or_is_looked_for_by_a_waker_is_not_small() {
    let of = |dims: &[usize]| {
        LazyTensor::from(candle_core::Tensor::ones(dims, candle_core::DType::F32, &Device::Cpu).unwrap())
    };
    let (row, wide, tall) = (of(&[1, 64]), of(&[64, 4096]), of(&[4096, 64]));
    let small = |y: &LazyTensor| is_small(&request(&[y]));
    assert!(small(&row.softmax(1).unwrap()) && small(&row.exp().unwrap()));
    assert!(!small(&wide.softmax(1).unwrap()) && !small(&wide.exp().unwrap()));
    assert!(!small(&row.lora(&wide, &tall, 1.0).unwrap()), "few results of much");
    assert!(!small(&row.softmax(1).unwrap().exp().unwrap()));
    // one who polls is woken by the executor's thread, not by whoever happens to wait
    let executor = BatchExecutor::new().unwrap();
    let (slow, go) = busy(&executor, &row);
    let mut polled = executor.try_submit(&row.exp().unwrap()).unwrap();
    as_if_small(&executor);
    let mut context = Context::from_waker(std::task::Waker::noop());
    assert!(Pin::new(&mut polled).poll(&mut context).is_pending());
    assert!(!serve_small(&executor.0.line, &Window::default()));
    go.send(()).unwrap();
    assert!(slow.wait().is_ok() && polled.wait().is_ok());
}

#[test]
fn cancelled_requests_beside_wanted_ones_are_left_out() {
    let executor = BatchExecutor::new().unwrap();
    let x = LazyTensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap();
    as_if_small(&executor);
    // cancelled requests beside wanted ones
    let mut kept = Vec::new();
    for i in 0..TURN - 1 {
        let one = executor.try_submit(&x.affine(2.0, i as f64).unwrap()).unwrap();
        if i % 2 == 0 {
            kept.push((i, one));
        }
    }
    for (i, one) in kept {
        assert_eq!(one.wait().unwrap().to_vec1::<f32>().unwrap()[0], 2.0 + i as f32);
    }
    let (values, _) = crate::eval_all_with(&[&x.exp().unwrap()], &EvalOptions::default()).unwrap();
    assert_eq!(
        executor.submit(&x.exp().unwrap()).unwrap().wait().unwrap().to_vec1::<f32>().unwrap(),
        values[0].to_vec1::<f32>().unwrap()
    );
}
