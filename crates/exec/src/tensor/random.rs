//! Random numbers with an explicit key: a function of the key and of each element's place, whatever was fused, batched or
//! threaded.

use super::LazyTensor;
use crate::error::Result;
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_graph::{Dims, Distribution, ErrorKind, Op};
use candle_lazy_ops::kernels::philox;

/// A key for random numbers. Equal keys give equal numbers, different keys independent ones; a key is used for one purpose
/// only and others are made from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RandomKey(u64);

impl RandomKey {
    /// The key of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Another key, made from this one and a number: a step, a layer.
    #[must_use]
    pub fn fold_in(self, data: u64) -> Self {
        let key = [self.0 as u32, (self.0 >> 32) as u32];
        // the third word keeps these counters apart from those that make numbers
        let [low, high, ..] = philox([data as u32, (data >> 32) as u32, u32::MAX, 0], key);
        Self(u64::from(low) | u64::from(high) << 32)
    }

    /// `n` different keys, made from this one.
    #[must_use]
    pub fn split(self, n: usize) -> Vec<Self> {
        (0..n as u64).map(|i| self.fold_in(i)).collect()
    }

    /// The key as a tensor: a leaf, so that another key makes no new plan.
    ///
    /// # Errors
    /// When Candle cannot make the tensor.
    #[track_caller]
    pub fn to_tensor(self, device: &Device) -> Result<LazyTensor> {
        Ok(LazyTensor::from(Tensor::new(self.0 as i64, device)?))
    }
}

impl LazyTensor {
    /// Random numbers spread evenly over `lo ≤ x < up`: as many random bits as `dtype` (float) has digits, rounded once.
    ///
    /// # Errors
    /// When the dtype is no float, or `lo` or `up` is not finite.
    #[track_caller]
    pub fn rand<S: Into<Shape>>(
        key: RandomKey,
        lo: f64,
        up: f64,
        shape: S,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::rand_from(&key.to_tensor(device)?, lo, up, shape, dtype)
    }

    /// As [`LazyTensor::rand`] with a key that is a tensor of one integer (u8, u32 or i64).
    ///
    /// # Errors
    /// As [`LazyTensor::rand`], and when the key is something else.
    #[track_caller]
    pub fn rand_from<S: Into<Shape>>(key: &Self, lo: f64, up: f64, shape: S, dtype: DType) -> Result<Self> {
        Self::random(Distribution::Uniform, key, [lo, up], shape.into(), dtype)
    }

    /// Normal random numbers (Box and Muller 1958), rounded once to `dtype` (float).
    ///
    /// # Errors
    /// When the dtype is no float, or `mean` or `std` is not finite.
    #[track_caller]
    pub fn randn<S: Into<Shape>>(
        key: RandomKey,
        mean: f64,
        std: f64,
        shape: S,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::randn_from(&key.to_tensor(device)?, mean, std, shape, dtype)
    }

    /// As [`LazyTensor::randn`] with a key that is a tensor of one integer (u8, u32 or i64).
    ///
    /// # Errors
    /// As [`LazyTensor::randn`], and when the key is something else.
    #[track_caller]
    pub fn randn_from<S: Into<Shape>>(key: &Self, mean: f64, std: f64, shape: S, dtype: DType) -> Result<Self> {
        Self::random(Distribution::Normal, key, [mean, std], shape.into(), dtype)
    }

    #[track_caller]
    fn random(dist: Distribution, key: &Self, scalars: [f64; 2], shape: Shape, dtype: DType) -> Result<Self> {
        if scalars.iter().any(|s| !s.is_finite()) {
            let detail = format!("{} and {} must be finite", scalars[0], scalars[1]);
            return Self::refuse(dist.name(), ErrorKind::Range(detail));
        }
        Self::record(Op::Random { dist, shape: Dims::from_slice(shape.dims()), dtype }, &scalars, &[key])
    }

    /// Each element zero with probability `p`, else divided by 1 − p (Srivastava et al. 2014, inverted): what a layer does while
    /// it is trained. With `p` = 0 the tensor itself.
    ///
    /// # Errors
    /// When `p` is not in 0 ≤ p < 1 or the dtype is no float.
    #[track_caller]
    pub fn dropout(&self, p: f64, key: RandomKey) -> Result<Self> {
        if !(0.0..1.0).contains(&p) {
            return Self::refuse("dropout", ErrorKind::Range(format!("probability {p} is not in 0 ≤ p < 1")));
        }
        if p == 0.0 {
            return Ok(self.clone());
        }
        let kept = Self::rand(key, 0.0, 1.0, self.shape(), DType::F32, self.device())?.ge(p)?;
        kept.to_dtype(self.dtype())?.affine(1.0 / (1.0 - p), 0.0)?.mul(self)
    }
}
