//! The program in the README prints what the README says.

use candle_lazy::prelude::*;

#[test]
fn the_program_prints_what_the_readme_shows() -> Result<()> {
    let x = LazyTensor::new(&[[1f32, 2., 3.], [4., 5., 6.]], &Device::Cpu)?;
    let w = LazyTensor::new(&[0.5f32, 1., 2.], &Device::Cpu)?;
    let y = x.rms_norm(Some(&w), 1e-5)?.silu()?.softmax(D::Minus1)?;
    let (tensor, report) = y.eval_with_report()?;
    let printed = format!("{tensor}\nkernels: {:?}", report.kernels);
    let shown = format!("```text\n{printed}\n```");
    assert!(include_str!("../README.md").contains(&shown), "the README does not show:\n{printed}");
    Ok(())
}

/// The same numbers from their definition, in f64.
#[test]
fn the_program_computes_what_it_says() -> Result<()> {
    let x = [[1f64, 2., 3.], [4., 5., 6.]];
    let w = [0.5f64, 1., 2.];
    let lazy = LazyTensor::new(&[[1f32, 2., 3.], [4., 5., 6.]], &Device::Cpu)?;
    let weight = LazyTensor::new(&[0.5f32, 1., 2.], &Device::Cpu)?;
    let y = lazy.rms_norm(Some(&weight), 1e-5)?.silu()?.softmax(D::Minus1)?.to_vec2::<f32>()?;
    for (row, got) in x.iter().zip(&y) {
        let scale = (row.iter().map(|v| v * v).sum::<f64>() / 3. + 1e-5).sqrt();
        let exps: Vec<f64> =
            row.iter().zip(w).map(|(v, w)| v / scale * w).map(|v| (v / (1. + (-v).exp())).exp()).collect();
        let sum: f64 = exps.iter().sum();
        for (e, g) in exps.iter().zip(got) {
            assert!((e / sum - f64::from(*g)).abs() < 1e-6, "{} and {g}", e / sum);
        }
    }
    Ok(())
}
