//! The graph's own bookkeeping: ids, sizes, merging, what is filled when, and the words of its errors.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::common::{lazy, tensor, values};
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_lazy_compat as metal_candle;
use metal_candle::error::TrainingError;
use metal_candle::graph::{AsyncExecutor, ComputationGraph, LazyTensor, NodeData, NodeId, Operation};
use std::sync::{Arc, RwLock};

const CPU: &Device = &Device::Cpu;

fn line(values: &[f32]) -> LazyTensor {
    LazyTensor::from_slice(values, &[values.len()], CPU).unwrap()
}

#[test]
fn sizes_grow_with_what_is_recorded_and_copied() {
    let (a, b) = (line(&[1., 2.]), line(&[3., 4.]));
    assert_eq!((a.graph_size(), a.node_id()), (1, NodeId(0)));
    let sum = a.add(&b).unwrap();
    assert_eq!((sum.graph_size(), sum.node_id()), (3, NodeId(2)));
    assert_eq!((a.graph_size(), b.graph_size()), (3, 1));
    // the right side is copied again by every call
    assert_eq!(a.mul(&b).unwrap().graph_size(), 5);
    assert_eq!(values(&sum.mul_scalar(2.).unwrap().eval().unwrap()), [8., 12.]);
    let own = a.add_tensor_to_graph(tensor(&[2], 1)).unwrap();
    assert_eq!(a.add(&own).unwrap().graph_size(), 8);
}

#[test]
fn inputs_are_evaluated_at_once_and_others_when_asked() {
    let x = line(&[1., 2.]);
    assert!(x.is_evaluated());
    let held = x.mul_scalar(2.).unwrap();
    let last = held.mul_scalar(3.).unwrap();
    assert!(!held.is_evaluated() && !last.is_evaluated());
    assert_eq!(values(&last.clone().eval().unwrap()), [6., 12.]);
    assert!(held.is_evaluated() && last.is_evaluated());
    assert_eq!(values(&last.eval().unwrap()), [6., 12.]);
    assert_eq!(values(&held.eval().unwrap()), [2., 4.]);
}

#[test]
fn what_nobody_holds_stays_empty_in_the_arena() {
    let mut graph = ComputationGraph::new(Device::Cpu);
    let x = graph.add_input(Tensor::new(&[1f32, 2.], CPU).unwrap());
    let double = graph.add_node(Operation::MulScalar { value: 2. }, vec![x]).unwrap();
    let six = graph.add_node(Operation::MulScalar { value: 3. }, vec![double]).unwrap();
    assert_eq!(graph.topological_order(six).unwrap(), [x, double, six]);
    let graph = Arc::new(RwLock::new(graph));
    let handle = LazyTensor::new(six, Arc::clone(&graph), Shape::from(2), DType::F32, Device::Cpu);
    assert_eq!(values(&handle.eval().unwrap()), [6., 12.]);
    let graph = graph.read().unwrap();
    assert!(matches!(graph.get_node(x).unwrap().data, NodeData::Concrete(_)));
    assert!(matches!(graph.get_node(double).unwrap().data, NodeData::Lazy));
    assert!(graph.get_node(double).unwrap().data.as_tensor().is_err());
    assert_eq!(values(graph.get_node(six).unwrap().data.as_tensor().unwrap()), [6., 12.]);
    assert_eq!((graph.len(), graph.is_empty()), (3, false));
}

#[test]
fn merging_copies_what_is_needed_with_new_ids() {
    let mut left = ComputationGraph::new(Device::Cpu);
    left.add_input(tensor(&[2, 2], 1));
    let mut right = ComputationGraph::new(Device::Cpu);
    let x = right.add_input(tensor(&[2, 3], 2));
    right.add_input(tensor(&[9], 3)); // nobody needs it
    let (a, b) = (right.add_input(tensor(&[3, 1], 4)), right.add_input(tensor(&[1, 3], 5)));
    let lora = right.add_node(Operation::LoRA { a, b, scale: 1. }, vec![x, a, b]).unwrap();
    assert_eq!(left.merge_from(&right, lora), NodeId(4));
    assert_eq!(left.len(), 5);
    let copy = left.get_node(NodeId(4)).unwrap();
    assert_eq!(copy.inputs, [NodeId(1), NodeId(2), NodeId(3)]);
    let Operation::LoRA { a, b, .. } = copy.operation else { panic!("{copy:?}") };
    assert_eq!((a, b), (NodeId(2), NodeId(3)));
    assert_eq!(right.len(), 5);
}

#[test]
fn two_threads_may_join_the_same_graphs_in_either_order() {
    let (a, b) = (line(&[1.]), line(&[2.]));
    std::thread::scope(|scope| {
        for (x, y) in [(&a, &b), (&b, &a)] {
            scope.spawn(move || {
                for _ in 0..50 {
                    assert_eq!(values(&x.add(y).unwrap().eval().unwrap()), [3.]);
                }
            });
        }
    });
}

#[test]
fn a_variable_is_read_when_evaluated_and_gets_its_gradient() {
    let var = Var::new(&[1f32, 2.], CPU).unwrap();
    let square = lazy(var.as_tensor()).mul(&lazy(var.as_tensor())).unwrap();
    var.set(&Tensor::new(&[3f32, 4.], CPU).unwrap()).unwrap();
    let value = square.eval().unwrap();
    assert_eq!(values(&value), [9., 16.]);
    assert_eq!(values(value.sum_all().unwrap().backward().unwrap().get(&var).unwrap()), [6., 8.]);
}

#[test]
fn what_does_not_fit_is_refused_when_recorded() {
    let (two, three) = (line(&[1., 2.]), line(&[1., 2., 3.]));
    for error in [two.add(&three).unwrap_err(), two.mul(&three).unwrap_err()] {
        assert!(error.to_string().contains("Shape mismatch"), "{error}");
    }
    assert!(two.matmul(&two).unwrap_err().to_string().contains("at least 2 dims"));
    let (a, b) = (lazy(&tensor(&[2, 3], 1)), lazy(&tensor(&[2, 3], 2)));
    assert!(a.matmul(&b).unwrap_err().to_string().contains("Shape mismatch"));
    assert_eq!((two.graph_size(), a.graph_size()), (1, 1));
    let zeros = LazyTensor::zeros(&[2, 3], DType::F32, CPU).unwrap();
    assert_eq!(
        values(&LazyTensor::ones(&[2, 3], DType::F32, CPU).unwrap().add(&zeros).unwrap().eval().unwrap()),
        [1.; 6]
    );
}

#[test]
fn batches_of_a_product_broadcast_in_the_recorded_shape_too() {
    let (a, b) = (tensor(&[4, 3], 1), tensor(&[2, 3, 5], 2));
    let product = lazy(&a).matmul(&lazy(&b)).unwrap();
    assert_eq!(product.shape().dims(), [2, 4, 5]);
    assert_eq!(product.eval().unwrap().dims(), [2, 4, 5]);
}

#[test]
fn a_node_that_is_missing_and_a_node_that_was_changed() {
    let mut graph = ComputationGraph::new(Device::Cpu);
    assert!(graph.get_node(NodeId(0)).unwrap_err().contains("not found"));
    assert!(graph.add_node(Operation::Add, vec![NodeId(0), NodeId(1)]).is_err());
    let x = graph.add_input(Tensor::new(&[1f32], CPU).unwrap());
    let y = graph.add_node(Operation::MulScalar { value: 2. }, vec![x]).unwrap();
    graph.get_node_mut(y).unwrap().operation = Operation::MulScalar { value: 5. };
    graph.get_node_mut(x).unwrap().data.clone().take_tensor().unwrap();
    let graph = Arc::new(RwLock::new(graph));
    let handle = |id| LazyTensor::new(id, Arc::clone(&graph), Shape::from(1), DType::F32, Device::Cpu);
    assert_eq!(values(&handle(y).eval().unwrap()), [5.]);
    assert!(matches!(handle(NodeId(9)).eval(), Err(TrainingError::Failed { .. })));
    graph.write().unwrap().get_node_mut(x).unwrap().inputs = vec![y];
    assert!(graph.read().unwrap().topological_order(y).unwrap_err().contains("Cycle"));
}

/// New numbers for a graph that was evaluated: its input is set, what was computed is emptied, and the handles are asked again.
#[test]
fn a_handle_reads_nodes_that_were_changed_since() {
    let mut graph = ComputationGraph::new(Device::Cpu);
    let x = graph.add_input(Tensor::new(&[1f32, 2.], CPU).unwrap());
    let double = graph.add_node(Operation::MulScalar { value: 2. }, vec![x]).unwrap();
    let six = graph.add_node(Operation::MulScalar { value: 3. }, vec![double]).unwrap();
    let graph = Arc::new(RwLock::new(graph));
    let handle = |id| LazyTensor::new(id, Arc::clone(&graph), Shape::from(2), DType::F32, Device::Cpu);
    let (double_handle, six_handle) = (handle(double), handle(six));
    assert_eq!(values(&double_handle.clone().eval().unwrap()), [2., 4.]);
    assert_eq!(values(&six_handle.clone().eval().unwrap()), [6., 12.]);
    {
        let mut graph = graph.write().unwrap();
        graph.get_node_mut(x).unwrap().data = NodeData::Concrete(Tensor::new(&[5f32, 7.], CPU).unwrap());
        graph.get_node_mut(double).unwrap().data = NodeData::Lazy;
        graph.get_node_mut(six).unwrap().data = NodeData::Lazy;
    }
    assert!(!six_handle.is_evaluated());
    let twelve = six_handle.mul_scalar(2.).unwrap();
    assert_eq!(values(&six_handle.clone().eval().unwrap()), [30., 42.]);
    assert_eq!(values(&twelve.eval().unwrap()), [60., 84.]);
    assert_eq!(values(&double_handle.clone().eval().unwrap()), [10., 14.]);
    // what needs a changed node is read anew, even where only the operation in front of it changed
    let later = double_handle.mul_scalar(10.).unwrap();
    {
        let mut graph = graph.write().unwrap();
        let node = graph.get_node_mut(double).unwrap();
        (node.operation, node.data) = (Operation::MulScalar { value: -1. }, NodeData::Lazy);
    }
    assert_eq!(values(&later.eval().unwrap()), [-50., -70.]);
}

#[test]
fn what_another_tensor_waits_for_is_filled_without_a_handle_of_its_own() {
    let graph = Arc::new(RwLock::new(ComputationGraph::new(Device::Cpu)));
    let x = graph.write().unwrap().add_input(Tensor::new(&[1f32, 2.], CPU).unwrap());
    let x = LazyTensor::new(x, Arc::clone(&graph), Shape::from(2), DType::F32, Device::Cpu);
    let double = x.mul_scalar(2.).unwrap();
    let (six, ten) = (double.mul_scalar(3.).unwrap(), double.mul_scalar(5.).unwrap());
    let id = double.node_id();
    drop(double);
    assert_eq!(values(&six.eval().unwrap()), [6., 12.]);
    // the other one still needs it
    let held = graph.read().unwrap().get_node(id).unwrap().data.as_tensor().cloned();
    assert_eq!(values(&held.unwrap()), [2., 4.]);
    assert_eq!(values(&ten.eval().unwrap()), [10., 20.]);
}

#[test]
fn names_shapes_and_dtypes_of_operations() {
    let ops = [
        (Operation::Input, "input"),
        (Operation::Matmul, "matmul"),
        (Operation::Add, "add"),
        (Operation::Mul, "mul"),
        (Operation::MulScalar { value: 1. }, "mul_scalar"),
        (Operation::LoRA { a: NodeId(0), b: NodeId(1), scale: 1. }, "lora"),
        (Operation::Softmax { dim: 0 }, "softmax"),
        (Operation::RMSNorm { eps: 0. }, "rms_norm"),
    ];
    for (op, name) in ops {
        assert_eq!(op.name(), name);
    }
    assert_eq!(Operation::Add.output_dtype(&[DType::F16, DType::F32]), DType::F16);
    let shape = Shape::from((2, 3));
    assert_eq!(Operation::Softmax { dim: 1 }.output_shape(&[&shape]).unwrap(), shape);
    assert!(Operation::Softmax { dim: 2 }.output_shape(&[&shape]).is_err());
}

#[test]
fn the_executor_broadcasts_and_says_what_is_missing() {
    let mut executor = AsyncExecutor::new(Device::Cpu).unwrap();
    let printed = format!("{executor:?}");
    assert!(printed.contains("AsyncExecutor") && printed.contains("device"));
    let (column, row) =
        (Tensor::new(&[[1f32], [2.], [3.]], CPU).unwrap(), Tensor::new(&[10f32, 20., 30.], CPU).unwrap());
    let sum = executor.execute_operation(&Operation::Add, &[column, row]).unwrap();
    assert_eq!(sum.to_vec2::<f32>().unwrap(), [[11., 21., 31.], [12., 22., 32.], [13., 23., 33.]]);
    let said = [
        (Operation::Input, "Cannot execute Input operation"),
        (Operation::Matmul, "Matmul requires 2 inputs"),
        (Operation::Add, "Add requires 2 inputs"),
        (Operation::Mul, "Mul requires 2 inputs"),
        (Operation::MulScalar { value: 1. }, "MulScalar requires 1 input"),
        (Operation::Softmax { dim: 0 }, "Softmax requires 1 input"),
        (Operation::RMSNorm { eps: 0. }, "RMSNorm requires 1 input"),
        (Operation::LoRA { a: NodeId(0), b: NodeId(1), scale: 1. }, "LoRA requires 3 inputs"),
    ];
    for (operation, words) in said {
        let error = executor.execute_operation(&operation, &[]).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    executor.synchronize().unwrap();
}

#[cfg(feature = "async-exec")]
#[tokio::test]
async fn asynchronous_code_gets_the_same_values() {
    use metal_candle::graph::AsyncGraphExecutor;
    // as a task of a runtime with several threads would have to be
    fn sent<T: Send>(future: T) -> T {
        future
    }
    let double = line(&[1., 2.]).mul_scalar(2.).unwrap();
    assert_eq!(values(&sent(double.eval_async()).await.unwrap()), [2., 4.]);
    let mut executor = AsyncGraphExecutor::new(metal_candle::Device::new_cpu());
    let six = double.mul_scalar(3.).unwrap();
    assert_eq!(values(&sent(executor.execute_tensor(&six)).await.unwrap()), [6., 12.]);
    assert!(format!("{:?}", executor.sync_executor()).contains("AsyncExecutor"));
}
