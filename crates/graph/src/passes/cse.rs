//! Common subexpressions: equal ops on equal inputs with the same scalars become one node.
//!
//! Scalars are compared as parameters, not as numbers: a plan must hold for every value they take.

use super::rewrite::rewrite;
use super::Rewritten;
use crate::capture::Graph;

pub(super) fn run(graph: Graph) -> Rewritten {
    let (graph, rewriter) = rewrite(graph, |r, node, origin| r.add(node, origin));
    Rewritten { graph, hits: rewriter.merged() }
}
