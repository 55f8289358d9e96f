//! The timeline that the example `generate --timeline` writes: a file that Perfetto's reader of Chrome's trace format takes.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

#[path = "../examples/shared/timeline.rs"]
mod timeline;

use candle_core::{Device, Tensor};
use candle_lazy::exec::LazyTensor;
use serde_json::Value;
use std::collections::BTreeMap;

#[test]
fn it_has_every_step_of_every_thread_with_its_begin_and_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("timeline.json");
    let guard = timeline::begin(&file).unwrap();
    let x = LazyTensor::from(Tensor::randn(0f32, 1.0, (3, 4), &Device::Cpu).unwrap());
    let (_, report) = x.softmax(1).unwrap().matmul(&x.t().unwrap()).unwrap().eval_with_report().unwrap();
    std::thread::spawn(move || x.exp().unwrap().sum_all().unwrap().eval().unwrap()).join().unwrap();
    drop(guard);
    assert!(timeline::begin(&file.join("no")).is_err_and(|error| error.to_string().contains("timeline.json/no")));

    let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    // of each thread, the names of the spans that are open
    let mut open: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut begun: BTreeMap<String, usize> = BTreeMap::new();
    for event in &events {
        let stack = open.entry(event["tid"].as_u64().unwrap()).or_default();
        let name = event["name"].as_str().unwrap().to_string();
        match event["ph"].as_str().unwrap() {
            "B" => {
                assert!(event["ts"].as_f64().unwrap() >= 0.0);
                *begun.entry(name.clone()).or_default() += 1;
                stack.push(name);
            }
            "E" => assert_eq!(stack.pop(), Some(name)),
            _ => {}
        }
    }
    assert!(open.values().all(Vec::is_empty) && open.len() >= 2, "{open:?}");
    assert_eq!((begun["eval"], begun["run"]), (2, 2), "{begun:?}");
    assert!(begun["step"] > report.steps, "{begun:?}");
    let kernels: Vec<&str> = events.iter().filter_map(|event| event["args"]["kernel"].as_str()).collect();
    assert!(kernels.contains(&"matmul") || kernels.contains(&"\"matmul\""), "{kernels:?}");
}
