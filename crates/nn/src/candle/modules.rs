//! The modules of this crate as modules of the mirror, so that `xs.apply(&layer)` takes both kinds.

use crate::candle::{Module, Result, Tensor};

macro_rules! also_modules {
    ($($module:ty),+ $(,)?) => {
        $(impl Module for $module {
            #[track_caller]
            fn forward(&self, xs: &Tensor) -> Result<Tensor> {
                Ok(<Self as crate::Module>::forward(self, xs)?)
            }
        })+
    };
}

also_modules!(
    crate::Activation,
    crate::Embedding,
    crate::FeedForward,
    crate::LayerNorm,
    crate::Linear,
    crate::LoraLinear,
    crate::Mlp,
    crate::RmsNorm,
);
