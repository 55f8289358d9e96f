//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2).

use super::ParamsAdamW;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_exec::{eval_all, LazyTensor};

/// Checks the numbers of an update.
///
/// # Errors
/// [`Error::Config`] where one is not finite, the learning rate or the decay is below 0, a beta is not in 0 ≤ β < 1, or `eps` is not
/// above 0.
pub fn validate_adamw(params: &ParamsAdamW) -> Result<()> {
    let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = *params;
    let refuse = |what: &str, value: f64, wanted: &str| {
        Err(Error::config("AdamW", format_args!("{what} must be {wanted}, got {value}")))
    };
    if !(lr >= 0.0 && lr.is_finite()) {
        return refuse("the learning rate", lr, "finite and not below 0");
    }
    for (what, beta) in [("beta1", beta1), ("beta2", beta2)] {
        if !(0.0..1.0).contains(&beta) {
            return refuse(what, beta, "in [0, 1)");
        }
    }
    if !(eps > 0.0 && eps.is_finite()) {
        return refuse("epsilon", eps, "finite and above 0");
    }
    if !(weight_decay >= 0.0 && weight_decay.is_finite()) {
        return refuse("the weight decay", weight_decay, "finite and not below 0");
    }
    Ok(())
}

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
        let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = *params;
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
        let first = first.affine(beta1, 0.0)?.add(&g.affine(1.0 - beta1, 0.0)?)?;
        let second = second.affine(beta2, 0.0)?.add(&g.sqr()?.affine(1.0 - beta2, 0.0)?)?;
        let t = (self.steps + 1) as f64;
        let root = second.affine(1.0 / (1.0 - beta2.powf(t)), 0.0)?.sqrt()?.affine(1.0, eps)?;
        let step = first.affine(lr / (1.0 - beta1.powf(t)), 0.0)?.div(&root)?;
        let theta = theta.sub(&step.add(&theta.affine(lr * weight_decay, 0.0)?)?)?;
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
