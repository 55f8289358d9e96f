//! Recording without history.

use std::cell::Cell;
use std::marker::PhantomData;

thread_local! {
    static OFF: Cell<bool> = const { Cell::new(false) };
}

/// A scope without gradients: see [`without_grad`]. The state from before comes back with its end, also where that is a panic.
#[derive(Debug)]
pub struct WithoutGrad {
    before: bool,
    /// It belongs to the thread that made it.
    _here: PhantomData<*const ()>,
}

impl Drop for WithoutGrad {
    fn drop(&mut self) {
        OFF.set(self.before);
    }
}

/// Until the result is dropped, what this thread records keeps no history, and variables count as constants. Scopes nest, and end in the
/// order opposite to that of their beginnings.
#[must_use]
pub fn without_grad() -> WithoutGrad {
    WithoutGrad { before: OFF.replace(true), _here: PhantomData }
}

/// Calls `f` in such a scope. Inside of a closure, what is recorded has the closure's line.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    let _scope = without_grad();
    f()
}

/// Whether what this thread records now keeps the history that gradients need.
#[inline]
#[must_use]
pub fn is_grad_enabled() -> bool {
    !OFF.get()
}
