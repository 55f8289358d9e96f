//! LoRA layers and adapters, and what trains them: losses, AdamW, schedules of the learning rate, a training loop, checkpoints.

pub mod adapter;
pub mod adapter_registry;
pub mod apply_adapter;
pub mod checkpoint;
pub mod lora;
pub mod loss;
pub mod optimizer;
pub mod scheduler;
pub mod trainer;

pub use adapter::{LoRAAdapter, LoRAAdapterConfig, ProjectionSizes, TargetModule};
pub use adapter_registry::AdapterRegistry;
pub use apply_adapter::ApplyAdapter;
pub use lora::{LoRAConfig, LoRALayer};
pub use loss::{cross_entropy_loss, cross_entropy_loss_with_smoothing};
pub use optimizer::{AdamW, AdamWConfig};
pub use scheduler::LRScheduler;
pub use trainer::{StepMetrics, Trainer, TrainingConfig, TrainingStep};
