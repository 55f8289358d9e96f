//! Functions of functions: what MLX and JAX call transforms.

use super::grad;
use crate::error::Error;
use crate::tensor::LazyTensor;

/// A function that gives a loss together with its gradients; made by [`value_and_grad`].
#[derive(Debug, Clone)]
pub struct ValueAndGrad<F>(F);

/// The function of tensors that gives what `f` gives, a scalar loss, and the gradient with respect to each of them.
///
/// `f` is called with variables that have the values of the arguments. Loss and gradients are recorded, not evaluated:
/// [`eval_all`](crate::eval_all) on all of them is one plan.
///
/// ```
/// use candle_core::Device;
/// use candle_lazy_exec::{value_and_grad, LazyTensor, Result};
/// # fn main() -> Result<()> {
/// let f = value_and_grad(|x: &[LazyTensor]| -> Result<LazyTensor> { x[0].mul(&x[1])?.sum_all() });
/// let a = LazyTensor::new(&[1f32, 2.0], &Device::Cpu)?;
/// let b = LazyTensor::new(&[3f32, 4.0], &Device::Cpu)?;
/// let (loss, gradients) = f.call(&[&a, &b])?;
/// assert_eq!(loss.to_scalar::<f32>()?, 11.0);
/// assert_eq!(gradients[0].to_vec1::<f32>()?, [3.0, 4.0]);
/// # Ok(())
/// # }
/// ```
pub fn value_and_grad<F, E>(f: F) -> ValueAndGrad<F>
where
    F: Fn(&[LazyTensor]) -> std::result::Result<LazyTensor, E>,
    E: From<Error>,
{
    ValueAndGrad(f)
}

impl<F> ValueAndGrad<F> {
    /// The loss and the gradients at `args`.
    ///
    /// # Errors
    /// Those of the function, and as [`grad`]: an integer argument, or one that the loss does not depend on.
    #[track_caller]
    pub fn call<E>(&self, args: &[&LazyTensor]) -> std::result::Result<(LazyTensor, Vec<LazyTensor>), E>
    where
        F: Fn(&[LazyTensor]) -> std::result::Result<LazyTensor, E>,
        E: From<Error>,
    {
        let mut variables = Vec::with_capacity(args.len());
        for x in args {
            variables.push(x.variable()?);
        }
        let loss = (self.0)(&variables)?;
        let gradients = grad(&loss, &variables.iter().collect::<Vec<_>>())?;
        Ok((loss, gradients))
    }
}
