//! `i(…)`: selection by numbers, ranges and lists, in all the forms that Candle takes.

use super::LazyTensor;
use crate::error::{Error, Result};
use candle_core::Device;
use candle_lazy_graph::ErrorKind;
use std::ops::{Bound, Range, RangeBounds, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive};

/// What is taken of one dim.
#[derive(Debug)]
pub enum TensorIndexer {
    /// One index; the dim disappears.
    Select(usize),
    /// A range.
    Narrow(Bound<usize>, Bound<usize>),
    /// The indices in a tensor of one dim (u8, u32 or i64).
    IndexSelect(LazyTensor),
    /// A list that could not be made a tensor.
    Err(Error),
}

impl From<usize> for TensorIndexer {
    fn from(index: usize) -> Self {
        Self::Select(index)
    }
}

impl From<&[u32]> for TensorIndexer {
    fn from(indices: &[u32]) -> Self {
        LazyTensor::new(indices, &Device::Cpu).map_or_else(Self::Err, Self::IndexSelect)
    }
}

impl From<Vec<u32>> for TensorIndexer {
    fn from(indices: Vec<u32>) -> Self {
        let len = indices.len();
        LazyTensor::from_vec(indices, len, &Device::Cpu).map_or_else(Self::Err, Self::IndexSelect)
    }
}

impl From<&LazyTensor> for TensorIndexer {
    fn from(indices: &LazyTensor) -> Self {
        Self::IndexSelect(indices.clone())
    }
}

/// The ranges that may stand in an index. A trait of this module, so that `From` for all of them excludes nothing else.
trait IndexRange: RangeBounds<usize> {}
impl IndexRange for Range<usize> {}
impl IndexRange for RangeFrom<usize> {}
impl IndexRange for RangeFull {}
impl IndexRange for RangeInclusive<usize> {}
impl IndexRange for RangeTo<usize> {}
impl IndexRange for RangeToInclusive<usize> {}

impl<R: IndexRange> From<R> for TensorIndexer {
    fn from(range: R) -> Self {
        Self::Narrow(range.start_bound().cloned(), range.end_bound().cloned())
    }
}

impl LazyTensor {
    #[track_caller]
    fn index(&self, indexers: Vec<TensorIndexer>) -> Result<Self> {
        if indexers.len() > self.rank() {
            let detail = format!("{} indices for {:?}", indexers.len(), self.dims());
            return Self::refuse("i", ErrorKind::Range(detail));
        }
        let mut part = self.clone();
        let mut dim = 0;
        for indexer in indexers {
            match indexer {
                TensorIndexer::Select(index) => part = part.get_on_dim(dim, index)?,
                TensorIndexer::Narrow(start, end) => {
                    let start = match start {
                        Bound::Included(start) => start,
                        Bound::Excluded(start) => start.saturating_add(1),
                        Bound::Unbounded => 0,
                    };
                    let end = match end {
                        Bound::Included(end) => end.saturating_add(1),
                        Bound::Excluded(end) => end,
                        Bound::Unbounded => part.dim(dim)?,
                    };
                    part = part.narrow(dim, start, end.saturating_sub(start))?;
                    dim += 1;
                }
                TensorIndexer::IndexSelect(indices) => {
                    if indices.rank() != 1 {
                        let detail = format!("indices of shape {:?}; one dim is taken", indices.dims());
                        return Self::refuse("i", ErrorKind::Shape(detail));
                    }
                    part = part.index_select(&indices.to_device(part.device())?, dim)?;
                    dim += 1;
                }
                TensorIndexer::Err(error) => return Err(error.at_caller()),
            }
        }
        Ok(part)
    }
}

/// Parts of a tensor: `x.i(2)`, `x.i((.., 1..3))`, `x.i((&ids, ..))`; the lazy twin of `candle_core::IndexOp`.
///
/// ```
/// use candle_core::Device;
/// use candle_lazy_exec::{IndexOp, LazyTensor};
/// # fn main() -> candle_lazy_exec::Result<()> {
/// let x = LazyTensor::new(&[[0f32, 1., 2.], [3., 4., 5.]], &Device::Cpu)?;
/// assert_eq!(x.i((1, ..2))?.to_vec1::<f32>()?, [3., 4.]);
/// assert_eq!(x.i((.., vec![2, 0]))?.to_vec2::<f32>()?, [[2., 0.], [5., 3.]]);
/// # Ok(())
/// # }
/// ```
pub trait IndexOp<T> {
    /// The part that `index` names; dims after the last one named are taken whole.
    ///
    /// # Errors
    /// When there are more indices than dims, or one is out of range.
    #[track_caller]
    fn i(&self, index: T) -> Result<LazyTensor>;
}

impl<T: Into<TensorIndexer>> IndexOp<T> for LazyTensor {
    #[track_caller]
    fn i(&self, index: T) -> Result<LazyTensor> {
        self.index(vec![index.into()])
    }
}

macro_rules! tuples {
    ($(($($name:ident),+);)+) => {
        $(
            #[allow(non_snake_case)]
            impl<$($name: Into<TensorIndexer>),+> IndexOp<($($name,)+)> for LazyTensor {
                #[track_caller]
                fn i(&self, ($($name,)+): ($($name,)+)) -> Result<LazyTensor> {
                    self.index(vec![$($name.into()),+])
                }
            }
        )+
    };
}

tuples! {
    (A);
    (A, B);
    (A, B, C);
    (A, B, C, D);
    (A, B, C, D, E);
    (A, B, C, D, E, F);
    (A, B, C, D, E, F, G);
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{IndexOp as CandleIndexOp, Tensor};

    fn numbers(dims: &[usize]) -> Tensor {
        let count = dims.iter().product::<usize>();
        Tensor::arange(0f32, count as f32, &Device::Cpu).unwrap().reshape(dims).unwrap()
    }

    fn equal(got: &LazyTensor, want: &Tensor) {
        assert_eq!(got.dims(), want.dims());
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&got.eval().unwrap()), flat(want));
    }

    macro_rules! same_as_candle {
        ($tensor:expr; $($index:expr),+ $(,)?) => {
            let tensor = $tensor;
            let lazy = LazyTensor::from(&tensor);
            $(equal(&IndexOp::i(&lazy, $index).unwrap(), &CandleIndexOp::i(&tensor, $index).unwrap());)+
        };
    }

    #[test]
    fn every_form_gives_what_candle_gives() {
        same_as_candle!(numbers(&[4, 5, 3]);
            2, .., 1.., ..3, 1..3, 1..=2, ..=2, 2..2, vec![3u32, 0, 0], &[1u32, 2][..],
            (1,), (1..,), (1, 2), (.., 2), (2, ..), (1.., ..=2), (.., vec![4u32, 1]), (vec![0u32], 2),
            (.., 1, 2), (1, .., 2), (1, 2, ..), (.., .., ..), (1.., vec![0u32, 3], ..2), (3, 4, 2),
        );
    }

    #[test]
    fn long_tuples_and_tensors_of_indices() {
        same_as_candle!(numbers(&[2, 1, 2, 3, 1, 2, 2]);
            (1, .., 0, ..), (.., 0, .., 1.., 0), (.., .., .., .., .., 1), (1, 0, 1, 2, 0, 1, 1),
            (.., 0, .., 1, .., .., ..1),
        );
        let tensor = numbers(&[4, 3]);
        let ids = Tensor::new(&[3u32, 1], &Device::Cpu).unwrap();
        let lazy = LazyTensor::from(&tensor);
        let got = IndexOp::i(&lazy, (&LazyTensor::from(&ids), 1..)).unwrap();
        equal(&got, &CandleIndexOp::i(&tensor, (&ids, 1..)).unwrap());
    }

    #[test]
    fn an_index_that_does_not_fit_is_refused_at_this_line() {
        let x = LazyTensor::from(numbers(&[4, 3]));
        let line = line!() + 1;
        let errors = [x.i(4).err(), x.i((.., 3)).err(), x.i((0, 0, 0)).err(), x.i(..9).err()];
        for error in errors.map(Option::unwrap) {
            let site = error.site().map(|site| (site.location().file().ends_with("index.rs"), site.location().line()));
            assert_eq!(site, Some((true, line)), "{error}");
        }
        let matrix = LazyTensor::from(numbers(&[1, 2]));
        assert!(x.i(&matrix).unwrap_err().to_string().contains("[1, 2]"));
    }
}
