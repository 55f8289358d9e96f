//! Low-rank adapters: `y = base(x) + (x·A·B)·scale` (Hu et al. 2021, arXiv:2106.09685).

use crate::error::{Error, Result};
use crate::linear::Linear;
use crate::module::{detached, Module};
use crate::scope;
use candle_lazy_exec::{LazyTensor, RandomKey};

/// The two factors of an adapter and its scale (`alpha / r` in PEFT's words).
#[derive(Debug, Clone)]
pub struct LoraWeights {
    a: LazyTensor,
    b: LazyTensor,
    scale: f64,
    dropout: Option<(f64, RandomKey)>,
}

impl LoraWeights {
    /// From `a` (in, r) and `b` (r, out).
    ///
    /// PEFT stores the transposes (`lora_A.weight` is (r, in), `lora_B.weight` is (out, r)).
    ///
    /// # Errors
    /// Where either is no matrix, the ranks differ, or the dtypes differ.
    #[track_caller]
    pub fn new(a: impl Into<LazyTensor>, b: impl Into<LazyTensor>, scale: f64) -> Result<Self> {
        let (a, b) = (a.into(), b.into());
        let fits = matches!((a.dims(), b.dims()), (&[_, ra], &[rb, _]) if ra == rb && ra > 0);
        if !fits {
            return Err(Error::module(
                "lora",
                "",
                format_args!("expected a (in, r) and b (r, out), found a {:?} and b {:?}", a.shape(), b.shape()),
            ));
        }
        if a.dtype() != b.dtype() {
            return Err(Error::module(
                "lora",
                "",
                format_args!("a is {:?} and b is {:?}: both must have one dtype", a.dtype(), b.dtype()),
            ));
        }
        Ok(Self { a, b, scale, dropout: None })
    }

    /// The same with dropout, for training: each element of x·A is zero with probability `p`, else divided by 1 − p. A key gives the
    /// same zeros again, so each step needs its own.
    ///
    /// # Errors
    /// Where `p` is not in 0 ≤ p < 1.
    #[track_caller]
    pub fn with_dropout(self, p: f64, key: RandomKey) -> Result<Self> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::module("lora", "", format_args!("a dropout of {p}: needs 0 ≤ p < 1")));
        }
        Ok(Self { dropout: (p > 0.0).then_some((p, key)), ..self })
    }

    /// The same factors on the same memory, without dropout, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a factor that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        Ok(Self { a: detached(&self.a)?, b: detached(&self.b)?, scale: self.scale, dropout: None })
    }

    /// The factor (in, r).
    pub fn a(&self) -> &LazyTensor {
        &self.a
    }

    /// The factor (r, out).
    pub fn b(&self) -> &LazyTensor {
        &self.b
    }

    /// What the product is multiplied by.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The rank `r`.
    pub fn rank(&self) -> usize {
        self.b.dims().first().copied().unwrap_or(0)
    }
}

/// A linear map that may carry one adapter; without one it is its base.
///
/// The adapter is recorded as one node that adds to the base's result: two skinny products, `x·A` once per row.
#[derive(Debug, Clone)]
pub struct LoraLinear {
    base: Linear,
    adapter: Option<LoraWeights>,
}

impl LoraLinear {
    /// The base alone; [`LoraLinear::set_adapter`] adds one.
    #[track_caller]
    pub fn new(base: Linear) -> Self {
        Self { base, adapter: None }
    }

    /// Sets, replaces (`Some`) or removes (`None`) the adapter.
    ///
    /// # Errors
    /// Where the factors do not fit the base's widths or dtype; the module keeps what it had.
    #[track_caller]
    pub fn set_adapter(&mut self, adapter: Option<LoraWeights>) -> Result<()> {
        if let Some(lora) = &adapter {
            let (input, output) = (self.base.in_features(), self.base.out_features());
            let fits = lora.a.dims().first() == Some(&input) && lora.b.dims().get(1) == Some(&output);
            if !fits {
                return Err(Error::module(
                    "lora",
                    self.base.path(),
                    format_args!(
                        "a base of in {input}, out {output} needs a ({input}, r) and b (r, {output}), found a {:?} and b {:?}",
                        lora.a.shape(),
                        lora.b.shape()
                    ),
                ));
            }
            if lora.a.dtype() != self.base.weight().dtype() {
                return Err(Error::module(
                    "lora",
                    self.base.path(),
                    format_args!("the base is {:?}, the adapter {:?}", self.base.weight().dtype(), lora.a.dtype()),
                ));
            }
        }
        self.adapter = adapter;
        Ok(())
    }

    /// The same module on the same memory, without dropout, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a weight that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        let adapter = match &self.adapter {
            Some(adapter) => Some(adapter.detached()?),
            None => None,
        };
        Ok(Self { base: self.base.detached()?, adapter })
    }

    /// The linear map below the adapter.
    pub fn base(&self) -> &Linear {
        &self.base
    }

    /// The adapter, where one is set.
    pub fn adapter(&self) -> Option<&LoraWeights> {
        self.adapter.as_ref()
    }
}

impl From<Linear> for LoraLinear {
    fn from(base: Linear) -> Self {
        Self::new(base)
    }
}

impl Module for LoraLinear {
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        let base = self.base.forward(xs)?;
        let Some(lora) = &self.adapter else {
            return Ok(base);
        };
        let _scope = scope::enter(self.base.path());
        if let Some((p, key)) = lora.dropout {
            let kept = xs.broadcast_matmul(&lora.a)?.dropout(p, key)?;
            return Ok(base.add(&kept.broadcast_matmul(&lora.b)?.affine(lora.scale, 0.)?)?);
        }
        Ok(xs.lora_add(&base, &lora.a, &lora.b, lora.scale)?)
    }
}
