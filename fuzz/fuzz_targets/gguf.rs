//! Arbitrary bytes as a GGUF file: header, config, every tensor, and a step of the model where one comes out.
#![no_main]

use candle_core::{DType, Device};
use candle_lazy_fuzz::{contained, file_of};
use candle_lazy_nn::models::CausalLm;
use candle_lazy_nn::weights::Gguf;
use candle_lazy_nn::LazyTensor;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| contained(|| {
    let Ok(path) = file_of(data, "gguf") else { return };
    let Ok(file) = Gguf::open(&path) else { return };
    let vb = file.var_builder(DType::F32, &Device::Cpu);
    for (name, _) in file.tensors() {
        // a file of n bytes holds no tensor of more elements than the smallest block type allows
        let _ = vb.get_unchecked(name);
    }
    let config = file.config();
    let Ok(model) = CausalLm::load(vb, config) else { return };
    let Ok(mut cache) = model.new_cache(2.min(config.max_position_embeddings)) else { return };
    let Ok(ids) = LazyTensor::new(&[[0u32]], &Device::Cpu) else { return };
    if let Ok(logits) = model.forward(&ids, &mut cache) {
        let _ = logits.eval();
    }
}));
