//! The arena: equal nodes get equal indices, sizes become symbols, and every new node adds its words to the key.

use super::key::{hash, push, push_indices};
use super::{Arena, Bindings, CaptureOptions, GNode, GOp, Graph, Info, LeafKey, Sym};
use crate::custom::CustomOp;
use crate::decompose::{decompose, is_composite};
use crate::error::{Error, ErrorKind, Result};
use crate::hash::FastHasher;
use crate::infer::{infer, Meta};
use crate::node::{Node, NodeRef, Value};
use crate::op::{Dims, Op, Scalars};
use crate::recorder::Recorder;
use candle_core::{DType, Device};
use smallvec::SmallVec;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// Sizes whose symbols are looked up without a search.
const RECENT: usize = 64;

pub(super) struct Builder<'a, 'o> {
    options: &'a CaptureOptions<'o>,
    arena: &'a mut Arena,
    key: &'a mut Vec<u64>,
    pub(super) bindings: Bindings,
    graph: Option<Graph>,
    /// Sizes of two and more, with their symbols; short, so a scan is quicker than a map.
    shared: Vec<(usize, Sym)>,
    /// For sizes with equal last bits, the one that was met last.
    recent: [(usize, Sym); RECENT],
    /// The recorded node whose ops are being added: its visit and its device.
    current: (u32, Option<Device>),
}

/// What a node's words begin with: all that does not vary in length, and how long the rest is, but for the scalars, whose number is the
/// op's. The rank of the dims that follow is added by [`with_rank`].
#[inline(always)]
fn header(dtype: DType, device: u16, inputs: usize) -> u64 {
    (dtype as u64) | u64::from(device) << 20 | (inputs as u64) << 36
}

/// A header before dims.
fn with_rank(header: u64, rank: usize) -> u64 {
    header | (rank as u64 + 1) << 12
}

impl<'a, 'o> Builder<'a, 'o> {
    /// `whole` asks for a graph beside the key.
    pub(super) fn new(
        options: &'a CaptureOptions<'o>,
        arena: &'a mut Arena,
        key: &'a mut Vec<u64>,
        bindings: Bindings,
        whole: bool,
    ) -> Self {
        Self {
            options,
            arena,
            key,
            bindings,
            graph: whole.then(Graph::default),
            shared: Vec::new(),
            recent: [(0, Sym::ZERO); RECENT],
            current: (0, None),
        }
    }

    /// How many nodes the arena has.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.arena.infos.len()
    }

    #[inline]
    fn shared_sym(&mut self, size: usize) -> Sym {
        if size < 2 {
            return Sym(size as u32);
        }
        let recent = size % RECENT;
        if self.recent[recent].0 == size {
            return self.recent[recent].1;
        }
        let known = self.shared.iter().find(|(s, _)| *s == size).map(|(_, sym)| *sym);
        let sym = known.unwrap_or_else(|| {
            let sym = self.free_sym(size);
            self.shared.push((size, sym));
            sym
        });
        self.recent[recent] = (size, sym);
        sym
    }

    #[inline]
    fn free_sym(&mut self, size: usize) -> Sym {
        let sym = Sym(self.bindings.sizes.len() as u32);
        self.bindings.sizes.push(size);
        sym
    }

    fn symbolise(&mut self, op: &Op) -> Op<Sym> {
        match op {
            Op::Narrow { dim, start, len } => {
                Op::Narrow { dim: *dim, start: self.free_sym(*start), len: self.shared_sym(*len) }
            }
            Op::SliceAssign { dim, start } => Op::SliceAssign { dim: *dim, start: self.free_sym(*start) },
            Op::Stride { dim, start, len, step } => Op::Stride {
                dim: *dim,
                start: self.free_sym(*start),
                len: self.shared_sym(*len),
                step: self.free_sym(*step),
            },
            // nothing compares them, as the start of a narrow
            Op::LoraSegments { rows } => Op::LoraSegments { rows: rows.iter().map(|&n| self.free_sym(n)).collect() },
            Op::GroupNorm { groups, weight, bias } => {
                Op::GroupNorm { groups: self.free_sym(*groups), weight: *weight, bias: *bias }
            }
            Op::Attention { mask, causal, softcap, window: Some(window) } => {
                Op::Attention { mask: *mask, causal: *causal, softcap: *softcap, window: Some(self.free_sym(*window)) }
            }
            Op::AttentionBackward { mask, causal, softcap, window: Some(window) } => Op::AttentionBackward {
                mask: *mask,
                causal: *causal,
                softcap: *softcap,
                window: Some(self.free_sym(*window)),
            },
            Op::CausalMask { queries, keys, window: Some(window), dtype } => Op::CausalMask {
                queries: self.shared_sym(*queries),
                keys: self.shared_sym(*keys),
                window: Some(self.free_sym(*window)),
                dtype: *dtype,
            },
            other => other.map_sizes(|s| self.shared_sym(*s)),
        }
    }

    #[inline]
    fn device(&mut self, device: &Device) -> u16 {
        if let Some(i) = self.bindings.devices.iter().position(|d| d.same_device(device)) {
            return i as u16;
        }
        self.bindings.devices.push(device.clone());
        if let Some(graph) = &mut self.graph {
            graph.devices.push(device.location());
        }
        (self.bindings.devices.len() - 1) as u16
    }

    /// The index of a ready node, and whether it is new. `nodes` are those of all visits before.
    pub(super) fn leaf(&mut self, visit: u32, node: &NodeRef, value: &Value, nodes: &[NodeRef]) -> (u32, bool) {
        let identity = match value {
            Value::Tensor(tensor) => {
                let mut hasher = FastHasher::default();
                tensor.id().hash(&mut hasher);
                hasher.finish()
            }
            Value::Engine(engine) => !(Arc::as_ptr(engine).cast::<u8>() as usize as u64),
            Value::Quantized(weight) => !(Arc::as_ptr(weight).cast::<u8>() as usize as u64),
        };
        let recorded = &self.bindings.recorded;
        let known = |id: u32| nodes.get(recorded[id as usize] as usize).is_some_and(|n| same_data(n, value));
        if let Some(id) = self.arena.same.find(identity, known) {
            return (id, false);
        }
        let leaf = LeafKey::of(node, value);
        let id = self.len() as u32;
        self.arena.same.insert(identity, id);
        let (dims, dtype) = (node.dims(), node.dtype());
        let device = self.device(node.device());
        self.key.push(with_rank(header(dtype, device, 0), dims.len()));
        // where an op has its discriminant, a leaf has a number that no discriminant is
        self.key.push(!(leaf.kind as u64 * 2 + u64::from(leaf.contiguous)));
        let (at, rank) = (self.push_dims(dims), dims.len() as u16);
        let info = Info { words: (0, 0), dims: at, rank, device, dtype };
        self.add(visit, info, &[], 0, || GOp::Leaf(leaf));
        (id, true)
    }

    /// Adds a recorded op, or its decomposition.
    pub(super) fn op(&mut self, visit: u32, node: &NodeRef, custom: Option<CustomOp>, inputs: &[u32]) -> Result<u32> {
        let Some((op, scalars)) = node.recorded() else {
            return Err(Error::new("leaf", ErrorKind::Invalid("a leaf that waits".into())));
        };
        self.bindings.pending += 1;
        if let (Op::Checkpoint { .. }, Some(&x)) = (op, inputs.first()) {
            return Ok(x);
        }
        let mut number = [0.0];
        let scalars = match custom {
            None => scalars,
            Some(custom) => {
                let known = self.bindings.customs.iter().position(|c| c.is(&custom));
                // equal scalars are one node: two nodes merge only if they run the same object
                number[0] = known.unwrap_or_else(|| {
                    self.bindings.customs.push(custom);
                    self.bindings.customs.len() - 1
                }) as f64;
                &number
            }
        };
        if is_composite(op) && (self.options.expand)(op, node.dtype(), node.device()) {
            self.current = (visit, Some(node.device().clone()));
            let expanded = decompose(op, &Scalars::from_slice(scalars), inputs, self);
            self.current.1 = None;
            return expanded.map_err(|e| e.at(node.site()));
        }
        let meta = Meta { dims: node.dims(), dtype: node.dtype() };
        Ok(self.intern(visit, node.device(), op, scalars, inputs, meta))
    }

    #[allow(clippy::too_many_arguments)] // the parts of a node, once
    #[inline]
    fn intern(&mut self, visit: u32, device: &Device, op: &Op, scalars: &[f64], inputs: &[u32], meta: Meta<'_>) -> u32 {
        let device = match inputs.first() {
            Some(&first) if !matches!(op, Op::ToDevice) => self.arena.infos[first as usize].device,
            _ => self.device(device),
        };
        let header = header(meta.dtype, device, inputs.len());
        let Arena { infos, words, equal, dims, .. } = &mut *self.arena;
        let from = words.len();
        words.push(header);
        push(words, op);
        let op_end = words.len();
        push_indices(words, inputs);
        let inputs_end = words.len();
        words.extend(scalars.iter().map(|s| s.to_bits()));
        let hash = hash(&words[from..]);
        let known = |id: u32| {
            let (start, end) = infos[id as usize].words;
            words[start as usize..end as usize] == words[from..]
        };
        if let Some(id) = equal.find(hash, known) {
            words.truncate(from);
            return id;
        }
        let id = infos.len() as u32;
        equal.insert(hash, id);
        let range = (from as u32, words.len() as u32);
        // the dims of a node that has those of its first input need no words
        let first = inputs.first().map(|&i| (infos[i as usize].dims, infos[i as usize].rank));
        let alike = |&(at, rank): &(u32, u16)| {
            let first = &dims[at as usize..][..usize::from(rank)];
            first.len() == meta.dims.len() && first.iter().zip(meta.dims).all(|(a, b)| a == b)
        };
        let first = first.filter(alike);
        let rank = meta.dims.len();
        self.key.push(if first.is_some() { header } else { with_rank(header, rank) });
        let relative = op.has_sizes().then(|| self.symbolise(op));
        match &relative {
            Some(relative) => push(self.key, relative),
            None => self.key.extend_from_slice(&self.arena.words[from + 1..op_end]),
        }
        self.key.extend_from_slice(&self.arena.words[op_end..inputs_end]);
        self.bindings.params.extend_from_slice(scalars);
        let at = match first {
            Some((at, _)) => at,
            None => self.push_dims(meta.dims),
        };
        let info = Info { words: range, dims: at, rank: rank as u16, device, dtype: meta.dtype };
        let graph_op = || GOp::Op(relative.unwrap_or_else(|| op.map_sizes(|_| Sym::ZERO)));
        self.add(visit, info, inputs, scalars.len(), graph_op);
        id
    }

    /// Adds the words of dims to the key, and the dims to the arena: says where they lie there.
    #[inline]
    fn push_dims(&mut self, dims: &[usize]) -> u32 {
        for pair in dims.chunks(2) {
            let low = self.shared_sym(pair[0]).0;
            let high = pair.get(1).map_or(0, |&size| self.shared_sym(size).0);
            self.key.push(u64::from(high) << 32 | u64::from(low));
        }
        let at = self.arena.dims.len() as u32;
        self.arena.dims.extend_from_slice(dims);
        at
    }

    /// Adds a new node, whose params are the last ones; `op` is called if there is a graph.
    #[inline]
    fn add(&mut self, visit: u32, info: Info, inputs: &[u32], scalars: usize, op: impl FnOnce() -> GOp) {
        self.arena.infos.push(info);
        self.bindings.recorded.push(visit);
        if self.graph.is_none() {
            return;
        }
        let Info { dims, rank, device, dtype, .. } = info;
        let sizes = Dims::<usize>::from_slice(&self.arena.dims[dims as usize..][..usize::from(rank)]);
        let (op, dims) = (op(), sizes.iter().map(|&d| self.shared_sym(d)).collect());
        let end = self.bindings.params.len();
        let params = (end - scalars..end).map(|p| p as u32).collect();
        if let Some(graph) = &mut self.graph {
            graph.nodes.push(GNode { op, inputs: inputs.into(), params, dims, dtype, device });
        }
    }

    /// The outputs, behind all nodes.
    pub(super) fn outputs(&mut self, outputs: &[u32]) {
        // a word that no header is: there the number of inputs ends below this bit
        self.key.push(1 << 63 | outputs.len() as u64);
        push_indices(self.key, outputs);
        for device in &self.bindings.devices {
            push(self.key, &device.location());
        }
        if let Some(graph) = &mut self.graph {
            graph.outputs = outputs.to_vec();
            graph.origins = (0..graph.nodes.len() as u32).collect();
        }
    }

    pub(super) fn finish(self) -> (Bindings, Option<Graph>) {
        (self.bindings, self.graph)
    }
}

/// Whether `node` holds the very data of `value`.
pub(super) fn same_data(node: &Node, value: &Value) -> bool {
    match (node.value(), value) {
        (Some(Value::Tensor(a)), Value::Tensor(b)) => a.id() == b.id(),
        (Some(Value::Engine(a)), Value::Engine(b)) => Arc::ptr_eq(&a, b),
        (Some(Value::Quantized(a)), Value::Quantized(b)) => Arc::ptr_eq(&a, b),
        _ => false,
    }
}

impl Recorder for Builder<'_, '_> {
    type Ref = u32;

    fn dims(&self, node: &u32) -> Dims {
        let info = &self.arena.infos[*node as usize];
        Dims::from_slice(&self.arena.dims[info.dims as usize..][..usize::from(info.rank)])
    }

    fn dtype(&self, node: &u32) -> DType {
        self.arena.infos[*node as usize].dtype
    }

    fn push(&mut self, op: Op, scalars: Scalars, inputs: &[u32]) -> Result<u32> {
        let (visit, Some(device)) = self.current.clone() else {
            return Err(Error::new(op.name(), ErrorKind::Invalid("no recorded node".into())));
        };
        let dims: SmallVec<[Dims; 4]> = inputs.iter().map(|i| self.dims(i)).collect();
        let metas: SmallVec<[Meta<'_>; 4]> =
            dims.iter().zip(inputs).map(|(dims, i)| Meta { dims, dtype: self.dtype(i) }).collect();
        let meta = infer(&op, &metas)?;
        if is_composite(&op) && (self.options.expand)(&op, meta.dtype, &device) {
            return decompose(&op, &scalars, inputs, self);
        }
        let meta = Meta { dims: &meta.dims, dtype: meta.dtype };
        Ok(self.intern(visit, &device, &op, &scalars, inputs, meta))
    }
}
