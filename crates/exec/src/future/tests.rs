//! Where an evaluation runs, and what a thread may wait for.
use super::*;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape};
use std::sync::{Arc, Mutex};

/// Notes the threads that it runs on.
struct Where(Arc<Mutex<Vec<std::thread::ThreadId>>>);

impl CustomOp1 for Where {
    fn name(&self) -> &'static str {
        "where"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.0.lock().unwrap().push(std::thread::current().id());
        Ok((CpuStorage::F32(vec![7.0; layout.shape().elem_count()]), layout.shape().clone()))
    }
}

#[test]
fn who_waits_for_what_is_next_runs_it_and_the_engine_runs_the_rest() {
    let x = LazyTensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let here = std::thread::current().id();
    let ran_on = |wait: bool| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let eval = x.custom_op1(Where(seen.clone()), 2, DType::F32).unwrap().eval_async();
        let value = if wait { eval.wait() } else { futures::executor::block_on(eval) };
        assert_eq!(value.unwrap().to_vec1::<f32>().unwrap(), [7.0, 7.0]);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 1, "it runs once");
        seen[0]
    };
    assert_ne!(ran_on(false), here);
    // the engine may be the first, but not every time
    assert!((0..1000).any(|_| ran_on(true) == here));
    assert_ne!(ran_on(false), here);
}

#[test]
fn it_can_be_sent_and_a_state_says_what_it_is() {
    fn sent<T: Send + Sync + Unpin + 'static>(_: &T) {}
    let x = LazyTensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let (one, all) = (x.exp().unwrap().eval_async(), eval_all_async(&[]));
    sent(&one);
    sent(&all);
    assert_eq!(format!("{one:?} {all:?}"), "Eval(EvalAll(submitted)) EvalAll(ready)");
    assert!(all.wait().unwrap().is_empty());
    one.wait().unwrap();
}
