//! A function whose plan is kept with it.
//!
//! Recording, capturing and finding a plan cost some hundred nanoseconds per op at every call; a compiled function pays them once per
//! combination of shapes, dtypes and devices, and binds new arguments to the plan that it kept after that.

use crate::config;
use crate::error::Error;
use crate::run::{eval_all, Trace};
use crate::tensor::LazyTensor;
use candle_core::{DType, Device, Shape};
use candle_lazy_graph::ErrorKind;
use parking_lot::Mutex;
use std::sync::Arc;

/// How many combinations of shapes, dtypes and devices a function keeps; the oldest one goes.
const KEPT: usize = 32;

/// What a kept plan is for.
type Signature = Vec<(Shape, DType, Device)>;

fn same(a: &Signature, b: &[&LazyTensor]) -> bool {
    let fits = |((shape, dtype, device), x): (&(Shape, DType, Device), &&LazyTensor)| {
        shape == x.shape() && *dtype == x.dtype() && device.same_device(x.device())
    };
    a.len() == b.len() && a.iter().zip(b).all(fits)
}

/// A function of tensors whose plans are kept; made by [`compile`].
pub struct Compiled<F> {
    f: F,
    kept: Mutex<Vec<(Signature, Arc<Trace>)>>,
}

impl<F> std::fmt::Debug for Compiled<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Compiled({} plans)", self.plans())
    }
}

/// The function that gives what `f` gives, from a plan that is made at the first call with arguments of these shapes, dtypes and devices,
/// and kept.
///
/// `f` only records: it is not called again for arguments that fit, so whatever it reads beside its arguments (weights, scalars, random
/// keys) is a constant of the plan. What changes from call to call is an argument. Gradients are taken inside, by
/// [`grad`](crate::grad()) or [`value_and_grad`](crate::value_and_grad).
///
/// ```
/// use candle_core::Device;
/// use candle_lazy_exec::{compile, grad, LazyTensor, Result};
/// # fn main() -> Result<()> {
/// let step = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
///     let w = x[0].variable()?;
///     let loss = w.mul(&x[1])?.sqr()?.sum_all()?;
///     let gradient = grad(&loss, &[&w])?.remove(0);
///     Ok(vec![loss, (&w - (gradient * 0.1)?)?])
/// });
/// let mut w = LazyTensor::new(&[1f32, 2.0], &Device::Cpu)?;
/// let x = LazyTensor::new(&[1f32, 0.5], &Device::Cpu)?;
/// for _ in 0..3 {
///     w = step.call(&[&w, &x])?.remove(1);
/// }
/// assert_eq!(step.plans(), 1);
/// # Ok(())
/// # }
/// ```
pub fn compile<F, E>(f: F) -> Compiled<F>
where
    F: Fn(&[LazyTensor]) -> std::result::Result<Vec<LazyTensor>, E>,
    E: From<Error>,
{
    Compiled { f, kept: Mutex::default() }
}

impl<F> Compiled<F> {
    /// How many plans are kept.
    #[must_use]
    pub fn plans(&self) -> usize {
        self.kept.lock().len()
    }

    /// The results at `args`, evaluated.
    ///
    /// # Errors
    /// Those of `f`, which must not evaluate anything; those of running its plan; and an argument that Candle's autograd tracks, whose
    /// gradient the results could not carry.
    #[track_caller]
    pub fn call<E>(&self, args: &[&LazyTensor]) -> std::result::Result<Vec<LazyTensor>, E>
    where
        F: Fn(&[LazyTensor]) -> std::result::Result<Vec<LazyTensor>, E>,
        E: From<Error>,
    {
        if let Some(x) = args.iter().find(|x| x.track_op()) {
            let detail =
                "an argument is tracked by Candle's autograd, and a compiled function gives it no gradient; take the \
                          gradient inside, or detach it"
                    .to_string();
            x.refuse_here::<()>("compile", ErrorKind::Unsupported(detail))?;
        }
        let mut values = eval_all(args)?;
        for value in &mut values {
            // a plan depends on whether a leaf lies in order
            *value = value.contiguous().map_err(Error::from)?;
        }
        let kept = self.kept.lock().iter().find(|(signature, _)| same(signature, args)).map(|(_, trace)| trace.clone());
        let trace = match kept {
            Some(trace) => trace,
            None => {
                // each a tensor of its own, so that equal arguments are not taken for one
                let mut leaves = Vec::with_capacity(values.len());
                for value in &values {
                    leaves.push(LazyTensor::from(value.reshape(value.shape()).map_err(Error::from)?));
                }
                let outputs = {
                    let _recording = config::Recording::begin();
                    (self.f)(&leaves)?
                };
                if let Some(y) = outputs.iter().find(|y| y.track_op()) {
                    let detail =
                        "a result depends on a tensor that Candle's autograd tracks, whose gradient it could not carry"
                            .to_string();
                    y.refuse_here::<()>("compile", ErrorKind::Unsupported(detail))?;
                }
                let trace = Arc::new(Trace::new(&leaves, outputs)?);
                let signature = args.iter().map(|x| (x.shape().clone(), x.dtype(), x.device().clone())).collect();
                let mut kept = self.kept.lock();
                if kept.len() >= KEPT {
                    kept.remove(0);
                }
                kept.push((signature, trace.clone()));
                trace
            }
        };
        Ok(trace.run(&values)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a panic is how a test fails

    use super::*;
    use crate::error::Result;
    use crate::grad;
    use candle_core::{Tensor, Var};
    use std::sync::atomic::{AtomicUsize, Ordering};

    const CPU: Device = Device::Cpu;

    fn tensor(values: &[f32]) -> LazyTensor {
        LazyTensor::new(values, &CPU).unwrap()
    }

    #[test]
    fn a_function_is_recorded_once_per_signature() {
        let calls = AtomicUsize::new(0);
        let weight = tensor(&[2.0, 3.0]);
        let f = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
            calls.fetch_add(1, Ordering::Relaxed);
            Ok(vec![x[0].broadcast_mul(&weight)?.sum_all()?, x[1].clone(), (&x[0] - &x[1])?])
        });
        for i in 0..3 {
            let (a, b) = (tensor(&[i as f32, 1.0]), tensor(&[1.0, 5.0]));
            // the same tensor twice is two arguments all the same
            let both = if i == 0 { [&a, &a] } else { [&a, &b] };
            let got = f.call(&both).unwrap();
            assert_eq!(got[0].to_scalar::<f32>().unwrap(), 2.0 * i as f32 + 3.0);
            assert_eq!(got[1].to_vec1::<f32>().unwrap(), both[1].to_vec1::<f32>().unwrap());
            let want: Vec<f32> = if i == 0 { vec![0.0, 0.0] } else { vec![i as f32 - 1.0, -4.0] };
            assert_eq!(got[2].to_vec1::<f32>().unwrap(), want);
        }
        assert_eq!((calls.load(Ordering::Relaxed), f.plans()), (1, 1));
        let wide = LazyTensor::zeros((3, 2), DType::F32, &CPU).unwrap();
        f.call(&[&wide, &wide]).unwrap();
        assert_eq!((calls.load(Ordering::Relaxed), f.plans()), (2, 2));
        let f64s = LazyTensor::zeros(2, DType::F64, &CPU).unwrap();
        assert!(f.call(&[&f64s, &f64s]).is_err(), "the weight is f32");
    }

    #[test]
    fn a_training_step_descends() {
        let step = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
            let w = x[0].variable()?;
            let loss = (w.mul(&x[1])?.sum_all()? - 1.0)?.sqr()?;
            let gradient = grad(&loss, &[&w])?.remove(0);
            Ok(vec![loss, (&w - (gradient * 0.1)?)?])
        });
        let (mut w, x) = (tensor(&[3.0, -1.0]), tensor(&[1.0, 0.5]));
        let mut losses = Vec::new();
        for _ in 0..30 {
            let got = step.call(&[&w, &x]).unwrap();
            losses.push(got[0].to_scalar::<f32>().unwrap());
            w = got[1].clone();
        }
        assert_eq!(losses[0], 2.25);
        assert!(losses[29] < 1e-4 && step.plans() == 1, "{losses:?}");
    }

    #[test]
    fn what_cannot_be_compiled_is_an_error() {
        let x = tensor(&[1.0, 2.0]);
        let reads = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> {
            let factor = x[0].sum_all()?.to_scalar::<f32>()?;
            Ok(vec![(&x[0] * f64::from(factor))?])
        });
        let text = reads.call(&[&x]).unwrap_err().to_string();
        assert!(text.contains("sum") && text.contains("inside of a compiled function"), "{text}");
        // the thread evaluates again after it
        assert_eq!(x.sum_all().unwrap().to_scalar::<f32>().unwrap(), 3.0);
        let var = Var::from_tensor(&Tensor::ones(2, DType::F32, &CPU).unwrap()).unwrap();
        let tracked = LazyTensor::from(var.as_tensor());
        let plain = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> { Ok(vec![x[0].exp()?]) });
        assert!(plain.call(&[&tracked]).unwrap_err().to_string().contains("tracked by Candle"));
        let captured = compile(|x: &[LazyTensor]| -> Result<Vec<LazyTensor>> { Ok(vec![x[0].add(&tracked)?]) });
        assert!(captured.call(&[&x]).unwrap_err().to_string().contains("tracks"));
    }
}
