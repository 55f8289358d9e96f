//! Errors of a running plan: which recorded op failed, on what, and the line that wrote it.

use crate::error::{Error, Member};
use crate::plan::{Plan, Step};
use candle_lazy_graph::node::Look;
use candle_lazy_graph::{describe, Bindings, BuildSite, Meta, Node};

/// What an error says about a step.
struct Place {
    op: &'static str,
    operands: String,
    site: Box<BuildSite>,
    members: Vec<Member>,
}

/// The name of the recorded op and what it was applied to; a composite whose parts run is named itself, not its part.
pub(super) fn described(node: &Node) -> Option<(&'static str, String)> {
    let Look::Pending(expr) = node.look() else {
        return None;
    };
    let metas: Vec<Meta<'_>> = expr.inputs.iter().map(|n| n.meta()).collect();
    Some((expr.op.name(), describe(&metas)))
}

fn place(step: &Step, bindings: &Bindings) -> Option<Place> {
    let node = bindings.recorded(step.origin)?;
    let (op, operands) = match described(&node) {
        Some((op, operands)) if operands.is_empty() => (op, operands),
        Some((op, operands)) => (op, format!("({operands})")),
        None => (step.ops.last().copied().unwrap_or("step"), String::new()),
    };
    let mut members = Vec::new();
    if step.origins.len() > 1 {
        for (&op, &origin) in step.ops.iter().zip(&step.origins) {
            if let Some(node) = bindings.recorded(origin) {
                members.push(Member { op, site: node.site().clone() });
            }
        }
    }
    Some(Place { op, operands, site: Box::new(node.site().clone()), members })
}

/// The error of step `i`, with the op and the user's line.
pub(super) fn located(plan: &Plan, i: usize, bindings: &Bindings, error: Error) -> Error {
    let (Error::Candle(_) | Error::Other(_) | Error::Internal(_) | Error::Memory { .. } | Error::Budget { .. }) =
        &error
    else {
        return error;
    };
    let Some(Place { op, operands, site, members }) = plan.steps.get(i).and_then(|step| place(step, bindings)) else {
        return error;
    };
    let source: Box<dyn std::error::Error + Send + Sync> = match error {
        Error::Candle(error) => Box::new(crate::error::bare(error)),
        Error::Other(error) => error,
        other => Box::new(other),
    };
    Error::Run { op, operands, site, members, source }
}

/// The error of a panic in step `i`.
pub(super) fn panicked(plan: &Plan, i: usize, bindings: &Bindings, panic: &(dyn std::any::Any + Send)) -> Error {
    let message = message_of(panic);
    match plan.steps.get(i).and_then(|step| place(step, bindings)) {
        Some(Place { op, operands, site, members }) => Error::Panic { op, operands, site, members, message },
        None => Error::Internal(format!("a kernel panicked: {message}")),
    }
}

/// What a panic said.
pub(crate) fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into())
}
