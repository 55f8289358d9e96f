//! Candle's names on lazy tensors against Candle's own functions.

// the functions that tests share fail as tests do
#![allow(clippy::unwrap_used, clippy::panic)]

mod caches;
mod functions;
mod layers;
mod var_builder;

use candle_core::{Device, Tensor};
use candle_lazy_nn::candle::{self, Error};
use candle_lazy_nn::LazyTensor;

/// Random numbers that are the same every time.
fn random(dims: &[usize], seed: u64) -> Tensor {
    crate::common::Rng::new(seed).tensor(dims, 2.0).unwrap()
}

/// Equal shapes, and numbers that differ by rounding only.
fn same(got: candle::Result<LazyTensor>, want: candle_core::Result<Tensor>) {
    let (got, want) = (got.unwrap().eval().unwrap(), want.unwrap());
    if let Err(error) = crate::common::close(&got, &want, 2e-6) {
        panic!("{error}");
    }
}

/// The error names this file and line.
fn at_line(error: &Error, line: u32) {
    let site = error.site().unwrap_or_else(|| panic!("no line: {error}")).location();
    assert_eq!((site.file().rsplit('/').next(), site.line()), (file_of(error), line), "{error}");
}

/// The file that the error names, if it is one of this test.
fn file_of(error: &Error) -> Option<&str> {
    let file = error.site()?.location().file();
    file.contains("/it/ported/").then(|| file.rsplit('/').next())?
}

#[test]
fn ported_functions_fail_where_they_are_written() {
    use candle_lazy_nn::candle::{bail, Context, DType, Result, Tensor};

    fn attention(q: &Tensor, k: &Tensor) -> Result<Tensor> {
        if q.dtype() != DType::F32 {
            bail!("f32 is needed, got {:?}", q.dtype())
        }
        let scores = (q.matmul(&k.t()?)? / 2.0)?;
        scores + k
    }

    let q = LazyTensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    let wrong = LazyTensor::zeros((3, 5), DType::F32, &Device::Cpu).unwrap();
    let product = attention(&q, &wrong).unwrap_err();
    at_line(&product, line!() - 7);
    let sum = attention(&q, &q).context("layer 3").unwrap_err();
    at_line(&sum, line!() - 8);
    assert!(
        sum.to_string().starts_with("layer 3\nadd(f32 [3, 3], f32 [3, 4]): shape mismatch, [3, 3] and [3, 4]"),
        "{sum}"
    );
    let half = q.to_dtype(DType::F16).unwrap();
    assert_eq!(attention(&half, &q).unwrap_err().to_string(), "f32 is needed, got F16");
}

#[test]
fn errors_of_all_layers_pass_through_the_question_mark() {
    fn io() -> candle::Result<Vec<u8>> {
        Ok(std::fs::read("no such file")?)
    }
    fn eager() -> candle::Result<Tensor> {
        Ok(Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu)?.narrow(0, 5, 1)?)
    }
    fn module() -> candle::Result<candle_lazy_nn::Linear> {
        Ok(candle_lazy_nn::Linear::new(LazyTensor::zeros(3, candle_core::DType::F32, &Device::Cpu)?, None)?)
    }
    assert!(matches!(io().unwrap_err(), Error::Candle(candle_core::Error::Io(_))));
    assert!(matches!(eager().unwrap_err(), Error::Candle(_)));
    assert!(module().unwrap_err().to_string().contains("the weight must have shape (out, in)"));
}
