//! Rewrites: pure functions from graph to graph, in one ordered list.
//!
//! A pass sees symbols, never sizes, and never adds a size that the graph does not have: a rewritten graph therefore
//! holds for every binding of the same key. After each pass the graph can be validated; a failure names the pass.

mod cse;
mod dce;
mod noop_views;
mod rewrite;
mod split_bias;

pub use rewrite::Rewriter;

use crate::capture::{Bindings, Graph};
use crate::error::{Error, ErrorKind, Result};
use crate::op::Exactness;
use crate::validate::validate;

/// A rewritten graph and how often the rewrite applied.
#[derive(Debug)]
pub struct Rewritten {
    /// The new graph.
    pub graph: Graph,
    /// How many places changed.
    pub hits: usize,
}

/// A pass and what is known of it.
#[derive(Clone, Copy)]
pub struct Pass {
    /// The name in reports and errors.
    pub name: &'static str,
    /// Whether results may change in their last bits.
    pub exactness: Exactness,
    /// The rewrite.
    pub run: fn(Graph) -> Rewritten,
}

impl std::fmt::Debug for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pass").field("name", &self.name).field("exactness", &self.exactness).finish_non_exhaustive()
    }
}

/// Every pass, in the order in which they run.
pub const PASSES: &[Pass] = &[
    // First: a bias becomes an ordinary addition, which later passes and the fusion of row programs can see.
    Pass { name: "split_bias", exactness: Exactness::Exact, run: split_bias::run },
    // Before merging: two chains that differ only in views that do nothing become equal.
    Pass { name: "noop_views", exactness: Exactness::Exact, run: noop_views::run },
    // After the rewrites: what they made equal is merged (capture merged what was recorded equal).
    Pass { name: "cse", exactness: Exactness::Exact, run: cse::run },
    // Last: what nobody uses any more goes.
    Pass { name: "dce", exactness: Exactness::Exact, run: dce::run },
];

/// The hits of each pass that ran, by name.
pub type Hits = Vec<(&'static str, usize)>;

/// Runs the passes for which `enabled` is true. With `check`, validates the graph after each at the sizes of the bindings.
///
/// # Errors
/// When a pass broke the graph; the error names the pass.
pub fn run_passes(graph: Graph, enabled: impl Fn(&Pass) -> bool, check: Option<&Bindings>) -> Result<(Graph, Hits)> {
    run_these(graph, PASSES.iter().filter(|p| enabled(p)).copied(), check)
}

/// Runs the passes given, in the order given, as [`run_passes`] does.
///
/// # Errors
/// When a pass broke the graph; the error names the pass.
pub fn run_these(
    graph: Graph,
    passes: impl IntoIterator<Item = Pass>,
    check: Option<&Bindings>,
) -> Result<(Graph, Hits)> {
    let mut current = graph;
    let mut hits = Hits::new();
    for pass in passes {
        let rewritten = (pass.run)(current);
        if let Some(bindings) = check {
            validate(&rewritten.graph, bindings)
                .map_err(|e| Error::new(pass.name, ErrorKind::Invalid(format!("pass {}: {e}", pass.name))))?;
        }
        hits.push((pass.name, rewritten.hits));
        current = rewritten.graph;
    }
    Ok((current, hits))
}

#[cfg(test)]
mod tests;
