//! Where an operation was written: the user's source line and the module path.

use std::cell::RefCell;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;

/// The place that recorded a node: the user's `file:line:column` and, when a module recorded it, the module's path
/// (`model.layers.3.self_attn.q_proj`).
#[derive(Clone, Debug)]
pub struct BuildSite {
    location: &'static Location<'static>,
    module: Option<Arc<str>>,
}

impl BuildSite {
    /// The caller's line, and the module path of the scopes that are open on this thread.
    #[track_caller]
    #[must_use]
    pub fn here() -> Self {
        Self { location: Location::caller(), module: current_module() }
    }

    /// The caller's line, in no module.
    #[track_caller]
    pub(crate) fn bare() -> Self {
        Self { location: Location::caller(), module: None }
    }

    /// The source location.
    #[must_use]
    pub fn location(&self) -> &'static Location<'static> {
        self.location
    }

    /// The module path, if a module recorded the node.
    #[must_use]
    pub fn module(&self) -> Option<&str> {
        self.module.as_deref()
    }
}

impl fmt::Display for BuildSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.location.file(), self.location.line(), self.location.column())?;
        match &self.module {
            Some(module) => write!(f, " (in {module})"),
            None => Ok(()),
        }
    }
}

thread_local! {
    static SCOPES: RefCell<Vec<Arc<str>>> = const { RefCell::new(Vec::new()) };
}

fn current_module() -> Option<Arc<str>> {
    SCOPES.with(|scopes| scopes.borrow().last().cloned())
}

/// Adds `segment` to the module path of every node recorded on this thread until the guard is dropped.
///
/// An empty segment adds nothing. Guards must be dropped in reverse order, which scopes do by themselves.
#[must_use = "the path segment is removed when the guard is dropped"]
pub fn module_scope(segment: &str) -> ModuleScope {
    if segment.is_empty() {
        return ModuleScope { pushed: false, _not_send: std::marker::PhantomData };
    }
    SCOPES.with(|scopes| {
        let mut scopes = scopes.borrow_mut();
        let path: Arc<str> = match scopes.last() {
            Some(parent) => format!("{parent}.{segment}").into(),
            None => segment.into(),
        };
        scopes.push(path);
    });
    ModuleScope { pushed: true, _not_send: std::marker::PhantomData }
}

/// The guard of [`module_scope`].
#[derive(Debug)]
pub struct ModuleScope {
    pushed: bool,
    // the stack belongs to one thread, so the guard must not leave it
    _not_send: std::marker::PhantomData<*const ()>,
}

impl Drop for ModuleScope {
    fn drop(&mut self) {
        if self.pushed {
            SCOPES.with(|scopes| {
                scopes.borrow_mut().pop();
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_this_line() {
        let line = line!() + 1;
        let site = BuildSite::here();
        assert_eq!(site.location().line(), line);
        assert!(site.to_string().contains("site.rs"), "{site}");
        assert_eq!(site.module(), None);
    }

    #[test]
    fn scopes_nest_and_close() {
        let outer = module_scope("model");
        {
            let _inner = module_scope("layers.3");
            let _empty = module_scope("");
            assert_eq!(BuildSite::here().module(), Some("model.layers.3"));
            assert!(BuildSite::here().to_string().ends_with("(in model.layers.3)"));
        }
        assert_eq!(BuildSite::here().module(), Some("model"));
        drop(outer);
        assert_eq!(BuildSite::here().module(), None);
    }
}
