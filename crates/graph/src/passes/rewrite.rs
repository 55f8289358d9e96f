//! The consing builder that every rewrite goes through.

use crate::capture::{GNode, Graph};
use crate::hash::{FastHasher, FastMap};
use smallvec::SmallVec;
use std::hash::{Hash, Hasher};

/// Builds a new graph node by node; equal nodes are added once.
#[derive(Debug, Default)]
pub struct Rewriter {
    graph: Graph,
    cons: FastMap<u64, SmallVec<[u32; 1]>>,
    merged: usize,
}

impl Rewriter {
    /// Adds `node`, whose inputs are indices of the new graph, or finds an equal one.
    pub fn add(&mut self, node: GNode, origin: u32) -> u32 {
        let mut hasher = FastHasher::default();
        node.hash(&mut hasher);
        let bucket = self.cons.entry(hasher.finish()).or_default();
        // a leaf is its own identity: two leaves of one shape are not the same data
        if node.op().is_some() {
            for &id in bucket.iter() {
                if self.graph.nodes[id as usize] == node {
                    self.merged += 1;
                    return id;
                }
            }
        }
        let id = self.graph.nodes.len() as u32;
        self.graph.nodes.push(node);
        self.graph.origins.push(origin);
        bucket.push(id);
        id
    }

    /// The node at `id` of the graph being built.
    #[must_use]
    pub fn node(&self, id: u32) -> &GNode {
        &self.graph.nodes[id as usize]
    }

    /// How many nodes were found equal to earlier ones.
    #[must_use]
    pub fn merged(&self) -> usize {
        self.merged
    }
}

/// Rebuilds `graph`: `each` gets every node with its inputs already mapped, adds what it wants and returns the index that
/// stands for the node.
pub(super) fn rewrite(graph: Graph, mut each: impl FnMut(&mut Rewriter, GNode, u32) -> u32) -> (Graph, Rewriter) {
    let count = graph.nodes.len();
    let mut rewriter = Rewriter::default();
    rewriter.graph.nodes.reserve(count);
    rewriter.graph.origins.reserve(count);
    rewriter.cons.reserve(count);
    let mut map: Vec<u32> = Vec::with_capacity(count);
    for (i, mut node) in graph.nodes.into_iter().enumerate() {
        for input in &mut node.inputs {
            *input = map[*input as usize];
        }
        let origin = graph.origins.get(i).copied().unwrap_or(i as u32);
        let id = each(&mut rewriter, node, origin);
        map.push(id);
    }
    let mut result = std::mem::take(&mut rewriter.graph);
    result.outputs = graph.outputs.iter().map(|&o| map[o as usize]).collect();
    result.devices = graph.devices;
    (result, rewriter)
}
