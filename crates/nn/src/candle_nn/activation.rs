//! Activations by name, as configs give them.

use super::ops;
use super::var_builder::VarBuilder;
use crate::candle::{Error, Module, Result, Tensor};
use candle_nn::Init;

/// An elementwise activation, with Candle's variants and their names in configs.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// GELU with the error function.
    #[default]
    #[serde(alias = "gelu")]
    Gelu,
    /// GELU with the hyperbolic tangent.
    #[serde(alias = "gelu_new")]
    NewGelu,
    /// max(x, 0).
    Relu,
    /// max(x, 0)².
    Relu2,
    /// x limited to 0..=6.
    Relu6,
    /// x·σ(x).
    Silu,
    /// 1/(1 + e⁻ˣ).
    Sigmoid,
    /// (x + 3)/6 limited to 0..=1.
    HardSigmoid,
    /// silu of one half of the last dim times the other half.
    Swiglu,
    /// The same as `Silu`.
    Swish,
    /// x·tanh(log(1 + eˣ)).
    Mish,
    /// x times `HardSigmoid`.
    HardSwish,
    /// x where x > 0, else α·(eˣ − 1).
    Elu(f64),
    /// x where x > 0, else slope·x.
    LeakyRelu(f64),
    /// The same as `NewGelu`.
    #[serde(alias = "gelu_pytorch_tanh")]
    GeluPytorchTanh,
}

impl Module for Activation {
    #[track_caller]
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => xs.gelu_erf(),
            Self::NewGelu | Self::GeluPytorchTanh => xs.gelu(),
            Self::Relu => xs.relu(),
            Self::Relu2 => xs.relu()?.sqr(),
            Self::Relu6 => xs.clamp(0., 6.),
            Self::Silu | Self::Swish => xs.silu(),
            Self::Sigmoid => xs.sigmoid(),
            Self::HardSigmoid => ops::hard_sigmoid(xs),
            Self::Swiglu => ops::swiglu(xs),
            Self::Mish => ops::mish(xs),
            Self::HardSwish => xs * ops::hard_sigmoid(xs)?,
            Self::Elu(alpha) => xs.elu(*alpha),
            Self::LeakyRelu(slope) => ops::leaky_relu(xs, *slope),
        }
    }
}

/// max(x, 0) + weight·min(x, 0), with one weight or one per channel (arXiv:1502.01852, eq. 1).
#[derive(Clone, Debug)]
pub struct PReLU {
    weight: Tensor,
    is_scalar: bool,
}

impl PReLU {
    /// From one weight, or from one per channel (the second dim, or the only one).
    #[must_use]
    pub fn new(weight: Tensor, is_scalar: bool) -> Self {
        Self { weight, is_scalar }
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Whether there is one weight only.
    #[must_use]
    pub fn is_scalar(&self) -> bool {
        self.is_scalar
    }
}

impl Module for PReLU {
    #[track_caller]
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let weight = if self.is_scalar {
            self.weight.reshape(())?
        } else if xs.dims() == self.weight.dims() || xs.rank() < 2 {
            self.weight.clone()
        } else {
            let (channels, weights) = (xs.dim(1)?, self.weight.elem_count());
            if channels != weights {
                let message = format!("prelu: {weights} weights for {channels} channels, input {:?}", xs.dims());
                return Err(Error::Msg(message).at_caller());
            }
            let mut shape = vec![1; xs.rank()];
            if let Some(channel) = shape.get_mut(1) {
                *channel = weights;
            }
            self.weight.reshape(shape)?
        };
        let zero = Tensor::filled(0., (), xs.dtype(), xs.device())?;
        xs.broadcast_maximum(&zero)? + xs.broadcast_minimum(&zero)?.broadcast_mul(&weight)?
    }
}

/// A [`PReLU`] from `weight`; `None` for one weight.
///
/// # Errors
/// When the tensor is missing or has another shape.
#[track_caller]
pub fn prelu(num_channels: Option<usize>, vb: VarBuilder<'_>) -> Result<PReLU> {
    let weight = vb.get_with_hints(num_channels.unwrap_or(1), "weight", Init::Const(0.25))?;
    Ok(PReLU::new(weight, num_channels.is_none()))
}
