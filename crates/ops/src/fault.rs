//! Faults that the checker must catch: named places where the code goes wrong when told to.
//!
//! With the feature `testing` one fault at a time can be injected into the process; `cargo xtask verify --mutants` injects each
//! and expects the matrix to fail. Without the feature [`active`] is the constant `false`, and nothing of this is left in the
//! code. A hook stands outside of inner loops, so that the feature costs one atomic load per call.

#[cfg(feature = "testing")]
mod injected {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

    static ON: AtomicBool = AtomicBool::new(false);
    static REACHED: AtomicU64 = AtomicU64::new(0);
    static NAME: RwLock<String> = RwLock::new(String::new());
    static TURN: Mutex<()> = Mutex::new(());
    static SPOILED: AtomicBool = AtomicBool::new(false);

    /// Whether memory for results is filled with numbers that are none before a kernel gets it.
    #[inline]
    #[must_use]
    pub fn spoiled() -> bool {
        SPOILED.load(Ordering::Relaxed)
    }

    /// From now on memory for results is spoiled before a kernel gets it: what a kernel leaves out does not look right because an
    /// earlier run wrote the right numbers there.
    pub fn spoil_memory() {
        SPOILED.store(true, Ordering::Relaxed);
    }

    /// A fault that is active until this is dropped. There is one per process: a second injection waits for the first.
    #[derive(Debug)]
    pub struct Injected {
        _turn: MutexGuard<'static, ()>,
    }

    impl Injected {
        /// How often the faulty place was reached since the injection.
        #[must_use]
        pub fn reached(&self) -> u64 {
            REACHED.load(Ordering::Relaxed)
        }
    }

    impl Drop for Injected {
        fn drop(&mut self) {
            ON.store(false, Ordering::SeqCst);
        }
    }

    /// Injects the fault `name` until the result is dropped.
    #[must_use]
    pub fn inject(name: &str) -> Injected {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        name.clone_into(&mut NAME.write().unwrap_or_else(PoisonError::into_inner));
        REACHED.store(0, Ordering::Relaxed);
        ON.store(true, Ordering::SeqCst);
        Injected { _turn: turn }
    }

    /// Whether any fault is active.
    #[inline]
    #[must_use]
    pub fn any() -> bool {
        ON.load(Ordering::Relaxed)
    }

    /// Whether the fault `name` is active.
    #[inline]
    #[must_use]
    pub fn active(name: &str) -> bool {
        any() && is(name)
    }

    /// Whether no fault is active but one of these, whose places are elsewhere: asking does not count as reaching them.
    #[inline]
    #[must_use]
    pub fn none_but(names: &[&str]) -> bool {
        !any() || names.contains(&NAME.read().unwrap_or_else(PoisonError::into_inner).as_str())
    }

    #[cold]
    fn is(name: &str) -> bool {
        let same = *NAME.read().unwrap_or_else(PoisonError::into_inner) == name;
        if same {
            REACHED.fetch_add(1, Ordering::Relaxed);
        }
        same
    }
}

#[cfg(feature = "testing")]
pub use injected::{active, any, inject, none_but, spoil_memory, spoiled, Injected};

/// Whether no fault is active but one of these: always without the feature `testing`.
#[cfg(not(feature = "testing"))]
#[inline(always)]
#[must_use]
pub fn none_but(_: &[&str]) -> bool {
    true
}

/// Whether any fault is active: never without the feature `testing`.
#[cfg(not(feature = "testing"))]
#[inline(always)]
#[must_use]
pub const fn any() -> bool {
    false
}

/// Whether memory for results is spoiled before a kernel gets it: never without the feature `testing`.
#[cfg(not(feature = "testing"))]
#[inline(always)]
#[must_use]
pub const fn spoiled() -> bool {
    false
}

/// Whether the fault `name` is active: never without the feature `testing`.
#[cfg(not(feature = "testing"))]
#[inline(always)]
#[must_use]
pub const fn active(_name: &str) -> bool {
    false
}

/// 1 where the fault `name` is active, else 0: for sizes and indices that are off by one.
#[inline]
#[must_use]
pub fn one_if(name: &str) -> usize {
    usize::from(active(name))
}

/// Moves a number by a thousandth of itself, or of one where it is zero.
pub(crate) fn nudged<T: crate::math::Real>(x: T) -> T {
    let by = T::from_f64(1e-3);
    if x == T::ZERO {
        by
    } else {
        x + x * by
    }
}
