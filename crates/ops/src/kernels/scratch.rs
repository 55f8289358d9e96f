//! Memory that a thread keeps for its kernels: packed operands.

use std::cell::Cell;

/// Numbers in a cache line.
const LINE: usize = 16;

thread_local! {
    static KEPT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with `len` numbers that start on a cache line; they hold what the last kernel left there. The thread keeps the memory:
/// new pages for each call cost more than many a product.
pub(crate) fn with<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // a kernel within a kernel finds none and takes its own, which then replaces the outer one or is replaced by it
    let mut store = KEPT.take();
    if store.len() < len + LINE {
        store.resize(len + LINE, 0.0);
    }
    let skip = store.as_ptr().align_offset(size_of::<f32>() * LINE).min(LINE);
    let result = f(&mut store[skip..skip + len]);
    KEPT.set(store);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_line_and_nests() {
        for len in [0, 1, 1000, 3] {
            with(len, |outer| {
                outer.fill(1.0);
                with(2 * len, |inner| {
                    assert_eq!((inner.len(), inner.as_ptr() as usize % 64), (2 * len, 0));
                    inner.fill(2.0);
                });
                assert_eq!((outer.len(), outer.as_ptr() as usize % 64), (len, 0));
                assert!(outer.iter().all(|&x| x == 1.0));
            });
        }
    }
}
