//! The intermediate representation alone: record, capture, rewrite, print.

use candle_core::{DType, Device, Tensor};
use candle_lazy_graph::{capture, dump, passes, BinaryOp, BuildSite, CaptureOptions, Node, NodeRef, Op};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let x = Node::leaf(Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?, BuildSite::here());
    let record = |op: Op, inputs: &[&NodeRef]| Node::record(op, &[], inputs, None, BuildSite::here());
    let same = record(Op::Contiguous, &[&x])?;
    let sum = record(Op::Binary(BinaryOp::Add), &[&same, &x])?;
    assert!(record(Op::Matmul, &[&x, &x]).is_err(), "(2, 3) x (2, 3) is refused when it is recorded");
    let captured = capture(&[sum], &CaptureOptions { expand: &|_, _, _| false }).map_err(|e| format!("{e:?}"))?;
    println!("{}", dump::dump(&captured.graph, Some(&captured.bindings)));
    println!("passes: {:?}", passes::PASSES.iter().map(|pass| pass.name).collect::<Vec<_>>());
    Ok(())
}
