//! Functions on tensors.

use crate::candle::shape::Dim;
use crate::candle::{Error, Module, ModuleT, Result, Tensor, D};

/// exp(x − max)/sum over `dim`.
///
/// # Errors
/// When the dim is out of range or the dtype is not floating-point.
#[track_caller]
pub fn softmax<D: Dim>(xs: &Tensor, dim: D) -> Result<Tensor> {
    xs.softmax(dim)
}

/// The softmax over the last dim.
///
/// # Errors
/// As [`softmax`].
#[track_caller]
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    xs.softmax(D::Minus1)
}

/// The logarithm of the softmax over `dim`.
///
/// # Errors
/// As [`softmax`].
#[track_caller]
pub fn log_softmax<D: Dim>(xs: &Tensor, dim: D) -> Result<Tensor> {
    xs.log_softmax(dim)
}

/// x/(1 + e⁻ˣ).
///
/// # Errors
/// When the dtype is not floating-point.
#[track_caller]
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    xs.silu()
}

/// silu of the first half of the last dim times the second half.
///
/// # Errors
/// When the last dim is odd or absent, or the dtype is not floating-point.
#[track_caller]
pub fn swiglu(xs: &Tensor) -> Result<Tensor> {
    let width = xs.dim(D::Minus1)?;
    let half = width / 2;
    if width % 2 != 0 {
        let detail = format!("the last dim holds gate and up side by side and must be even, got {width}");
        return Err(Tensor::shape_error("swiglu", detail, &[xs]));
    }
    xs.narrow(D::Minus1, 0, width - half)?.silu_mul(&xs.narrow(D::Minus1, width - half, half)?)
}

/// 1/(1 + e⁻ˣ).
///
/// # Errors
/// When the dtype is not floating-point.
#[track_caller]
pub fn sigmoid(xs: &Tensor) -> Result<Tensor> {
    xs.sigmoid()
}

/// (x + 3)/6, limited to 0..=1.
///
/// # Errors
/// When the dtype is not supported.
#[track_caller]
pub fn hard_sigmoid(xs: &Tensor) -> Result<Tensor> {
    ((xs + 3.0)? / 6.0)?.clamp(0., 1.)
}

/// x·tanh(log(1 + eˣ)) (arXiv:1908.08681, eq. 1).
///
/// # Errors
/// When the dtype is not floating-point.
#[track_caller]
pub fn mish(xs: &Tensor) -> Result<Tensor> {
    xs * (xs.exp()? + 1.0)?.log()?.tanh()?
}

/// max(x, 0) + slope·min(x, 0).
///
/// # Errors
/// When the dtype is not floating-point.
#[track_caller]
pub fn leaky_relu(xs: &Tensor, negative_slope: f64) -> Result<Tensor> {
    let zero = Tensor::filled(0., (), xs.dtype(), xs.device())?;
    xs.broadcast_maximum(&zero)? + (xs.broadcast_minimum(&zero)? * negative_slope)?
}

/// γ·x where x > 0, else γ·α·(eˣ − 1) (arXiv:1706.02515, eq. 2).
///
/// # Errors
/// When the dtype is not floating-point.
#[track_caller]
pub fn selu(xs: &Tensor, alpha: f32, gamma: f32) -> Result<Tensor> {
    xs.elu(f64::from(alpha))? * f64::from(gamma)
}

/// Zero with probability `drop_p`, else x/(1 − drop_p); other numbers at every call.
///
/// # Errors
/// When the probability is not in 0..1, or the dtype is not floating-point.
#[track_caller]
pub fn dropout(xs: &Tensor, drop_p: f32) -> Result<Tensor> {
    if !(0. ..1.).contains(&drop_p) {
        return Err(Error::Msg(format!("dropout: a probability of {drop_p}; it lies in 0..1")).at_caller());
    }
    let random = Tensor::from(candle_core::Tensor::rand(0f32, 1f32, xs.shape(), xs.device())?);
    let mask = (random.ge(drop_p)?.to_dtype(xs.dtype())? * (1.0 / (1.0 - f64::from(drop_p))))?;
    xs * mask
}

/// [`dropout`] while training, nothing otherwise.
#[derive(Clone, Debug)]
pub struct Dropout {
    drop_p: f32,
}

impl Dropout {
    /// With this probability of a zero.
    #[must_use]
    pub fn new(drop_p: f32) -> Self {
        Self { drop_p }
    }

    /// [`dropout`] if `train`.
    ///
    /// # Errors
    /// As [`dropout`].
    #[track_caller]
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if train {
            dropout(xs, self.drop_p)
        } else {
            Ok(xs.clone())
        }
    }
}

impl ModuleT for Dropout {
    #[track_caller]
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(xs, train)
    }
}

/// RMS norm over the last dim, weight (n).
///
/// # Errors
/// When the weight has another shape or dtype.
#[track_caller]
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    xs.rms_norm(Some(alpha), f64::from(eps))
}

/// The same as [`rms_norm`], which has a gradient as it is.
///
/// # Errors
/// As [`rms_norm`].
#[track_caller]
pub fn rms_norm_slow(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    rms_norm(xs, alpha, eps)
}

/// Layer norm over the last dim, weight and bias (n).
///
/// # Errors
/// When weight or bias have another shape or dtype.
#[track_caller]
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    xs.layer_norm(Some(alpha), Some(beta), f64::from(eps))
}

/// The same as [`layer_norm`], which has a gradient as it is.
///
/// # Errors
/// As [`layer_norm`].
#[track_caller]
pub fn layer_norm_slow(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    layer_norm(xs, alpha, beta, eps)
}

/// (b, c·r², h, w) to (b, c, h·r, w·r) (arXiv:1609.05158, eq. 4).
///
/// # Errors
/// When there are not four dims or the channels do not divide.
#[track_caller]
pub fn pixel_shuffle(xs: &Tensor, upscale_factor: usize) -> Result<Tensor> {
    let (b, c, h, w) = xs.dims4()?;
    let r = upscale_factor;
    let out = c.checked_div(r.saturating_mul(r)).unwrap_or(0);
    xs.reshape((b, out, r, r, h, w))?.permute((0, 1, 4, 2, 5, 3))?.reshape((b, out, h * r, w * r))
}

/// The inverse of [`pixel_shuffle`].
///
/// # Errors
/// When there are not four dims or height and width do not divide.
#[track_caller]
pub fn pixel_unshuffle(xs: &Tensor, downscale_factor: usize) -> Result<Tensor> {
    let (b, c, h, w) = xs.dims4()?;
    let r = downscale_factor;
    let (oh, ow) = (h.checked_div(r).unwrap_or(0), w.checked_div(r).unwrap_or(0));
    xs.reshape((b, c, oh, r, ow, r))?.permute((0, 1, 3, 5, 2, 4))?.reshape((b, c.saturating_mul(r * r), oh, ow))
}

/// The module that changes nothing.
#[derive(Clone, Debug, Default)]
pub struct Identity;

impl Identity {
    /// The module.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl Module for Identity {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        Ok(xs.clone())
    }
}
