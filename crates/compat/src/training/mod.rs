//! LoRA layers and adapters, and what trains them: losses, AdamW, schedules of the learning rate, a training loop, checkpoints.

pub mod adapter;
pub mod adapter_registry;
pub mod apply_adapter;
pub mod checkpoint;
pub mod lora;

pub use adapter::{LoRAAdapter, LoRAAdapterConfig, ProjectionSizes, TargetModule};
pub use adapter_registry::AdapterRegistry;
pub use apply_adapter::ApplyAdapter;
pub use lora::{LoRAConfig, LoRALayer};
