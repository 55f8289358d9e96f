//! An output matrix whose columns can be shared among threads.

use crate::error::{Error, Result};
use std::marker::PhantomData;

/// `rows × cols` numbers, rows `pitch` apart. Two grids made by [`Grid::split_cols`] interleave in memory but share no
/// number, nor do those of [`Grid::split_rows`].
#[derive(Debug)]
pub(crate) struct Grid<'a, T = f32> {
    data: *mut T,
    rows: usize,
    cols: usize,
    pitch: usize,
    own: PhantomData<&'a mut [T]>,
}

// SAFETY: a grid is the only way to its numbers, as a `&mut [T]` would be: `new` borrows the slice for `'a`, and `split_cols`
// and `split_rows` consume the grid that they share out.
unsafe impl<T: Send> Send for Grid<'_, T> {}

impl<'a, T: Copy> Grid<'a, T> {
    /// The grid at the start of `data`.
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize, pitch: usize) -> Result<Self> {
        let end = rows.checked_sub(1).map_or(Some(0), |last| last.checked_mul(pitch)?.checked_add(cols));
        if cols > pitch || end.is_none_or(|end| end > data.len()) {
            return Err(Error::shape("matmul", format!("{rows} x {cols}, rows {pitch} apart, in {}", data.len())));
        }
        Ok(Self { data: data.as_mut_ptr(), rows, cols, pitch, own: PhantomData })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The same grid while this one waits.
    pub(crate) fn borrow(&mut self) -> Grid<'_, T> {
        Grid { own: PhantomData, ..*self }
    }

    /// The columns before `at`, and the others.
    pub(crate) fn split_cols(self, at: usize) -> (Grid<'a, T>, Grid<'a, T>) {
        let at = at.min(self.cols);
        // SAFETY: column `at` of the first row is within the data, or one behind its end where there is no such column; without
        // rows the pointer is never followed.
        let right = if self.rows == 0 { self.data } else { unsafe { self.data.add(at) } };
        (
            Grid { cols: at, own: PhantomData, ..self },
            Grid { data: right, cols: self.cols - at, own: PhantomData, ..self },
        )
    }

    /// The rows before `at`, and the others.
    pub(crate) fn split_rows(self, at: usize) -> (Grid<'a, T>, Grid<'a, T>) {
        let at = at.min(self.rows);
        // SAFETY: row `at` begins within the data, or there is none; then the pointer is never followed.
        let below = if at == self.rows { self.data } else { unsafe { self.data.add(at * self.pitch) } };
        (
            Grid { rows: at, own: PhantomData, ..self },
            Grid { data: below, rows: self.rows - at, own: PhantomData, ..self },
        )
    }

    /// Writes numbers from row `i`, column `j` on, as many as the row has room for.
    #[inline(always)]
    pub(crate) fn put(&mut self, i: usize, j: usize, numbers: &[T]) {
        if i >= self.rows || j >= self.cols {
            return;
        }
        let n = numbers.len().min(self.cols - j);
        // four in one move: a run of any length is a call
        if let (4, Ok(four)) = (n, <&[T; 4]>::try_from(numbers)) {
            // SAFETY: as below.
            return unsafe { self.data.add(i * self.pitch + j).cast::<[T; 4]>().write_unaligned(*four) };
        }
        // SAFETY: row `i` and columns `j..j + n` are within the grid, which `new` showed to be within its data; nothing else can
        // reach them, and `numbers` is not among them, being another borrow.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), self.data.add(i * self.pitch + j), n) }
    }

    /// Columns `from..from + count` of all rows, where they lie behind one another: of a single row, or where that is all there is.
    pub(crate) fn run(&mut self, from: usize, count: usize) -> Option<&mut [T]> {
        let within = from.checked_add(count).is_some_and(|end| end <= self.cols);
        let whole = from == 0 && count == self.cols && self.cols == self.pitch;
        if !within || self.rows == 0 || self.rows > 1 && !whole {
            return None;
        }
        // SAFETY: the columns are within the first row, or they are all columns of rows without gaps; `new` showed either to be within the
        // data, which nothing else can reach while this grid is borrowed.
        Some(unsafe { std::slice::from_raw_parts_mut(self.data.add(from), self.rows * count) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_write_their_own_columns_and_nothing_else() {
        let mut data = [0f32; 11];
        let (mut left, mut right) = Grid::new(&mut data, 3, 3, 4).unwrap().split_cols(1);
        assert_eq!((left.cols(), right.cols()), (1, 2));
        left.put(0, 0, &[1.0, 9.0]);
        left.put(2, 0, &[3.0]);
        left.put(3, 0, &[9.0]);
        left.put(0, 1, &[9.0]);
        right.put(0, 0, &[4.0, 5.0, 9.0]);
        right.put(2, 1, &[6.0]);
        assert_eq!(data, [1.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 6.0]);
    }

    #[test]
    fn parts_by_rows_write_their_own() {
        let mut data = [0f32; 11];
        let (mut above, mut below) = Grid::new(&mut data, 3, 3, 4).unwrap().split_rows(1);
        assert_eq!((above.rows(), below.rows()), (1, 2));
        above.put(0, 0, &[1.0]);
        above.put(1, 0, &[9.0]);
        below.put(0, 0, &[2.0]);
        below.put(1, 2, &[3.0, 9.0]);
        let (all, mut none) = below.split_rows(9);
        none.put(0, 0, &[9.0]);
        assert_eq!((all.rows(), none.rows()), (2, 0));
        assert_eq!(data, [1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]);
    }

    #[test]
    fn runs_are_what_lies_together() {
        let mut data = [0u8; 12];
        let mut grid = Grid::new(&mut data, 3, 4, 4).unwrap();
        assert!(grid.run(0, 3).is_none());
        assert!(grid.run(1, 4).is_none());
        assert_eq!(grid.run(0, 4).map(|all| all.len()), Some(12));
        let (mut first, mut others) = grid.split_rows(1);
        first.run(1, 2).unwrap().copy_from_slice(&[1, 2]);
        assert!(first.run(1, 4).is_none());
        assert!(first.run(usize::MAX, 2).is_none());
        others.run(0, 4).unwrap().fill(3);
        let (mut left, mut none) = others.split_cols(2);
        assert!(left.run(0, 2).is_none());
        assert!(none.borrow().split_rows(0).0.run(0, 2).is_none());
        assert!(none.run(0, 2).is_none());
        assert_eq!(data, [0, 1, 2, 0, 3, 3, 3, 3, 3, 3, 3, 3]);
    }

    #[test]
    fn grids_behind_their_data_are_refused() {
        let mut data = [0f32; 11];
        assert!(Grid::new(&mut data, 3, 4, 4).is_err());
        assert!(Grid::new(&mut data, 2, 5, 4).is_err());
        assert!(Grid::new(&mut data, usize::MAX, 1, 4).is_err());
        let (left, right) = Grid::new(&mut data, 0, 4, 4).unwrap().split_cols(9);
        assert_eq!((left.cols(), right.cols()), (4, 0));
    }
}
