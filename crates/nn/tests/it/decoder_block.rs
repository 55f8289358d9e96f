//! One block of a decoder: with and without a cache, with adapters, without gradient.

use crate::common::{close, decoder_vars, tiny_config, Rng, TestResult};
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_nn::models::DecoderBlock;
use candle_lazy_nn::{Error, KvCache, LazyTensor, LoraWeights, Positions, RopeScaling, RopeTable, VarBuilder};
use std::collections::HashMap;

fn block() -> std::result::Result<(HashMap<String, Var>, DecoderBlock), Box<dyn std::error::Error>> {
    let config = tiny_config();
    let mut vars = HashMap::new();
    for (name, tensor) in decoder_vars(&config, 3)? {
        vars.insert(name, Var::from_tensor(&tensor)?);
    }
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    Ok((vars, DecoderBlock::load(&config, vb.pp("model.layers.0"))?))
}

fn positions(start: usize, len: usize) -> candle_lazy_nn::Result<Positions> {
    let table = RopeTable::new(4, 1e4, &RopeScaling::None, 16, DType::F32, &Device::Cpu)?;
    let (cos, sin) = table.slice(start, len)?;
    Ok(Positions { cos, sin })
}

#[test]
fn a_causal_mask_gives_what_the_cache_gives() -> TestResult {
    let (_, block) = block()?;
    let xs: LazyTensor = Rng::new(4).tensor(&[2, 6, 24], 1.)?.into();
    let mask = LazyTensor::causal_mask(6, 6, None, DType::F32, &Device::Cpu)?;
    let masked = block.forward_masked(&xs, &positions(0, 6)?, Some(&mask))?.eval()?;
    let detached = block.detached()?;
    let mut cache = KvCache::new(6);
    let first = detached.forward(&xs.narrow(1, 0, 4)?, &positions(0, 4)?, &mut cache)?;
    let rest = detached.forward(&xs.narrow(1, 4, 2)?, &positions(4, 2)?, &mut cache)?;
    let both = LazyTensor::cat(&[first, rest], 1)?.eval()?;
    assert!(!both.track_op() && masked.track_op());
    close(&both, &masked, 1e-5)?;
    // without a mask the first position sees the others
    let open = block.forward_masked(&xs, &positions(0, 6)?, None)?.eval()?;
    let away = (open.narrow(1, 0, 1)? - masked.narrow(1, 0, 1)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(away > 1e-2, "{away}");
    close(&open.narrow(1, 5, 1)?.contiguous()?, &masked.narrow(1, 5, 1)?.contiguous()?, 1e-5)
}

#[test]
fn every_map_takes_an_adapter_and_gradients_reach_it() -> TestResult {
    let (vars, mut block) = block()?;
    let mut rng = Rng::new(5);
    let xs: LazyTensor = rng.tensor(&[1, 3, 24], 1.)?.into();
    let at = positions(0, 3)?;
    let plain = block.forward_masked(&xs, &at, None)?.eval()?;
    let maps = [
        ("q_proj", 24, 24),
        ("k_proj", 24, 8),
        ("v_proj", 24, 8),
        ("o_proj", 24, 24),
        ("gate_proj", 24, 40),
        ("up_proj", 24, 40),
        ("down_proj", 40, 24),
    ];
    for (name, input, output) in maps {
        let a = Var::from_tensor(&rng.tensor(&[input, 2], 0.5)?)?;
        let b = Var::from_tensor(&rng.tensor(&[2, output], 0.5)?)?;
        let lora = LoraWeights::new(a.as_tensor(), b.as_tensor(), 0.5)?;
        let projection = block.projection_mut(name).ok_or(name)?;
        projection.set_adapter(Some(lora.clone()))?;
        let adapted = block.forward_masked(&xs, &at, None)?.eval()?;
        let grads = adapted.sqr()?.sum_all()?.backward()?;
        for var in [&a, &b] {
            let gradient = grads.get(var).ok_or(name)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(gradient > 1e-4, "{name}: {gradient}");
        }
        assert!(grads.get(&vars["model.layers.0.mlp.down_proj.weight"]).is_some());
        let detached = block.detached()?.forward_masked(&xs, &at, None)?.eval()?;
        assert!(!detached.track_op());
        close(&detached, &adapted, 1e-5)?;
        block.clear_lora()?;
        let away = (&adapted - &plain)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(away > 1e-3, "{name}: {away}");
        close(&block.forward_masked(&xs, &at, None)?.eval()?, &plain, 0.)?;
    }
    assert!(block.projection_mut("q").is_none());
    let lora = LoraWeights::new(Tensor::zeros((24, 2), DType::F32, &Device::Cpu)?, rng.tensor(&[2, 24], 1.)?, 1.)?;
    let refused = block.attention_mut().projection_mut("k_proj").ok_or("k_proj")?.set_adapter(Some(lora));
    assert!(matches!(refused, Err(Error::Module { .. })), "keys are 8 wide: {refused:?}");
    assert!(block.mlp_mut().projection_mut("gate_proj").is_some());
    Ok(())
}
