//! What would be computed twice if a part of a graph were evaluated by itself.

use super::{Node, NodeId};
use crate::hash::FastMap;
use crate::op::OpClass;
use std::sync::Arc;

impl Node {
    /// The pending nodes above this one that something outside of its own graph refers to, a handle or a node that is not above: if only
    /// this one were computed, they would be computed again. Of a view that is what it is a view of; what is made from nothing is left
    /// out.
    #[must_use]
    pub fn shared_above(self: &Arc<Self>) -> Vec<Arc<Node>> {
        let mut numbers: FastMap<NodeId, usize> = FastMap::default();
        // with how many references come from here
        let mut above: Vec<(Arc<Node>, usize)> = vec![(self.clone(), 0)];
        let mut next = 0;
        while let Some((node, _)) = above.get(next) {
            for input in node.inputs() {
                match numbers.get(&input.id) {
                    Some(&number) => above[number].1 += 1,
                    None if input.is_pending() => {
                        numbers.insert(input.id, above.len());
                        above.push((input, 1));
                    }
                    None => {}
                }
            }
            next += 1;
        }
        let mut kept: FastMap<NodeId, ()> = FastMap::default();
        kept.insert(self.id, ());
        let mut shared = Vec::new();
        // one more is held here
        for (node, _) in above.iter().skip(1).filter(|(node, inner)| Arc::strong_count(node) > inner + 1) {
            let mut base = node.clone();
            while base.recorded.as_ref().is_some_and(|(op, _)| op.class() == OpClass::View) {
                match base.inputs().into_iter().next() {
                    Some(input) => base = input,
                    None => break,
                }
            }
            let made = base.recorded.as_ref().is_some_and(|(op, _)| op.class() != OpClass::Source);
            if made && base.is_pending() && kept.insert(base.id, ()).is_none() {
                shared.push(base);
            }
        }
        shared
    }
}
