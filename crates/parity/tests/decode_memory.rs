//! A thousand decode steps: no cache copy, and no allocation over 64 KB beyond the logits.
//!
//! In a binary of its own, because it counts every allocation of the process.

#![allow(clippy::unwrap_used)] // outside the test function too: a model that cannot be built fails the test

use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::models::causal_lm_config::CausalLmConfig;
use candle_lazy_nn::models::{Cache, CausalLm};
use candle_lazy_parity::alloc::{Count, CountingAlloc};

#[global_allocator]
static ALLOCATOR: CountingAlloc = CountingAlloc;

const STEPS: usize = 1000;

fn model() -> CausalLm {
    // a cache of one head row per position is 1,100 x 64 floats, 280 KB: one copy of it would be seen
    let config = r#"{"model_type": "llama", "hidden_size": 192, "intermediate_size": 384, "vocab_size": 1000,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": true}"#;
    let config = CausalLmConfig::from_json(config).unwrap();
    let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    CausalLm::load(vb, &config).unwrap()
}

#[test]
fn a_thousand_decode_steps_copy_no_cache_and_allocate_nothing_large() {
    let model = model();
    let mut cache = model.new_cache(1100).unwrap();
    let step = |cache: &mut Cache, ids: &[u32]| {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = model.forward(&ids.into(), cache).unwrap();
        logits.eval_with_report().unwrap()
    };
    step(&mut cache, &[1, 2, 3, 4]);
    for i in 0..20 {
        step(&mut cache, &[i]);
    }
    let count = Count::begin();
    assert!(count.is_counting());
    count.reset();
    let (mut copies, mut in_place, mut fallbacks) = (0, 0, 0);
    for i in 0..STEPS {
        let (_, report) = step(&mut cache, &[i as u32 % 1000]);
        copies += report.copies;
        in_place += report.in_place;
        fallbacks += report.fallback_count();
    }
    assert_eq!((copies, in_place, fallbacks), (0, 4 * STEPS, 0));
    let (largest, more) = (count.largest_bytes(), count.live_bytes());
    assert!(largest <= 64 << 10, "an allocation of {largest} bytes");
    // plans for lengths that coincide with another size stay in the cache; nothing else grows
    assert!(more < 1 << 20, "{more} bytes more than before");
}
