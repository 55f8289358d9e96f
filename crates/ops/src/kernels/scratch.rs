//! Memory that a thread keeps for its kernels: packed operands.

use std::cell::Cell;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// Numbers in a cache line.
const LINE: usize = LINE_BYTES / size_of::<f32>();
/// No more numbers than these are kept: two MiB, enough for the panels of all but very long rows.
const MOST: usize = 1 << 19;

/// So many kernels within one another find memory: copies of x, a product in parts, and what follows it element by element.
const DEPTH: usize = 3;

thread_local! {
    static KEPT: [Cell<Vec<f32>>; DEPTH] = const { [const { Cell::new(Vec::new()) }; DEPTH] };
    /// How many kernels of this thread have memory at the moment.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// Calls `f` with `len` numbers that start on a cache line; they hold what the last kernel left there. The thread keeps the memory up
/// to two MiB at each depth: new pages for each call cost more than many a product.
pub(crate) fn with<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    /// A kernel that panics has no memory any more either.
    struct Inside(usize);
    impl Drop for Inside {
        fn drop(&mut self) {
            INSIDE.set(self.0);
        }
    }
    let inside = Inside(INSIDE.get());
    INSIDE.set(inside.0 + 1);
    // deeper ones take their own, which goes with them
    let mut store = KEPT.with(|kept| kept.get(inside.0).map(Cell::take)).unwrap_or_default();
    if store.len() < len + LINE {
        // the old memory goes before the new one comes
        drop(store);
        store = vec![0.0; len + LINE];
    }
    let result = f(on_line(&mut store, len));
    if store.len() <= MOST {
        KEPT.with(|kept| kept.get(inside.0).map(|kept| kept.set(store)));
    }
    result
}

/// `len` numbers of `store` that start on a cache line; it has a line more than these.
pub(crate) fn on_line<T>(store: &mut [T], len: usize) -> &mut [T] {
    let skip = store.as_ptr().align_offset(LINE_BYTES).min(store.len() - len);
    &mut store[skip..skip + len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_two_mib_are_kept() {
        with(2 * MOST, |all| assert_eq!(all.len(), 2 * MOST));
        with(10, |_| ());
        let kept = KEPT.with(|kept| kept[0].take()).len();
        assert!((10..=MOST).contains(&kept), "{kept}");
    }

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
