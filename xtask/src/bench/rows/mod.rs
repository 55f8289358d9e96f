//! The rows: what is timed, and what each has to reach.

mod batch;
mod contraction;
mod elementwise;
mod model;
mod overhead;
mod service;
mod train;
mod v1;

use super::measure::{Effort, Paired};
use super::Error;
use candle_core::{DType, Device, Tensor, WithDType};
use candle_lazy::exec::buffer::vec_with_huge_pages;
use candle_lazy::exec::LazyTensor;
use half::bf16;

/// Inputs in turn: what one call leaves in the caches is not the next call's input.
pub(super) const RING: usize = 8;

/// What a row has to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Floor {
    /// Eager's time over lazy's, at least.
    Ratio(f64),
    /// Lazy's microseconds, at most.
    MostUs(f64),
}

/// A result of one side on an input of the ring.
pub(super) type Run = Box<dyn Fn(usize) -> Result<Tensor, Error>>;

/// An f64 result, and per element or row the number that its rounding is measured by.
pub(super) type Exact = Box<dyn Fn(usize) -> Result<(Tensor, Tensor), Error>>;

/// What is timed.
pub(super) struct Work {
    /// Candle's ways; the fastest counts.
    pub(super) eager: Vec<Run>,
    pub(super) lazy: Run,
    /// Whose error lazy's is compared with, where eager computes with more digits than lazy.
    pub(super) rough: Option<Run>,
    pub(super) exact: Exact,
    /// Bytes that a call must read and write.
    pub(super) bytes: usize,
    /// Bytes that calls on the whole ring touch.
    pub(super) footprint: usize,
    /// Floating-point operations of a call's products.
    pub(super) flops: f64,
    /// Calls that make one of what is reported, e.g. the nodes of a chain.
    pub(super) per: f64,
}

/// A row before its work is made.
pub(super) struct Row {
    pub(super) name: String,
    pub(super) floor: Option<Floor>,
    pub(super) job: Job,
}

/// How a row is measured.
pub(super) enum Job {
    /// Two sides in turns; the work is made when the row's turn comes.
    Pair(Box<dyn Fn() -> Result<Work, Error>>),
    /// In a way of its own.
    Own(Box<dyn Fn(Effort) -> Result<Paired, Error>>),
}

impl Row {
    fn new(
        name: impl Into<String>,
        floor: impl Into<Option<f64>>,
        make: impl Fn() -> Result<Work, Error> + 'static,
    ) -> Self {
        Self { name: name.into(), floor: floor.into().map(Floor::Ratio), job: Job::Pair(Box::new(make)) }
    }

    /// A row judged by lazy's time alone.
    fn at_most(name: impl Into<String>, us: f64, make: impl Fn() -> Result<Work, Error> + 'static) -> Self {
        Self { floor: Some(Floor::MostUs(us)), ..Self::new(name, None, make) }
    }
}

impl Row {
    /// A row that measures itself.
    fn own(name: impl Into<String>, floor: Floor, measure: impl Fn(Effort) -> Result<Paired, Error> + 'static) -> Self {
        Self { name: name.into(), floor: Some(floor), job: Job::Own(Box::new(measure)) }
    }
}

/// All rows, in the order of the report.
pub(super) fn all() -> Vec<Row> {
    let mut rows = elementwise::rows();
    rows.extend(contraction::rows());
    rows.extend(model::rows());
    rows.extend(overhead::rows());
    rows.extend(batch::rows());
    rows.extend(service::rows());
    rows.extend(train::rows());
    rows.extend(v1::rows());
    rows
}

/// Normal random numbers.
fn randn(dims: &[usize], dtype: DType) -> Result<Tensor, Error> {
    Ok(Tensor::randn(0f32, 1f32, dims, &Device::Cpu)?.to_dtype(dtype)?)
}

/// Normal random numbers in memory as `nn` loads weights into: on huge pages, where the system grants them. Both sides read them there.
fn weights(dims: &[usize], dtype: DType) -> Result<Tensor, Error> {
    fn placed<T: WithDType>(numbers: &Tensor) -> Result<Tensor, Error> {
        let mut vec = vec_with_huge_pages::<T>(numbers.elem_count());
        vec.extend(numbers.flatten_all()?.to_vec1::<T>()?);
        Ok(Tensor::from_vec(vec, numbers.shape(), &Device::Cpu)?)
    }
    let numbers = randn(dims, dtype)?;
    match dtype {
        DType::BF16 => placed::<bf16>(&numbers),
        _ => placed::<f32>(&numbers),
    }
}

/// A ring of inputs of one shape.
fn ring(dims: &[usize], dtype: DType) -> Result<Vec<Tensor>, Error> {
    (0..RING).map(|_| randn(dims, dtype)).collect()
}

fn bytes_of(t: &Tensor) -> usize {
    t.elem_count() * t.dtype().size_in_bytes()
}

fn f64s(t: &Tensor) -> Result<Tensor, Error> {
    Ok(t.to_dtype(DType::F64)?)
}

/// A value with the largest magnitude of each of its rows.
fn by_row(value: Tensor) -> Result<(Tensor, Tensor), Error> {
    let last = value.rank().saturating_sub(1);
    let scale = value.abs()?.max_keepdim(last)?;
    Ok((value, scale))
}

/// Lazy's side: recorded anew on each input, evaluated to the end.
fn lazily(xs: &[Tensor], f: impl Fn(&LazyTensor) -> candle_lazy::exec::Result<LazyTensor> + 'static) -> Run {
    let xs = xs.to_vec();
    Box::new(move |i| Ok(f(&LazyTensor::from(&xs[i % RING]))?.eval()?))
}

/// A side of Candle's.
fn eagerly(xs: &[Tensor], f: impl Fn(&Tensor) -> candle_core::Result<Tensor> + 'static) -> Run {
    let xs = xs.to_vec();
    Box::new(move |i| Ok(f(&xs[i % RING])?))
}

/// The result in f64.
fn exactly(xs: &[Tensor], f: impl Fn(&Tensor) -> Result<(Tensor, Tensor), Error> + 'static) -> Exact {
    let xs = xs.to_vec();
    Box::new(move |i| f(&f64s(&xs[i % RING])?))
}
