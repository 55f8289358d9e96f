//! `eval_async`: what it gives, what happens to what is dropped, and that nobody waits for more than must be.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use candle_lazy_exec::{compile, eval_all_async, join, Error, Eval, EvalAll, LazyTensor, Result};
use futures::executor::block_on;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

const CPU: Device = Device::Cpu;

/// Calls a function with its input's elements, and hands them on with one added.
struct Calls<F>(F);

impl<F: Fn() -> candle_core::Result<()>> CustomOp1 for Calls<F> {
    fn name(&self) -> &'static str {
        "calls"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        (self.0)()?;
        let (from, to) = layout.contiguous_offsets().expect("dense");
        let values = storage.as_slice::<f32>()?[from..to].iter().map(|v| v + 1.0).collect();
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }
}

/// `x + 1`, calling `f` while it runs.
#[track_caller]
fn calls(x: &LazyTensor, f: impl Fn() -> candle_core::Result<()> + Send + Sync + 'static) -> LazyTensor {
    x.custom_op1(Calls(f), x.shape(), DType::F32).unwrap()
}

/// `x + 1`, which runs until it is told to go on, and where to tell it; and where it says that it has begun.
fn gate(x: &LazyTensor) -> (LazyTensor, mpsc::Sender<()>, mpsc::Receiver<()>) {
    let (go_on, told) = mpsc::channel();
    let (begun, begins) = mpsc::channel();
    let told = Mutex::new(told);
    let op = calls(x, move || {
        begun.send(()).unwrap();
        told.lock().unwrap().recv().unwrap();
        Ok(())
    });
    (op, go_on, begins)
}

fn line(values: &[f32]) -> LazyTensor {
    LazyTensor::new(values, &CPU).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Counts.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Whether the future is still pending after one poll, with a waker that wakes nobody.
fn is_pending(future: &mut (impl Future + Unpin)) -> bool {
    pin!(future).poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

#[test]
fn a_hand_written_loop_is_woken_once_and_needs_no_runtime() {
    let (y, go_on, begins) = gate(&line(&[1.0, 2.0]));
    let mut eval = pin!(y.eval_async());
    let woken = Arc::new(Count::default());
    let waker = Waker::from(woken.clone());
    let mut context = Context::from_waker(&waker);
    begins.recv().unwrap();
    for _ in 0..3 {
        assert!(eval.as_mut().poll(&mut context).is_pending());
    }
    assert_eq!(woken.0.load(Ordering::SeqCst), 0);
    go_on.send(()).unwrap();
    while woken.0.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let Poll::Ready(value) = eval.as_mut().poll(&mut context) else { panic!("woken, and not ready") };
    assert_eq!(values(&value.unwrap()), [2.0, 3.0]);
    let Poll::Ready(Err(error)) = eval.as_mut().poll(&mut context) else { panic!("ready twice") };
    assert!(error.to_string().contains("polled after it had given its result"), "{error}");
    assert_eq!(woken.0.load(Ordering::SeqCst), 1);
}

#[test]
fn only_the_last_waker_is_woken() {
    let (y, go_on, begins) = gate(&line(&[1.0]));
    let mut eval = pin!(y.eval_async());
    let (first, last) = (Arc::new(Count::default()), Arc::new(Count::default()));
    begins.recv().unwrap();
    for woken in [&first, &last] {
        assert!(eval.as_mut().poll(&mut Context::from_waker(&Waker::from(woken.clone()))).is_pending());
    }
    go_on.send(()).unwrap();
    while last.0.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    assert_eq!((first.0.load(Ordering::SeqCst), Arc::strong_count(&first)), (0, 1), "it is not kept either");
}

#[test]
fn every_runtime_and_a_thread_that_waits_get_the_bits_of_eval() {
    let x = LazyTensor::from(Tensor::randn(0f32, 1.0, (7, 33), &CPU).unwrap());
    let w = LazyTensor::from(Tensor::randn(0f32, 1.0, (33, 20), &CPU).unwrap());
    type Program = fn(&LazyTensor, &LazyTensor) -> Result<LazyTensor>;
    let programs: [Program; 5] = [
        |x, _| x.exp(),
        |x, _| x.softmax(1),
        |x, w| x.matmul(w)?.gelu()?.rms_norm(None, 1e-5),
        |x, _| x.to_dtype(DType::F16)?.sum_keepdim(0)?.to_dtype(DType::F32),
        |x, w| w.t()?.contiguous()?.narrow(1, 0, 33)?.matmul(&x.t()?)?.sqr(),
    ];
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let ways: [&dyn Fn(Eval) -> Result<Tensor>; 3] =
        [&Eval::wait, &|eval| block_on(eval), &|eval| tokio.block_on(eval)];
    let bits = |t: &Tensor| values(t).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for (i, program) in programs.iter().enumerate() {
        let want = program(&x, &w).unwrap().eval().unwrap();
        for way in ways {
            let y = program(&x, &w).unwrap();
            let got = way(y.eval_async()).unwrap();
            assert_eq!((bits(&got), got.dims()), (bits(&want), want.dims()), "{i}");
            assert_eq!(got.id(), y.eval().unwrap().id(), "the value is the node's");
            assert_eq!(got.id(), y.eval_async().wait().unwrap().id(), "and is there at once");
        }
        let (y, z) = (program(&x, &w).unwrap(), program(&x, &w).unwrap().neg().unwrap());
        for all in [EvalAll::wait(eval_all_async(&[&y, &z])), block_on(eval_all_async(&[&y, &z]))] {
            let all = all.unwrap();
            assert_eq!((bits(&all[0]), bits(&all[1].neg().unwrap())), (bits(&want), bits(&want)), "{i}");
        }
    }
}

#[test]
fn what_candle_tracks_gets_its_gradient() {
    let var = Var::from_tensor(&Tensor::new(&[3f32, -2.0], &CPU).unwrap()).unwrap();
    let loss = LazyTensor::from(var.as_tensor()).sqr().unwrap().sum_all().unwrap();
    for loss in [loss.eval_async().wait().unwrap(), block_on(loss.eval_async()).unwrap()] {
        // d Σx² = 2x
        assert_eq!(values(loss.backward().unwrap().get(var.as_tensor()).unwrap()), [6.0, -4.0]);
    }
}

#[test]
fn the_next_step_is_recorded_and_submitted_while_one_runs() {
    const STEPS: usize = 5;
    let runs = Arc::new(AtomicUsize::new(0));
    let (go_on, told) = mpsc::channel::<()>();
    let (begun, begins) = mpsc::channel();
    let told = Arc::new(Mutex::new(told));
    let mut state = line(&[0.0]);
    let mut running: Option<Eval> = None;
    for step in 0..STEPS {
        let (runs, told, begun) = (runs.clone(), told.clone(), begun.clone());
        // recorded on a result that does not exist yet, since its op has not been told to go on
        state = calls(&(&state * 2.0).unwrap(), move || {
            runs.fetch_add(1, Ordering::SeqCst);
            begun.send(()).unwrap();
            told.lock().unwrap().recv().unwrap();
            Ok(())
        });
        let eval = state.eval_async();
        if let Some(mut earlier) = running.replace(eval) {
            begins.recv().unwrap();
            assert!(is_pending(&mut earlier), "step {step} is in the line, and the one before it runs");
            // what needs nothing of it has no need to wait
            assert_eq!((line(&[4.0]) + 1.0).unwrap().to_vec1::<f32>().unwrap(), [5.0]);
            go_on.send(()).unwrap();
            // sₙ₊₁ = 2·sₙ + 1 from 0: 2ⁿ − 1
            assert_eq!(values(&earlier.wait().unwrap()), [(1 << step) as f32 - 1.0]);
        }
    }
    go_on.send(()).unwrap();
    assert_eq!(values(&running.unwrap().wait().unwrap()), [31.0]);
    assert_eq!(runs.load(Ordering::SeqCst), STEPS, "no step was computed for another one");
}

#[test]
fn evaluations_take_their_turns_in_the_order_of_their_arrival() {
    let (first, go_on, begins) = gate(&line(&[1.0]));
    let first = first.eval_async();
    begins.recv().unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let rest: Vec<Eval> = (0..5)
        .map(|i| {
            let order = order.clone();
            calls(&line(&[i as f32]), move || {
                order.lock().unwrap().push(i);
                Ok(())
            })
            .eval_async()
        })
        .collect();
    go_on.send(()).unwrap();
    for (i, eval) in rest.into_iter().enumerate().rev() {
        assert_eq!(values(&block_on(eval).unwrap()), [i as f32 + 1.0]);
    }
    first.wait().unwrap();
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4]);
}

#[test]
fn dropped_before_it_begins_it_never_begins_and_is_freed_at_once() {
    let (first, go_on, begins) = gate(&line(&[1.0]));
    let first = first.eval_async();
    begins.recv().unwrap();
    let alive = Arc::new(());
    let held = alive.clone();
    let y = calls(&line(&[1.0]), move || {
        let _ = &held;
        panic!("it ran");
    });
    let (mut polled, unpolled) = (y.eval_async(), y.exp().unwrap().eval_async());
    assert!(is_pending(&mut polled));
    drop((polled, unpolled));
    assert!(!y.is_ready());
    drop(y);
    assert_eq!(Arc::strong_count(&alive), 1, "the op is gone while the line does not move");
    go_on.send(()).unwrap();
    first.wait().unwrap();
}

#[test]
fn dropped_while_it_runs_it_goes_on_and_its_value_stays() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let (inner, go_on, begins) = gate(&line(&[1.0]));
    let y = calls(&inner, move || {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let eval = y.eval_async();
    begins.recv().unwrap();
    drop(eval);
    go_on.send(()).unwrap();
    // behind it in the line
    block_on((line(&[1.0]) * 2.0).unwrap().sum_all().unwrap().eval_async()).unwrap();
    assert!(y.is_ready());
    assert_eq!((y.to_vec1::<f32>().unwrap(), runs.load(Ordering::SeqCst)), (vec![3.0], 1));
}

#[test]
fn what_is_evaluated_twice_at_once_has_one_value() {
    let (go_on, told) = mpsc::channel::<()>();
    let (begun, begins) = mpsc::channel();
    let told = Mutex::new(told);
    let first = AtomicUsize::new(0);
    let y = calls(&line(&[1.0]), move || {
        if first.fetch_add(1, Ordering::SeqCst) == 0 {
            begun.send(()).unwrap();
            told.lock().unwrap().recv().unwrap();
        }
        Ok(())
    });
    let eval = y.eval_async();
    begins.recv().unwrap();
    // the one in the line stands still; this one is the first to publish
    let now = y.eval().unwrap();
    go_on.send(()).unwrap();
    assert_eq!((values(&now), eval.wait().unwrap().id()), (vec![2.0], now.id()));
}

#[test]
fn errors_and_panics_reach_their_own_caller_and_name_the_line() {
    let at = std::panic::Location::caller().line();
    let fails = calls(&line(&[1.0]), || candle_core::bail!("no luck"));
    let panics = calls(&line(&[1.0]), || std::panic::resume_unwind(Box::new("out of order")));
    let fine = calls(&line(&[1.0]), || Ok(()));
    let (failed, panicked, done) = (fails.eval_async(), panics.eval_async(), fine.eval_async());
    assert_eq!(values(&done.wait().unwrap()), [2.0]);
    for (eval, words, below) in [(failed, "no luck", 1), (panicked, "a kernel panicked (out of order)", 2)] {
        let text = block_on(eval).unwrap_err().to_string();
        let place = format!("{}:{}", file!(), at + below);
        assert!(text.contains("calls") && text.contains(words) && text.contains(&place), "{text}");
    }
    assert!(!fails.is_ready() && !panics.is_ready(), "they can be tried again");
    assert_eq!(fails.eval_async().wait().unwrap_err().to_string(), fails.eval().unwrap_err().to_string());
}

/// Panics when it is dropped.
struct Sore;

impl Drop for Sore {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            std::panic::resume_unwind(Box::new("sore"));
        }
    }
}

#[test]
fn a_panic_outside_of_every_kernel_is_contained_too() {
    let (first, go_on, begins) = gate(&line(&[1.0]));
    let first = first.eval_async();
    begins.recv().unwrap();
    let sore = Sore;
    let y = calls(&line(&[1.0]), move || {
        let _ = &sore;
        Ok(())
    });
    let eval = y.eval_async();
    // the last to hold the op is the evaluation
    drop(y);
    go_on.send(()).unwrap();
    first.wait().unwrap();
    let text = block_on(eval).unwrap_err().to_string();
    assert!(text.contains("sore"), "{text}");
    assert_eq!(values(&block_on(line(&[1.0]).exp().unwrap().sum_all().unwrap().eval_async()).unwrap()), [1f32.exp()]);
}

#[test]
fn a_waker_that_panics_ends_nothing() {
    struct Panics;
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            std::panic::resume_unwind(Box::new("woken"));
        }
    }
    let (y, go_on, begins) = gate(&line(&[1.0]));
    let mut eval = y.eval_async();
    begins.recv().unwrap();
    assert!(pin!(&mut eval).poll(&mut Context::from_waker(&Waker::from(Arc::new(Panics)))).is_pending());
    go_on.send(()).unwrap();
    assert_eq!(values(&block_on(eval).unwrap()), [2.0]);
    assert_eq!(values(&block_on(line(&[1.0]).neg().unwrap().eval_async()).unwrap()), [-1.0]);
}

#[test]
fn an_op_that_evaluates_asynchronously_itself_does_not_wait_for_its_own_end() {
    for polled in [false, true] {
        let got = Arc::new(Mutex::new(None));
        let (inner, kept) = (line(&[20.0]), got.clone());
        let y = calls(&line(&[1.0]), move || {
            let eval = (&inner * 2.0)?.sum_all()?.eval_async();
            let value = if polled { block_on(eval) } else { eval.wait() };
            *kept.lock().unwrap() = Some(value?.to_scalar::<f32>()?);
            Ok(())
        });
        assert_eq!(values(&block_on(y.eval_async()).unwrap()), [2.0]);
        assert_eq!(*got.lock().unwrap(), Some(40.0));
    }
}

#[test]
fn an_op_that_waits_for_itself_gets_an_error() {
    let (give, given) = mpsc::channel::<Eval>();
    let given = Mutex::new(given);
    let (say, said) = mpsc::channel();
    let y = calls(&line(&[1.0]), move || {
        let mut eval = given.lock().unwrap().recv().unwrap();
        let polled = pin!(&mut eval).poll(&mut Context::from_waker(Waker::noop()));
        say.send(polled.map(|value| value.unwrap_err().to_string())).unwrap();
        Ok(())
    });
    // the future goes into the op itself
    give.send(y.eval_async()).unwrap();
    let Poll::Ready(text) = said.recv().unwrap() else { panic!("it would wait for ever") };
    assert!(text.contains("waits for its own evaluation"), "{text}");
}

#[test]
fn a_function_that_is_being_compiled_evaluates_nothing() {
    let x = line(&[1.0, 2.0]);
    let f = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
        x[0].sum_all()?.eval_async().wait()?;
        Ok(vec![x[0].clone()])
    });
    let text = f.call(&[&x]).unwrap_err().to_string();
    assert!(text.contains("sum") && text.contains("inside of a compiled function"), "{text}");
    // what was submitted outside may be waited for: the engine runs it
    let before = Mutex::new(Some(x.sqr().unwrap().sum_all().unwrap().eval_async()));
    let f = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
        let five = before.lock().unwrap().take().unwrap().wait()?.to_scalar::<f32>().map_err(Error::from)?;
        Ok(vec![(&x[0] * f64::from(five))?])
    });
    assert_eq!(f.call(&[&x]).unwrap()[0].to_vec1::<f32>().unwrap(), [5.0, 10.0]);
}

#[test]
fn joined_evaluations_end_together_in_their_order_and_the_first_error_counts() {
    let x = line(&[1.0, 2.0]);
    let squares = || [x.sqr().unwrap().eval_async(), (&x * 3.0).unwrap().eval_async()];
    let wanted = [vec![1.0, 4.0], vec![3.0, 6.0]];
    let got = |tensors: Vec<Tensor>| tensors.iter().map(values).collect::<Vec<_>>();
    assert_eq!(got(join(squares()).wait().unwrap()), wanted);
    assert_eq!(got(block_on(join(squares())).unwrap()), wanted);
    assert!(join([]).wait().unwrap().is_empty());
    for waits in [true, false] {
        let ran = Arc::new(AtomicUsize::new(0));
        let fails = |what: &'static str| calls(&x, move || Err(candle_core::Error::Msg(what.into()))).eval_async();
        let counts = {
            let ran = ran.clone();
            calls(&x, move || {
                ran.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
        };
        let all = join([fails("first"), fails("second"), counts.eval_async()]);
        let error = if waits { all.wait() } else { block_on(all) }.unwrap_err();
        assert!(error.to_string().contains("first"), "{error}");
        assert_eq!(ran.load(Ordering::SeqCst), 1, "the others have ended all the same");
    }
}
