//! Arbitrary text as `config.json` of a decoder and of an encoder: parsed, and where the sizes are small the model is made of
//! zeros and run.
#![no_main]

use candle_core::{DType, Device, Tensor};
use candle_lazy_fuzz::contained;
use candle_lazy_nn::models::{BertConfig, BertModel, Cache, CausalLm, CausalLmConfig};
use candle_lazy_nn::LazyTensor;
use candle_nn::VarBuilder;
use libfuzzer_sys::fuzz_target;
use std::collections::HashMap;

/// No weight of a model that is run has more elements.
const SMALL: usize = 1 << 12;

fn small(sizes: &[usize]) -> bool {
    sizes.iter().try_fold(1usize, |n, &s| n.checked_mul(s)).is_some_and(|n| n <= SMALL)
}

fn zeros() -> VarBuilder<'static> {
    VarBuilder::zeros(DType::F32, &Device::Cpu)
}

fn nothing() -> VarBuilder<'static> {
    VarBuilder::from_tensors(HashMap::<String, Tensor>::new(), DType::F32, &Device::Cpu)
}

fn decoder(text: &str) {
    let Ok(config) = CausalLmConfig::from_json(text) else { return };
    assert!(CausalLm::load(nothing(), &config).is_err(), "a model of no weights");
    // the rotary table of a wide head is legal and takes its time
    if config.head_dim <= 1 << 14 {
        let _ = Cache::new(&config, config.max_position_embeddings.min(8), DType::F32, &Device::Cpu);
    }
    let width = config.num_attention_heads.saturating_mul(config.head_dim);
    let runs = small(&[config.vocab_size, config.hidden_size])
        && small(&[config.intermediate_size, config.hidden_size])
        && small(&[width, config.hidden_size])
        && config.num_hidden_layers <= 3;
    if !runs {
        return;
    }
    let Ok(model) = CausalLm::load(zeros(), &config) else { return };
    let Ok(mut cache) = model.new_cache(config.max_position_embeddings.min(4)) else { return };
    for ids in [vec![0u32, 1], vec![0]] {
        let Ok(ids) = LazyTensor::from_vec(ids.clone(), (1, ids.len()), &Device::Cpu) else { return };
        if let Ok(logits) = model.forward(&ids, &mut cache) {
            let _ = logits.eval();
        }
    }
}

fn encoder(text: &str) {
    let Ok(config) = BertConfig::from_json(text) else { return };
    assert!(BertModel::load(nothing(), &config).is_err(), "a model of no weights");
    let runs = small(&[config.vocab_size, config.hidden_size])
        && small(&[config.intermediate_size, config.hidden_size])
        && small(&[config.max_position_embeddings, config.hidden_size])
        && small(&[config.type_vocab_size, config.hidden_size])
        && small(&[config.hidden_size, config.hidden_size])
        && config.num_hidden_layers <= 3;
    if !runs {
        return;
    }
    let Ok(model) = BertModel::load(zeros(), &config) else { return };
    let Ok(ids) = LazyTensor::new(&[[0u32, 1]], &Device::Cpu) else { return };
    let Ok(segments) = LazyTensor::zeros((1, 2), DType::U32, &Device::Cpu) else { return };
    if let Ok(hidden) = model.forward(&ids, &segments, None) {
        let _ = hidden.eval();
    }
}

fuzz_target!(|data: &[u8]| contained(|| {
    if let Ok(text) = std::str::from_utf8(data) {
        decoder(text);
        encoder(text);
    }
}));
