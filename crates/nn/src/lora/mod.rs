//! Low-rank adapters: `y = base(x) + (x·A·B)·scale` (Hu et al. 2021, arXiv:2106.09685).
//!
//! [`LoraLinear`] is a linear map with one. [`attach`](LoraAdapter::attach) puts trainable ones on the maps of a decoder,
//! [`LoraAdapter::save`] and [`LoraAdapter::load`] are in PEFT's format.

mod adapter;
mod config;
mod peft;
mod set;

pub use adapter::LoraAdapter;
pub use config::{LoraConfig, LoraTargets};
pub use set::LoraSet;

use crate::error::{Error, Result};
use crate::linear::Linear;
use crate::module::{detached, Module};
use crate::params::Param;
use crate::scope;
use candle_core::DType;
use candle_lazy_exec::{LazyTensor, LoraSegment, RandomKey};
use parking_lot::Mutex;
use std::sync::Arc;

/// The two factors of an adapter and its scale (`alpha / r` in PEFT's words).
#[derive(Debug, Clone)]
pub struct LoraWeights {
    factors: Factors,
    scale: f64,
    dropout: Option<Dropout>,
}

#[derive(Debug, Clone)]
enum Factors {
    /// (in, r) and (r, out).
    Tensors { a: LazyTensor, b: LazyTensor },
    /// (r, in) and (out, r), read at every use.
    Params { a: Param, b: Param },
}

#[derive(Debug, Clone)]
enum Dropout {
    /// Of x·A.
    Inner { p: f64, key: RandomKey },
    /// Of x, with a key of the step's; without one nothing is dropped.
    Input { p: f64, step: StepKey, map: u64 },
}

/// The key of a training step, which all maps of an adapter share.
pub(crate) type StepKey = Arc<Mutex<Option<RandomKey>>>;

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
        Self::of_one_dtype(a.dtype(), b.dtype())?;
        Ok(Self { factors: Factors::Tensors { a, b }, scale, dropout: None })
    }

    /// From parameters `a` (r, in) and `b` (out, r), as PEFT stores them. They are read at every use: what is recorded after an
    /// optimiser's step has the new values.
    ///
    /// # Errors
    /// As [`LoraWeights::new`].
    #[track_caller]
    pub fn from_params(a: &Param, b: &Param, scale: f64) -> Result<Self> {
        let fits = matches!((a.shape().dims(), b.shape().dims()), (&[ra, _], &[_, rb]) if ra == rb && ra > 0);
        if !fits {
            let (a, b) = (a.shape(), b.shape());
            let message = format_args!("expected a (r, in) and b (out, r), found a {a:?} and b {b:?}");
            return Err(Error::module("lora", "", message));
        }
        Self::of_one_dtype(a.dtype(), b.dtype())?;
        Ok(Self { factors: Factors::Params { a: a.clone(), b: b.clone() }, scale, dropout: None })
    }

    #[track_caller]
    fn of_one_dtype(a: DType, b: DType) -> Result<()> {
        if a == b {
            return Ok(());
        }
        Err(Error::module("lora", "", format_args!("a is {a:?} and b is {b:?}: both must have one dtype")))
    }

    /// The same with dropout, for training: each element of x·A is zero with probability `p`, else divided by 1 − p. A key gives the
    /// same zeros again, so each step needs its own. ([`LoraAdapter::train`] drops elements of x, as PEFT does.)
    ///
    /// # Errors
    /// Where `p` is not in 0 ≤ p < 1.
    #[track_caller]
    pub fn with_dropout(self, p: f64, key: RandomKey) -> Result<Self> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::module("lora", "", format_args!("a dropout of {p}: needs 0 ≤ p < 1")));
        }
        Ok(Self { dropout: (p > 0.0).then_some(Dropout::Inner { p, key }), ..self })
    }

    /// The same with dropout of x where `step` has a key, which `map` tells from those of other maps.
    fn with_step_dropout(self, p: f64, step: StepKey, map: u64) -> Self {
        Self { dropout: (p > 0.0).then_some(Dropout::Input { p, step, map }), ..self }
    }

    /// The same factors on the same memory, without dropout, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a factor that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        let (a, b) = (detached(&self.a()?)?, detached(&self.b()?)?);
        Ok(Self { factors: Factors::Tensors { a, b }, scale: self.scale, dropout: None })
    }

    /// As [`LoraWeights::detached`], with factors that are contiguous as (in, r) and (r, out): quick to read at every step.
    #[track_caller]
    pub(crate) fn frozen(&self) -> Result<Self> {
        let Self { factors, scale, .. } = self.detached()?;
        let factors = match factors {
            Factors::Tensors { a, b } => {
                let (a, b) = (a.eval()?.contiguous()?, b.eval()?.contiguous()?);
                Factors::Tensors { a: a.into(), b: b.into() }
            }
            params @ Factors::Params { .. } => params,
        };
        Ok(Self { factors, scale, dropout: None })
    }

    /// The factor (in, r); of a parameter the value of now.
    ///
    /// # Errors
    /// None in practice: the parameter is a matrix.
    #[track_caller]
    pub fn a(&self) -> Result<LazyTensor> {
        match &self.factors {
            Factors::Tensors { a, .. } => Ok(a.clone()),
            Factors::Params { a, .. } => Ok(a.value().t()?),
        }
    }

    /// The factor (r, out); as [`LoraWeights::a`].
    ///
    /// # Errors
    /// As [`LoraWeights::a`].
    #[track_caller]
    pub fn b(&self) -> Result<LazyTensor> {
        match &self.factors {
            Factors::Tensors { b, .. } => Ok(b.clone()),
            Factors::Params { b, .. } => Ok(b.value().t()?),
        }
    }

    /// What the product is multiplied by.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The rank `r`.
    pub fn rank(&self) -> usize {
        match &self.factors {
            Factors::Tensors { b, .. } => b.dims().first().copied().unwrap_or(0),
            Factors::Params { a, .. } => a.shape().dims().first().copied().unwrap_or(0),
        }
    }

    /// in and out.
    fn widths(&self) -> (usize, usize) {
        let first = |dims: &[usize]| dims.first().copied().unwrap_or(0);
        let last = |dims: &[usize]| dims.last().copied().unwrap_or(0);
        match &self.factors {
            Factors::Tensors { a, b } => (first(a.dims()), last(b.dims())),
            Factors::Params { a, b } => (last(a.shape().dims()), first(b.shape().dims())),
        }
    }

    fn dtype(&self) -> DType {
        match &self.factors {
            Factors::Tensors { a, .. } => a.dtype(),
            Factors::Params { a, .. } => a.dtype(),
        }
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
    /// Where the factors do not fit the base's widths, or are neither of its dtype nor of f32 on a base of f16 or bf16; the module keeps
    /// what it had.
    #[track_caller]
    pub fn set_adapter(&mut self, adapter: Option<LoraWeights>) -> Result<()> {
        if let Some(lora) = &adapter {
            let (input, output) = (self.base.in_features(), self.base.out_features());
            let (path, rank) = (self.base.path(), lora.rank());
            if lora.widths() != (input, output) {
                let (a, b) = lora.widths();
                let message = format_args!(
                    "a base of in {input}, out {output} needs a ({input}, r) and b (r, {output}), found a [{a}, {rank}] and b [{rank}, {b}]"
                );
                return Err(Error::module("lora", path, message));
            }
            let (base, found) = (self.base.weight().dtype(), lora.dtype());
            if found != base && found != compute_dtype(base) {
                return Err(Error::module("lora", path, format_args!("the base is {base:?}, the adapter {found:?}")));
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
        match &self.adapter {
            Some(lora) => self.adapted(lora, xs, base),
            None => Ok(base),
        }
    }
}

/// Rows of a packed step that share an adapter: their number, and the adapter of the map at hand.
pub(crate) type AdaptedRows<'a> = (usize, Option<&'a LoraWeights>);

impl LoraLinear {
    /// The map of packed rows `xs` (1, rows, in): one pass over the base for all of them, then each stretch of rows through its own
    /// adapter. A stretch that names none has the module's, where there is one. The stretches follow one another and cover all rows.
    #[track_caller]
    pub(crate) fn forward_packed(&self, xs: &LazyTensor, stretches: &[AdaptedRows<'_>]) -> Result<LazyTensor> {
        let base = self.base.forward(xs)?;
        let adapters: Vec<_> = stretches.iter().map(|(_, of)| of.or(self.adapter.as_ref())).collect();
        let Some(first) = adapters.iter().flatten().next() else { return Ok(base) };
        if let [Some(lora)] = adapters.as_slice() {
            return self.adapted(lora, xs, base);
        }
        // rows without an adapter go to the adapters' dtype and back, which must change nothing
        let wide = first.dtype();
        let alike = |lora: &&LoraWeights| lora.dropout.is_none() && lora.dtype() == wide;
        if (wide == base.dtype() || wide == compute_dtype(base.dtype())) && adapters.iter().flatten().all(alike) {
            return self.adapted_segments(wide, xs, &base, stretches, &adapters);
        }
        let mut pieces = Vec::with_capacity(stretches.len());
        let mut start = 0;
        for ((rows, _), of) in stretches.iter().zip(&adapters) {
            let piece = base.narrow(1, start, *rows)?;
            pieces.push(match of {
                Some(lora) => self.adapted(lora, &xs.narrow(1, start, *rows)?, piece)?,
                None => piece,
            });
            start += rows;
        }
        Ok(LazyTensor::cat(&pieces, 1)?)
    }

    /// All stretches in one op: `base`, which is the base's result for `xs`, plus what the adapters of dtype `wide` add.
    #[track_caller]
    fn adapted_segments(
        &self,
        wide: DType,
        xs: &LazyTensor,
        base: &LazyTensor,
        stretches: &[AdaptedRows<'_>],
        adapters: &[Option<&LoraWeights>],
    ) -> Result<LazyTensor> {
        let _scope = scope::enter(self.base.path());
        let of = |lora: &LoraWeights| Ok((lora.a()?, lora.b()?, lora.scale));
        let factors = adapters.iter().map(|lora| lora.map(of).transpose()).collect::<Result<Vec<_>>>()?;
        let segments: Vec<_> = stretches
            .iter()
            .zip(&factors)
            .map(|(&(rows, _), of)| LoraSegment { rows, adapter: of.as_ref().map(|(a, b, scale)| (a, b, *scale)) })
            .collect();
        // as `adapted` computes each stretch
        let sum = xs.to_dtype(wide)?.lora_segments(&base.to_dtype(wide)?, &segments)?;
        Ok(sum.to_dtype(base.dtype())?)
    }

    /// `base`, which is the base's result for `xs`, plus what the adapter adds.
    #[track_caller]
    fn adapted(&self, lora: &LoraWeights, xs: &LazyTensor, base: LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(self.base.path());
        let (a, b) = (lora.a()?, lora.b()?);
        // an adapter of f32 on a base of half precision is computed in f32, and its sum with the base is rounded once
        let (dtype, wide) = (base.dtype(), lora.dtype());
        let (xs, base) = (xs.to_dtype(wide)?, base.to_dtype(wide)?);
        let sum = match &lora.dropout {
            Some(Dropout::Inner { p, key }) => {
                let kept = xs.broadcast_matmul(&a)?.dropout(*p, *key)?;
                base.add(&kept.broadcast_matmul(&b)?.affine(lora.scale, 0.)?)?
            }
            Some(Dropout::Input { p, step, map }) => match *step.lock() {
                Some(key) => xs.dropout(*p, key.fold_in(*map))?.lora_add(&base, &a, &b, lora.scale)?,
                None => xs.lora_add(&base, &a, &b, lora.scale)?,
            },
            None => xs.lora_add(&base, &a, &b, lora.scale)?,
        };
        Ok(sum.to_dtype(dtype)?)
    }
}

/// The dtype that an adapter on a base of `base` is trained in.
pub(crate) fn compute_dtype(base: DType) -> DType {
    match base {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that fails says so

    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn rows_beside_an_adapter_of_lower_precision_keep_their_bits() {
        let random = |seed: u64, shape: (usize, usize), dtype: DType| {
            let key = RandomKey::new(seed);
            LazyTensor::rand(key, -1., 1., shape, DType::F32, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let xs = random(1, (5, 10), DType::F32).reshape((1, 5, 10)).unwrap();
        let bits = |t: &LazyTensor, start: usize, rows: usize| -> Vec<u32> {
            let rows = t.narrow(1, start, rows).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            rows.into_iter().map(f32::to_bits).collect()
        };
        let layer = LoraLinear::new(Linear::new(random(2, (7, 10), DType::F32), None).unwrap());
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let (a, b) = (random(3, (10, 2), dtype), random(4, (2, 7), dtype));
            let adapter = LoraWeights::new(a, b, 0.5).unwrap();
            let alone = layer.forward(&xs).unwrap();
            let mixed = layer.forward_packed(&xs, &[(2, Some(&adapter)), (3, None)]).unwrap();
            assert_eq!(bits(&mixed, 2, 3), bits(&alone, 2, 3), "{dtype:?}");
            let adapted =
                layer.adapted(&adapter, &xs.narrow(1, 0, 2).unwrap(), alone.narrow(1, 0, 2).unwrap()).unwrap();
            assert_eq!(bits(&mixed, 0, 2), bits(&adapted, 0, 2), "{dtype:?}");
        }
    }

    #[test]
    fn a_steps_dropout_is_of_the_input_by_the_steps_and_the_maps_key() {
        let random = |seed: u64, shape: (usize, usize)| {
            let key = RandomKey::new(seed);
            LazyTensor::rand(key, -1., 1., shape, DType::F32, &Device::Cpu).unwrap().eval().unwrap()
        };
        let (weight, a, b) = (random(1, (7, 10)), random(2, (2, 10)), random(3, (7, 2)));
        let xs: LazyTensor = random(4, (5, 10)).into();
        let (a, b) = (Param::new("a", a).unwrap(), Param::new("b", b).unwrap());
        let (step, key) = (StepKey::default(), RandomKey::new(5));
        let mut layer = LoraLinear::new(Linear::new(weight, None).unwrap());
        let base = layer.forward(&xs).unwrap();
        let weights = LoraWeights::from_params(&a, &b, 0.5).unwrap().with_step_dropout(0.25, Arc::clone(&step), 3);
        layer.set_adapter(Some(weights)).unwrap();
        let by_hand = |xs: &LazyTensor| {
            let inner = xs.matmul(&a.value().t().unwrap()).unwrap();
            let delta = inner.matmul(&b.value().t().unwrap()).unwrap().affine(0.5, 0.).unwrap();
            base.add(&delta).unwrap().eval().unwrap()
        };
        let differ =
            |x: &Tensor, y: &Tensor| (x - y).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let plain = layer.forward(&xs).unwrap().eval().unwrap();
        assert!(differ(&plain, &by_hand(&xs)) < 1e-5);
        *step.lock() = Some(key);
        let dropped = layer.forward(&xs).unwrap().eval().unwrap();
        assert!(differ(&dropped, &by_hand(&xs.dropout(0.25, key.fold_in(3)).unwrap())) < 1e-5);
        assert!(differ(&dropped, &plain) > 0.01);
        assert!(differ(&layer.detached().unwrap().forward(&xs).unwrap().eval().unwrap(), &plain) < 1e-5);
    }
}
