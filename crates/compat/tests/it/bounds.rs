//! What v1's types implement, and its errors: derives and thread bounds are asked for, enums matched without a wildcard.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use candle_core::{DType, Device as CandleDevice, Tensor};
use candle_lazy_compat as metal_candle;
use metal_candle::backend::{FusedLoRAOp, FusedRMSNormOp, FusedSoftmaxOp, LayerNormOp};
use metal_candle::embeddings::{EmbeddingConfig, EmbeddingModel, EmbeddingModelType};
use metal_candle::error::{CheckpointError, DeviceError, EmbeddingError, InferenceError, ModelError, TrainingError};
use metal_candle::graph::{
    AsyncExecutor, AsyncGraphExecutor, ComputationGraph, GraphNode, LazyTensor, NodeData, NodeId, Operation,
};
use metal_candle::inference::{GeneratorConfig, KVCache, KVCacheConfig, SamplingStrategy, StreamToken};
use metal_candle::models::qwen::QwenDecoderLayer;
use metal_candle::models::transformer::{Attention, RotaryEmbedding, MLP};
use metal_candle::models::{LanguageModel, ModelConfig, ModelLoader, Qwen};
use metal_candle::training::checkpoint::CheckpointMetadata;
use metal_candle::training::{
    AdamW, AdamWConfig, AdapterRegistry, ApplyAdapter, LRScheduler, LoRAAdapter, LoRAAdapterConfig, LoRAConfig,
    LoRALayer, StepMetrics, TargetModule, Trainer, TrainingConfig, TrainingStep,
};
use metal_candle::{Device, DeviceInfo, DeviceType, Error};

type R<T> = metal_candle::Result<T>;

/// Asks each type for the bounds of a function.
macro_rules! each {
    ($bounds:ident: $($type:ty),*) => { $( $bounds::<$type>(); )* };
}

#[test]
fn what_types_implement() {
    fn shared<T: Send + Sync + 'static>() {}
    fn debug<T: std::fmt::Debug>() {}
    fn cloned<T: Clone>() {}
    fn copied<T: Copy>() {}
    fn hashed<T: Eq + std::hash::Hash>() {}
    fn default<T: Default>() {}
    fn serialised<T: serde::Serialize + serde::de::DeserializeOwned>() {}
    each!(shared:
        Error, LazyTensor, ComputationGraph, KVCache, LoRALayer, LoRAAdapter, AdamW, Trainer, TrainingStep,
        Qwen, QwenDecoderLayer, Attention, MLP, RotaryEmbedding, ModelLoader, Device, AdapterRegistry,
        AsyncExecutor, AsyncGraphExecutor, FusedLoRAOp, FusedRMSNormOp, FusedSoftmaxOp, LayerNormOp,
        GeneratorConfig, StreamToken, EmbeddingModel
    );
    each!(debug:
        Device, DeviceInfo, DeviceType, LazyTensor, NodeData, GraphNode, ComputationGraph, NodeId, Operation,
        AsyncExecutor, AsyncGraphExecutor, KVCache, KVCacheConfig, SamplingStrategy, StreamToken,
        GeneratorConfig, ModelConfig, ModelLoader, Attention, MLP, Qwen, QwenDecoderLayer, LoRAConfig,
        LoRALayer, LoRAAdapterConfig, LoRAAdapter, AdapterRegistry, CheckpointMetadata, AdamW, LRScheduler,
        TrainingConfig, StepMetrics, EmbeddingConfig
    );
    each!(cloned:
        Device, DeviceInfo, LazyTensor, NodeData, GraphNode, Operation, KVCacheConfig, SamplingStrategy,
        GeneratorConfig, ModelConfig, ModelLoader, RotaryEmbedding, TargetModule, LRScheduler,
        TrainingConfig, EmbeddingConfig
    );
    each!(copied: DeviceType, NodeId, LoRAConfig, AdamWConfig, EmbeddingModelType);
    each!(hashed: NodeId, TargetModule);
    each!(default:
        KVCacheConfig, SamplingStrategy, GeneratorConfig, LoRAConfig, LoRAAdapterConfig, AdapterRegistry,
        AdamWConfig, TrainingConfig, TrainingStep, EmbeddingModelType, EmbeddingConfig
    );
    each!(serialised: ModelConfig, LoRAConfig, CheckpointMetadata, EmbeddingModelType);
}

/// A model of one's own has three methods to write, and needs no thread bounds.
#[test]
fn a_model_of_ones_own() {
    struct Echo(std::rc::Rc<()>);
    impl LanguageModel for Echo {
        fn forward(&self, input_ids: &Tensor, _attention_mask: Option<&Tensor>) -> R<Tensor> {
            Ok(input_ids.clone())
        }
        fn device(&self) -> &CandleDevice {
            &CandleDevice::Cpu
        }
        fn vocab_size(&self) -> usize {
            std::rc::Rc::strong_count(&self.0)
        }
    }
    let model: Box<dyn LanguageModel> = Box::new(Echo(std::rc::Rc::default()));
    assert_eq!(model.vocab_size(), 1);
    let _: fn(&mut dyn ApplyAdapter) -> R<()> = |model| model.remove_adapter();
}

#[test]
fn errors_and_their_variants() {
    fn q(n: u8) -> R<()> {
        match n {
            0 => Err(ModelError::FileNotFound { path: "/p".into() })?,
            1 => Err(TrainingError::Gradient { reason: "r".into() })?,
            2 => Err(InferenceError::EndOfSequence { position: 1 })?,
            3 => Err(CheckpointError::SaveFailed { reason: "r".into() })?,
            4 => Err(DeviceError::AllocationFailed { requested_bytes: 5 })?,
            5 => Err(EmbeddingError::EmptyInput)?,
            6 => {
                std::fs::read("/nonexistent/x")?;
            }
            7 => {
                Tensor::zeros((2, 3), DType::F32, &CandleDevice::Cpu)?.reshape(5)?;
            }
            8 => {
                let _: u32 = serde_json::from_str("{")?;
            }
            _ => {}
        }
        Ok(())
    }
    for n in 0..9 {
        let e = q(n).unwrap_err();
        let k = match &e {
            Error::Model(_) => 0,
            Error::Training(_) => 1,
            Error::Inference(_) => 2,
            Error::Checkpoint(_) => 3,
            Error::Device(_) => 4,
            Error::Embedding(_) => 5,
            Error::Io(_) => 6,
            Error::Candle(_) => 7,
            Error::Json(_) => 8,
        };
        assert_eq!(k, n, "{e}");
        let _: Box<dyn std::error::Error + Send + Sync> = Box::new(e);
    }
    let m = |e: ModelError| match e {
        ModelError::FileNotFound { path } => path.display().to_string(),
        ModelError::InvalidFormat { reason } => reason,
        ModelError::IncompatibleVersion { expected, found } => expected + &found,
        ModelError::InvalidConfig { reason } => reason,
        ModelError::ShapeMismatch { expected, actual } => format!("{expected:?}{actual:?}"),
    };
    assert_eq!(m(ModelError::IncompatibleVersion { expected: "1".into(), found: "2".into() }), "12");
    let _ = |e: TrainingError| match e {
        TrainingError::InvalidLoRAConfig { reason }
        | TrainingError::InvalidConfig { reason }
        | TrainingError::Failed { reason }
        | TrainingError::Gradient { reason }
        | TrainingError::StateError { reason } => reason,
    };
    let _ = |e: InferenceError| match e {
        InferenceError::InvalidConfig { reason }
        | InferenceError::Failed { reason }
        | InferenceError::InvalidSampling { reason }
        | InferenceError::SamplingError { reason } => reason,
        InferenceError::CacheFull { position, max_len } => format!("{position}{max_len}"),
        InferenceError::EndOfSequence { position } => position.to_string(),
    };
    let _ = |e: CheckpointError| match e {
        CheckpointError::SaveFailed { reason }
        | CheckpointError::LoadFailed { reason }
        | CheckpointError::InvalidFormat { reason } => reason,
    };
    let _ = |e: DeviceError| match e {
        DeviceError::MetalUnavailable { reason } | DeviceError::InitializationFailed { reason } => reason,
        DeviceError::AllocationFailed { requested_bytes } => requested_bytes.to_string(),
        DeviceError::OperationFailed { operation } => operation,
    };
    let _ = |e: EmbeddingError| match e {
        EmbeddingError::DownloadFailed { reason }
        | EmbeddingError::TokenizerFailed { reason }
        | EmbeddingError::TokenizationFailed { reason }
        | EmbeddingError::InvalidConfig { reason } => reason,
        EmbeddingError::ModelNotFound { model_id } => model_id,
        EmbeddingError::EmptyInput => String::new(),
        EmbeddingError::DimensionMismatch { expected, actual } => format!("{expected}{actual}"),
    };
    use std::error::Error as _;
    assert!(
        Error::from(ModelError::InvalidFormat { reason: "r".into() }).source().is_some(),
        "source of a from variant"
    );
}
