//! Rotary position embedding: the table of cosines and sines (Su et al. 2021, arXiv:2104.09864).

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::LazyTensor;

/// How the base frequencies are changed for contexts longer than the model was first trained on.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// Every frequency divided by one factor (position interpolation, arXiv:2306.15595).
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        /// What long wavelengths are divided by.
        factor: f32,
        /// A wavelength beyond `original_context / low_freq_factor` is long.
        low_freq_factor: f32,
        /// A wavelength below `original_context / high_freq_factor` is short.
        high_freq_factor: f32,
        /// Context of the first training, in positions.
        original_context: usize,
    },
    /// One divisor per frequency, as GGUF files carry them (`rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Cosines and sines of positions `0..positions`, half-split layout: shape (positions, head_dim / 2) each.
///
/// Angles are computed as Hugging Face and candle-transformers compute them, in f32 throughout: the models were trained
/// with those very numbers, also where f64 would give better ones at far positions.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: LazyTensor,
    sin: LazyTensor,
    positions: usize,
}

impl RopeTable {
    /// The table of `positions` rows for heads of `head_dim`, base `theta`; for a partial embedding `head_dim` is the number of dims
    /// that turn.
    ///
    /// # Errors
    /// Where `head_dim` is odd or zero, a factor list has another length than `head_dim / 2`, or there is no memory for it.
    #[track_caller]
    pub fn new(
        head_dim: usize,
        theta: f32,
        scaling: &RopeScaling,
        positions: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let frequencies = inverse_frequencies(head_dim, theta, scaling)?;
        let half = frequencies.len();
        let mut cos = room(positions.saturating_mul(half))?;
        let mut sin = room(positions.saturating_mul(half))?;
        for position in 0..positions {
            for frequency in &frequencies {
                let angle = position as f32 * frequency;
                cos.push(angle.cos());
                sin.push(angle.sin());
            }
        }
        let cos = Tensor::from_vec(cos, (positions, half), device)?.to_dtype(dtype)?;
        let sin = Tensor::from_vec(sin, (positions, half), device)?.to_dtype(dtype)?;
        Ok(Self { cos: cos.into(), sin: sin.into(), positions })
    }

    /// From tables of cosines and sines (positions, rotary dim / 2), where a model computes its angles otherwise.
    ///
    /// # Errors
    /// Where the tables are no matrices of one shape.
    #[track_caller]
    pub fn from_tables(cos: LazyTensor, sin: LazyTensor) -> Result<Self> {
        if cos.rank() != 2 || cos.dims() != sin.dims() {
            let (cos, sin) = (cos.dims(), sin.dims());
            return Err(Error::config(
                "rope",
                format_args!("tables {cos:?} and {sin:?}: needs (positions, dims / 2) twice"),
            ));
        }
        let positions = cos.dims().first().copied().unwrap_or(0);
        Ok(Self { cos, sin, positions })
    }

    /// How many dims of a head the table turns.
    pub fn rotary_dim(&self) -> usize {
        self.cos.dims().last().map_or(0, |half| half * 2)
    }

    /// `xs` (batch, heads, positions, head dim) turned by the angles of the positions from `start` on. A head may be wider than
    /// [`RopeTable::rotary_dim`]: its other dims pass through (partial rotary embedding).
    ///
    /// # Errors
    /// Where the table ends too early or is wider than a head, or the dtypes differ.
    #[track_caller]
    pub fn apply(&self, xs: &LazyTensor, start: usize) -> Result<LazyTensor> {
        let (_, _, len, _) = xs.dims4()?;
        let (cos, sin) = self.slice(start, len)?;
        Ok(xs.rope_partial(&cos, &sin, false)?)
    }

    /// Number of rows.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Cosines and sines of the positions `at` (u32, of any shape S), (S…, head_dim / 2) each.
    ///
    /// # Errors
    /// Where `at` is not of u32; a position beyond the table is an error when it is evaluated.
    #[track_caller]
    pub fn select(&self, at: &LazyTensor) -> Result<(LazyTensor, LazyTensor)> {
        Ok((self.cos.embedding(at)?, self.sin.embedding(at)?))
    }

    /// Cosines and sines of `len` positions from `start` on, (len, head_dim / 2) each.
    ///
    /// # Errors
    /// Where the table ends before `start + len`.
    #[track_caller]
    pub fn slice(&self, start: usize, len: usize) -> Result<(LazyTensor, LazyTensor)> {
        Ok((self.cos.narrow(0, start, len)?, self.sin.narrow(0, start, len)?))
    }
}

/// An empty vector with room for `len` numbers, unless there is no such memory: sizes come from a config.
fn room(len: usize) -> Result<Vec<f32>> {
    let mut list = Vec::new();
    match list.try_reserve_exact(len) {
        Ok(()) => Ok(list),
        Err(_) => Err(Error::config("rope", format_args!("there is no memory for a table of {len} numbers"))),
    }
}

/// `theta^(−2i/head_dim)` for `i` in `0..head_dim/2`, scaled.
fn inverse_frequencies(head_dim: usize, theta: f32, scaling: &RopeScaling) -> Result<Vec<f32>> {
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(Error::config("rope", format_args!("the head dim must be even and positive, found {head_dim}")));
    }
    room(head_dim / 2)?;
    let base = (0..head_dim).step_by(2).map(|i| 1f32 / theta.powf(i as f32 / head_dim as f32));
    Ok(match scaling {
        RopeScaling::None => base.collect(),
        RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let context = *original_context as f32;
            let long = context / low_freq_factor;
            let short = context / high_freq_factor;
            base.map(|f| {
                let wavelength = 2. * std::f32::consts::PI / f;
                if wavelength < short {
                    f
                } else if wavelength > long {
                    f / factor
                } else {
                    let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1. - smooth) * f / factor + smooth * f
                }
            })
            .collect()
        }
        RopeScaling::Factors(factors) => {
            if factors.len() != head_dim / 2 {
                return Err(Error::config(
                    "rope",
                    format_args!("{} frequency factors for a head dim of {head_dim}", factors.len()),
                ));
            }
            base.zip(factors).map(|(f, factor)| f / factor).collect()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies_are_powers_of_theta() -> Result<()> {
        let got = inverse_frequencies(8, 10_000., &RopeScaling::None)?;
        for (i, f) in got.iter().enumerate() {
            let want = 10_000f64.powf(-2. * i as f64 / 8.);
            assert!((*f as f64 - want).abs() <= 1e-6 * want, "{i}: {f} against {want}");
        }
        Ok(())
    }

    #[test]
    fn llama3_keeps_short_and_divides_long_wavelengths() -> Result<()> {
        let scaling =
            RopeScaling::Llama3 { factor: 8., low_freq_factor: 1., high_freq_factor: 4., original_context: 8192 };
        let base = inverse_frequencies(128, 500_000., &RopeScaling::None)?;
        let got = inverse_frequencies(128, 500_000., &scaling)?;
        assert_eq!(got.first(), base.first());
        let (last, base_last) = (got[63], base[63]);
        assert!((last - base_last / 8.).abs() <= 1e-6 * base_last);
        for (g, b) in got.iter().zip(&base) {
            assert!(*g <= b * 1.000001 && *g >= b / 8.000001);
        }
        Ok(())
    }

    #[test]
    fn a_table_that_no_memory_holds_is_refused() {
        let table = |head_dim, positions| {
            RopeTable::new(head_dim, 1e4, &RopeScaling::None, positions, DType::F32, &Device::Cpu).map(|_| ())
        };
        assert!(matches!(table(1 << 62, 1), Err(Error::Config { .. })));
        assert!(matches!(table(8, usize::MAX), Err(Error::Config { .. })));
    }

    #[test]
    fn odd_head_dim_and_wrong_factor_count_are_refused() {
        assert!(matches!(inverse_frequencies(7, 1e4, &RopeScaling::None), Err(Error::Config { .. })));
        assert!(matches!(inverse_frequencies(0, 1e4, &RopeScaling::None), Err(Error::Config { .. })));
        let factors = RopeScaling::Factors(vec![1.; 3]);
        assert!(matches!(inverse_frequencies(8, 1e4, &factors), Err(Error::Config { .. })));
    }
}
