//! One op on tensors: no capture, no plan, the kernel at once.
//!
//! A graph of one op costs what eager costs only where nothing is built for it. The kernels are those that a plan of the op would run,
//! so the result has the bits that a plan gives it.

use super::kernel::row_program;
use super::slots::{kernel_error, with_views, SlotValue};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::lower::{binary, unary};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use candle_lazy_graph::node::storage_address;
use candle_lazy_graph::{Node, NodeRef, Op, Value};
use candle_lazy_ops::fault;
use candle_lazy_ops::kernels::{self, fresh};
use candle_lazy_ops::row::programs::Ready;
use candle_lazy_ops::row::{direct, BinaryFn, UnaryFn};
use candle_lazy_ops::view::SliceMut;
use smallvec::SmallVec;
use std::borrow::Cow;

/// With more elements an elementwise op is a row program, which may use more threads.
const MOST: usize = 4096;

/// What the op does.
enum Function {
    Unary(UnaryFn),
    Binary(BinaryFn),
    Affine(f32, f32),
    /// Holds the scale. Only with few results: else a plan costs little beside it.
    Lora(f64),
    /// A row program over these axes.
    Row(Ready, u32),
}

impl Function {
    fn of(node: &Node, op: &Op, scalars: &[f64]) -> Option<Self> {
        let few = node.elem_count() <= MOST;
        let axis = |dim: usize| 1u32.checked_shl(u32::try_from(dim).ok()?);
        let last = || axis(node.dims().len().checked_sub(1)?);
        Some(match (op, scalars) {
            (Op::Unary(f), []) if few => Function::Unary(unary(*f)),
            (Op::Unary(f), []) => Function::Row(Ready::Unary(unary(*f)), 0),
            (Op::Binary(f), []) if few => Function::Binary(binary(*f)),
            (Op::Binary(f), []) => Function::Row(Ready::Binary(binary(*f)), 0),
            (Op::Affine, [mul, add]) if few => Function::Affine(*mul as f32, *add as f32),
            (Op::Lora { .. }, [scale]) if few => Function::Lora(*scale),
            (Op::Softmax { dim }, []) => Function::Row(Ready::Softmax, axis(usize::from(*dim))?),
            (Op::LogSoftmax { dim }, []) => Function::Row(Ready::LogSoftmax, axis(usize::from(*dim))?),
            (Op::RmsNorm { weight }, [_]) => Function::Row(Ready::RmsNorm { weight: *weight }, last()?),
            (Op::LayerNorm { weight, bias }, [_]) => {
                Function::Row(Ready::LayerNorm { weight: *weight, bias: *bias }, last()?)
            }
            (Op::Glu { act }, []) => Function::Row(Ready::Glu(unary(*act)), 0),
            _ => return None,
        })
    }
}

/// The inputs of a small op have no more elements together.
const MOST_READ: usize = 1 << 16;

/// Whether [`eval_direct`] takes the node, as far as can be seen at a glance, and needs microseconds for it: one pending op that reads and
/// writes little.
pub(crate) fn is_direct(node: &Node) -> bool {
    let little = || node.with_inputs(|inputs| is_little(node, inputs)).unwrap_or(node.elem_count() <= MOST);
    let known = || node.recorded().is_some_and(|(op, params)| Function::of(node, op, params).is_some());
    is_plain(node) && node.pending_estimate().0 <= 1 && little() && known()
}

/// Whether an op reads and writes little, and so takes microseconds.
fn is_little(node: &Node, inputs: &[NodeRef]) -> bool {
    node.elem_count() <= MOST && inputs.iter().map(|input| input.elem_count()).sum::<usize>() <= MOST_READ
}

/// Of f32, on the CPU, and not of Candle's tape.
fn is_plain(node: &Node) -> bool {
    node.dtype() == DType::F32 && !node.tracked() && matches!(node.device(), Device::Cpu)
}

/// The value of a pending node that is one op of f32 on ready, untracked tensors on the CPU: an elementwise one (of tensors of its own
/// shape; where they are small, dense ones), a softmax, a norm or a gated unit, or a small LoRA. `None` if it is anything else.
pub(crate) fn eval_direct(node: &NodeRef) -> Option<Result<Tensor>> {
    let direct = Direct::of(node)?;
    let mut later: Option<Operands<'static>> = None;
    let computed = node.compute(|inputs| {
        let operands = direct.operands(inputs)?;
        // what takes no longer than another thread may wait for the node needs no handles on its inputs
        if is_little(node, inputs) {
            return direct.run(&operands);
        }
        later = Some(operands.into_iter().map(Operand::into_owned).collect());
        None
    });
    if computed.is_some() {
        return computed;
    }
    let tensor = match direct.run(&later?)? {
        Ok(tensor) => tensor,
        Err(error) => return Some(Err(error)),
    };
    if node.publish(Value::Tensor(tensor.clone())) {
        return Some(Ok(tensor));
    }
    // somebody else was first: all get the same tensor
    node.tensor().map(|tensor| Ok(tensor.into_owned()))
}

/// The same of a node that [`is_direct`] takes, or that has its value already.
pub(crate) fn eval_little(node: &NodeRef) -> Option<Result<Tensor>> {
    let ready = || node.tensor().filter(|_| !node.tracked()).map(|tensor| Ok(tensor.into_owned()));
    let Some(direct) = Direct::of(node).filter(|_| node.elem_count() <= MOST) else { return ready() };
    let little = |inputs: &[NodeRef]| direct.run(&direct.operands(is_little(node, inputs).then_some(inputs)?)?);
    node.compute(little).or_else(ready)
}

/// A tensor that an op reads: that of a leaf is borrowed.
struct Operand<'a> {
    tensor: Cow<'a, Tensor>,
    /// Where its storage lies, if the node knows.
    address: Option<usize>,
}

impl std::ops::Deref for Operand<'_> {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl Operand<'_> {
    fn address(&self) -> usize {
        self.address.unwrap_or_else(|| storage_address(&self.tensor))
    }

    fn into_owned(self) -> Operand<'static> {
        Operand { tensor: Cow::Owned(self.tensor.into_owned()), address: self.address }
    }
}

/// What an op reads.
type Operands<'a> = SmallVec<[Operand<'a>; 4]>;

/// One op to be computed at once.
struct Direct<'a> {
    node: &'a Node,
    function: Function,
    params: &'a [f64],
}

impl<'a> Direct<'a> {
    /// What a node does, if it is of a kind that needs no plan.
    fn of(node: &'a Node) -> Option<Self> {
        // a plan knows what it needs
        if crate::config::memory_budget().is_some() || crate::config::is_recording() || !is_plain(node) {
            return None;
        }
        let (op, params) = node.recorded()?;
        Some(Self { node, function: Function::of(node, op, params)?, params })
    }

    /// The inputs, if they are ready tensors of a kind that the function takes.
    fn operands<'i>(&self, inputs: &'i [NodeRef]) -> Option<Operands<'i>> {
        let elementwise = matches!(self.function, Function::Unary(_) | Function::Binary(_) | Function::Affine(..));
        let alike = elementwise || matches!(self.function, Function::Row(_, 0));
        let mut operands = Operands::new();
        for input in inputs {
            let fits = !alike || input.dims() == self.node.dims() && input.dtype() == DType::F32;
            let tensor = input.tensor().filter(|t| fits && (!elementwise || t.is_contiguous()))?;
            // one has no order
            let address = if inputs.len() > 1 { input.storage_address() } else { Some(0) };
            operands.push(Operand { tensor, address });
        }
        Some(operands)
    }

    fn run(&self, inputs: &[Operand<'_>]) -> Option<Result<Tensor>> {
        match &self.function {
            Function::Row(ready, axes) => rows(self.node, *ready, *axes, self.params, inputs),
            function => small(self.node, function, inputs),
        }
    }
}

/// A row program on inputs that broadcast to the node's shape.
fn rows(node: &Node, ready: Ready, axes: u32, params: &[f64], inputs: &[Operand<'_>]) -> Option<Result<Tensor>> {
    let dims = node.dims();
    let mut out = Buffer::take(DType::F32, node.elem_count()).ok()?;
    if !dense_rows(node, ready, axes, params, inputs, &mut out) {
        let program = ready.program(DType::F32).ok()?;
        let slots = slots_of(inputs);
        let inputs = [0, 1, 2, 3].get(..slots.len())?;
        // what fails here fails again with a plan, which knows how to say it
        row_program(&program, (dims, axes), params, &slots, inputs, std::slice::from_mut(&mut out)).ok()?;
    }
    if let (true, SliceMut::F32([.., last])) = (fault::active("direct.row"), out.slice_mut()) {
        *last += 1.0;
    }
    Some(out.into_tensor(dims))
}

/// The inputs as a plan has them.
fn slots_of(inputs: &[Operand<'_>]) -> SmallVec<[SlotValue; 4]> {
    inputs.iter().map(|x| SlotValue::foreign(Tensor::clone(&x.tensor))).collect()
}

/// The same of dense inputs, without a program, over the last dim or element by element; whether it was done.
fn dense_rows(node: &Node, ready: Ready, axes: u32, params: &[f64], inputs: &[Operand<'_>], out: &mut Buffer) -> bool {
    let rank = node.dims().len();
    let last = rank.checked_sub(1).and_then(|dim| 1u32.checked_shl(u32::try_from(dim).ok()?));
    let fits = axes == 0 || Some(axes) == last;
    if !(fits && inputs.iter().all(|t| t.dtype() == DType::F32 && t.is_contiguous())) {
        return false;
    }
    let SliceMut::F32(out) = out.slice_mut() else { return false };
    let cols = if axes == 0 { out.len() } else { node.dims().last().copied().unwrap_or(0) };
    let eps = params.first().copied().unwrap_or_default();
    let done = match inputs {
        [x] => with_dense([x], |x| direct::rows(ready, eps, &x, cols, out)),
        [x, y] => with_dense([x, y], |xy| direct::rows(ready, eps, &xy, cols, out)),
        [x, y, z] => with_dense([x, y, z], |xyz| direct::rows(ready, eps, &xyz, cols, out)),
        _ => None,
    };
    matches!(done, Some(Ok(true)))
}

/// A function of few elements.
fn small(node: &Node, function: &Function, inputs: &[Operand<'_>]) -> Option<Result<Tensor>> {
    let mut out = fresh::<f32>(node.elem_count());
    let computed = match (function, inputs) {
        (Function::Unary(f), [x]) => with_dense([x], |[x]| direct::unary(*f, x, &mut out)),
        (Function::Affine(mul, add), [x]) => with_dense([x], |[x]| direct::affine(x, *mul, *add, &mut out)),
        (Function::Binary(f), [x, y]) => with_dense([x, y], |[x, y]| direct::binary(*f, x, y, &mut out)),
        (Function::Lora(scale), inputs) => lora(*scale, inputs, &mut out).map(Ok),
        _ => None,
    };
    // what fails here fails again with a plan, which knows how to say it
    computed?.ok()?;
    let storage = Storage::Cpu(CpuStorage::F32(out));
    Some(Ok(Tensor::from_storage(storage, Shape::from(node.dims()), BackpropOp::none(), false)))
}

/// A LoRA of few rows: its two products take less time than a plan.
fn lora(scale: f64, inputs: &[Operand<'_>], out: &mut [f32]) -> Option<()> {
    if dense_lora(scale, inputs, out).is_none() {
        lora_of_views(scale, inputs, out)?;
    }
    if let (true, Some(x)) = (fault::active("direct.lora"), out.last_mut()) {
        *x += 1.0;
    }
    Some(())
}

fn lora_of_views(scale: f64, inputs: &[Operand<'_>], out: &mut [f32]) -> Option<()> {
    let slots = slots_of(inputs);
    with_views(&slots, &[0, 1, 2, 3][..slots.len().min(4)], |v| match v {
        [x, a, b, base @ ..] => {
            kernels::lora(x, a, b, base.first(), scale, &mut SliceMut::F32(&mut *out)).map_err(kernel_error)
        }
        _ => Err(Error::Internal("lora lacks an input".into())),
    })
    .ok()
}

/// The same of dense operands without a base, at a rank that hidden rows are kept in registers at.
fn dense_lora(scale: f64, inputs: &[Operand<'_>], out: &mut [f32]) -> Option<()> {
    let [x, a, b] = inputs else { return None };
    let (&[k, r], &[_, n]) = (a.dims(), b.dims()) else { return None };
    if !(kernels::lora_is_skinny(r) && inputs.iter().all(|t| t.is_contiguous())) {
        return None;
    }
    with_dense([x, a, b], |operands| kernels::lora_dense(operands.into(), (k, r, n), scale, out))?.ok()
}

/// The elements of a dense f32 tensor.
fn elements<'a>(storage: &'a Storage, tensor: &Tensor) -> Option<&'a [f32]> {
    let Storage::Cpu(CpuStorage::F32(data)) = storage else {
        return None;
    };
    let start = tensor.layout().start_offset();
    data.get(start..start + tensor.elem_count())
}

/// Calls `f` with the elements of dense f32 tensors. One guard per storage, in the order of their addresses: as
/// [`super::slots::with_views`], whose reasons hold here too.
fn with_dense<const N: usize, R>(tensors: [&Operand<'_>; N], f: impl FnOnce([&[f32]; N]) -> R) -> Option<R> {
    let addresses = tensors.map(Operand::address);
    let mut order: [usize; N] = std::array::from_fn(|i| i);
    order.sort_unstable_by_key(|&i| addresses.get(i));
    let mut guards: [Option<_>; N] = std::array::from_fn(|_| None);
    for i in order {
        let first = addresses.iter().position(|address| Some(address) == addresses.get(i))?;
        if let (None, Some(tensor)) = (guards.get(first)?, tensors.get(first)) {
            *guards.get_mut(first)? = Some(tensor.storage_and_layout().0);
        }
    }
    let mut slices: [&[f32]; N] = [&[]; N];
    for ((slice, tensor), address) in slices.iter_mut().zip(tensors).zip(&addresses) {
        let first = addresses.iter().position(|other| other == address)?;
        *slice = elements(guards.get(first)?.as_ref()?, tensor)?;
    }
    Some(f(slices))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::LazyTensor;
    use candle_core::Var;

    fn tensor(n: usize, dtype: DType) -> Tensor {
        Tensor::arange(1f32, n as f32 + 1.0, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    #[test]
    fn one_small_op_needs_no_plan_and_has_the_bits_of_one() {
        let (x, y) = (LazyTensor::from(tensor(100, DType::F32)), LazyTensor::from(tensor(100, DType::F32)));
        let ops: [fn(&LazyTensor, &LazyTensor) -> Result<LazyTensor>; 4] =
            [|x, _| x.exp(), |x, y| x - y, |x, _| x.affine(0.3, -1.7), |x, y| x.maximum(y)];
        for op in ops {
            let direct = eval_direct(op(&x, &y).unwrap().node()).expect("direct").unwrap();
            let (planned, report) = op(&x, &y).unwrap().eval_with_report().unwrap();
            assert_eq!(report.steps, 1);
            assert_eq!(direct.to_vec1::<f32>().unwrap(), planned.to_vec1::<f32>().unwrap());
        }
        let (wide, skinny) = (x.reshape((5, 20)).unwrap(), y.reshape((20, 5)).unwrap());
        let ready = |t: LazyTensor| LazyTensor::from(t.eval().unwrap());
        let (wide, skinny) = (ready(wide), ready(skinny));
        let lora = || wide.lora(&skinny, &wide, 0.01).unwrap();
        let direct = eval_direct(lora().node()).expect("direct").unwrap();
        let (planned, report) = lora().eval_with_report().unwrap();
        assert_eq!(report.kernels.get("lora"), Some(&1));
        assert_eq!(direct.to_vec2::<f32>().unwrap(), planned.to_vec2::<f32>().unwrap());
        let once = (&x + &y).unwrap();
        assert_eq!(once.eval().unwrap().id(), once.eval().unwrap().id(), "the value is kept");
    }

    #[test]
    fn a_row_program_without_a_plan_has_the_bits_of_one() {
        let dims = (3, 5, 700);
        let whole = tensor(3 * 5 * 700, DType::F32).affine(1e-3, -4.7).unwrap();
        let x = LazyTensor::from(whole.reshape(dims).unwrap());
        let turned = LazyTensor::from(whole.reshape((700, 5, 3)).unwrap().t().unwrap().transpose(0, 2).unwrap());
        let w = LazyTensor::from(tensor(700, DType::F32).affine(0.01, -3.0).unwrap());
        type Make = fn(&LazyTensor, &LazyTensor) -> Result<LazyTensor>;
        let ops: [(Make, &str); 10] = [
            (|x, _| x.exp(), "row"),
            (|x, _| x * x, "row"),
            (|x, _| x.softmax(2), "row"),
            (|x, _| x.softmax(1), "row"),
            (|x, _| x.log_softmax(0), "row"),
            (|x, w| x.rms_norm(Some(w), 1e-5), "row"),
            (|x, _| x.rms_norm(None, 1e-5), "row"),
            (|x, w| x.layer_norm(Some(w), Some(w), 1e-5), "row"),
            (|x, _| x.layer_norm(None, None, 1e-5), "row"),
            (|x, _| x.silu_mul(x), "row"),
        ];
        for (i, (op, kernel)) in ops.into_iter().enumerate() {
            for x in [&x, &turned] {
                let direct = eval_direct(op(x, &w).unwrap().node()).expect("direct").unwrap();
                let (planned, report) = op(x, &w).unwrap().eval_with_report().unwrap();
                assert_eq!((report.kernels.get(kernel), report.steps), (Some(&1), 1), "{i}");
                let bits = |t: &Tensor| -> Vec<u32> {
                    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
                };
                assert!(bits(&direct) == bits(&planned) && direct.dims() == planned.dims(), "{i}");
            }
        }
    }

    #[test]
    fn what_is_not_one_f32_op_on_its_own_kind_is_planned() {
        let small = LazyTensor::from(tensor(6, DType::F32));
        let planned = [
            LazyTensor::from(tensor(MOST + 1, DType::F32)).affine(2.0, 1.0),
            LazyTensor::from(tensor(MOST + 2, DType::F32).reshape((683, 6)).unwrap()).broadcast_add(&small),
            LazyTensor::from(tensor(6, DType::F64)).exp(),
            LazyTensor::from(tensor(6, DType::F64)).softmax(0),
            LazyTensor::from(tensor(6, DType::F32).reshape((2, 3)).unwrap().t().unwrap()).exp(),
            LazyTensor::from(Var::from_tensor(&tensor(6, DType::F32)).unwrap().as_tensor().clone()).exp(),
            small.exp().and_then(|x| x.neg()),
            small.broadcast_add(&LazyTensor::from(tensor(1, DType::F32))),
            small.sum_keepdim(0),
        ];
        for (i, tensor) in planned.into_iter().enumerate() {
            let tensor = tensor.unwrap();
            assert!(eval_direct(tensor.node()).is_none(), "{i}");
            assert!(tensor.eval().is_ok(), "{i}");
        }
    }
}
