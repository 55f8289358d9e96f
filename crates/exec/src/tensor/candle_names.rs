//! Names of Candle's `Tensor` that are compositions of recorded ops, so that ported code finds them.

use super::LazyTensor;
use crate::error::Result;
use candle_core::backprop::GradStore;
use candle_core::shape::Dim;
use candle_core::{Device, WithDType};
use candle_lazy_graph::{ErrorKind, NodeId};

impl LazyTensor {
    /// A leaf of one dim from an iterator.
    ///
    /// # Errors
    /// When Candle cannot make the tensor.
    #[track_caller]
    pub fn from_iter<T: WithDType>(values: impl IntoIterator<Item = T>, device: &Device) -> Result<Self> {
        let values: Vec<T> = values.into_iter().collect();
        let len = values.len();
        Self::from_vec(values, len, device)
    }

    /// A number that no other node of this process has.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.node().id()
    }

    /// Always true: a lazy tensor has no strides, and every op takes it as it is.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        true
    }

    /// The same as [`LazyTensor::contiguous`]: what is computed is never written to by anybody else, so no copy is needed.
    ///
    /// # Errors
    /// As [`LazyTensor::contiguous`].
    #[track_caller]
    pub fn force_contiguous(&self) -> Result<Self> {
        self.contiguous()
    }

    /// The same tensor: values are never shared with anything that changes them.
    ///
    /// # Errors
    /// None.
    pub fn copy(&self) -> Result<Self> {
        Ok(self.clone())
    }

    /// Gradients of this tensor by Candle's autograd: evaluates, then walks back over what Candle tracked.
    ///
    /// # Errors
    /// When evaluation fails, or Candle has no gradient for an op.
    #[track_caller]
    pub fn backward(&self) -> Result<GradStore> {
        // no closure here: it would name this line
        match self.eval()?.backward() {
            Ok(gradients) => Ok(gradients),
            Err(error) => {
                let detail = format!("backward({:?}): {}", self.dims(), crate::error::words(&error));
                Err(crate::error::Error::Candle(candle_core::Error::Msg(detail)).at_caller())
            }
        }
    }

    /// Evaluates and writes this tensor to a safetensors file of its own, under `name`.
    ///
    /// # Errors
    /// When evaluation fails or the file cannot be written.
    #[track_caller]
    pub fn save_safetensors<P: AsRef<std::path::Path>>(&self, name: &str, filename: P) -> Result<()> {
        match self.eval()?.save_safetensors(name, filename) {
            Ok(()) => Ok(()),
            Err(error) => Err(crate::error::Error::from(error).at_caller()),
        }
    }

    /// Which dim `axis` is, counted from the end where it is negative.
    ///
    /// # Errors
    /// When it is out of range.
    #[track_caller]
    pub fn normalize_axis(&self, axis: i64) -> Result<usize> {
        let rank = self.rank() as i64;
        let index = if axis < 0 { axis + rank } else { axis };
        match usize::try_from(index) {
            Ok(index) if index < self.rank() => Ok(index),
            _ => {
                let detail = format!("axis {axis} of {:?}", self.dims());
                Self::refuse("normalize_axis", ErrorKind::Range(detail))
            }
        }
    }

    /// The sum of products of two vectors (n).
    ///
    /// # Errors
    /// When one is no vector, or lengths or dtypes differ.
    #[track_caller]
    pub fn dot(&self, rhs: &Self) -> Result<Self> {
        if self.rank() != 1 || rhs.rank() != 1 {
            let detail = format!("needs two vectors, got {:?} and {:?}", self.dims(), rhs.dims());
            return Self::refuse("dot", ErrorKind::Shape(detail));
        }
        self.mul(rhs)?.sum_all()
    }

    /// √Σx², over all elements.
    ///
    /// # Errors
    /// When the dtype is not floating-point.
    #[track_caller]
    pub fn norm(&self) -> Result<Self> {
        self.sqr()?.sum_all()?.sqrt()
    }

    /// The product of this matrix (m, n) and a vector (n).
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn mv(&self, rhs: &Self) -> Result<Self> {
        let fits = matches!((self.dims(), rhs.dims()), ([_, n], [k]) if n == k);
        if !fits {
            let detail = format!("{:?} x {:?}", self.dims(), rhs.dims());
            return Self::refuse("mv", ErrorKind::Shape(detail));
        }
        self.matmul(&rhs.unsqueeze(1)?)?.squeeze(1)
    }

    /// Rounded to `decimals` places after the point, or before it where negative.
    ///
    /// # Errors
    /// When the dtype is not floating-point.
    #[track_caller]
    pub fn round_to(&self, decimals: i32) -> Result<Self> {
        if !self.dtype().is_float() && decimals >= 0 {
            return Ok(self.clone());
        }
        let factor = 10f64.powi(decimals);
        self.affine(factor, 0.0)?.round()?.affine(1.0 / factor, 0.0)
    }

    /// This tensor with `src` written at `start` of the first dim.
    ///
    /// # Errors
    /// As [`LazyTensor::slice_scatter`].
    #[track_caller]
    pub fn slice_scatter0(&self, src: &Self, start: usize) -> Result<Self> {
        self.slice_scatter(src, 0, start)
    }

    /// Elements moved `shift` places along `dim`; what leaves at one end enters at the other.
    ///
    /// # Errors
    /// When the dim is out of range.
    #[track_caller]
    pub fn roll<D: Dim + Clone>(&self, shift: i32, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "roll")?;
        let size = self.dims()[dim];
        let shift = i64::from(shift).rem_euclid((size as i64).max(1)) as usize;
        if shift == 0 {
            return Ok(self.clone());
        }
        let kept = self.narrow(dim, 0, size - shift)?;
        let moved = self.narrow(dim, size - shift, shift)?;
        Self::cat(&[moved, kept], dim)
    }

    /// Elements in reverse order along each of `dims`.
    ///
    /// # Errors
    /// When a dim is out of range.
    #[track_caller]
    pub fn flip(&self, dims: &[usize]) -> Result<Self> {
        let mut flipped = self.clone();
        for &dim in dims {
            let dim = flipped.dim_index(dim, "flip")?;
            let reversed: Vec<i64> = (0..flipped.dims()[dim] as i64).rev().collect();
            flipped = flipped.index_select(&Self::from_iter(reversed, self.device())?, dim)?;
        }
        Ok(flipped)
    }

    /// The sums of the first 1, 2, … elements along `dim`, as a product with a triangular matrix.
    ///
    /// # Errors
    /// When the dim is out of range or the dtype has no product.
    #[track_caller]
    pub fn cumsum<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "cumsum")?;
        let last = self.rank() - 1;
        let upper = Self::triu2(self.dims()[dim], self.dtype(), self.device())?;
        if last == 0 {
            return self.unsqueeze(0)?.matmul(&upper)?.squeeze(0);
        }
        self.transpose(dim, last)?.broadcast_matmul(&upper)?.transpose(dim, last)
    }

    /// The grids that vectors span: one tensor per vector, of the shape of all lengths. With `xy_indexing` the first two
    /// dims are swapped, as numpy does.
    ///
    /// # Errors
    /// When there are fewer than two tensors, or one is no vector.
    #[track_caller]
    pub fn meshgrid<A: AsRef<LazyTensor>>(vectors: &[A], xy_indexing: bool) -> Result<Vec<Self>> {
        if vectors.len() < 2 {
            return Self::refuse("meshgrid", ErrorKind::Shape("needs at least two tensors".into()));
        }
        let mut ordered: Vec<&Self> = vectors.iter().map(AsRef::as_ref).collect();
        if xy_indexing {
            ordered.reverse();
        }
        let mut shape = Vec::with_capacity(ordered.len());
        for vector in &ordered {
            shape.push(vector.dims1()?);
        }
        let mut grids = Vec::with_capacity(ordered.len());
        for (dim, vector) in ordered.into_iter().enumerate() {
            let mut along = vec![1; shape.len()];
            along[dim] = shape[dim];
            grids.push(vector.reshape(along)?.broadcast_as(shape.as_slice())?);
        }
        if xy_indexing {
            grids.reverse();
        }
        Ok(grids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Tensor, Var};

    fn tensor(dims: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1., dims, &Device::Cpu).unwrap()
    }

    fn equal(got: Result<LazyTensor>, want: candle_core::Result<Tensor>) {
        let (got, want) = (got.unwrap(), want.unwrap());
        assert_eq!(got.dims(), want.dims());
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (a, b) in flat(&got.eval().unwrap()).iter().zip(flat(&want)) {
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.), "{a} instead of {b}");
        }
    }

    #[test]
    fn the_names_do_what_candles_do() {
        let (x, v, w) = (tensor(&[3, 4]), tensor(&[4]), tensor(&[4]));
        let (lx, lv, lw) = (LazyTensor::from(&x), LazyTensor::from(&v), LazyTensor::from(&w));
        equal(lv.dot(&lw), v.dot(&w));
        equal(lx.norm(), x.norm());
        equal(lx.mv(&lv), x.mv(&v));
        equal(lx.round_to(2), x.round_to(2));
        equal(lx.slice_scatter0(&lx.narrow(0, 0, 2).unwrap(), 1), x.slice_scatter0(&x.narrow(0, 0, 2).unwrap(), 1));
        equal(lv.cumsum(0), v.cumsum(0));
        for dim in 0..2 {
            equal(lx.cumsum(dim), x.cumsum(dim));
            equal(lx.flip(&[dim]), x.flip(&[dim]));
            for shift in [-5, -1, 0, 1, 2, 7] {
                equal(lx.roll(shift, dim), x.roll(shift, dim));
            }
        }
        equal(lx.flip(&[0, 1]), x.flip(&[0, 1]));
    }

    #[test]
    fn grids_are_candles() {
        let (a, b, c) = (tensor(&[2]), tensor(&[3]), tensor(&[4]));
        let lazy = [&a, &b, &c].map(LazyTensor::from);
        for xy in [false, true] {
            let want = Tensor::meshgrid(&[&a, &b, &c], xy).unwrap();
            for (got, want) in LazyTensor::meshgrid(&lazy, xy).unwrap().into_iter().zip(want) {
                equal(Ok(got), Ok(want));
            }
        }
        assert!(LazyTensor::meshgrid(&lazy[..1], true).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused_here() {
        let x = LazyTensor::from(tensor(&[3, 4]));
        let line = line!() + 1;
        let errors = [x.mv(&x).err(), x.dot(&x).err(), x.roll(1, 2).err(), x.flip(&[2]).err(), x.cumsum(2).err()];
        for error in errors {
            assert_eq!(error.unwrap().site().unwrap().location().line(), line);
        }
        assert_eq!(x.normalize_axis(-1).unwrap(), 1);
        assert!(x.normalize_axis(-3).is_err() && x.normalize_axis(2).is_err());
    }

    #[test]
    fn full_takes_its_dtype_from_the_value() {
        let big = i64::MAX - 1;
        assert_eq!(LazyTensor::full(big, 2, &Device::Cpu).unwrap().to_vec1::<i64>().unwrap(), [big, big]);
        assert_eq!(LazyTensor::full(3u8, (1, 1), &Device::Cpu).unwrap().dtype(), DType::U8);
        assert!(LazyTensor::full(f32::NAN, (), &Device::Cpu).unwrap().to_scalar::<f32>().unwrap().is_nan());
    }

    #[test]
    fn gradients_are_candles() {
        let var = Var::from_tensor(&tensor(&[3])).unwrap();
        let x = LazyTensor::from(var.as_tensor());
        let grads = x.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let want = (var.as_tensor() * 2.0).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(grads.get(&var).unwrap().to_vec1::<f32>().unwrap(), want);
        assert!(!x.detach().track_op());
    }
}
