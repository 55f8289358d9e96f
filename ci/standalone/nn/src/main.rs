//! Modules alone: a small network from Candle's `VarBuilder`, with a LoRA adapter.

use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::{linear, rms_norm, LazyTensor, LoraLinear, LoraWeights, Module, Result, VarBuilder};

fn main() -> Result<()> {
    let device = Device::Cpu;
    let vb = VarBuilder::zeros(DType::F32, &device);
    let norm = rms_norm(4, 1e-5, vb.pp("norm"))?;
    let mut project = LoraLinear::new(linear(4, 2, vb.pp("project"))?);
    let ones = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, &device);
    let x = LazyTensor::from(ones((3, 4))?);
    // all weights are zero: nothing comes out
    assert_eq!(project.forward(&x)?.to_vec2::<f32>()?, [[0.; 2]; 3]);
    project.set_adapter(Some(LoraWeights::new(ones((4, 1))?, ones((1, 2))?, 0.5)?))?;
    // now each output is 4 · 1 · 0.5
    assert_eq!(project.forward(&x)?.to_vec2::<f32>()?, [[2.; 2]; 3]);
    assert_eq!(norm.forward(&x)?.to_vec2::<f32>()?, [[0.; 4]; 3]);
    println!("nn: a linear map, an adapter and a norm");
    Ok(())
}
