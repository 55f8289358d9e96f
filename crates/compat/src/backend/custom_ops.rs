//! The fused ops as Candle's custom ops, for `Tensor::apply_op1`.
//!
//! They compute on the CPU, whatever the layout, and are refused elsewhere; `CustomMetalOps` runs on every device. The gradient of the
//! input flows through all of them. Candle asks a custom op of one input for that one gradient only, so A and B of [`FusedLoRAOp`] get
//! none here; `CustomMetalOps::lora_forward_fused` gives all three theirs.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Storage, Tensor};

/// The input as a tensor of its own: what the layout selects, contiguous.
fn tensor_of(op: &str, storage: &CpuStorage, layout: &Layout) -> Result<Tensor> {
    fn selected<T: Copy>(values: &[T], layout: &Layout) -> Vec<T> {
        match layout.contiguous_offsets() {
            Some((start, end)) => values.get(start..end).map(<[T]>::to_vec).unwrap_or_default(),
            None => {
                let mut places = vec![layout.start_offset()];
                for (&len, &stride) in layout.dims().iter().zip(layout.stride()) {
                    places = places.iter().flat_map(|at| (0..len).map(move |i| at + i * stride)).collect();
                }
                places.iter().filter_map(|&at| values.get(at).copied()).collect()
            }
        }
    }
    let shape = layout.shape();
    match storage {
        CpuStorage::F32(values) => Tensor::from_vec(selected(values, layout), shape, &Device::Cpu),
        CpuStorage::F64(values) => Tensor::from_vec(selected(values, layout), shape, &Device::Cpu),
        CpuStorage::F16(values) => Tensor::from_vec(selected(values, layout), shape, &Device::Cpu),
        CpuStorage::BF16(values) => Tensor::from_vec(selected(values, layout), shape, &Device::Cpu),
        _ => Err(candle_core::Error::Msg(format!("{op}: the input must be of a float dtype"))),
    }
}

/// The storage of a result and its shape.
fn storage_of(result: &Tensor) -> Result<(CpuStorage, Shape)> {
    let contiguous = result.contiguous()?;
    let (guard, layout) = contiguous.storage_and_layout();
    let Storage::Cpu(storage) = &*guard else {
        return Err(candle_core::Error::Msg("the result of a CPU op is not on the CPU".into()));
    };
    let (start, len) = (layout.start_offset(), layout.shape().elem_count());
    let part = |what: Option<CpuStorage>| {
        what.ok_or_else(|| candle_core::Error::Msg("a result that its storage does not hold".into()))
    };
    let owned = match storage {
        CpuStorage::F32(v) => part(v.get(start..start + len).map(|v| CpuStorage::F32(v.to_vec())))?,
        CpuStorage::F64(v) => part(v.get(start..start + len).map(|v| CpuStorage::F64(v.to_vec())))?,
        CpuStorage::F16(v) => part(v.get(start..start + len).map(|v| CpuStorage::F16(v.to_vec())))?,
        CpuStorage::BF16(v) => part(v.get(start..start + len).map(|v| CpuStorage::BF16(v.to_vec())))?,
        _ => return Err(candle_core::Error::Msg("the result of a float op is no float".into())),
    };
    Ok((owned, layout.shape().clone()))
}

/// The gradient of `f`'s input, from Candle's tape over `f`.
fn gradient(x: &Tensor, grad: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Option<Tensor>> {
    let input = candle_core::Var::from_tensor(&x.detach())?;
    let weighted = (f(input.as_tensor())? * grad.detach())?.sum_all()?;
    Ok(weighted.backward()?.get(input.as_tensor()).cloned())
}

/// (x·A·B)·scaling as an op of x.
#[derive(Debug)]
pub struct FusedLoRAOp {
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: f32,
}

impl FusedLoRAOp {
    /// From A (in, rank) and B (rank, out).
    ///
    /// # Errors
    /// Where either is no matrix, or the ranks differ.
    #[cfg_attr(
        not(feature = "silence-deprecated"),
        deprecated(note = "no gradient reaches A and B: `CustomMetalOps::lora_forward_fused` has all three")
    )]
    pub fn new(lora_a: Tensor, lora_b: Tensor, scaling: f32) -> Result<Self> {
        let ((_, rank_a), (rank_b, _)) = (lora_a.dims2()?, lora_b.dims2()?);
        if rank_a != rank_b {
            return Err(candle_core::Error::Msg(format!(
                "LoRA matrix dimension mismatch: A {:?} and B {:?} have ranks {rank_a} and {rank_b}",
                lora_a.dims(),
                lora_b.dims()
            )));
        }
        Ok(Self { lora_a, lora_b, scaling })
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        candle_lazy_ops::lora(x, &self.lora_a.detach(), &self.lora_b.detach(), f64::from(self.scaling))
    }
}

impl CustomOp1 for FusedLoRAOp {
    fn name(&self) -> &'static str {
        "fused_lora_forward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        storage_of(&self.apply(&tensor_of(self.name(), storage, layout)?)?)
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        gradient(x, grad, |x| self.apply(x))
    }
}

/// x/√(mean(x²) + eps) over the last dim.
#[derive(Debug)]
pub struct FusedRMSNormOp {
    eps: f32,
}

impl FusedRMSNormOp {
    /// With this eps.
    ///
    /// # Errors
    /// Where eps is negative or no number.
    pub fn new(eps: f32) -> Result<Self> {
        if eps.is_nan() || eps < 0.0 {
            return Err(candle_core::Error::Msg(format!("fused-rms-norm: an eps of {eps}")));
        }
        Ok(Self { eps })
    }
}

impl CustomOp1 for FusedRMSNormOp {
    fn name(&self) -> &'static str {
        "fused-rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = tensor_of(self.name(), storage, layout)?;
        storage_of(&candle_lazy_ops::rms_norm(&x, None, f64::from(self.eps))?)
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        gradient(x, grad, |x| candle_lazy_ops::rms_norm(x, None, f64::from(self.eps)))
    }
}

/// Softmax over the last dim.
#[derive(Debug)]
pub struct FusedSoftmaxOp;

impl FusedSoftmaxOp {
    /// The op.
    ///
    /// # Errors
    /// None here; v1 could fail to set up its Metal pipeline.
    pub fn new() -> Result<Self> {
        Ok(Self)
    }
}

impl CustomOp1 for FusedSoftmaxOp {
    fn name(&self) -> &'static str {
        "fused-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = tensor_of(self.name(), storage, layout)?;
        storage_of(&candle_lazy_ops::softmax(&x, candle_core::D::Minus1)?)
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        gradient(x, grad, |x| candle_lazy_ops::softmax(x, candle_core::D::Minus1))
    }
}

/// (x − mean)/√(var + eps) over the last dim, biased variance.
#[derive(Debug)]
pub struct LayerNormOp {
    eps: f64,
}

impl LayerNormOp {
    /// With this eps.
    #[must_use]
    pub fn new(eps: f64) -> Self {
        Self { eps }
    }
}

impl CustomOp1 for LayerNormOp {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = tensor_of(self.name(), storage, layout)?;
        storage_of(&candle_lazy_ops::layer_norm(&x, None, None, self.eps)?)
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        gradient(x, grad, |x| candle_lazy_ops::layer_norm(x, None, None, self.eps))
    }
}

/// (x − mean)/√(var + eps) over the last dim, biased variance, any rank above 0, differentiable.
///
/// # Errors
/// For a scalar, or a dtype that is not a float.
pub fn layer_norm(tensor: &Tensor, eps: f64) -> Result<Tensor> {
    crate::eager::layer_norm(tensor, eps)
}
