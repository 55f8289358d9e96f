//! The umbrella alone: one dependency for recording, modules and Candle's names.

use candle_lazy::nn::Module as _;
use candle_lazy::nn::{linear, VarBuilder};
use candle_lazy::prelude::*;

/// Written against Candle's names.
fn mean_square(xs: &candle_lazy::candle::Tensor) -> candle_lazy::candle::Result<candle_lazy::candle::Tensor> {
    xs.sqr()?.mean_all()
}

fn main() -> Result<()> {
    let project = linear(2, 2, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    let x = LazyTensor::new(&[[3f32, 4.], [0., 5.]], &Device::Cpu)?;
    assert_eq!(project.forward(&x)?.to_vec2::<f32>()?, [[0.; 2]; 2]);
    assert_eq!(mean_square(&x)?.to_scalar::<f32>()?, 12.5);
    let (tensor, report) = x.softmax(D::Minus1)?.sum_all()?.eval_with_report()?;
    assert!((tensor.to_scalar::<f32>()? - 2.).abs() < 1e-6);
    println!("candle-lazy: kernels {:?}, fallbacks {:?}", report.kernels, report.fallbacks);
    Ok(())
}
