//! A graph as text: one line per node, stable across runs, made for reading and for golden tests.

use crate::capture::{Bindings, GOp, Graph, LeafKind};
use std::fmt::Write;

/// The graph in relative form. With `bindings`, the values of the sizes follow.
#[must_use]
pub fn dump(graph: &Graph, bindings: Option<&Bindings>) -> String {
    let mut text = String::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        let inputs: Vec<String> = node.inputs.iter().map(|j| format!("%{j}")).collect();
        let dims: Vec<String> = node.dims.iter().map(ToString::to_string).collect();
        let what = match &node.op {
            GOp::Leaf(key) => {
                let kind = match key.kind {
                    LeafKind::Tensor => "tensor",
                    LeafKind::Engine => "buffer",
                    LeafKind::Quantized => "quantised",
                };
                format!("leaf({kind}{})", if key.contiguous { "" } else { ", strided" })
            }
            GOp::Op(op) => op.to_string(),
        };
        let mark = if graph.outputs.contains(&(i as u32)) { " -> out" } else { "" };
        let space = if inputs.is_empty() { "" } else { " " };
        // writing to a String cannot fail
        let _ = writeln!(
            text,
            "%{i} = {what}{space}{} : {} [{}]{mark}",
            inputs.join(", "),
            node.dtype.as_str(),
            dims.join(", ")
        );
    }
    if let Some(bindings) = bindings {
        let sizes: Vec<String> =
            bindings.sizes.iter().enumerate().skip(2).map(|(i, s)| format!("s{} = {s}", i - 2)).collect();
        if !sizes.is_empty() {
            let _ = writeln!(text, "where {}", sizes.join(", "));
        }
    }
    text
}
