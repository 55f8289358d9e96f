//! Semantic composites: recorded as one node each, so that no pattern has to be found again.

use super::LazyTensor;
use crate::error::Result;
use candle_core::shape::Dim;
use candle_lazy_graph::{Dims, ErrorKind, Op, UnaryOp};

/// Options of [`LazyTensor::attention`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionOptions {
    /// The factor of the scores, usually 1/√d.
    pub scale: f64,
    /// Query i of s sees keys 0..=t−s+i of t.
    pub causal: bool,
    /// Scores pass through cap·tanh(score/cap).
    pub softcap: Option<f64>,
    /// With `causal`, a query sees at most this many keys, its own included.
    pub window: Option<usize>,
}

impl AttentionOptions {
    /// Scores times `scale`; no mask, no cap.
    #[must_use]
    pub fn new(scale: f64) -> Self {
        Self { scale, causal: false, softcap: None, window: None }
    }

    /// The same with a causal mask.
    #[must_use]
    pub fn causal(self, causal: bool) -> Self {
        Self { causal, ..self }
    }

    /// The same with scores that pass through cap·tanh(score/cap).
    #[must_use]
    pub fn softcap(self, cap: f64) -> Self {
        Self { softcap: Some(cap), ..self }
    }

    /// The same with a window of keys.
    #[must_use]
    pub fn window(self, keys: usize) -> Self {
        Self { window: Some(keys), ..self }
    }
}

/// Neighbouring rows that have one adapter, or none: a segment of [`LazyTensor::lora_segments`].
#[derive(Debug, Clone, Copy)]
pub struct LoraSegment<'a> {
    /// How many rows.
    pub rows: usize,
    /// A (in, r), B (r, out) and the scale of their product.
    pub adapter: Option<(&'a LazyTensor, &'a LazyTensor, f64)>,
}

impl LazyTensor {
    /// exp(x − max)/sum over `dim`. f16 and bf16 compute in f32 and round once.
    ///
    /// # Errors
    /// When the dim is out of range or the dtype is not floating-point.
    #[track_caller]
    pub fn softmax<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "softmax")?;
        Self::record(Op::Softmax { dim: dim as u8 }, &[], &[self])
    }

    /// The logarithm of the softmax over `dim`.
    ///
    /// # Errors
    /// As [`LazyTensor::softmax`].
    #[track_caller]
    pub fn log_softmax<D: Dim>(&self, dim: D) -> Result<Self> {
        let dim = self.dim_index(dim, "log_softmax")?;
        Self::record(Op::LogSoftmax { dim: dim as u8 }, &[], &[self])
    }

    /// x/√(mean(x²) + eps)·weight over the last dim (arXiv:1910.07467, eq. 4); weight (n).
    ///
    /// # Errors
    /// When the weight has another shape or dtype.
    #[track_caller]
    pub fn rms_norm(&self, weight: Option<&Self>, eps: f64) -> Result<Self> {
        match weight {
            Some(w) => Self::record(Op::RmsNorm { weight: true }, &[eps], &[self, w]),
            None => Self::record(Op::RmsNorm { weight: false }, &[eps], &[self]),
        }
    }

    /// (x − mean)/√(var + eps)·weight + bias over the last dim, biased variance (arXiv:1607.06450, eq. 4); weight and bias (n).
    ///
    /// # Errors
    /// When weight or bias have another shape or dtype.
    #[track_caller]
    pub fn layer_norm(&self, weight: Option<&Self>, bias: Option<&Self>, eps: f64) -> Result<Self> {
        let op = Op::LayerNorm { weight: weight.is_some(), bias: bias.is_some() };
        let inputs: smallvec::SmallVec<[&Self; 3]> = std::iter::once(self).chain(weight).chain(bias).collect();
        Self::record(op, &[eps], &inputs)
    }

    /// Layer norm over groups of channels (arXiv:1803.08494, eq. 7): x (b, c, …) of rank 3 or more, c split into `groups`, the mean
    /// and the biased variance taken over each group and everything behind it; weight and bias (c).
    ///
    /// # Errors
    /// When c does not split into the groups, or weight or bias have another shape or dtype.
    #[track_caller]
    pub fn group_norm(&self, groups: usize, weight: Option<&Self>, bias: Option<&Self>, eps: f64) -> Result<Self> {
        let op = Op::GroupNorm { groups, weight: weight.is_some(), bias: bias.is_some() };
        let inputs: smallvec::SmallVec<[&Self; 3]> = std::iter::once(self).chain(weight).chain(bias).collect();
        Self::record(op, &[eps], &inputs)
    }

    /// The mean over n of −log softmax(self)\[target\]: logits (n, classes), targets (n; u8, u32 or i64); a scalar of the logits'
    /// dtype. f16 and bf16 compute in f32 and round once.
    ///
    /// # Errors
    /// When the shapes do not fit or are empty. A target out of range is an error when the value is computed.
    #[track_caller]
    pub fn cross_entropy(&self, targets: &Self) -> Result<Self> {
        Self::record(Op::CrossEntropy, &[], &[self, targets])
    }

    /// x·weightᵀ + bias: (…, in) with weight (out, in) and bias (out) gives (…, out).
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn linear(&self, weight: &Self, bias: Option<&Self>) -> Result<Self> {
        match bias {
            Some(b) => Self::record(Op::Linear { bias: true }, &[], &[self, weight, b]),
            None => Self::record(Op::Linear { bias: false }, &[], &[self, weight]),
        }
    }

    /// (x·A·B)·scale: (…, in) with A (in, r) and B (r, out) gives (…, out) (arXiv:2106.09685, §4.1).
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn lora(&self, a: &Self, b: &Self, scale: f64) -> Result<Self> {
        Self::record(Op::Lora { base: false }, &[scale], &[self, a, b])
    }

    /// base + (x·A·B)·scale; base (…, out).
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn lora_add(&self, base: &Self, a: &Self, b: &Self, scale: f64) -> Result<Self> {
        Self::record(Op::Lora { base: true }, &[scale], &[self, a, b, base])
    }

    /// `base` (…, n, out), and in segments of its rows what an adapter of the segment's own adds for the rows of `self` (…, n, in):
    /// (x·A·B)·scale, as [`LazyTensor::lora_add`] gives it (the segmented products of Punica, arXiv:2310.18547). The segments follow one
    /// another along the n rows and need not cover them: rows of no adapter are the base's.
    ///
    /// # Errors
    /// When there is no segment with an adapter, the shapes do not fit, the segments have more rows than there are, or the dtypes differ.
    #[track_caller]
    pub fn lora_segments(&self, base: &Self, segments: &[LoraSegment<'_>]) -> Result<Self> {
        let all = segments.iter().fold(0usize, |sum, segment| sum.saturating_add(segment.rows));
        if let Some(&n) = self.dims().iter().rev().nth(1).filter(|&&n| all > n) {
            let detail = format!("the segments have {all} rows, the input {:?} has {n}", self.dims());
            return Self::refuse_on("lora_segments", ErrorKind::Range(detail), &[self, base]);
        }
        let mut rows = Dims::new();
        let (mut inputs, mut scales) = (vec![self, base], Vec::new());
        let mut gap = 0usize;
        for segment in segments {
            match segment.adapter {
                None => gap = gap.saturating_add(segment.rows),
                Some((a, b, scale)) => {
                    rows.extend([std::mem::take(&mut gap), segment.rows]);
                    inputs.extend([a, b]);
                    scales.push(scale);
                }
            }
        }
        Self::record(Op::LoraSegments { rows }, &scales, &inputs)
    }

    /// silu(self)·up: SwiGLU (arXiv:2002.05202, §2).
    ///
    /// # Errors
    /// When shapes or dtypes differ.
    #[track_caller]
    pub fn silu_mul(&self, up: &Self) -> Result<Self> {
        Self::record(Op::Glu { act: UnaryOp::Silu }, &[], &[self, up])
    }

    /// gelu(self)·up with the tanh form: GeGLU (arXiv:2002.05202, §2).
    ///
    /// # Errors
    /// When shapes or dtypes differ.
    #[track_caller]
    pub fn gelu_mul(&self, up: &Self) -> Result<Self> {
        Self::record(Op::Glu { act: UnaryOp::Gelu }, &[], &[self, up])
    }

    /// gelu(self)·up with the exact form.
    ///
    /// # Errors
    /// When shapes or dtypes differ.
    #[track_caller]
    pub fn gelu_erf_mul(&self, up: &Self) -> Result<Self> {
        Self::record(Op::Glu { act: UnaryOp::GeluErf }, &[], &[self, up])
    }

    /// Rotary position embedding, pairs (i, i + d/2): x (b, h, s, d); cos and sin (s, d/2) or (b, s, d/2)
    /// (arXiv:2104.09864, eq. 34).
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn rope(&self, cos: &Self, sin: &Self) -> Result<Self> {
        Self::record(Op::Rope { interleaved: false }, &[], &[self, cos, sin])
    }

    /// Rotary position embedding, pairs (2i, 2i + 1); shapes as [`LazyTensor::rope`].
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn rope_i(&self, cos: &Self, sin: &Self) -> Result<Self> {
        Self::record(Op::Rope { interleaved: true }, &[], &[self, cos, sin])
    }

    /// Rotary position embedding of the first dims of each head: cos and sin (s, r/2) or (b, s, r/2) turn the first r of d dims, as
    /// [`LazyTensor::rope`] or, with `interleaved`, [`LazyTensor::rope_i`]; the rest passes through (GPT-NeoX, Phi, GLM: a partial
    /// rotary factor r/d).
    ///
    /// # Errors
    /// When the shapes do not fit, r is larger than d, or the dtypes differ.
    #[track_caller]
    pub fn rope_partial(&self, cos: &Self, sin: &Self, interleaved: bool) -> Result<Self> {
        let (&[.., d], &[.., half]) = (self.dims(), cos.dims()) else {
            let detail = format!("input {:?} and cos {:?}", self.dims(), cos.dims());
            return Self::refuse_on("rope", ErrorKind::Shape(detail), &[self, cos, sin]);
        };
        let op = Op::Rope { interleaved };
        let rotary = half.saturating_mul(2);
        // a table that is too wide, and an input of another rank, are refused as those of a whole head
        if rotary >= d || self.rank() != 4 {
            return Self::record(op, &[], &[self, cos, sin]);
        }
        let turned = Self::record(op, &[], &[&self.narrow(3, 0, rotary)?, cos, sin])?;
        Self::cat(&[turned, self.narrow(3, rotary, d - rotary)?], 3)
    }

    /// softmax(q·kᵀ·scale + mask)·v without the score matrix: q (b, h, s, d), k (b, hk, t, d), v (b, hk, t, dv), where h is a
    /// multiple of hk (grouped heads are not repeated); mask additive, broadcast to (b, h, s, t).
    ///
    /// # Errors
    /// When the shapes do not fit or the dtypes differ.
    #[track_caller]
    pub fn attention(q: &Self, k: &Self, v: &Self, mask: Option<&Self>, options: &AttentionOptions) -> Result<Self> {
        if let Some(cap) = options.softcap {
            if cap == 0.0 || cap.is_nan() {
                let kind = ErrorKind::Range(format!("a softcap of {cap}"));
                return Self::refuse_on("attention", kind, &[q, k, v]);
            }
        }
        let op = Op::Attention {
            mask: mask.is_some(),
            causal: options.causal,
            softcap: options.softcap.is_some(),
            window: options.window,
        };
        let scalars: smallvec::SmallVec<[f64; 2]> = std::iter::once(options.scale).chain(options.softcap).collect();
        let inputs: smallvec::SmallVec<[&Self; 4]> = [q, k, v].into_iter().chain(mask).collect();
        Self::record(op, &scalars, &inputs)
    }
}
