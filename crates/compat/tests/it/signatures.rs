//! v1's signatures, as code of metal-candle 1.3.0 relies on them: functions are coerced to pointers of their types, enums are matched
//! without a wildcard, structs are written as literals.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too
#![allow(deprecated)] // what v1 had is there
#![allow(clippy::type_complexity)] // the types are v1's

use candle_core::{DType, Device as CandleDevice, Shape, Tensor, Var};
use candle_lazy_compat as metal_candle;
use candle_nn::VarBuilder;
use metal_candle::backend::{self, CustomMetalOps, FusedLoRAOp, FusedRMSNormOp, FusedSoftmaxOp, LayerNormOp};
use metal_candle::embeddings::{pooling, EmbeddingConfig, EmbeddingModel, EmbeddingModelType};
use metal_candle::error::TrainingError;
use metal_candle::graph::{
    AsyncExecutor, AsyncGraphExecutor, ComputationGraph, GraphNode, LazyTensor, NodeData, NodeId, Operation,
};
use metal_candle::inference::{
    apply_repetition_penalty, sample_token, sample_token_with_metadata, Generator, GeneratorConfig, KVCache,
    KVCacheConfig, SamplingStrategy, StreamToken,
};
use metal_candle::models::qwen::QwenDecoderLayer;
use metal_candle::models::transformer::{Attention, RotaryEmbedding, MLP};
use metal_candle::models::{LanguageModel, ModelConfig, ModelLoader, Qwen};
use metal_candle::training::checkpoint::{load_checkpoint, save_checkpoint, CheckpointMetadata};
use metal_candle::training::{
    cross_entropy_loss, cross_entropy_loss_with_smoothing, AdamW, AdamWConfig, AdapterRegistry, ApplyAdapter,
    LRScheduler, LoRAAdapter, LoRAAdapterConfig, LoRAConfig, LoRALayer, StepMetrics, TargetModule, Trainer,
    TrainingConfig, TrainingStep,
};
use metal_candle::{Device, DeviceInfo, DeviceType};
use std::collections::HashMap;
use std::sync::{Arc, RwLock};

type R<T> = metal_candle::Result<T>;
type CR<T> = candle_core::Result<T>;

/// Another path to a type.
macro_rules! same {
    ($($path:ty = $name:ty,)*) => { $( let _: fn($path) -> $name = |same| same; )* };
}

#[test]
fn paths() {
    use metal_candle::{embeddings, graph, inference, models, training};
    same!(
        backend::Device = Device,
        backend::device::Device = Device,
        backend::device::DeviceInfo = DeviceInfo,
        backend::device::DeviceType = DeviceType,
        backend::custom_ops::FusedLoRAOp = FusedLoRAOp,
        backend::custom_ops::FusedRMSNormOp = FusedRMSNormOp,
        backend::custom_ops::FusedSoftmaxOp = FusedSoftmaxOp,
        backend::custom_ops::LayerNormOp = LayerNormOp,
        graph::executor::AsyncExecutor = AsyncExecutor,
        graph::async_executor::AsyncGraphExecutor = AsyncGraphExecutor,
        graph::lazy_tensor::LazyTensor = LazyTensor,
        graph::node::ComputationGraph = ComputationGraph,
        graph::node::GraphNode = GraphNode,
        graph::node::NodeData = NodeData,
        graph::node::NodeId = NodeId,
        graph::operation::Operation = Operation,
        inference::cache::KVCache = KVCache,
        inference::cache::KVCacheConfig = KVCacheConfig,
        inference::generator::Generator = Generator,
        inference::generator::GeneratorConfig = GeneratorConfig,
        inference::sampling::SamplingStrategy = SamplingStrategy,
        models::config::ModelConfig = ModelConfig,
        models::loader::ModelLoader = ModelLoader,
        models::qwen::Qwen = Qwen,
        training::adapter::LoRAAdapter = LoRAAdapter,
        training::adapter::LoRAAdapterConfig = LoRAAdapterConfig,
        training::adapter::TargetModule = TargetModule,
        training::adapter_registry::AdapterRegistry = AdapterRegistry,
        training::lora::LoRAConfig = LoRAConfig,
        training::lora::LoRALayer = LoRALayer,
        training::optimizer::AdamW = AdamW,
        training::optimizer::AdamWConfig = AdamWConfig,
        training::scheduler::LRScheduler = LRScheduler,
        training::trainer::StepMetrics = StepMetrics,
        training::trainer::Trainer = Trainer,
        training::trainer::TrainingConfig = TrainingConfig,
        training::trainer::TrainingStep = TrainingStep,
        // the crate's root
        metal_candle::AdamW = AdamW,
        metal_candle::AdamWConfig = AdamWConfig,
        metal_candle::LRScheduler = LRScheduler,
        metal_candle::LoRAAdapter = LoRAAdapter,
        metal_candle::LoRAAdapterConfig = LoRAAdapterConfig,
        metal_candle::LoRAConfig = LoRAConfig,
        metal_candle::LoRALayer = LoRALayer,
        metal_candle::StepMetrics = StepMetrics,
        metal_candle::TargetModule = TargetModule,
        metal_candle::Trainer = Trainer,
        metal_candle::TrainingConfig = TrainingConfig,
        metal_candle::TrainingStep = TrainingStep,
        metal_candle::Generator = Generator,
        metal_candle::GeneratorConfig = GeneratorConfig,
        metal_candle::KVCache = KVCache,
        metal_candle::KVCacheConfig = KVCacheConfig,
        metal_candle::SamplingStrategy = SamplingStrategy,
    );
    let _: [fn(&Tensor, &Tensor, Option<u32>) -> R<Tensor>; 2] =
        [training::loss::cross_entropy_loss, metal_candle::cross_entropy_loss];
    let _: [fn(&Tensor, &Tensor, f32, Option<u32>) -> R<Tensor>; 2] =
        [training::loss::cross_entropy_loss_with_smoothing, metal_candle::cross_entropy_loss_with_smoothing];
    let _: [fn(&Tensor, &SamplingStrategy, &[u32], f32) -> R<u32>; 2] =
        [inference::sampling::sample_token, metal_candle::sample_token];
    let _: [fn(&mut Tensor, &[u32], f32) -> R<()>; 2] =
        [inference::sampling::apply_repetition_penalty, metal_candle::apply_repetition_penalty];
    let _ = inference::sampling::sample_token_with_metadata;
    let _: [fn(&Tensor) -> CR<Tensor>; 2] = [embeddings::pooling::normalize, pooling::normalize];
    let _ = <Tensor as backend::tensor::TensorExt>::softmax_stable;
    let _ = <Tensor as metal_candle::TensorExt>::softmax_stable;
    let _ = <Tensor as backend::metal_ops::CustomMetalOps>::softmax_fused;
    let _ = <Qwen as training::apply_adapter::ApplyAdapter>::has_adapter;
}

#[test]
fn backend() {
    let _: fn(usize) -> R<Device> = Device::new_metal;
    let _: fn() -> Device = Device::new_cpu;
    let _: fn(usize) -> Device = Device::new_with_fallback;
    let _: fn(Device) -> CandleDevice = Device::into_candle_device;
    let _: fn(&Device) -> bool = Device::is_metal;
    let _: fn(&Device) -> bool = Device::is_cpu;
    let _: fn(&Device) -> DeviceInfo = Device::info;
    let _: fn() -> bool = Device::is_metal_available;
    let _: fn(&Device) -> R<&candle_core::MetalDevice> = Device::metal_device;
    let _: CandleDevice = Device::new_cpu().into();
    let _: Device = CandleDevice::Cpu.into();
    let d = Device::new_cpu();
    let _: &CandleDevice = d.as_ref();
    let DeviceInfo { device_type, index, metal_available } = d.info();
    let _ = match device_type {
        DeviceType::Metal => 1,
        DeviceType::Cpu => 2,
    };
    assert_eq!(index, 0);
    let _: bool = metal_available;
    let _ = DeviceInfo { device_type: DeviceType::Cpu, index: 0, metal_available: false }.clone();
    let _: fn(Tensor, Tensor, f32) -> CR<FusedLoRAOp> = FusedLoRAOp::new;
    let _: fn(f32) -> CR<FusedRMSNormOp> = FusedRMSNormOp::new;
    let _: fn() -> CR<FusedSoftmaxOp> = FusedSoftmaxOp::new;
    let _: fn(f64) -> LayerNormOp = LayerNormOp::new;
    let _: fn(&Tensor, f64) -> CR<Tensor> = backend::custom_ops::layer_norm;
    let _: fn(&Tensor, f64) -> CR<Tensor> = backend::layer_norm;
    let _: fn(&Tensor, &Tensor, &Tensor, f32) -> Result<Tensor, TrainingError> =
        <Tensor as CustomMetalOps>::lora_forward_fused;
    let _: fn(&Tensor) -> Result<Tensor, TrainingError> = <Tensor as CustomMetalOps>::softmax_fused;
    let _: fn(&Tensor, f32) -> Result<Tensor, TrainingError> = <Tensor as CustomMetalOps>::rms_norm_fused;
}

#[test]
fn graph() {
    let _: fn(NodeId, Arc<RwLock<ComputationGraph>>, Shape, DType, CandleDevice) -> LazyTensor = LazyTensor::new;
    let _: fn(&[f32], &[usize], &CandleDevice) -> CR<LazyTensor> = LazyTensor::from_slice;
    let _: fn(Tensor) -> CR<LazyTensor> = LazyTensor::from_tensor;
    let _: fn(&LazyTensor, Tensor) -> CR<LazyTensor> = LazyTensor::add_tensor_to_graph;
    let _: fn(&[usize], DType, &CandleDevice) -> CR<LazyTensor> = LazyTensor::zeros;
    let _: fn(&[usize], DType, &CandleDevice) -> CR<LazyTensor> = LazyTensor::ones;
    let _: fn(&LazyTensor) -> &Shape = LazyTensor::shape;
    let _: fn(&LazyTensor) -> DType = LazyTensor::dtype;
    let _: fn(&LazyTensor) -> &CandleDevice = LazyTensor::device;
    let _: fn(&LazyTensor) -> NodeId = LazyTensor::node_id;
    let _: fn(&LazyTensor) -> usize = LazyTensor::graph_size;
    let _: fn(&LazyTensor) -> bool = LazyTensor::is_evaluated;
    let _: fn(&LazyTensor, &LazyTensor) -> CR<LazyTensor> = LazyTensor::matmul;
    let _: fn(&LazyTensor, &LazyTensor) -> CR<LazyTensor> = LazyTensor::add;
    let _: fn(&LazyTensor, &LazyTensor) -> CR<LazyTensor> = LazyTensor::mul;
    let _: fn(&LazyTensor, f32) -> CR<LazyTensor> = LazyTensor::mul_scalar;
    let _: fn(&LazyTensor, usize) -> CR<LazyTensor> = LazyTensor::softmax;
    let _: fn(&LazyTensor, f32) -> CR<LazyTensor> = LazyTensor::rms_norm;
    let _: fn(&LazyTensor, &LazyTensor, &LazyTensor, f32) -> CR<LazyTensor> = LazyTensor::lora_fused;
    let _: fn(LazyTensor) -> Result<Tensor, TrainingError> = LazyTensor::eval;
    let _: fn(&NodeData) -> bool = NodeData::is_available;
    let _: fn(&NodeData) -> Result<&Tensor, String> = NodeData::as_tensor;
    let _: fn(NodeData) -> Result<Tensor, String> = NodeData::take_tensor;
    let _: fn(NodeId, Operation, Vec<NodeId>, Shape, DType) -> GraphNode = GraphNode::new;
    let _: fn(NodeId, Tensor) -> GraphNode = GraphNode::input;
    let _: fn(CandleDevice) -> ComputationGraph = ComputationGraph::new;
    let _: fn(&ComputationGraph) -> &CandleDevice = ComputationGraph::device;
    let _: fn(&ComputationGraph, NodeId) -> Result<&GraphNode, String> = ComputationGraph::get_node;
    let _: fn(&mut ComputationGraph, NodeId) -> Result<&mut GraphNode, String> = ComputationGraph::get_node_mut;
    let _: fn(&mut ComputationGraph, Tensor) -> NodeId = ComputationGraph::add_input;
    let _: fn(&mut ComputationGraph, Operation, Vec<NodeId>) -> Result<NodeId, String> = ComputationGraph::add_node;
    let _: fn(&ComputationGraph, NodeId) -> Result<Vec<NodeId>, String> = ComputationGraph::topological_order;
    let _: fn(&ComputationGraph) -> usize = ComputationGraph::len;
    let _: fn(&ComputationGraph) -> bool = ComputationGraph::is_empty;
    let _: fn(&mut ComputationGraph, &ComputationGraph, NodeId) -> NodeId = ComputationGraph::merge_from;
    let _: fn(&Operation) -> &'static str = Operation::name;
    let _: fn(&Operation, &[&Shape]) -> Result<Shape, String> = Operation::output_shape;
    let _: fn(&Operation, &[DType]) -> DType = Operation::output_dtype;
    let _: fn(CandleDevice) -> Result<AsyncExecutor, TrainingError> = AsyncExecutor::new;
    let _: fn(&mut AsyncExecutor, &Operation, &[Tensor]) -> Result<Tensor, TrainingError> =
        AsyncExecutor::execute_operation;
    let _: fn(&mut AsyncExecutor) -> Result<(), TrainingError> = AsyncExecutor::synchronize;
    let _: fn(Device) -> AsyncGraphExecutor = AsyncGraphExecutor::new;
    let op = Operation::Input;
    let _ = match op {
        Operation::Input => 0,
        Operation::Matmul => 1,
        Operation::Add => 2,
        Operation::Mul => 3,
        Operation::MulScalar { value } => value as i32,
        Operation::LoRA { a, b, scale } => (a.0 + b.0) as i32 + scale as i32,
        Operation::Softmax { dim } => dim as i32,
        Operation::RMSNorm { eps } => eps as i32,
    };
    let t = Tensor::zeros(2, DType::F32, &CandleDevice::Cpu).unwrap();
    let n = GraphNode {
        id: NodeId(3),
        operation: Operation::Input,
        inputs: vec![],
        output_shape: Shape::from(2),
        output_dtype: DType::F32,
        data: NodeData::Concrete(t.clone()),
    };
    let _ = match n.clone().data {
        NodeData::Concrete(_) => 0,
        NodeData::Lazy => 1,
        NodeData::Available(_) => 2,
    };
}

#[test]
fn inference() {
    let _: fn(KVCacheConfig, &CandleDevice) -> R<KVCache> = KVCache::new;
    let _: fn(&KVCache) -> usize = KVCache::position;
    let _: fn(&KVCache) -> bool = KVCache::is_empty;
    let _: fn(&KVCache) -> usize = KVCache::max_seq_len;
    let _: fn(&mut KVCache) = KVCache::clear;
    let _: fn(&mut KVCache, usize, &Tensor, &Tensor) -> R<(Tensor, Tensor)> = KVCache::update;
    let _: fn(&KVCache, usize) -> Option<&(Tensor, Tensor)> = KVCache::get;
    let _: fn(&KVCache) -> usize = KVCache::num_cached_layers;
    let _: fn(&Tensor, &SamplingStrategy, &[u32], f32) -> R<u32> = sample_token;
    let _: fn(&mut Tensor, &[u32], f32) -> R<()> = apply_repetition_penalty;
    let _: fn(&Tensor, &SamplingStrategy, &[u32], f32, Option<u32>) -> R<StreamToken> = sample_token_with_metadata;
    let _: fn(Box<dyn LanguageModel>, GeneratorConfig) -> R<Generator> = Generator::new;
    let _: fn(&Generator) -> &GeneratorConfig = Generator::config;
    let _: fn(&mut Generator, &[u32]) -> R<Vec<u32>> = Generator::generate;
    let s = SamplingStrategy::default();
    let _ = match s {
        SamplingStrategy::Greedy => 0,
        SamplingStrategy::TopK { k } => k,
        SamplingStrategy::TopP { p } => p as usize,
        SamplingStrategy::Temperature { temperature } => temperature as usize,
    };
    let st = StreamToken { token_id: 1, text: None, logit: 1.0, probability: 0.5, is_eos: false };
    assert_eq!(st, st.clone());
    let _ = KVCacheConfig { max_seq_len: 1, num_layers: 1, num_heads: 1, head_dim: 1, batch_size: 1 };
    let _ = GeneratorConfig {
        max_tokens: 1,
        sampling: SamplingStrategy::Greedy,
        temperature: 1.0,
        eos_token_id: None,
        top_p: None,
        top_k: None,
        repetition_penalty: 1.0,
        stop_on_eos: true,
        stop_tokens: vec![],
    };
}

#[test]
fn models() {
    let _ = |p: &str| -> R<ModelConfig> { ModelConfig::from_file(p) };
    let _ = |p: std::path::PathBuf| -> R<ModelConfig> { ModelConfig::from_file(p) };
    let _: fn(&str) -> R<ModelConfig> = ModelConfig::from_json;
    let _: fn(&ModelConfig) -> R<()> = ModelConfig::validate;
    let _: fn(&ModelConfig) -> usize = ModelConfig::head_dim;
    let _: fn(&ModelConfig) -> usize = ModelConfig::num_kv_heads;
    let _: fn(Device) -> ModelLoader = ModelLoader::new;
    let _: fn(ModelLoader, DType) -> ModelLoader = ModelLoader::with_dtype;
    let _ = |l: &ModelLoader,
             p: &str,
             e: &HashMap<String, Vec<usize>>|
     -> R<(HashMap<String, Tensor>, HashMap<String, Tensor>, HashMap<String, Vec<usize>>)> {
        Ok((l.load(p)?, l.load_with_validation(p, e)?, l.inspect(p)?))
    };
    let _: fn(usize, usize, f64, &CandleDevice) -> R<RotaryEmbedding> = RotaryEmbedding::new;
    let _: fn(&RotaryEmbedding, &Tensor, usize) -> R<Tensor> = RotaryEmbedding::apply_rotary_emb;
    let _: fn(usize, usize, Option<usize>, usize, f64, &VarBuilder<'_>) -> R<Attention> = Attention::new;
    let _: fn(&Attention, &Tensor, Option<&Tensor>) -> R<Tensor> = Attention::forward;
    let _: fn(usize, usize, &VarBuilder<'_>) -> R<MLP> = MLP::new;
    let _: fn(&MLP, &Tensor) -> R<Tensor> = MLP::forward;
    let _: fn(&ModelConfig, VarBuilder<'_>) -> R<Qwen> = Qwen::new;
    let _: fn(&Qwen, &Tensor, Option<&Tensor>) -> R<Tensor> = Qwen::forward;
    let _: fn(&Qwen) -> usize = Qwen::num_layers;
    let _: fn(&Qwen) -> usize = Qwen::num_parameters;
    let _: fn(&ModelConfig, usize, &VarBuilder<'_>) -> R<QwenDecoderLayer> = QwenDecoderLayer::new;
    let _: fn(&QwenDecoderLayer, &Tensor, Option<&Tensor>, Option<&LoRAAdapter>) -> R<Tensor> =
        QwenDecoderLayer::forward;
    fn lm<T: LanguageModel + ApplyAdapter + std::fmt::Debug>() {}
    lm::<Qwen>();
}

#[test]
fn training() {
    let _: fn(usize, usize, &LoRAConfig, &CandleDevice) -> R<LoRALayer> = LoRALayer::new;
    let _: fn(&LoRALayer, &Tensor) -> R<Tensor> = LoRALayer::forward;
    let _: fn(&LoRALayer, &LazyTensor) -> R<LazyTensor> = LoRALayer::forward_lazy;
    let _: fn(&mut LoRALayer, bool) = LoRALayer::set_training;
    let _: fn(&mut LoRALayer) = LoRALayer::eval;
    let _: fn(&LoRALayer) -> &Tensor = LoRALayer::lora_a_tensor;
    let _: fn(&LoRALayer) -> &Tensor = LoRALayer::lora_b_tensor;
    let _: fn(&LoRALayer) -> Vec<&Var> = LoRALayer::trainable_variables;
    let _: fn(&str) -> Option<TargetModule> = TargetModule::from_name;
    let m = TargetModule::QProj;
    let _ = match m {
        TargetModule::QProj => 0,
        TargetModule::KProj => 1,
        TargetModule::VProj => 2,
        TargetModule::OProj => 3,
        TargetModule::GateProj => 4,
        TargetModule::UpProj => 5,
        TargetModule::DownProj => 6,
    };
    let _: fn(&LoRAAdapterConfig, &TargetModule) -> bool = LoRAAdapterConfig::is_target;
    let _: fn(usize, usize, usize, &LoRAAdapterConfig, &CandleDevice) -> R<LoRAAdapter> = LoRAAdapter::new;
    let _: fn(&LoRAAdapter, usize, &TargetModule, &Tensor) -> R<Option<Tensor>> = LoRAAdapter::forward;
    let _: fn(&LoRAAdapter) -> usize = LoRAAdapter::num_trainable_parameters;
    let _: fn(&LoRAAdapter, usize) -> usize = LoRAAdapter::num_frozen_parameters;
    let _: for<'a, 'b> fn(&'a LoRAAdapter, usize, &'b TargetModule) -> Option<&'a LoRALayer> = LoRAAdapter::get_layer;
    let _: fn(&LoRAAdapter, &Tensor, usize, &TargetModule) -> R<Tensor> = LoRAAdapter::merge_weights;
    let _ = |a: &LoRAAdapter| {
        for (n, l) in a.layers() {
            let _: (&String, &LoRALayer) = (n, l);
        }
    };
    let _: fn(&mut AdapterRegistry, String, LoRAAdapter) -> R<()> = AdapterRegistry::add_adapter;
    let _: fn(&mut AdapterRegistry, &str) -> R<()> = AdapterRegistry::unload_adapter;
    let _: fn(&mut AdapterRegistry, &str) -> R<()> = AdapterRegistry::activate;
    let _: fn(&mut AdapterRegistry) = AdapterRegistry::deactivate;
    let _: fn(&AdapterRegistry) -> Option<&str> = AdapterRegistry::active_adapter;
    let _: fn(&AdapterRegistry) -> Option<&Arc<LoRAAdapter>> = AdapterRegistry::get_active;
    let _: for<'a, 'b> fn(&'a AdapterRegistry, &'b str) -> Option<&'a Arc<LoRAAdapter>> = AdapterRegistry::get_adapter;
    let _: fn(&AdapterRegistry) -> Vec<String> = AdapterRegistry::list_adapters;
    let _ = |r: &mut AdapterRegistry, a: LoRAAdapter| r.load_adapter_from_checkpoint("x".into(), a, "path");
    let _ = |a: &mut LoRAAdapter, m: &CheckpointMetadata| -> R<Option<CheckpointMetadata>> {
        save_checkpoint(a, "p", Some(m))?;
        save_checkpoint(a, std::path::Path::new("p"), None)?;
        load_checkpoint(a, "p")
    };
    let _: fn(&Tensor, &Tensor, Option<u32>) -> R<Tensor> = cross_entropy_loss;
    let _: fn(&Tensor, &Tensor, f32, Option<u32>) -> R<Tensor> = cross_entropy_loss_with_smoothing;
    let _: fn(AdamWConfig) -> R<AdamW> = AdamW::new;
    let _ = |a: &mut AdamW, t: &Tensor| -> R<()> {
        a.add_parameter("w", t)?;
        a.add_parameter(String::from("w"), t)
    };
    let _: fn(&mut AdamW, &str, &Tensor, &Tensor) -> R<Tensor> = AdamW::step;
    let _: fn(&mut AdamW, &Var, &Tensor) -> R<()> = AdamW::step_var;
    let _: fn(&mut AdamW, f32) = AdamW::set_lr;
    let _: fn(&mut AdamW) = AdamW::reset_state;
    let _: fn(&AdamWConfig) -> R<()> = AdamWConfig::validate;
    let _ = match LRScheduler::constant(1.0) {
        LRScheduler::Constant { lr } => lr,
        LRScheduler::Linear { warmup_steps, max_lr } => warmup_steps as f32 * max_lr,
        LRScheduler::Cosine { total_steps, max_lr, min_lr } => total_steps as f32 + max_lr + min_lr,
        LRScheduler::WarmupCosine { warmup_steps, total_steps, max_lr, min_lr } => {
            (warmup_steps + total_steps) as f32 + max_lr + min_lr
        }
    };
    let _: fn(&LRScheduler, usize) -> f32 = LRScheduler::get_lr;
    let _: fn(&LRScheduler) -> R<()> = LRScheduler::validate;
    let _: fn(usize, usize, usize, &LoRAAdapterConfig, TrainingConfig, &CandleDevice) -> R<Trainer> = Trainer::new;
    let _: fn(&mut Trainer) -> &mut LoRAAdapter = Trainer::lora_adapter_mut;
    let _ = |t: &mut Trainer, d: &[(Tensor, Tensor)]| {
        t.train(d, |x: &Tensor| -> candle_core::Result<Tensor> { Ok(x.clone()) })?;
        t.train(d, |x: &Tensor| -> R<Tensor> { Ok(x.clone()) })?;
        t.train(d, |x: &Tensor| -> Result<Tensor, TrainingError> { Ok(x.clone()) })
    };
    let _ = |s: &mut TrainingStep, t: &Tensor, a: &LoRAAdapter, o: &mut AdamW| -> R<StepMetrics> {
        s.execute(t, t, a, o, 1e-3, |x| Ok(x.clone()))
    };
    let _: fn() -> TrainingStep = TrainingStep::new;
    let _: fn(&mut TrainingStep) = TrainingStep::reset;
    let _ = TrainingConfig {
        num_epochs: 1,
        lr_scheduler: LRScheduler::Constant { lr: 1.0 },
        optimizer_config: AdamWConfig {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        },
        max_grad_norm: None,
    };
    let _ = StepMetrics { loss: 1.0, step: 1, learning_rate: 1.0 }.clone();
    let _ = CheckpointMetadata { global_step: 1, loss: 1.0, learning_rate: 1.0, timestamp: 1 }.clone();
    let _ = LoRAConfig { rank: 1, alpha: 1.0, dropout: 0.0 };
    let _ = LoRAAdapterConfig { rank: 1, alpha: 1.0, dropout: 0.0, target_modules: vec![] }.clone();
}

#[test]
fn embeddings() {
    let _: fn(EmbeddingModelType, CandleDevice) -> R<EmbeddingModel> = EmbeddingModel::from_pretrained;
    let _: fn(EmbeddingConfig, CandleDevice) -> R<EmbeddingModel> = EmbeddingModel::from_config;
    let _: fn(&EmbeddingModel, &[&str]) -> CR<Tensor> = EmbeddingModel::encode;
    let _: fn(&Tensor, &Tensor) -> CR<Tensor> = pooling::mean_pool;
    let _: fn(&Tensor) -> CR<Tensor> = pooling::normalize;
}

/// Methods that v1 lets be called at compile time.
macro_rules! constant {
    ($it:ident: $type:ty => $($call:expr),*) => {{
        const fn at_compile_time($it: &$type) {
            $( let _ = $call; )*
        }
        let _: fn(&$type) = at_compile_time;
    }};
}

#[test]
fn constants() {
    const DEVICE: Device = Device::from_candle_device(CandleDevice::Cpu);
    const SCHEDULES: [LRScheduler; 4] = [
        LRScheduler::constant(1e-4),
        LRScheduler::linear(10, 1e-3),
        LRScheduler::cosine(100, 1e-3, 1e-5),
        LRScheduler::warmup_cosine(10, 100, 1e-3, 1e-5),
    ];
    const NAMES: [&str; 2] = [TargetModule::QProj.name(), EmbeddingModelType::E5SmallV2.model_id()];
    const WIDTH: usize = EmbeddingModelType::AllMpnetBaseV2.dimension();
    const VERSION: &str = metal_candle::VERSION;
    assert!(DEVICE.is_cpu() && SCHEDULES.iter().all(|schedule| schedule.validate().is_ok()));
    assert_eq!((NAMES, WIDTH), (["q_proj", "intfloat/e5-small-v2"], 768));
    assert_eq!(VERSION, env!("CARGO_PKG_VERSION"));
    constant!(it: Device => it.as_candle_device());
    constant!(it: LoRALayer => it.num_parameters(), it.is_training(), it.lora_a(), it.lora_b(), it.config());
    constant!(it: LoRALayer => it.in_features(), it.out_features());
    constant!(it: LoRAAdapterConfig => it.to_lora_config());
    constant!(it: LoRAAdapter => it.config(), it.num_layers());
    constant!(it: AdamW => it.learning_rate(), it.step_count(), it.config());
    constant!(it: Trainer => it.lora_adapter(), it.global_step());
    constant!(it: TrainingStep => it.step());
    constant!(it: ModelLoader => it.device(), it.dtype());
    constant!(it: Attention => it.head_dim());
    constant!(it: AsyncGraphExecutor => it.sync_executor());
    constant!(it: EmbeddingModel => it.dimension(), it.model_type());
}
