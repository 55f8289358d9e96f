//! Devices, and ops on plain tensors.

#[cfg(feature = "custom-metal")]
pub mod custom_ops;
pub mod device;
#[cfg(feature = "custom-metal")]
pub mod metal_ops;
pub mod tensor;

#[cfg(feature = "custom-metal")]
pub use custom_ops::{layer_norm, FusedLoRAOp, FusedRMSNormOp, FusedSoftmaxOp, LayerNormOp};
pub use device::{Device, DeviceInfo, DeviceType};
#[cfg(feature = "custom-metal")]
pub use metal_ops::CustomMetalOps;
pub use tensor::TensorExt;
