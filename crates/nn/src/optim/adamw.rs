//! AdamW of one parameter at a time, for programs that take their gradients from Candle's tape (Loshchilov and Hutter 2019,
//! arXiv:1711.05101, algorithm 2).

use super::rules::{self, validate_adamw};
use super::ParamsAdamW;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_exec::{eval_all, LazyTensor};

/// The running means of one parameter's gradient and of its square, in f32, and how many steps they are of.
#[derive(Debug, Clone)]
pub struct Moments {
    shape: Shape,
    device: Device,
    /// From the first step on.
    means: Option<[Tensor; 2]>,
    steps: usize,
}

impl Moments {
    /// For a parameter of this shape. Memory is taken at the first step.
    #[must_use]
    pub fn new(shape: impl Into<Shape>, device: &Device) -> Self {
        Self { shape: shape.into(), device: device.clone(), means: None, steps: 0 }
    }

    /// As new.
    pub fn reset(&mut self) {
        self.means = None;
        self.steps = 0;
    }

    /// m, the mean of the gradient, of the parameter's shape; `None` before the first step, where it is 0.
    #[must_use]
    pub fn first(&self) -> Option<&Tensor> {
        self.means.as_ref().map(|[first, _]| first)
    }

    /// v, the mean of the gradient's square; as [`Moments::first`].
    #[must_use]
    pub fn second(&self) -> Option<&Tensor> {
        self.means.as_ref().map(|[_, second]| second)
    }

    /// Updates so far: the t of the bias correction.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// One update of AdamW: the parameter's new value, in its dtype. With t steps, this one included,
    ///
    /// m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g²,
    /// θ ← θ − lr·(m/(1 − β₁ᵗ))/(√(v/(1 − β₂ᵗ)) + ε) − lr·λ·θ
    ///
    /// The parameter and its gradient are of any float dtype; it is computed in f32, for a parameter of f64 in f64. One fused pass.
    ///
    /// # Errors
    /// As [`validate_adamw`], and where parameter, gradient and moments have not one shape and device, or are no floats. The moments are
    /// as they were then.
    #[track_caller]
    pub fn adamw(&mut self, param: &Tensor, grad: &Tensor, params: &ParamsAdamW) -> Result<Tensor> {
        validate_adamw(params)?;
        self.check(param, grad)?;
        let recorded = self.record(param, grad, params)?;
        let values = eval_all(&recorded.each_ref())?;
        let Ok([theta, first, second]) = <[Tensor; 3]>::try_from(values) else {
            return Err(Error::module("AdamW", "", "the engine did not return three values"));
        };
        self.means = Some([first, second]);
        self.steps += 1;
        Ok(theta)
    }

    /// θ, m and v after a step. Handles on what lies between end here: the engine would keep such values.
    #[track_caller]
    fn record(&self, param: &Tensor, grad: &Tensor, params: &ParamsAdamW) -> Result<[LazyTensor; 3]> {
        let dtype = if param.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let load = |tensor: &Tensor| LazyTensor::from_tensor(tensor.detach()).to_dtype(dtype);
        let (theta, g) = (load(param)?, load(grad)?);
        let [first, second] = match &self.means {
            Some([first, second]) => [load(first)?, load(second)?],
            None => {
                let zeros = LazyTensor::zeros(self.shape.clone(), dtype, &self.device)?;
                [zeros.clone(), zeros]
            }
        };
        let [theta, first, second] = rules::adamw(&theta, &g, [&first, &second], params, self.steps as u64 + 1)?;
        let (first, second) = (first.to_dtype(DType::F32)?, second.to_dtype(DType::F32)?);
        Ok([theta.to_dtype(param.dtype())?, first, second])
    }

    #[track_caller]
    fn check(&self, param: &Tensor, grad: &Tensor) -> Result<()> {
        for (what, tensor) in [("the parameter", param), ("the gradient", grad)] {
            if !tensor.dtype().is_float() {
                return Err(Error::float_expected("AdamW", "", what, tensor.dtype()));
            }
            if *tensor.shape() != self.shape {
                let (found, wanted) = (tensor.shape(), &self.shape);
                let message = format_args!("shape mismatch: {what} is {found:?}, its state {wanted:?}");
                return Err(Error::module("AdamW", "", message));
            }
            if !tensor.device().same_device(&self.device) {
                let (found, wanted) = (tensor.device().location(), self.device.location());
                return Err(Error::module(
                    "AdamW",
                    "",
                    format_args!("{what} is on {found:?}, its state on {wanted:?}"),
                ));
            }
        }
        Ok(())
    }
}
