//! Recording without history.

use std::cell::Cell;

thread_local! {
    static OFF: Cell<bool> = const { Cell::new(false) };
}

/// Puts the state back, also where the scope is left by a panic.
struct Restore(bool);

impl Drop for Restore {
    fn drop(&mut self) {
        OFF.set(self.0);
    }
}

/// Calls `f`; what this thread records meanwhile keeps no history, and variables count as constants. Scopes nest.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    let _restore = Restore(OFF.replace(true));
    f()
}

/// Whether what this thread records now keeps the history that gradients need.
#[must_use]
pub fn is_grad_enabled() -> bool {
    !OFF.get()
}
