//! Checks that a graph still means something: run on every graph that capture or a pass gives, in debug builds, in tests
//! and in `verify`.

use crate::capture::{Bindings, GOp, Graph};
use crate::error::{Error, ErrorKind, Result};
use crate::infer::{infer, Meta};
use crate::op::{Dims, Op};
use smallvec::SmallVec;

/// Checks topological order, indices, and that inference at the sizes of `bindings` agrees with every recorded shape and dtype.
///
/// # Errors
/// The first disagreement, naming the op.
pub fn validate(graph: &Graph, bindings: &Bindings) -> Result<()> {
    let concrete: Vec<Dims> = graph.nodes.iter().map(|n| bindings.dims(&n.dims)).collect();
    for (i, node) in graph.nodes.iter().enumerate() {
        let name = node.op().map_or("leaf", |op| op.name());
        let fail = |detail: String| Err(Error::new(name, ErrorKind::Invalid(format!("node %{i}: {detail}"))));
        if node.inputs.iter().any(|&input| input as usize >= i) {
            return fail("an input comes after its user".into());
        }
        if node.params.iter().any(|&p| p as usize >= bindings.params.len()) {
            return fail("a scalar has no value".into());
        }
        if node.dims.iter().any(|s| s.index() >= bindings.sizes.len()) {
            return fail("a size has no value".into());
        }
        let GOp::Op(op) = &node.op else { continue };
        if op.scalar_count() != node.params.len() {
            return fail(format!("{} scalars instead of {}", node.params.len(), op.scalar_count()));
        }
        let moves = *op == Op::ToDevice;
        if !moves && node.inputs.iter().any(|&input| graph.nodes[input as usize].device != node.device) {
            return fail("an input is on another device".into());
        }
        let metas: SmallVec<[Meta<'_>; 4]> = node
            .inputs
            .iter()
            .map(|&j| Meta { dims: &concrete[j as usize], dtype: graph.nodes[j as usize].dtype })
            .collect();
        let meta = infer(&op.map_sizes(|s| bindings.size(*s)), &metas)?;
        if meta.dims != concrete[i] || meta.dtype != node.dtype {
            return fail(format!(
                "inference says {} {:?}, the graph {} {:?}",
                meta.dtype.as_str(),
                meta.dims.as_slice(),
                node.dtype.as_str(),
                concrete[i].as_slice()
            ));
        }
    }
    match graph.outputs.iter().find(|&&o| o as usize >= graph.nodes.len()) {
        Some(o) => Err(Error::new("output", ErrorKind::Invalid(format!("node %{o} does not exist")))),
        None => Ok(()),
    }
}
