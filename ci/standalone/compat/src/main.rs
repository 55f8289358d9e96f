//! v1's names alone: a layer, its gradient, a lazy chain, a sampled token.

use candle_core::{Device, Tensor};
use metal_candle::graph::LazyTensor;
use metal_candle::training::{LoRAConfig, LoRALayer};
use metal_candle::{sample_token, Error, SamplingStrategy, TensorExt};

fn main() -> Result<(), Error> {
    let config = LoRAConfig { rank: 1, alpha: 2.0, dropout: 0.0 };
    let layer = LoRALayer::new(2, 3, &config, &Device::Cpu)?;
    layer.lora_a().set(&Tensor::new(&[[1f32], [2.0]], &Device::Cpu)?)?;
    layer.lora_b().set(&Tensor::new(&[[1f32, 0.0, -1.0]], &Device::Cpu)?)?;
    let x = Tensor::new(&[[3f32, 4.0]], &Device::Cpu)?;
    // (3·1 + 4·2)·2 = 22
    let y = layer.forward(&x)?;
    assert_eq!(y.to_vec2::<f32>()?, [[22.0, 0.0, -22.0]]);
    let lazy = layer.forward_lazy(&LazyTensor::from_tensor(x.clone())?)?.mul_scalar(0.5)?.eval()?;
    assert_eq!(lazy.to_vec2::<f32>()?, [[11.0, 0.0, -11.0]]);
    // the gradient of a sum of results by B: x·A·2 in each column
    let store = y.sum_all()?.backward()?;
    let gradient = store.get(layer.lora_b_tensor()).map(Tensor::to_vec2::<f32>).transpose()?;
    assert_eq!(gradient, Some(vec![vec![22.0; 3]]));
    let token = sample_token(&y.squeeze(0)?.softmax_stable_row()?, &SamplingStrategy::Greedy, &[], 1.0)?;
    assert_eq!(token, 0);
    println!("compat: a layer, its gradient, a lazy chain and a token");
    Ok(())
}

/// An extension of the program's own on top of v1's.
trait Rows {
    fn softmax_stable_row(&self) -> candle_core::Result<Tensor>;
}

impl Rows for Tensor {
    fn softmax_stable_row(&self) -> candle_core::Result<Tensor> {
        self.detach().softmax_stable()
    }
}
