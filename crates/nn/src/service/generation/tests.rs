//! Steps that fail because of one of their texts.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, and the op of one panics

use super::*;
use crate::lora::LoraWeights;
use crate::models::{CausalLmConfig, GenerateOptions};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape};
use candle_lazy_exec::LazyTensor;
use candle_nn::{VarBuilder, VarMap};

const CONFIG: &str = r#"{"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5}"#;

fn model() -> CausalLm {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    CausalLm::load(vb, &CausalLmConfig::from_json(CONFIG).unwrap()).unwrap()
}

/// How an op of an adapter goes wrong.
#[derive(Debug, Clone, Copy)]
enum Wrong {
    Fails,
    Panics,
}

impl CustomOp1 for Wrong {
    fn name(&self) -> &'static str {
        "wrong"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match self {
            Self::Fails => candle_core::bail!("it fails"),
            Self::Panics => panic!("it panics"),
        }
    }
}

fn wrong(model: &CausalLm, how: Wrong) -> LoraSet {
    let factor = |shape| LazyTensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let a = factor((8, 2)).custom_op1(how, (8, 2), DType::F32).unwrap();
    LoraSet::of(model).unwrap().with(0, 0, LoraWeights::new(a, factor((2, 8)), 1.0).unwrap())
}

fn alone(model: &CausalLm, request: &GenerationRequest) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens: request.max_new_tokens, ..GenerateOptions::default() };
    model.generate(&request.prompt, options).unwrap().collect::<Result<_>>().unwrap()
}

#[test]
fn a_text_that_fails_or_panics_takes_no_other_with_it() {
    for how in [Wrong::Fails, Wrong::Panics] {
        let model = model();
        let options = GenerationOptions { prefill_tokens: 4, ..GenerationOptions::default() };
        let service = GenerationService::new(model.clone(), options).unwrap();
        service.add_adapter_set("wrong", wrong(&model, how));
        let submit = SubmitOptions::default();
        let requests: Vec<_> =
            (1..4).map(|i| GenerationRequest::new(vec![i; 7 * i as usize]).max_new_tokens(300)).collect();
        let mut running: Vec<_> =
            requests.iter().map(|request| service.submit(request.clone(), &submit).unwrap()).collect();
        for one in &mut running {
            one.wait_pieces().next().unwrap().unwrap();
        }
        let others = service.submit(GenerationRequest::new(vec![5; 9]).adapter("wrong"), &submit).unwrap();
        let error = others.wait().unwrap_err().to_string();
        assert!(error.contains(if matches!(how, Wrong::Fails) { "it fails" } else { "it panics" }), "{error}");
        for (request, one) in requests.iter().zip(running) {
            // the first token was taken above
            assert_eq!(one.wait().unwrap().tokens, alone(&model, request)[1..]);
        }
        let stats = service.stats();
        assert_eq!((stats.completed, stats.failed), (3, 1));
    }
}

#[test]
fn a_deadline_ends_a_text_that_runs() {
    let service = GenerationService::new(model(), GenerationOptions::default()).unwrap();
    // a thousand steps take longer
    let deadline = Some(std::time::Instant::now() + std::time::Duration::from_millis(5));
    let submit = SubmitOptions { deadline, ..SubmitOptions::default() };
    let request = GenerationRequest::new(vec![1]).max_new_tokens(1000);
    assert!(service.submit(request.clone(), &submit).and_then(Generating::wait).is_err());
    let served = service.submit(request.max_new_tokens(1), &SubmitOptions::default()).unwrap().wait().unwrap();
    assert_eq!(served.tokens.len(), 1);
}

#[test]
fn a_deadline_ends_a_text_that_waits_for_a_cache() {
    let options = GenerationOptions { cache_positions: 1024, ..GenerationOptions::default() };
    let service = GenerationService::new(model(), options).unwrap();
    // its cache is all that there is, and a thousand steps take longer than the deadline of the other
    let request = GenerationRequest::new(vec![1]).max_new_tokens(1000);
    let mut runs = service.submit(request.clone(), &SubmitOptions::default()).unwrap();
    runs.wait_pieces().next().unwrap().unwrap();
    let deadline = Some(std::time::Instant::now() + std::time::Duration::from_millis(5));
    let late = service.submit(request, &SubmitOptions { deadline, ..SubmitOptions::default() }).unwrap();
    let error = futures::executor::block_on(late.complete()).unwrap_err();
    assert!(matches!(&error, Error::Exec(error) if matches!(**error, candle_lazy_exec::Error::Queue(_))), "{error}");
    let stats = service.stats();
    assert_eq!((stats.running, stats.queued, stats.completed, stats.failed), (1, 0, 0, 1));
    drop(runs);
    // who goes away while it waits is forgotten too
    let runs = service.submit(GenerationRequest::new(vec![1]).max_new_tokens(1000), &SubmitOptions::default()).unwrap();
    drop(service.submit(GenerationRequest::new(vec![1]).max_new_tokens(1000), &SubmitOptions::default()).unwrap());
    drop(runs);
    let served = service.submit(GenerationRequest::new(vec![1]).max_new_tokens(1), &SubmitOptions::default()).unwrap();
    assert_eq!(served.wait().unwrap().tokens.len(), 1);
}
