//! One op on small tensors: no capture, no plan, the kernel's loop at once.
//!
//! A graph of one op costs what eager costs only where nothing is built for it. The loops are those of row programs, so the result
//! has the bits that a plan gives it.

use super::slots::{kernel_error, with_views, SlotValue};
use crate::error::{Error, Result};
use crate::lower::{binary, unary};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use candle_lazy_graph::{Node, Op, Value};
use candle_lazy_ops::fault;
use candle_lazy_ops::kernels::{self, fresh};
use candle_lazy_ops::row::{direct, BinaryFn, UnaryFn};
use candle_lazy_ops::view::SliceMut;
use smallvec::SmallVec;
use std::sync::Arc;

/// From this many elements on a plan costs little beside the arithmetic, and may use more threads.
const MOST: usize = 4096;

/// What the op does.
enum Function {
    Unary(UnaryFn),
    Binary(BinaryFn),
    Affine(f32, f32),
    /// No function of an element, but as short where its rows are few. Holds the scale.
    Lora(f64),
}

/// The value of a pending node that is one elementwise op of f32 on ready, dense, untracked tensors of its own shape on the CPU, or a
/// LoRA with as few results on ready tensors; `None` if it is anything else.
pub(crate) fn eval_direct(node: &Arc<Node>) -> Option<Result<Tensor>> {
    let count = node.shape().elem_count();
    if node.dtype() != DType::F32 || node.tracked() || count > MOST || !matches!(node.device(), Device::Cpu) {
        return None;
    }
    let (function, inputs) = node.with_expr(|expr| {
        let function = match (&expr.op, expr.scalars.as_slice()) {
            (Op::Unary(f), []) => Function::Unary(unary(*f)),
            (Op::Binary(f), []) => Function::Binary(binary(*f)),
            (Op::Affine, [mul, add]) => Function::Affine(*mul as f32, *add as f32),
            (Op::Lora { .. }, [scale]) => Function::Lora(*scale),
            _ => return None,
        };
        let elementwise = !matches!(function, Function::Lora(_));
        let mut inputs: SmallVec<[Tensor; 4]> = SmallVec::new();
        for input in &expr.inputs {
            let fits = input.shape() == node.shape() && input.dtype() == DType::F32;
            inputs.push(input.tensor().filter(|t| !elementwise || fits && t.is_contiguous())?);
        }
        Some((function, inputs))
    })??;
    let mut out = fresh::<f32>(count);
    let computed = match (&function, inputs.as_slice()) {
        (Function::Unary(f), [x]) => with_one(x, |x| direct::unary(*f, x, &mut out)),
        (Function::Affine(mul, add), [x]) => with_one(x, |x| direct::affine(x, *mul, *add, &mut out)),
        (Function::Binary(f), [x, y]) => with_two(x, y, |x, y| direct::binary(*f, x, y, &mut out)),
        (Function::Lora(scale), inputs) => lora(*scale, inputs, &mut out).map(Ok),
        _ => None,
    };
    // what fails here fails again with a plan, which knows how to say it
    computed?.ok()?;
    let tensor = match Tensor::from_vec(out, node.shape(), &Device::Cpu) {
        Ok(tensor) => tensor,
        Err(error) => return Some(Err(error.into())),
    };
    if node.publish(Value::Tensor(tensor.clone())) {
        return Some(Ok(tensor));
    }
    // somebody else was first: all get the same tensor
    node.tensor().map(Ok)
}

/// A LoRA of few rows: its two products take less time than a plan.
fn lora(scale: f64, inputs: &[Tensor], out: &mut [f32]) -> Option<()> {
    let slots: SmallVec<[SlotValue; 4]> = inputs.iter().cloned().map(SlotValue::foreign).collect();
    with_views(&slots, &[0, 1, 2, 3][..slots.len().min(4)], |v| match v {
        [x, a, b, base @ ..] => {
            kernels::lora(x, a, b, base.first(), scale, &mut SliceMut::F32(&mut *out)).map_err(kernel_error)
        }
        _ => Err(Error::Internal("lora lacks an input".into())),
    })
    .ok()?;
    if let (true, Some(x)) = (fault::active("direct.lora"), out.last_mut()) {
        *x += 1.0;
    }
    Some(())
}

/// The elements of a dense f32 tensor.
fn elements<'a>(storage: &'a Storage, tensor: &Tensor) -> Option<&'a [f32]> {
    let Storage::Cpu(CpuStorage::F32(data)) = storage else {
        return None;
    };
    let start = tensor.layout().start_offset();
    data.get(start..start + tensor.elem_count())
}

fn with_one<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Option<R> {
    let (storage, _) = x.storage_and_layout();
    Some(f(elements(&storage, x)?))
}

/// One guard where both share a storage, else two in the order of their addresses: as [`super::slots::with_views`], whose reasons hold
/// here too.
fn with_two<R>(x: &Tensor, y: &Tensor, f: impl FnOnce(&[f32], &[f32]) -> R) -> Option<R> {
    let address = |t: &Tensor| std::ptr::from_ref::<Storage>(&t.storage_and_layout().0) as usize;
    let (at_x, at_y) = (address(x), address(y));
    if at_x == at_y {
        let (storage, _) = x.storage_and_layout();
        return Some(f(elements(&storage, x)?, elements(&storage, y)?));
    }
    let (first, second) = if at_x < at_y { (x, y) } else { (y, x) };
    let (low, _) = first.storage_and_layout();
    let (high, _) = second.storage_and_layout();
    let (sx, sy) = if at_x < at_y { (&low, &high) } else { (&high, &low) };
    Some(f(elements(sx, x)?, elements(sy, y)?))
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
    fn what_is_not_one_small_dense_f32_op_is_planned() {
        let small = LazyTensor::from(tensor(6, DType::F32));
        let planned = [
            LazyTensor::from(tensor(MOST + 1, DType::F32)).exp(),
            LazyTensor::from(tensor(6, DType::F64)).exp(),
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
