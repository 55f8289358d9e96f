//! What an evaluation tells a `tracing` subscriber: spans that nest as the work does, with their fields.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use candle_core::{Device, Tensor};
use candle_lazy_exec::batch::BatchExecutor;
use candle_lazy_exec::{LazyTensor, Result};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};

#[derive(Debug, Clone, Default)]
struct Seen {
    /// The names of the spans around it and its own.
    path: Vec<&'static str>,
    fields: BTreeMap<&'static str, String>,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }
}

/// Keeps everything.
#[derive(Clone, Default)]
struct Keeper(Arc<Mutex<Vec<Seen>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Keeper {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        let path = span.scope().from_root().map(|span| span.name()).collect();
        let mut seen = Seen { path, ..Seen::default() };
        attributes.record(&mut seen);
        let mut all = self.0.lock().unwrap();
        span.extensions_mut().insert(all.len());
        all.push(seen);
    }
    fn on_record(&self, id: &Id, record: &Record<'_>, context: Context<'_, S>) {
        let at = *context.span(id).unwrap().extensions().get::<usize>().unwrap();
        record.record(&mut self.0.lock().unwrap()[at]);
    }
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut seen = Seen { path: vec!["event"], ..Seen::default() };
        event.record(&mut seen);
        self.0.lock().unwrap().push(seen);
    }
}

/// One test at a time: which spans anybody listens to is the process's.
static ALONE: Mutex<()> = Mutex::new(());

impl Keeper {
    /// What `f` causes on this thread.
    fn of<R>(f: impl FnOnce() -> R) -> (R, Vec<Seen>) {
        let keeper = Self::default();
        let subscriber = Registry::default().with(keeper.clone());
        let result = tracing::subscriber::with_default(subscriber, f);
        let seen = keeper.0.lock().unwrap().clone();
        (result, seen)
    }
}

fn graph(x: &LazyTensor) -> Result<LazyTensor> {
    let y = x.matmul(&x.t()?)?.softmax(1)?;
    y.sum_keepdim(0)?.exp()
}

fn x() -> LazyTensor {
    LazyTensor::from(Tensor::randn(0f32, 1.0, (5, 7), &Device::Cpu).unwrap())
}

#[test]
fn an_evaluation_is_told_step_by_step() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let x = x();
    // without a subscriber the same bits
    let want = graph(&x).unwrap().to_vec2::<f32>().unwrap();
    let ((value, report), seen) = Keeper::of(|| graph(&x).unwrap().eval_with_report().unwrap());
    assert_eq!(value.to_vec2::<f32>().unwrap(), want);
    let of = |path: &[&str]| seen.iter().filter(|span| span.path == path).collect::<Vec<_>>();
    let [eval] = of(&["eval"])[..] else { panic!("{seen:?}") };
    assert_eq!(eval.fields["nodes"], report.nodes.to_string());
    assert_eq!((eval.fields["cache_hit"].as_str(), report.cache_hit), ("true", true));
    let [run] = of(&["eval", "run"])[..] else { panic!("{seen:?}") };
    assert_eq!(run.fields["peak_bytes"], report.peak_bytes.to_string());
    let steps = of(&["eval", "run", "step"]);
    assert_eq!(steps.len().to_string(), run.fields["steps"]);
    for (number, step) in steps.iter().enumerate() {
        assert_eq!(step.fields["number"], number.to_string());
    }
    let made = |kernel: &str| steps.iter().filter(|step| step.fields["kernel"] == format!("{kernel:?}")).count();
    for (kernel, count) in &report.kernels {
        assert_eq!(made(kernel), *count, "{kernel}");
    }
    assert!(steps.iter().any(|step| step.fields["ops"].contains("softmax")), "{steps:?}");
    assert_eq!(of(&["eval", "compile"]).len(), 0);
}

#[test]
fn a_new_plan_is_a_span_of_its_own() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (_, seen) = Keeper::of(|| x().sin().unwrap().cos().unwrap().abs().unwrap().sum_all().unwrap().eval().unwrap());
    let paths: Vec<&[&str]> = seen.iter().map(|span| &span.path[..]).collect();
    let at = |path: &[&str]| {
        paths.iter().position(|found| *found == path).unwrap_or_else(|| panic!("no {path:?} in {paths:?}"))
    };
    assert!(at(&["eval", "capture"]) < at(&["eval", "compile"]));
    assert!(at(&["eval", "compile"]) < at(&["eval", "run"]));
}

#[test]
fn an_asynchronous_job_says_that_it_was_submitted() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (_, seen) = Keeper::of(|| (x() + 1.0).unwrap().eval_async().wait().unwrap());
    assert!(seen.iter().any(|event| event.path == ["event"] && event.fields["message"] == "submitted"), "{seen:?}");
}

#[test]
fn a_batch_is_told_with_its_counters() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // the executor's thread is not this one: it has the subscriber that was the default when it began
    let keeper = Keeper::default();
    let subscriber: Arc<dyn Subscriber + Send + Sync> = Arc::new(Registry::default().with(keeper.clone()));
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let executor = BatchExecutor::new().unwrap();
    let x = x();
    let answers: Vec<_> = (0..8).map(|_| executor.submit(&graph(&x).unwrap()).unwrap()).collect();
    for answer in answers {
        answer.wait().unwrap();
    }
    executor.shutdown(candle_lazy_exec::batch::Shutdown::Drain);
    let seen = keeper.0.lock().unwrap();
    let requests: usize =
        seen.iter().filter(|s| s.path == ["batch"]).map(|s| s.fields["requests"].parse::<usize>().unwrap()).sum();
    assert_eq!(requests, 8, "{seen:?}");
    let done = seen.iter().rev().find(|s| s.fields.get("message").is_some_and(|m| m == "batch done")).unwrap();
    assert_eq!(done.fields["queued"], "0");
}
