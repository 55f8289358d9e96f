//! Activations by name, as configs give them.

use crate::error::{Error, Result};
use crate::module::Module;
use candle_lazy_exec::LazyTensor;

/// An elementwise activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `x·Φ(x)` with the error function, what Hugging Face calls `gelu` (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    Gelu,
    /// The tanh approximation of [`Activation::Gelu`]: `gelu_new`, `gelu_pytorch_tanh`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x·σ(x)`, also called swish.
    Silu,
    /// `1 / (1 + e⁻ˣ)`.
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
}

impl Activation {
    /// The activation that a Hugging Face config calls `name` (`hidden_act`).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a name that is not known.
    pub fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "relu" => Self::Relu,
            "silu" | "swish" => Self::Silu,
            "sigmoid" => Self::Sigmoid,
            "tanh" => Self::Tanh,
            other => {
                return Err(Error::Unsupported {
                    what: "activation",
                    found: other.to_string(),
                    supported: "gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu, silu, swish, sigmoid, tanh",
                })
            }
        })
    }
}

impl Module for Activation {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        Ok(match self {
            Self::Gelu => xs.gelu_erf()?,
            Self::GeluTanh => xs.gelu()?,
            Self::Relu => xs.relu()?,
            Self::Silu => xs.silu()?,
            Self::Sigmoid => xs.sigmoid()?,
            Self::Tanh => xs.tanh()?,
        })
    }
}
