//! Functions whose inner values are computed again for the backward pass.

use crate::error::{Error, Result};
use crate::tensor::LazyTensor;
use candle_lazy_graph::{BuildSite, Node, NodeId, Op};

/// What a function of tensors gives: a tensor, or several in a tuple, a vector, an array or an option.
pub trait Tensors: Sized {
    /// The same with `f` applied to every tensor.
    ///
    /// # Errors
    /// The first error of `f`.
    fn map_tensors(self, f: &mut dyn FnMut(LazyTensor) -> Result<LazyTensor>) -> Result<Self>;
}

impl Tensors for LazyTensor {
    fn map_tensors(self, f: &mut dyn FnMut(LazyTensor) -> Result<LazyTensor>) -> Result<Self> {
        f(self)
    }
}

impl<T: Tensors> Tensors for Vec<T> {
    fn map_tensors(self, f: &mut dyn FnMut(LazyTensor) -> Result<LazyTensor>) -> Result<Self> {
        self.into_iter().map(|x| x.map_tensors(f)).collect()
    }
}

impl<T: Tensors> Tensors for Option<T> {
    fn map_tensors(self, f: &mut dyn FnMut(LazyTensor) -> Result<LazyTensor>) -> Result<Self> {
        self.map(|x| x.map_tensors(f)).transpose()
    }
}

impl<A: Tensors, B: Tensors> Tensors for (A, B) {
    fn map_tensors(self, f: &mut dyn FnMut(LazyTensor) -> Result<LazyTensor>) -> Result<Self> {
        Ok((self.0.map_tensors(f)?, self.1.map_tensors(f)?))
    }
}

impl<A: Tensors, B: Tensors, C: Tensors> Tensors for (A, B, C) {
    fn map_tensors(self, f: &mut dyn FnMut(LazyTensor) -> Result<LazyTensor>) -> Result<Self> {
        Ok((self.0.map_tensors(f)?, self.1.map_tensors(f)?, self.2.map_tensors(f)?))
    }
}

/// A function whose inner values are computed again for the backward pass; made by [`checkpoint`].
#[derive(Debug, Clone)]
pub struct Checkpoint<F>(F);

/// The function that gives what `f` gives, and whose inner values no backward pass keeps: a gradient computes them again from the arguments
/// and from whatever else `f` reads, just before it needs them (gradient checkpointing, or rematerialisation: Chen et al. 2016,
/// arXiv:1604.06174).
///
/// Results and gradients, also those of tensors that `f` reads without their being arguments, have the bits that they have without it,
/// and so have gradients of gradients. It costs a second computation of `f` and saves the memory of all that lies between its inputs and
/// its results. Random numbers inside are the same both times, as they follow from their key. Checkpointed functions may be nested. Where
/// no gradient is taken, and of what depends on no variable, nothing is computed twice.
///
/// `f` is called once per call. What depends on no tensor (a range, a causal mask) is not computed again; neither are the values of
/// tensors that were evaluated inside of `f`, or that are used outside of it without being results.
///
/// ```
/// use candle_core::Device;
/// use candle_lazy_exec::{checkpoint, grad, LazyTensor, Result};
/// # fn main() -> Result<()> {
/// let w = LazyTensor::new(&[[1f32, 0.5], [0.25, 1.0]], &Device::Cpu)?.variable()?;
/// let block = checkpoint(|x: &[LazyTensor]| -> Result<LazyTensor> { x[0].matmul(&w)?.gelu()?.add(&x[0]) });
/// let mut x = LazyTensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// for _ in 0..4 {
///     x = block.call(&[&x])?;
/// }
/// let dw = grad(&x.sum_all()?, &[&w])?;
/// # assert_eq!(dw[0].dims(), [2, 2]);
/// # Ok(())
/// # }
/// ```
pub fn checkpoint<F, T, E>(f: F) -> Checkpoint<F>
where
    F: Fn(&[LazyTensor]) -> std::result::Result<T, E>,
    T: Tensors,
    E: From<Error>,
{
    Checkpoint(f)
}

impl<F> Checkpoint<F> {
    /// The results at `args`, recorded.
    ///
    /// # Errors
    /// Those of the function.
    #[track_caller]
    pub fn call<T, E>(&self, args: &[&LazyTensor]) -> std::result::Result<T, E>
    where
        F: Fn(&[LazyTensor]) -> std::result::Result<T, E>,
        T: Tensors,
        E: From<Error>,
    {
        let args: Vec<LazyTensor> = args.iter().map(|x| (*x).clone()).collect();
        let region = CheckpointRegion::begin();
        let results = (self.0)(&args)?;
        Ok(region.end(results)?)
    }
}

/// What [`checkpoint`] does, for code that is no function of tensors: from where it begins, what this thread records is computed again for
/// the backward pass, as far as the results given to [`CheckpointRegion::end`] depend on it.
///
/// ```
/// use candle_core::Device;
/// use candle_lazy_exec::{CheckpointRegion, LazyTensor};
/// # fn main() -> candle_lazy_exec::Result<()> {
/// let x = LazyTensor::new(&[1f32, 2.0], &Device::Cpu)?.variable()?;
/// let region = CheckpointRegion::begin();
/// let h = x.exp()?.sqr()?;
/// let y = region.end(h.sin()?)?;
/// # assert!(y.is_traced());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is checkpointed unless the region ends with its results"]
pub struct CheckpointRegion(u64);

impl CheckpointRegion {
    /// Begins a region.
    pub fn begin() -> Self {
        Self(NodeId::mark().get())
    }

    /// Ends it: the results, to be used from now on in the place of what is given.
    ///
    /// # Errors
    /// None of its own; where the pending budget is passed, those of evaluating.
    #[track_caller]
    pub fn end<T: Tensors>(self, results: T) -> Result<T> {
        let site = BuildSite::here();
        results.map_tensors(&mut |y| ended(y, self.0, &site))
    }
}

/// A result of the region that began at `region`.
fn ended(y: LazyTensor, region: u64, site: &BuildSite) -> Result<LazyTensor> {
    // what was there before, and what no gradient passes, needs no second computation
    if y.node().id().get() < region || !y.is_traced() || y.is_variable() {
        return Ok(y);
    }
    let end = Node::record(Op::Checkpoint { region }, &[], &[y.node()], None, site.clone())?;
    LazyTensor::within_budget(end)
}
