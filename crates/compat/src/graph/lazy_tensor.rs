//! The handle on a node.

use super::{ComputationGraph, NodeId, Operation};
use crate::error::TrainingError;
use candle_core::{DType, Device, Error, Result as CandleResult, Shape, Tensor};
use candle_lazy_exec::LazyTensor as Recorded;
use std::panic::Location;
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A tensor that is computed when [`LazyTensor::eval`] asks for it.
///
/// Handles that were recorded together share a graph. A clone is another handle on the same node.
#[derive(Clone)]
pub struct LazyTensor {
    id: NodeId,
    graph: Arc<RwLock<ComputationGraph>>,
    shape: Shape,
    dtype: DType,
    device: Device,
    /// The engine's handle: what keeps the recorded node alive. Made at the first need for a handle from [`LazyTensor::new`].
    recorded: OnceLock<Arc<Recorded>>,
}

impl std::fmt::Debug for LazyTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LazyTensor")
            .field("node_id", &self.id)
            .field("shape", &self.shape)
            .field("dtype", &self.dtype)
            .field("device", &self.device.location())
            .finish()
    }
}

/// A lock whose holder panicked is as it was: no method leaves a graph half changed.
fn read(graph: &RwLock<ComputationGraph>) -> RwLockReadGuard<'_, ComputationGraph> {
    graph.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write(graph: &RwLock<ComputationGraph>) -> RwLockWriteGuard<'_, ComputationGraph> {
    graph.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl LazyTensor {
    /// A handle on a node of a graph that was built by hand. Nothing is checked before it is used.
    #[must_use]
    pub fn new(id: NodeId, graph: Arc<RwLock<ComputationGraph>>, shape: Shape, dtype: DType, device: Device) -> Self {
        Self { id, graph, shape, dtype, device, recorded: OnceLock::new() }
    }

    /// Values with a shape, in a graph of their own.
    ///
    /// # Errors
    /// Where the shape has another number of elements.
    #[track_caller]
    pub fn from_slice(data: &[f32], shape: &[usize], device: &Device) -> CandleResult<Self> {
        Self::from_tensor(Tensor::from_slice(data, shape, device)?)
    }

    /// A tensor, in a graph of its own.
    ///
    /// # Errors
    /// None here.
    #[track_caller]
    pub fn from_tensor(tensor: Tensor) -> CandleResult<Self> {
        let graph = Arc::new(RwLock::new(ComputationGraph::new(tensor.device().clone())));
        Ok(Self::input(&graph, tensor))
    }

    /// A tensor as a further input of this handle's graph.
    ///
    /// # Errors
    /// None here.
    #[track_caller]
    pub fn add_tensor_to_graph(&self, tensor: Tensor) -> CandleResult<Self> {
        Ok(Self::input(&self.graph, tensor))
    }

    #[track_caller]
    fn input(graph: &Arc<RwLock<ComputationGraph>>, tensor: Tensor) -> Self {
        let recorded = Arc::new(Recorded::from_tensor(tensor.clone()));
        let mut nodes = write(graph);
        let id = nodes.add_input(tensor);
        nodes.remember(id, &recorded);
        drop(nodes);
        Self::of(id, graph, recorded)
    }

    fn of(id: NodeId, graph: &Arc<RwLock<ComputationGraph>>, recorded: Arc<Recorded>) -> Self {
        let (shape, dtype, device) = (recorded.shape().clone(), recorded.dtype(), recorded.device().clone());
        Self { id, graph: Arc::clone(graph), shape, dtype, device, recorded: OnceLock::from(recorded) }
    }

    /// Zeros, in a graph of their own.
    ///
    /// # Errors
    /// Where there is no memory for them.
    #[track_caller]
    pub fn zeros(shape: &[usize], dtype: DType, device: &Device) -> CandleResult<Self> {
        Self::from_tensor(Tensor::zeros(shape, dtype, device)?)
    }

    /// Ones, in a graph of their own.
    ///
    /// # Errors
    /// As [`LazyTensor::zeros`].
    #[track_caller]
    pub fn ones(shape: &[usize], dtype: DType, device: &Device) -> CandleResult<Self> {
        Self::from_tensor(Tensor::ones(shape, dtype, device)?)
    }

    /// The shape of the value.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The dtype of the value.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device of the value.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The node's place in its graph.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.id
    }

    /// Number of all nodes of the graph, those of other handles included.
    #[must_use]
    pub fn graph_size(&self) -> usize {
        read(&self.graph).len()
    }

    /// Whether the graph has a value of this node; true at once for inputs.
    #[must_use]
    pub fn is_evaluated(&self) -> bool {
        read(&self.graph).get_node(self.id).is_ok_and(|node| node.data.is_available())
    }

    #[track_caller]
    fn recorded(&self) -> Result<Arc<Recorded>, String> {
        // a node that was changed by hand since is recorded anew
        if let Some(recorded) = self.recorded.get().filter(|recorded| read(&self.graph).holds(self.id, recorded)) {
            return Ok(recorded.clone());
        }
        let recorded = write(&self.graph).handle(self.id)?;
        self.recorded.get_or_init(|| recorded.clone());
        Ok(recorded)
    }

    /// Records `operation` on this handle and `others`, whose parts of other graphs are copied into this one.
    #[track_caller]
    fn apply(&self, operation: impl Fn(&[NodeId]) -> Operation, others: &[&Self]) -> CandleResult<Self> {
        let mut handles = vec![self.recorded().map_err(Error::Msg)?];
        let mut shapes = vec![&self.shape];
        for other in others {
            handles.push(other.recorded().map_err(Error::Msg)?);
            shapes.push(&other.shape);
        }
        // refused before anything is copied: a call that fails leaves the graph as it was
        let line = Location::caller();
        operation(&[]).output_shape(&shapes).map_err(|e| Error::Msg(format!("{e}, at {line}")))?;
        let recorded = Arc::new(operation(&[]).record(&handles)?);
        let mut inputs = vec![self.id];
        for (other, handle) in others.iter().zip(handles.iter().skip(1)) {
            if Arc::ptr_eq(&self.graph, &other.graph) {
                inputs.push(other.id);
                continue;
            }
            // one lock at a time: two threads may join the same two graphs in either order
            let (part, id) = read(&other.graph).part(other.id);
            let mut graph = write(&self.graph);
            let id = graph.merge_from(&part, id);
            graph.remember(id, handle);
            inputs.push(id);
        }
        let mut graph = write(&self.graph);
        let id = graph.add_node(operation(&inputs), inputs).map_err(Error::Msg)?;
        graph.remember(id, &recorded);
        drop(graph);
        Ok(Self::of(id, &self.graph, recorded))
    }

    /// The matrix product, batch dims broadcast.
    ///
    /// # Errors
    /// Where either has fewer than 2 dims, or the shapes or dtypes do not fit.
    #[track_caller]
    pub fn matmul(&self, other: &Self) -> CandleResult<Self> {
        self.apply(|_| Operation::Matmul, &[other])
    }

    /// The sum of two tensors of one shape.
    ///
    /// # Errors
    /// Where shapes ("Shape mismatch") or dtypes differ.
    #[track_caller]
    pub fn add(&self, other: &Self) -> CandleResult<Self> {
        self.apply(|_| Operation::Add, &[other])
    }

    /// The elementwise product of two tensors of one shape.
    ///
    /// # Errors
    /// As [`LazyTensor::add`].
    #[track_caller]
    pub fn mul(&self, other: &Self) -> CandleResult<Self> {
        self.apply(|_| Operation::Mul, &[other])
    }

    /// The tensor times a number.
    ///
    /// # Errors
    /// For a dtype that cannot be multiplied.
    #[track_caller]
    pub fn mul_scalar(&self, value: f32) -> CandleResult<Self> {
        self.apply(|_| Operation::MulScalar { value }, &[])
    }

    /// Softmax over `dim`.
    ///
    /// # Errors
    /// Where the dim is out of range, or the dtype is no float.
    #[cfg(feature = "custom-metal")]
    #[track_caller]
    pub fn softmax(&self, dim: usize) -> CandleResult<Self> {
        self.apply(|_| Operation::Softmax { dim }, &[])
    }

    /// x/√(mean(x²) + eps) over the last dim.
    ///
    /// # Errors
    /// For a scalar, or a dtype that is no float.
    #[cfg(feature = "custom-metal")]
    #[track_caller]
    pub fn rms_norm(&self, eps: f32) -> CandleResult<Self> {
        self.apply(|_| Operation::RMSNorm { eps }, &[])
    }

    /// (self·A·B)·scale: self (…, in), A (in, rank), B (rank, out), result (…, out).
    ///
    /// # Errors
    /// Where shapes or dtypes do not fit.
    #[cfg(feature = "custom-metal")]
    #[track_caller]
    pub fn lora_fused(&self, lora_a: &Self, lora_b: &Self, scale: f32) -> CandleResult<Self> {
        let place = |inputs: &[NodeId], at: usize| inputs.get(at).copied().unwrap_or(self.id);
        self.apply(|ids| Operation::LoRA { a: place(ids, 1), b: place(ids, 2), scale }, &[lora_a, lora_b])
    }

    /// Computes the value. The graph keeps it, and the values of nodes on the way that somebody else holds.
    ///
    /// # Errors
    /// [`TrainingError::Failed`] where an operation fails; the graph is as it was, and a retry works.
    #[track_caller]
    pub fn eval(self) -> Result<Tensor, TrainingError> {
        let known = read(&self.graph).get_node(self.id).map(|node| node.data.as_tensor().ok().cloned());
        if let Some(tensor) = known.map_err(TrainingError::failed)? {
            return Ok(tensor);
        }
        let recorded = self.recorded().map_err(TrainingError::failed)?;
        // no lock is held while computing
        let tensor = recorded.eval().map_err(TrainingError::failed)?;
        write(&self.graph).fill(self.id, &tensor);
        Ok(tensor)
    }

    /// As [`LazyTensor::eval`], on the engine's thread: no runtime is needed, and no thread of one is blocked. Nothing begins before the
    /// first poll; see the engine's `eval_async` for what a drop does after that.
    ///
    /// # Errors
    /// As [`LazyTensor::eval`].
    #[cfg(feature = "async-exec")]
    pub async fn eval_async(&self) -> Result<Tensor, TrainingError> {
        let known = read(&self.graph).get_node(self.id).map(|node| node.data.as_tensor().ok().cloned());
        if let Some(tensor) = known.map_err(TrainingError::failed)? {
            return Ok(tensor);
        }
        let recorded = self.recorded().map_err(TrainingError::failed)?;
        // no lock is held while it is computed
        let tensor = recorded.eval_async().await.map_err(TrainingError::failed)?;
        write(&self.graph).fill(self.id, &tensor);
        Ok(tensor)
    }
}
