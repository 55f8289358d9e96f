//! The fused ops as Candle's custom ops, for `Tensor::apply_op1`.
//!
//! They run on every device, whatever the layout: what the layout selects becomes a tensor of the storage's device, and the engine's
//! function computes its result. The gradient of the input flows through all of them. Candle asks a custom op of one input for that one
//! gradient only, so A and B of [`FusedLoRAOp`] get none here; `CustomMetalOps::lora_forward_fused` gives all three theirs, and copies
//! nothing.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Error, Layout, MetalStorage, Result, Shape, Storage, Tensor, Var, D,
};

/// A storage of one kind of device.
trait OfDevice: BackendStorage<Device: BackendDevice<Storage = Self>> {
    fn wrapped(self) -> Storage;
    fn unwrapped(storage: &Storage) -> Option<&Self>;
}

macro_rules! of_device {
    ($storage:ty, $variant:ident) => {
        impl OfDevice for $storage {
            fn wrapped(self) -> Storage {
                Storage::$variant(self)
            }

            fn unwrapped(storage: &Storage) -> Option<&Self> {
                match storage {
                    Storage::$variant(storage) => Some(storage),
                    _ => None,
                }
            }
        }
    };
}
of_device!(CpuStorage, Cpu);
of_device!(CudaStorage, Cuda);
of_device!(MetalStorage, Metal);

/// What `layout` selects of a storage, row by row from offset 0.
fn selected<S: OfDevice>(storage: &S, layout: &Layout) -> Result<S> {
    let mut copy = storage.device().zeros_impl(layout.shape(), storage.dtype())?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}

/// The result of `f` on what `layout` selects.
fn forward<S: OfDevice>(storage: &S, layout: &Layout, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(S, Shape)> {
    let input = selected(storage, layout)?.wrapped();
    let result = f(&Tensor::from_storage(input, layout.shape().clone(), BackpropOp::none(), false))?;
    let (guard, layout) = result.storage_and_layout();
    let Some(storage) = S::unwrapped(&guard) else {
        return Err(Error::Msg("the result of an op is on another device than its input".into()));
    };
    let whole = layout.is_contiguous() && layout.start_offset() == 0;
    let own = if whole { storage.try_clone(layout)? } else { selected(storage, layout)? };
    Ok((own, layout.shape().clone()))
}

/// The gradient of `f`'s input, from Candle's tape over `f`.
fn gradient(x: &Tensor, grad: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Option<Tensor>> {
    let input = Var::from_tensor(&x.detach())?;
    let weighted = (f(input.as_tensor())? * grad.detach())?.sum_all()?;
    Ok(weighted.backward()?.get(input.as_tensor()).cloned())
}

/// All of a custom op: its name, and the type's `apply` on each kind of device and for the gradient.
macro_rules! by_apply {
    ($name:literal) => {
        fn name(&self) -> &'static str {
            $name
        }

        fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            forward(storage, layout, |x| self.apply(x))
        }

        fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
            // without Candle's feature the storage is a type whose methods panic
            if !candle_core::utils::cuda_is_available() {
                return Err(Error::NotCompiledWithCudaSupport);
            }
            forward(storage, layout, |x| self.apply(x))
        }

        fn metal_fwd(&self, storage: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
            if !candle_core::utils::metal_is_available() {
                return Err(Error::NotCompiledWithMetalSupport);
            }
            forward(storage, layout, |x| self.apply(x))
        }

        fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            gradient(x, grad, |x| self.apply(x))
        }
    };
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
            return Err(Error::Msg(format!(
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
    by_apply!("fused_lora_forward");
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
            return Err(Error::Msg(format!("fused-rms-norm: an eps of {eps}")));
        }
        Ok(Self { eps })
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        candle_lazy_ops::rms_norm(x, None, f64::from(self.eps))
    }
}

impl CustomOp1 for FusedRMSNormOp {
    by_apply!("fused-rms-norm");
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

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        candle_lazy_ops::softmax(x, D::Minus1)
    }
}

impl CustomOp1 for FusedSoftmaxOp {
    by_apply!("fused-softmax");
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

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        candle_lazy_ops::layer_norm(x, None, None, self.eps)
    }
}

impl CustomOp1 for LayerNormOp {
    by_apply!("layer-norm");
}

/// (x − mean)/√(var + eps) over the last dim, biased variance, any rank above 0, differentiable.
///
/// # Errors
/// For a scalar, or a dtype that is not a float.
#[track_caller]
pub fn layer_norm(tensor: &Tensor, eps: f64) -> Result<Tensor> {
    crate::eager::layer_norm(tensor, eps)
}
