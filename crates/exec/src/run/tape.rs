//! How the result of a plan joins Candle's tape.
//!
//! A plan runs our kernels on values that nobody tracks. Where a leaf of the graph is tracked by Candle's autograd, the result that the
//! user gets must carry the gradient all the same, and Candle's public tape takes custom ops of at most three inputs. So a result is
//! wrapped: a custom op on the tracked leaves hands over the finished storage, and its backward records the joint gradient of the graph
//! ([`candle_lazy_graph::vjp`]) and evaluates it as one plan. Of more than three leaves a tree of *tokens*, scalars made by custom ops of
//! up to three inputs, leads to the leaves: the result's op gives its tokens a number as their "gradient", under which the gradients of
//! all leaves are kept, and each op of the tree hands out those of its own leaves. A leaf that no gradient reaches gets zeros.
//!
//! What a result's op holds is its own node's history and a second handle on its storage, never the node: nothing refers to itself.

use super::eval_all;
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::tensor::LazyTensor;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, MetalStorage, Result as CandleResult,
    Shape, Storage, Tensor,
};
use candle_lazy_graph::{vjp, BuildSite, FastMap, Node, NodeId, NodeRef, Value};
use candle_lazy_ops::fault;
use candle_lazy_ops::storage::cpu_slice;
use parking_lot::Mutex;
use smallvec::SmallVec;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

/// A value that a run has finished.
pub(super) enum Finished {
    /// Memory that nobody else holds.
    Buffer(Buffer),
    /// A tensor that somebody else may hold: it is copied.
    Tensor(Tensor),
}

/// The tensor of a finished value of `node`, whose gradients reach the tracked leaves above it.
pub(super) fn attach(node: &NodeRef, value: Finished) -> Result<Tensor> {
    let leaves = tracked_leaves(node);
    let mut items: Vec<(Tensor, Source)> = Vec::with_capacity(leaves.len());
    for (i, leaf) in leaves.iter().enumerate() {
        let Some(tensor) = leaf.tensor() else {
            return Err(Error::Internal("a tracked leaf is no tensor".into()));
        };
        // one op's inputs are on one device: a copy that Candle tracks leads to a leaf elsewhere
        items.push((tensor.to_device(node.device())?, Source::Leaf(i)));
    }
    let shared = Arc::new(Shared { twin: OnceLock::new(), leaves, pending: Mutex::default() });
    while items.len() > 3 {
        let mut level = Vec::with_capacity(items.len().div_ceil(3));
        for group in items.chunks(3) {
            level.push(match group {
                [one] => one.clone(),
                several => (join(&shared, several, Hands::Token)?, Source::Token),
            });
        }
        items = level;
    }
    let dims = node.shape().clone();
    let storage = match value {
        Finished::Buffer(buffer) => Storage::Cpu(buffer.into_storage()?),
        Finished::Tensor(tensor) => copied(&tensor)?,
    };
    let tensor = join(&shared, &items, Hands::Result(Mutex::new(Some(storage)), dims))?;
    let twin = node.twin(Value::Tensor(tensor.detach()));
    let twin = twin.ok_or_else(|| Error::Internal("a tracked node has no history".into()))?;
    // nobody could have set it before
    let _ = shared.twin.set(twin);
    Ok(tensor)
}

/// The elements of a tensor in a storage of their own.
fn copied(tensor: &Tensor) -> CandleResult<Storage> {
    let whole = |storage: &Storage, layout: &Layout| match storage {
        Storage::Cpu(storage) => {
            let elements = cpu_slice(storage).map(|slice| slice.len());
            layout.is_contiguous() && layout.start_offset() == 0 && elements == Some(layout.shape().elem_count())
        }
        Storage::Cuda(_) | Storage::Metal(_) => false,
    };
    {
        let (storage, layout) = tensor.storage_and_layout();
        if whole(&storage, layout) {
            return storage.try_clone(layout);
        }
    }
    let dense = tensor.force_contiguous()?;
    let (storage, layout) = dense.storage_and_layout();
    storage.try_clone(layout)
}

/// The leaves above a node that Candle tracks, in the order of their making.
fn tracked_leaves(node: &NodeRef) -> Vec<NodeRef> {
    let mut seen: FastMap<NodeId, ()> = FastMap::default();
    let mut stack = vec![node.clone()];
    let mut leaves = Vec::new();
    while let Some(node) = stack.pop() {
        if !node.tracked() || seen.insert(node.id(), ()).is_some() {
            continue;
        }
        match node.history() {
            Some(expr) => stack.extend(expr.inputs),
            None => leaves.push(node),
        }
    }
    leaves.sort_by_key(|n| n.id());
    leaves
}

/// What an input of a tape op is.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// A tracked leaf, by its number.
    Leaf(usize),
    /// A token, whose gradient is a number to look gradients up by.
    Token,
}

/// What all ops of one result share.
struct Shared {
    /// The result's history and its value.
    twin: OnceLock<NodeRef>,
    leaves: Vec<NodeRef>,
    /// The gradients of backward passes that have not reached all leaves yet.
    pending: Mutex<FastMap<u32, Vec<Option<Tensor>>>>,
}

/// Numbers of backward passes; a token is f32, which holds whole numbers up to 2²⁴.
static PASSES: AtomicU32 = AtomicU32::new(0);

impl Shared {
    /// The gradients of all leaves, given that of the result.
    fn gradients(&self, g: &Tensor) -> Result<Vec<Tensor>> {
        let Some(twin) = self.twin.get() else {
            return Err(Error::Internal("a tape without its result".into()));
        };
        let site = BuildSite::here();
        let cotangent = Node::leaf(g.detach(), site.clone());
        let found = vjp(std::slice::from_ref(twin), std::slice::from_ref(&cotangent), &self.leaves)?;
        // Candle tracks no gradients, so neither may the tensors be tracked that it gets
        let roots: Vec<Option<LazyTensor>> =
            found.iter().map(|g| Some(LazyTensor::from_node(Node::detached(g.as_ref()?, site.clone())))).collect();
        drop(found);
        let mut values = eval_all(&roots.iter().flatten().collect::<Vec<_>>())?.into_iter();
        let mut gradients = Vec::with_capacity(roots.len());
        for (leaf, root) in self.leaves.iter().zip(&roots) {
            gradients.push(match root.as_ref().and_then(|_| values.next()) {
                Some(gradient) => gradient,
                None => Tensor::zeros(leaf.shape(), leaf.dtype(), leaf.device())?,
            });
        }
        if fault::active("tape.reversed") {
            gradients.reverse();
        }
        Ok(gradients)
    }
}

/// What a tape op makes.
enum Hands {
    /// The finished result, once.
    Result(Mutex<Option<Storage>>, Shape),
    /// A scalar that stands for the leaves below it.
    Token,
}

/// A custom op of up to three inputs that leads to leaves and tokens.
struct Join {
    shared: Arc<Shared>,
    sources: SmallVec<[Source; 3]>,
    hands: Hands,
}

fn join(shared: &Arc<Shared>, items: &[(Tensor, Source)], hands: Hands) -> Result<Tensor> {
    let sources = items.iter().map(|(_, source)| *source).collect();
    let op = Join { shared: shared.clone(), sources, hands };
    Ok(match items {
        [(a, _)] => a.apply_op1(op)?,
        [(a, _), (b, _)] => a.apply_op2(b, op)?,
        [(a, _), (b, _), (c, _)] => a.apply_op3(b, c, op)?,
        _ => return Err(Error::Internal(format!("a tape op of {} inputs", items.len()))),
    })
}

impl Join {
    /// The finished storage of the result; `None` for a token.
    fn finished(&self) -> CandleResult<Option<(Storage, Shape)>> {
        match &self.hands {
            Hands::Token => Ok(None),
            Hands::Result(storage, shape) => match storage.lock().take() {
                Some(storage) => Ok(Some((storage, shape.clone()))),
                None => candle_core::bail!("a result is handed over once"),
            },
        }
    }

    /// The gradients of the inputs.
    fn backward(&self, g: &Tensor) -> CandleResult<SmallVec<[Option<Tensor>; 3]>> {
        let number = match &self.hands {
            Hands::Result(..) => {
                let gradients = self.shared.gradients(g).map_err(candle_core::Error::wrap)?;
                if self.sources.iter().all(|source| matches!(source, Source::Leaf(_))) {
                    return Ok(gradients.into_iter().map(Some).collect());
                }
                let number = PASSES.fetch_add(1, Ordering::Relaxed) % (1 << 24);
                self.shared.pending.lock().insert(number, gradients.into_iter().map(Some).collect());
                number
            }
            Hands::Token => g.to_scalar::<f32>()? as u32,
        };
        let mut handed = SmallVec::new();
        let mut pending = self.shared.pending.lock();
        let Some(gradients) = pending.get_mut(&number) else {
            candle_core::bail!("a token without gradients");
        };
        for source in &self.sources {
            handed.push(match *source {
                Source::Leaf(i) => gradients.get_mut(i).and_then(Option::take),
                Source::Token => Some(Tensor::full(number as f32, (), g.device())?),
            });
        }
        if gradients.iter().all(Option::is_none) {
            pending.remove(&number);
        }
        Ok(handed)
    }

    fn cpu(&self) -> CandleResult<(CpuStorage, Shape)> {
        match self.finished()? {
            Some((Storage::Cpu(storage), shape)) => Ok((storage, shape)),
            Some(_) => candle_core::bail!("a result on another device than its leaves"),
            None => Ok((CpuStorage::F32(vec![0.0]), Shape::from(()))),
        }
    }

    fn cuda(&self, like: &CudaStorage) -> CandleResult<(CudaStorage, Shape)> {
        match self.finished()? {
            Some((Storage::Cuda(storage), shape)) => Ok((storage, shape)),
            Some(_) => candle_core::bail!("a result on another device than its leaves"),
            None => Ok((like.device().zeros_impl(&Shape::from(()), DType::F32)?, Shape::from(()))),
        }
    }

    fn metal(&self, like: &MetalStorage) -> CandleResult<(MetalStorage, Shape)> {
        match self.finished()? {
            Some((Storage::Metal(storage), shape)) => Ok((storage, shape)),
            Some(_) => candle_core::bail!("a result on another device than its leaves"),
            None => Ok((like.device().zeros_impl(&Shape::from(()), DType::F32)?, Shape::from(()))),
        }
    }
}

/// What the op is called in Candle's errors.
const NAME: &str = "candle-lazy";

impl CustomOp1 for Join {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, a: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        self.cuda(a)
    }
    fn metal_fwd(&self, a: &MetalStorage, _: &Layout) -> CandleResult<(MetalStorage, Shape)> {
        self.metal(a)
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, g: &Tensor) -> CandleResult<Option<Tensor>> {
        Ok(self.backward(g)?.into_iter().next().flatten())
    }
}

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, a: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        self.cuda(a)
    }
    fn metal_fwd(
        &self,
        a: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> CandleResult<(MetalStorage, Shape)> {
        self.metal(a)
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, g: &Tensor) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.backward(g)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten()))
    }
}

impl CustomOp3 for Join {
    fn name(&self) -> &'static str {
        NAME
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        self.cuda(a)
    }
    fn metal_fwd(
        &self,
        a: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> CandleResult<(MetalStorage, Shape)> {
        self.metal(a)
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.backward(g)?.into_iter();
        Ok((gradients.next().flatten(), gradients.next().flatten(), gradients.next().flatten()))
    }
}
