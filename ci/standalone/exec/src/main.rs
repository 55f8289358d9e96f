//! Lazy tensors alone: record, evaluate, read the report.

use candle_core::Device;
use candle_lazy_exec::{LazyTensor, Result};

fn main() -> Result<()> {
    let a = LazyTensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
    let b = LazyTensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?;
    let y = (a.matmul(&b)? + &a)?.affine(0.5, 1.)?;
    let (tensor, report) = y.eval_with_report()?;
    assert_eq!(tensor.to_vec2::<f32>()?, [[2., 3.], [4., 5.]]);
    println!("{report}");
    let error = a.matmul(&LazyTensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?);
    assert!(error.is_err(), "(2, 2) x (1, 3) is refused when it is recorded");
    Ok(())
}
