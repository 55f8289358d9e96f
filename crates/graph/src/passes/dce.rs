//! Dead code: nodes from which no output can be reached are removed, except leaves, whose order is the plan's interface.

use super::Rewritten;
use crate::capture::Graph;

pub(super) fn run(graph: Graph) -> Rewritten {
    let count = graph.nodes.len();
    let mut live = vec![false; graph.nodes.len()];
    for &output in &graph.outputs {
        live[output as usize] = true;
    }
    for i in (0..graph.nodes.len()).rev() {
        if live[i] {
            for &input in &graph.nodes[i].inputs {
                live[input as usize] = true;
            }
        }
    }
    let mut map = vec![u32::MAX; count];
    let mut result = Graph { devices: graph.devices, ..Graph::default() };
    result.nodes.reserve(count);
    result.origins.reserve(count);
    for (i, mut node) in graph.nodes.into_iter().enumerate() {
        if !live[i] && node.op().is_some() {
            continue;
        }
        map[i] = result.nodes.len() as u32;
        for input in &mut node.inputs {
            *input = map[*input as usize];
        }
        result.nodes.push(node);
        result.origins.push(graph.origins.get(i).copied().unwrap_or(i as u32));
    }
    result.outputs = graph.outputs.iter().map(|&o| map[o as usize]).collect();
    let hits = count - result.nodes.len();
    Rewritten { graph: result, hits }
}
