//! Plans of packed steps, in a process of their own: the plan cache counts for all of it.
#![allow(clippy::unwrap_used)] // tests fail so

use candle_core::{DType, Device};
use candle_lazy_exec::materialize;
use candle_lazy_exec::plan::cache_stats;
use candle_lazy_nn::models::{CausalLm, CausalLmConfig, PackedDecoder, Segment};
use candle_lazy_nn::VarBuilder;

const CONFIG: &str = r#"{"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 700, "rms_norm_eps": 1e-5}"#;

#[test]
fn texts_that_grow_have_one_plan() {
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let model = CausalLm::load(vb, &CausalLmConfig::from_json(CONFIG).unwrap()).unwrap();
    let mut packed = PackedDecoder::new(model.clone());
    let (mut one, mut two) = (model.new_cache(512).unwrap(), model.new_cache(512).unwrap());
    let mut step = |ids: [&[u32]; 2]| {
        let [a, b] = ids;
        let mut segments = [
            Segment { ids: a, cache: &mut one, adapter: None, logits: true },
            Segment { ids: b, cache: &mut two, adapter: None, logits: true },
        ];
        let logits = packed.forward(&mut segments).unwrap().unwrap();
        let mut roots: Vec<_> = segments.iter().flat_map(|segment| segment.cache.handles()).collect();
        roots.push(&logits);
        materialize(&roots).unwrap();
    };
    // longer than any other size of the model
    step([&[1; 100], &[2; 130]]);
    step([&[3], &[4]]);
    let before = cache_stats();
    for _ in 0..150 {
        step([&[3], &[4]]);
    }
    let after = cache_stats();
    assert_eq!((after.misses - before.misses, after.hits - before.hits), (0, 150));
}
