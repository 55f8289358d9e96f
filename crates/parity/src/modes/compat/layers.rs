//! `graph`: v1's lazy tensors, graphs built by hand, and both executors.

use super::ops::{lora, product, rms_norm, softmax, EPS, LOW_RANK, SCALING};
use super::{Call, Dtypes, Formula, Ours};
use candle_core::{DType, Result, Tensor};
use candle_lazy_compat::graph::{AsyncExecutor, AsyncGraphExecutor, ComputationGraph, LazyTensor, NodeId, Operation};
use candle_lazy_compat::Result as Compat;
use std::future::Future;
use std::sync::{Arc, RwLock};
use std::task::{Context, Poll, Wake, Waker};

fn lazy(x: &Tensor) -> Compat<LazyTensor> {
    Ok(LazyTensor::from_tensor(x.clone())?)
}

fn done(x: LazyTensor) -> Compat<Vec<Tensor>> {
    Ok(vec![x.eval()?])
}

fn executed(operation: &Operation, inputs: &[Tensor]) -> Compat<Vec<Tensor>> {
    let mut executor = AsyncExecutor::new(inputs[0].device().clone())?;
    Ok(vec![executor.execute_operation(operation, inputs)?])
}

/// The value of a future, on this thread.
fn wait<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// The node as a tensor of its graph.
fn handle(graph: ComputationGraph, id: NodeId, shape: &[usize], dtype: DType) -> LazyTensor {
    let device = graph.device().clone();
    LazyTensor::new(id, Arc::new(RwLock::new(graph)), shape.into(), dtype, device)
}

/// a·b + c from two graphs, of which the second has the product.
fn by_hand(x: &[Tensor]) -> Compat<LazyTensor> {
    let refused = candle_core::Error::Msg;
    let mut right = ComputationGraph::new(x[0].device().clone());
    let (a, b) = (right.add_input(x[0].clone()), right.add_input(x[1].clone()));
    let product = right.add_node(Operation::Matmul, vec![a, b]).map_err(refused)?;
    let mut left = ComputationGraph::new(x[0].device().clone());
    let c = left.add_input(x[2].clone());
    let product = left.merge_from(&right, product);
    let sum = left.add_node(Operation::Add, vec![product, c]).map_err(refused)?;
    Ok(handle(left, sum, x[2].dims(), x[2].dtype()))
}

fn product_and_sum(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let (values, sizes) = matmul(x)?;
    Ok((vec![(&values[0] + &x[2])?], vec![(&sizes[0] + x[2].abs()?)?]))
}

fn matmul(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let (a, b) = (x[0].contiguous()?, x[1].contiguous()?);
    Ok((vec![a.broadcast_matmul(&b)?], vec![a.abs()?.broadcast_matmul(&b.abs()?)?]))
}

fn sum(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    Ok((vec![x[0].broadcast_add(&x[1])?], vec![x[0].abs()?.broadcast_add(&x[1].abs()?)?]))
}

fn elementwise_product(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    Ok((vec![x[0].broadcast_mul(&x[1])?], Vec::new()))
}

const fn call(name: &'static str, inputs: &'static [&'static [usize]], ours: Ours, formula: Formula) -> Call {
    Call { name, inputs, dtypes: Dtypes::Floats, ours, formula, roundings: 2.0, gradients: true }
}

const TWO: &[&[usize]] = &[&[3, 5], &[3, 5]];
const BROADCAST: &[&[usize]] = &[&[3, 1], &[5]];
const SUM_OF_PRODUCT: &[&[usize]] = &[&[3, 5], &[5, 4], &[3, 4]];
const MATRICES: &[&[usize]] = &[&[3, 5], &[5, 4]];
const CUBE: &[&[usize]] = &[&[2, 3, 5]];

pub(super) const CALLS: &[Call] = &[
    call("a.matmul(&b)?.eval()", MATRICES, |x| done(lazy(&x[0])?.matmul(&lazy(&x[1])?)?), matmul),
    call("a.add(&b)?.eval()", TWO, |x| done(lazy(&x[0])?.add(&lazy(&x[1])?)?), sum),
    call("a.mul(&b)?.eval()", TWO, |x| done(lazy(&x[0])?.mul(&lazy(&x[1])?)?), elementwise_product),
    call(
        "a.mul_scalar(2.5)?.eval()",
        CUBE,
        |x| done(lazy(&x[0])?.mul_scalar(2.5)?),
        |x| Ok((vec![(&x[0] * 2.5)?], Vec::new())),
    ),
    call(
        "a.softmax(0)?.eval()",
        CUBE,
        |x| done(lazy(&x[0])?.softmax(0)?),
        |x| Ok((vec![softmax(&x[0], 0)?], Vec::new())),
    ),
    call(
        "a.softmax(2)?.eval()",
        CUBE,
        |x| done(lazy(&x[0])?.softmax(2)?),
        |x| Ok((vec![softmax(&x[0], 2)?], Vec::new())),
    ),
    call(
        "a.rms_norm(eps)?.eval()",
        CUBE,
        |x| done(lazy(&x[0])?.rms_norm(EPS as f32)?),
        |x| Ok((vec![rms_norm(&x[0], f64::from(EPS as f32))?], Vec::new())),
    ),
    call(
        "x.lora_fused(&a, &b, scale)?.eval()",
        LOW_RANK,
        |x| done(lazy(&x[0])?.lora_fused(&lazy(&x[1])?, &lazy(&x[2])?, SCALING)?),
        lora,
    ),
    Call {
        roundings: 6.0,
        ..call(
            "softmax((a·b + c)·2, 1)",
            &[&[3, 5], &[5, 4], &[3, 4]],
            |x| done(lazy(&x[0])?.matmul(&lazy(&x[1])?)?.add(&lazy(&x[2])?)?.mul_scalar(2.0)?.softmax(1)?),
            |x| {
                let logits = ((product(&x[0], &x[1])? + &x[2])? * 2.0)?;
                Ok((vec![softmax(&logits, 1)?], Vec::new()))
            },
        )
    },
    call("execute_operation(Matmul)", MATRICES, |x| executed(&Operation::Matmul, x), matmul),
    call("execute_operation(Add), broadcast", BROADCAST, |x| executed(&Operation::Add, x), sum),
    call("execute_operation(Mul), broadcast", BROADCAST, |x| executed(&Operation::Mul, x), elementwise_product),
    call(
        "execute_operation(MulScalar)",
        CUBE,
        |x| executed(&Operation::MulScalar { value: -1.5 }, x),
        |x| Ok((vec![(&x[0] * -1.5)?], Vec::new())),
    ),
    call(
        "execute_operation(Softmax)",
        CUBE,
        |x| executed(&Operation::Softmax { dim: 1 }, x),
        |x| Ok((vec![softmax(&x[0], 1)?], Vec::new())),
    ),
    call(
        "execute_operation(RMSNorm)",
        CUBE,
        |x| executed(&Operation::RMSNorm { eps: EPS as f32 }, x),
        |x| Ok((vec![rms_norm(&x[0], f64::from(EPS as f32))?], Vec::new())),
    ),
    call(
        "execute_operation(LoRA)",
        LOW_RANK,
        |x| executed(&Operation::LoRA { a: NodeId(1), b: NodeId(2), scale: SCALING }, x),
        lora,
    ),
    Call {
        roundings: 3.0,
        ..call("a graph built by hand and merged", SUM_OF_PRODUCT, |x| done(by_hand(x)?), product_and_sum)
    },
    Call {
        roundings: 3.0,
        ..call(
            "inputs in one graph: add_tensor_to_graph",
            SUM_OF_PRODUCT,
            |x| {
                let a = lazy(&x[0])?;
                let (b, c) = (a.add_tensor_to_graph(x[1].clone())?, a.add_tensor_to_graph(x[2].clone())?);
                done(a.matmul(&b)?.add(&c)?)
            },
            product_and_sum,
        )
    },
    call(
        "LazyTensor::ones and zeros",
        TWO,
        |x| {
            let of = |make: fn(&[usize], DType, &candle_core::Device) -> Result<LazyTensor>| {
                make(x[0].dims(), x[0].dtype(), x[0].device())
            };
            done(lazy(&x[0])?.add(&of(LazyTensor::ones)?)?.add(&lazy(&x[1])?.mul(&of(LazyTensor::zeros)?)?)?)
        },
        // times a tensor: Candle has no gradient of what is multiplied by the number 0
        |x| Ok((vec![((&x[0] + 1.0)? + (&x[1] * x[1].zeros_like()?)?)?], vec![(x[0].abs()? + 1.0)?])),
    ),
    Call {
        roundings: 3.0,
        gradients: false,
        ..call("by_hand.eval_async()", SUM_OF_PRODUCT, |x| Ok(vec![wait(by_hand(x)?.eval_async())?]), product_and_sum)
    },
    Call {
        roundings: 3.0,
        gradients: false,
        ..call(
            "AsyncGraphExecutor::execute_tensor",
            SUM_OF_PRODUCT,
            |x| {
                let mut executor = AsyncGraphExecutor::new(x[0].device().clone().into());
                Ok(vec![wait(executor.execute_tensor(&by_hand(x)?))?])
            },
            product_and_sum,
        )
    },
];
