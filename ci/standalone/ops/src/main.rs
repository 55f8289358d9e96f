//! The kernels alone, from plain eager Candle code: values and gradients.

use candle_core::{DType, Device, Tensor, Var};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let x = Var::from_tensor(&Tensor::new(&[[1f32, 2., 3.], [3., 2., 1.]], &Device::Cpu)?)?;
    let w = Var::from_tensor(&Tensor::ones(3, DType::F32, &Device::Cpu)?)?;
    let y = candle_lazy_ops::rms_norm(x.as_tensor(), Some(w.as_tensor()), 1e-5)?;
    let p = candle_lazy_ops::softmax(&y, 1)?;
    for row in p.to_vec2::<f32>()? {
        let sum: f32 = row.iter().sum();
        assert!((sum - 1.).abs() < 1e-5, "a row of a softmax sums to {sum}");
    }
    let gradients = p.sqr()?.sum_all()?.backward()?;
    for var in [&x, &w] {
        let gradient = gradients.get(var.as_tensor()).ok_or("a gradient is missing")?;
        assert_eq!(gradient.dims(), var.dims());
    }
    println!("ops: {p}");
    Ok(())
}
